import json
from pathlib import Path

import pytest

from tasks import untrusted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def test_a_plain_folder_is_taken(folder: Path) -> None:
    untrusted.check(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no weights in safetensors format; save the model again in it"):
        untrusted.check(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}))
    with pytest.raises(ValueError, match=f"{name} names code of its own .auto_map., which is never run"):
        untrusted.check(folder)


def test_code_that_nobody_needs_does_no_harm(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "mine.Mine"}}))
    untrusted.check(folder)
