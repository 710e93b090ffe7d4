"""The base model of a run: resolved, checked, its tokenizer made fit for training.

Writes `tokenizer/`, and either `base.json`, which points at a Hugging Face folder that is used as it lies, or `model/`:
a tiny Llama-shaped model made here, or a copy whose embedding had to grow for a pad token.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from data_prep import trained
from data_prep.conversation import HUMAN_ASSISTANT_TEMPLATE
from data_prep.tables import iter_rows
from data_prep.tokenizer import check_eos, load_tokenizer
from tasks import untrusted
from tasks.config import TinyModel
from tasks.shapes import positions_of
from tasks.stages import file_digests, write_json
from tasks.training.job import Job

PAD, EOS = "<|pad|>", "<|end|>"
TEXTS = 20_000
"""So many conversations are enough to train a small tokenizer."""


def run(job: Job) -> dict[str, Any]:
    """Resolve or make the base model. Returns its parameters or positions, and its vocabulary's size."""
    model = job.config["model"]
    if isinstance(model, dict):
        return make_tiny(TinyModel.model_validate(model), job.config["seed"], job.inputs["split"], job.directory)
    return use_folder(resolve(model, job.config.get("revision")), job.directory, job.trusts("model"))


def make_tiny(shape: TinyModel, seed: int, split: Path, out: Path) -> dict[str, Any]:
    """A byte-level BPE tokenizer of the run's own text, and a Llama-shaped model with random weights."""
    tokenizer = train_tokenizer(conversations(split), shape.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = True
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "tokenizer")
    return {"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with a pad and an EOS token of its own and the Human/Assistant chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=HUMAN_ASSISTANT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def conversations(split: Path) -> Iterator[str]:
    """The text of the train rows: the prompts' messages and both answers."""
    count = 0
    for table in sorted(split.glob("*-train.arrow")):
        for row in iter_rows(table):
            for message in (*row["prompt"], *row["chosen"], *row["rejected"]):
                yield f"\n\nHuman: {message['content']}" if message["role"] == "user" else f" {message['content']}"
            count += 1
            if count == TEXTS:
                return


def resolve(name: str, revision: str | None) -> Path:
    """The folder of a model: a local one as it lies, one of the hub from its cache. Raises ValueError with the mend."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is no model folder: it has no config.json; point models.policy at one that has")
        return folder.resolve()
    try:
        return Path(
            snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.gguf"])
        )
    except HFValidationError:
        raise ValueError(f"there is no folder {name}, and no model of the hub can be called so") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"the model {name} is neither a folder here nor to be had from the hub ({type(error).__name__}); "
            "give a local folder, or set HF_ENDPOINT and HF_TOKEN"
        ) from None


def use_folder(folder: Path, out: Path, trusted: bool = False) -> dict[str, Any]:
    """Check a Hugging Face folder and write its tokenizer; weights are copied only if the embedding has to grow.

    Code that the folder brings runs only if it is `trusted`.
    """
    untrusted.check(folder, trusted)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder, trusted)
    generation = folder / "generation_config.json"
    check_eos(tokenizer, config, json.loads(generation.read_text()) if generation.is_file() else None)
    tokenizer.save_pretrained(out / "tokenizer")
    if len(tokenizer) > config["vocab_size"]:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, use_safetensors=True)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
        trained.keep(out / "model", [folder], np.empty(0, np.uint64))
    else:
        # The weights' digests are a part of what this stage came to: its readers run again when a weight changes.
        digests = {name: entry["sha256"] for name, entry in file_digests(folder).items()}
        write_json(out / "base.json", {"model": str(folder), "files": digests})
    return {"vocabulary": len(tokenizer), "positions": positions_of(config)}
