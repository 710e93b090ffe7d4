r"""Conversations as text and as messages: the "\n\nHuman: ...\n\nAssistant: ..." form of the Anthropic sets.

A marker counts only where a paragraph begins (after a blank line, or at the very start), because "Assistant:" also
occurs as a word inside answers.  Messages are `{"role": "user" | "assistant" | "system", "content": str}`.
"""

import re
from collections.abc import Sequence
from typing import TypedDict


class Message(TypedDict):
    role: str
    content: str


NAMES = {"system": "System", "user": "Human", "assistant": "Assistant"}
ROLES = {"Human": "user", "Assistant": "assistant"}

MARKER = re.compile(r"(?:\A\s*|(?<=\n\n))(Human|Assistant):")
LEADING_MARKER = re.compile(r"\s*(?:Human|Assistant):\s*")

GENERATION_PROMPT = "\n\nAssistant:"

# Where a tokenizer brings no chat template.  Every assistant turn ends in EOS, the earlier ones too, so that the model
# meets the same end mark in the history that it has to produce itself.
HUMAN_ASSISTANT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '\\n\\nHuman: ' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '\\n\\nAssistant: ' + message['content'] + eos_token -}}"
    "{%- else -%}{{- '\\n\\nSystem: ' + message['content'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n\\nAssistant:' -}}{%- endif -%}"
)


def begins_with_marker(text: str) -> bool:
    """Whether the text is in the Human/Assistant form, and not plain text."""
    return MARKER.match(text) is not None


def has_turns(text: str) -> bool:
    """Whether a paragraph of the text begins with a marker: an answer with one runs on into further turns."""
    return ("Human:" in text or "Assistant:" in text) and MARKER.search(text) is not None


def parse(text: str) -> list[Message]:
    r"""Messages of a Human/Assistant text, contents stripped of white space; a closing empty "Assistant:" is left out.

    Line ends have to be "\n".  ValueError where the text does not begin with a marker.
    """
    marks = list(MARKER.finditer(text))
    if not marks or marks[0].start() != 0:
        raise ValueError(f"The text does not begin with 'Human:' or 'Assistant:' but with {text[:40]!r}.")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    messages = [
        Message(role=ROLES[mark.group(1)], content=text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
    if messages[-1] == Message(role="assistant", content=""):
        messages.pop()
    return messages


def to_text(messages: Sequence[Message], generation_prompt: bool = False) -> str:
    """The Human/Assistant form of messages; `parse` reads it back where no content holds a marker of its own."""
    turns = "".join(f"\n\n{NAMES[message['role']]}: {message['content']}" for message in messages)
    return turns + (GENERATION_PROMPT if generation_prompt else "")


def is_prompt(messages: Sequence[Message]) -> bool:
    """Whether the roles make a prompt: perhaps a system message, then user and assistant in turn, a user's last."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return len(turns) % 2 == 1 and all(
        role == ("user" if index % 2 == 0 else "assistant") for index, role in enumerate(turns)
    )


def without_leading_marker(text: str) -> str:
    """The text without one marker at its start: some answers name their speaker, now and then the wrong one."""
    mark = LEADING_MARKER.match(text)
    return text[mark.end() :] if mark else text


def without_stray_marker(text: str) -> str:
    r"""The text without marker words that stand alone as its last paragraphs.

    Samplers that ran past their turn were cut there: "... enough.\n\nHuman".
    """
    shorter = text.rstrip()
    while shorter.endswith(("\n\nHuman", "\n\nAssistant")):
        shorter = shorter[: shorter.rindex("\n\n")].rstrip()
    return shorter if len(shorter) < len(text.rstrip()) else text
