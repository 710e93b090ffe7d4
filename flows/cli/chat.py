"""`rlhf chat` and `rlhf generate`: talk with a model, or have a file of prompts answered."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli import console
from flows.cli.errors import Debug
from flows.cli.models import WORKSPACE, Workspace, existing_store

if TYPE_CHECKING:
    from data_prep.conversation import Message
    from tasks.chat import Sampling, Speaker
    from tasks.tracking import Store

Model = Annotated[
    str, typer.Argument(help="models:/chat-policy@champion, a model folder, or a name of the hub.", show_default=False)
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Limit of an answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="Of sampling; 0: always the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.01, max=1, help="Sample from the likeliest tokens of this mass.")]
Seed = Annotated[int, typer.Option(min=0, help="Of sampling.")]
HELP = "/compare MODEL: both answer your last message. /reset: a new conversation. /quit, or Ctrl-D: the end."


def chat(
    model: Model,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    workspace: Workspace = WORKSPACE,
    debug: Debug = False,
) -> None:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from tasks.chat import Sampling, speaker

    store = existing_store(workspace)
    with console.console.status(f"loading {model} ..."):
        own = speaker(model, store)
    talk = Conversation(model, own, store, Sampling(max_tokens, temperature, top_p, seed), system)
    console.console.print(f"[bold]{own.name}[/]  [dim]{HELP}[/]", soft_wrap=True)
    while (text := _read()) is not None and text != "/quit":
        try:
            talk.hear(text)
        except ValueError as error:  # what is wrong with one message does not end the conversation
            console.errors.print(str(error), style="yellow", markup=False, soft_wrap=True)


def generate(
    model: Model,
    prompts: Annotated[
        Path, typer.Option("--prompts", help="A file with a column prompt (text) or messages.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="JSONL, a line per prompt.", show_default=False)],
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts that are answered at once.")] = 16,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    workspace: Workspace = WORKSPACE,
    debug: Debug = False,
) -> None:
    """Have a file of prompts answered."""
    from rich.progress import track

    from tasks import chat

    asked = chat.read_prompts(prompts)
    own = chat.speaker(model, existing_store(workspace))
    sampling = chat.Sampling(max_tokens, temperature, top_p, seed)
    answers = zip(asked, own.answers(asked, sampling, batch_size), strict=True)
    draft = out.with_name(f".{out.name}.part")
    with draft.open("w", encoding="utf-8") as file:
        for messages, answer in track(answers, own.name, len(asked), console=console.errors, transient=True):
            file.write(json.dumps({"prompt": messages, "answer": answer, "model": own.name}, ensure_ascii=False) + "\n")
    draft.replace(out)
    console.console.print(f"{len(asked):,} answers of {own.name}: {out}", soft_wrap=True)


class Conversation:
    """What was said so far, and who answers."""

    def __init__(
        self, model: str, own: "Speaker", store: "Store | None", sampling: "Sampling", system: str | None
    ) -> None:
        self.model, self.own, self.store, self.sampling = model, own, store, sampling
        self.begin: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.begin)

    def hear(self, text: str) -> None:
        """Answer a message, or do what a command says. Raises ValueError for one that cannot be answered."""
        command, _, rest = text.partition(" ")
        if command == "/reset":
            self.messages = list(self.begin)
        elif command == "/compare":
            self._compare(rest.strip())
        elif text.startswith("/"):
            raise ValueError(f"there is no command {command}. {HELP}")
        elif text.strip():
            self._answer(text)

    def _answer(self, text: str) -> None:
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        said = ""
        pieces = self.own.stream(asked, self.sampling)
        try:
            for piece in pieces:
                said += piece
                console.console.print(console.printable(piece), end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.console.print(" [dim](stopped)[/]", end="")
        finally:
            pieces.close()
            console.console.print()
        self.messages = [*asked, {"role": "assistant", "content": said.strip()}]

    def _compare(self, other: str) -> None:
        """Both models' answers to the last message, side by side, with the rewards of this model's reward model."""
        from rich.markup import escape

        from tasks.chat import judge, speaker

        last = max((place for place, turn in enumerate(self.messages) if turn["role"] == "user"), default=None)
        if not other or last is None:
            raise ValueError("say something first, then write /compare MODEL")
        asked = self.messages[: last + 1]
        with console.console.status(f"{other} answers ..."):
            speakers = [self.own, speaker(other, self.store)]
            answers = ["".join(each.stream(asked, self.sampling)).strip() for each in speakers]
            scoring = judge(self.model, self.store)
            rewards = [scoring.score(asked, answer) for answer in answers] if scoring else []
        titles = [each.name for each in speakers]
        lines = [[escape(console.printable(answer)) for answer in answers]]
        if rewards:
            lines.append([f"[dim]reward {reward:+.2f}[/]" for reward in rewards])
        console.console.print(console.table(titles, lines))


def _read() -> str | None:
    """What the user types; None at the end."""
    try:
        return input("> " if console.console.is_terminal else "")
    except (EOFError, KeyboardInterrupt):
        return None
