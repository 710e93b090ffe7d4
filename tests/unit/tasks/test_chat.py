"""Asking real, tiny models: piece by piece, in batches, through the command line."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

from data_prep.conversation import Message
from flows.cli.chat import Conversation
from flows.cli.console import printable
from flows.cli.main import app
from tasks import chat, tracking
from tasks.base import train_tokenizer
from tasks.chat import Judge, Sampling, Speaker
from tasks.training.models import SCORE_MEAN
from tests.tiny import tiny_llama_for

TEXTS = ["Human: tell me of the red apple", "the apple is red and the pear is green", "a pear, an apple, a plum"]
GREEDY = Sampling(max_tokens=12, temperature=0.0, top_p=1.0, seed=0)


def asked(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with chat-policy 1 (champion) and 2, and the reward model of the first."""
    folder = tmp_path_factory.mktemp("workspace")
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    config = tiny_llama_for(tokenizer, num_labels=1, initializer_range=0.3, max_position_embeddings=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store = tracking.open_store(folder)
    for seed, (name, model_class) in enumerate(
        [
            ("chat-policy", LlamaForCausalLM),
            ("chat-policy", LlamaForCausalLM),
            ("chat-reward", LlamaForSequenceClassification),
        ]
    ):
        torch.manual_seed(seed)
        model = model_class(config)
        setattr(model.config, SCORE_MEAN, 0.25)
        model.save_pretrained(folder / f"made-{seed}" / "model")
        tokenizer.save_pretrained(folder / f"made-{seed}" / "model")
        tags = {"digest": f"digest {seed}", "input.reward.digest": "digest 2"}
        tracking.register_version(store, name, folder / f"made-{seed}", None, tags)
    tracking.set_alias(store, "chat-policy", "champion", 1)
    return folder


@pytest.fixture(scope="module")
def speaker(workspace: Path) -> Speaker:
    return chat.speaker("models:/chat-policy@champion", tracking.open_store(workspace))


def test_pieces_join_to_the_answer_of_a_batch(speaker: Speaker) -> None:
    streamed = "".join(speaker.stream(asked("tell me of the pear"), GREEDY)).strip()
    alone, beside = speaker.answers([asked("tell me of the pear"), asked("a plum, or is the apple red")], GREEDY)
    assert speaker.name == "chat-policy 1"
    assert streamed
    assert streamed == alone
    assert beside != alone


def test_same_seed_draws_the_same_answer(speaker: Speaker) -> None:
    def drawn(seed: int) -> str:
        return next(speaker.answers([asked("a plum")], Sampling(12, 1.0, 1.0, seed)))

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(6)}) > 1


def test_an_answer_can_be_stopped(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_to_stop: list[threading.Event] = []

    class Asked(chat._Asked):
        def __init__(self, stop: threading.Event) -> None:
            asked_to_stop.append(stop)
            super().__init__(stop)

    def steps(*, until_asked_at: int | None) -> int:
        """So many steps an answer takes: all, or those until it is asked to stop, for which the one given waits."""
        taken: list[int] = []

        def hold(*_: Any) -> None:
            taken.append(1)
            if len(taken) == until_asked_at:
                asked_to_stop[-1].wait(60)

        held = speaker.model.register_forward_hook(hold)
        pieces = speaker.stream(asked("is the pear green"), Sampling(40, 0.0, 1.0, 0))
        next(pieces)
        if until_asked_at is None:
            list(pieces)
        pieces.close()
        held.remove()
        return len(taken)

    monkeypatch.setattr(chat, "_Asked", Asked)
    assert steps(until_asked_at=None) == 40
    assert 0 < steps(until_asked_at=20) <= 20


def test_the_conversation_is_kept_until_it_is_reset(speaker: Speaker) -> None:
    talk = Conversation("models:/chat-policy@champion", speaker, None, GREEDY, "be brief")
    talk.hear("what is red?")
    talk.hear("and green?")
    assert [turn["role"] for turn in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.messages[4]["content"] == next(speaker.answers([talk.messages[:4]], GREEDY))
    talk.hear("/reset")
    assert talk.messages == [{"role": "system", "content": "be brief"}]


def test_a_conversation_without_room_is_refused(speaker: Speaker) -> None:
    with pytest.raises(ValueError, match=r"has \d+ tokens and chat-policy 1 has room for 256, the answer's 250"):
        next(speaker.answers([asked("is the pear green")], Sampling(250, 0.0, 1.0, 0)))


def test_reward_is_the_score_less_the_mean(workspace: Path) -> None:
    folder = workspace / "made-2" / "model"
    scored = Judge(folder, torch.device("cpu"))
    reward = scored.score(asked("what is red?"), "the apple")
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    text = "\n\nHuman: what is red?\n\nAssistant: the apple<|end|>"
    prompt, _, answer = text.partition("Assistant:")
    ids = [scored.tokenizer(part, add_special_tokens=False).input_ids for part in (f"{prompt}Assistant:", answer)]
    with torch.no_grad():
        expected = float(model(torch.tensor([ids[0] + ids[1]])).logits) - 0.25
    assert reward == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "what is red?"}, asked("what is red?")),
        (
            {"prompt": "Human: hi\n\nAssistant: ho\n\nHuman: well?"},
            [*asked("hi"), Message(role="assistant", content="ho"), *asked("well?")],
        ),
        ({"messages": asked("so?"), "id": 3}, asked("so?")),
    ],
)
def test_prompts_are_text_or_messages(tmp_path: Path, row: dict[str, Any], messages: list[Message]) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    assert chat.read_prompts(tmp_path / "prompts.jsonl") == [messages]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"question": "a"}', "has no column prompt or messages; it has question"),
        ('{"prompt": "a"}\n{"prompt": null}', "row 2: neither text nor messages but None"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "row 1: the turns have to alternate"),
    ],
)
def test_what_are_no_prompts_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"prompts.jsonl") as raised:
        chat.read_prompts(tmp_path / "prompts.jsonl")
    assert sentence in str(raised.value)


def test_generate_answers_every_prompt_in_order_and_in_slots(
    workspace: Path, tmp_path: Path, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["what is red?", "a plum or an apple", "is the pear green"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    command = ["generate", "models:/chat-policy@champion", "--prompts", str(tmp_path / "prompts.jsonl")]
    options = ["--out", str(tmp_path / "out.jsonl"), "--batch-size", "2", "--max-tokens", "12", "--temperature", "0"]
    with monkeypatch.context() as patch:
        patch.delattr("tasks.training.sampling.generate")  # the plain loop, which gives the answers to compare with
        result = CliRunner().invoke(app, [*command, *options, "--workspace", str(workspace)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [asked(text) for text in texts]
    assert [row["answer"] for row in rows] == list(speaker.answers([asked(text) for text in texts], GREEDY))
    assert {row["model"] for row in rows} == {"chat-policy 1"}


def test_chat_keeps_the_conversation_and_compares(workspace: Path) -> None:
    said = "what is red?\nand green?\n/compare models:/chat-policy/2\n/compare\n/nonsense\n/quit\nnever read\n"
    options = ["--max-tokens", "8", "--temperature", "0", "--workspace", str(workspace)]
    result = CliRunner().invoke(app, ["chat", "models:/chat-policy@champion", *options], input=said)
    assert result.exit_code == 0, result.output
    assert "chat-policy 1" in result.output
    assert "chat-policy 2" in result.output
    assert result.output.count("reward ") == 2
    assert "say something first, then write /compare MODEL" in result.output
    assert "there is no command /nonsense" in " ".join(result.output.split())


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\tc\nd\x07\u009b1m") == "a[2Jb\tc\nd1m"


def test_chat_with_nobody(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["chat", "models:/chat-policy@champion", "--workspace", str(tmp_path)])
    assert result.exit_code == 2
    assert "there is no MLflow store here" in result.output
