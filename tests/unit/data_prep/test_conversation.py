import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.conversation import (
    HUMAN_ASSISTANT_TEMPLATE,
    begins_with_marker,
    has_turns,
    is_prompt,
    parse,
    to_text,
    without_leading_marker,
    without_stray_marker,
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", [user("Hi")]),
        (" Human: Hi Assistant:", [user("Hi Assistant:")]),
        (
            "\n\nHuman: Hi\n\nAssistant: Hello.\n\nYes?\n\nHuman: Who?\n\nAssistant:",
            [user("Hi"), assistant("Hello.\n\nYes?"), user("Who?")],
        ),
        # The word inside a line, or at the start of a line that begins no paragraph, is text.
        (
            "\n\nHuman: Play a role: Assistant: waits\nHuman: asks\n\nAssistant:",
            [user("Play a role: Assistant: waits\nHuman: asks")],
        ),
        ("\n\nHuman: a\n\n\nAssistant: b", [user("a"), assistant("b")]),
        ("\n\nHuman: a\n\nHumans: b\n\nAssistant:", [user("a\n\nHumans: b")]),
        # The set's own cut at the last "Assistant:" left a begun answer in the prompt.
        ("\n\nHuman: a\n\nAssistant: Assistant:", [user("a"), assistant("Assistant:")]),
        ("\n\nHuman:\n\nAssistant:", [user("")]),
    ],
)
def test_parse(text: str, messages: list[dict[str, str]]) -> None:
    assert parse(text) == messages


@pytest.mark.parametrize("text", ["", "Hi", "Hi\n\nHuman: there\n\nAssistant:", "Humans: hi"])
def test_text_that_begins_with_no_marker_is_refused(text: str) -> None:
    assert not begins_with_marker(text)
    with pytest.raises(ValueError, match="does not begin with"):
        parse(text)


CONTENT = st.text().map(str.strip).filter(lambda text: text and not has_turns(text))
TURNS = st.lists(st.tuples(CONTENT, CONTENT), max_size=3)


@given(TURNS, CONTENT)
def test_parse_reads_back_what_to_text_writes(turns: list[tuple[str, str]], last: str) -> None:
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    assert parse(to_text([*messages, user(last)], generation_prompt=True)) == [*messages, user(last)]
    assert parse(to_text([*messages, user(last), assistant("x")])) == [*messages, user(last), assistant("x")]


def test_the_template_writes_the_text_and_ends_every_answer_in_eos() -> None:
    template = ImmutableSandboxedEnvironment().from_string(HUMAN_ASSISTANT_TEMPLATE)
    messages = [user(" a "), assistant("b\n\nc"), user("d")]
    text = template.render(messages=messages, eos_token="</s>", add_generation_prompt=True)
    assert text == "\n\nHuman:  a \n\nAssistant: b\n\nc</s>\n\nHuman: d\n\nAssistant:"
    system = template.render(messages=[{"role": "system", "content": "Be brief."}], eos_token="</s>")
    assert system == "\n\nSystem: Be brief."


@pytest.mark.parametrize(
    ("roles", "good"),
    [
        ("u", True),
        ("su", True),
        ("uau", True),
        ("suau", True),
        ("", False),
        ("s", False),
        ("a", False),
        ("ua", False),
        ("uu", False),
        ("uaau", False),
        ("usu", False),
        ("au", False),
    ],
)
def test_prompts_take_turns_and_end_with_the_user(roles: str, good: bool) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    assert is_prompt([{"role": names[role], "content": "x"} for role in roles]) is good


def test_stray_markers() -> None:
    assert without_stray_marker("Fine.\n\nHuman") == "Fine."
    assert without_stray_marker("Fine.\n\nHuman\n\nAssistant \n") == "Fine."
    assert without_stray_marker("I am\nHuman") == "I am\nHuman"
    assert without_stray_marker("One\n\nHumans ") == "One\n\nHumans "
    assert without_leading_marker("Human: Yes.") == "Yes."
    assert without_leading_marker("An Assistant: yes.") == "An Assistant: yes."
