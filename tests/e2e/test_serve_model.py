"""`rlhf serve-model` with the OpenAI client: answers stream, and another champion answers as soon as it is one."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from transformers import LlamaForCausalLM

from tasks import tracking
from tasks.base import train_tokenizer
from tests.tiny import tiny_llama_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def always(folder: Path, word: str) -> Path:
    """A registered model's folder whose every token is the first of `word`, whatever it is asked."""
    tokenizer = train_tokenizer(iter(["red red red", "blue blue blue"]), 300)
    model = LlamaForCausalLM(tiny_llama_for(tokenizer, tie_word_embeddings=False))
    token = tokenizer(word)["input_ids"][0]
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.fill_(-1.0)
        model.lm_head.weight[token] = 1.0
        for name, weight in model.model.layers.named_parameters():
            if not name.endswith("layernorm.weight"):
                weight.zero_()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def test_it_streams_follows_the_alias_and_leaves_nothing(command: Callable[..., Any], tmp_path: Path) -> None:
    store = tracking.open_store(tmp_path / "workspace")
    for number, word in enumerate(("red", "blue"), 1):
        tracking.register_version(store, "chat-policy", always(tmp_path / word, word), None, {"digest": str(number)})
    tracking.set_alias(store, "chat-policy", tracking.CHAMPION, 1)
    log = (tmp_path / "out").open("w+")
    serving = command("serve-model", "models:/chat-policy@champion", "-w", str(tmp_path / "workspace"), output=log)
    shown = tmp_path / "out"
    address = serving.wait_for(lambda: re.search(r"http://\S+/v1", shown.read_text().replace("\n", "")), 200)[0]
    client = OpenAI(base_url=address, api_key="none", timeout=60)

    def answer() -> list[str]:
        chunks = client.chat.completions.create(
            model="chat-policy", messages=[{"role": "user", "content": "which?"}], max_tokens=6, stream=True
        )
        return [chunk.choices[0].delta.content or "" for chunk in chunks]

    first = answer()
    assert len(first) > 2
    assert set("".join(first)) == {"r"} or "".join(first).startswith("red")
    tracking.set_alias(store, "chat-policy", tracking.CHAMPION, 2)
    serving.wait_for(lambda: "version 2 answers now" in " ".join(shown.read_text().split()), 60)
    second = "".join(answer())
    assert second.startswith("b")
    broken = always(tmp_path / "broken", "red")
    (broken / "model" / "model.safetensors").write_bytes(b"cut off")
    tracking.register_version(store, "chat-policy", broken, None, {"digest": "3"})
    tracking.set_alias(store, "chat-policy", tracking.CHAMPION, 3)
    serving.wait_for(
        lambda: "version 2 serves on: the model server could not" in " ".join(shown.read_text().split()), 60
    )
    assert "".join(answer()) == second
    serving.process.send_signal(signal.SIGINT)
    ended = serving.end()
    assert ended.code == 0
    assert ended.left == []
