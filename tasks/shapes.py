"""Sizes of models, read from their `config.json`, and of GPUs; what work a model has with a sequence."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.config import ConfigError, TinyModel

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One of the GPUs that a stage runs on."""

    memory: float
    """Bytes that a process can have."""
    flops: float
    """Dense, in 16 bit, a second."""
    bandwidth: float
    """Bytes a second."""


GPUS: Mapping[str, Gpu] = {
    name: Gpu(size * 0.99 * GIB, flops * 1e12, bandwidth * 1e12)  # a part of the memory is the driver's
    for name, size, flops, bandwidth in (
        ("t4", 15, 65, 0.32),
        ("v100", 32, 112, 0.9),
        ("a10", 22, 125, 0.6),
        ("l4", 22, 121, 0.3),
        ("a6000", 48, 155, 0.77),
        ("a100-40", 40, 312, 1.55),
        ("a100", 80, 312, 2.0),
        ("h100", 80, 989, 3.35),
        ("h200", 141, 989, 4.8),
    )
}


@dataclass(frozen=True)
class Shape:
    """A transformer's sizes, as far as memory and time depend on them."""

    family: str
    """`gated`: RMSNorm and a gated MLP (Llama, Mistral, Qwen, SmolLM); `opt`; `gpt_neox`."""
    hidden: int
    inner: int
    layers: int
    query: int
    """Width of all query heads."""
    key: int
    """Width of all key (or value) heads."""
    vocab: int
    tied: bool
    positions: int = 0
    """Learnt position embeddings."""
    projected: int = 0
    """Width of the token embedding where it differs (OPT-350M)."""
    biased: bool = False
    """Whether query, key and value have a bias (Qwen2)."""
    normed_heads: int = 0
    """Width of a norm over each head's query and key (Qwen3)."""
    final_norm: bool = True

    @property
    def linear(self) -> int:
        """Parameters of the linear layers of all decoder layers."""
        attention = self.hidden * (2 * self.query + 2 * self.key)
        return self.layers * (attention + (3 if self.family == "gated" else 2) * self.hidden * self.inner)

    @property
    def embedded(self) -> int:
        """Parameters of the embeddings, of tokens and of positions."""
        return self.vocab * (self.projected or self.hidden) + self.positions * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters of the causal language model."""
        head = 0 if self.tied else self.vocab * (self.projected or self.hidden)
        return self.without_embeddings + self.embedded + head

    @property
    def without_embeddings(self) -> int:
        """Parameters of the layers, the last norm, and what widens and narrows embeddings of another width."""
        d, total = self.hidden, self.linear
        if self.family == "gated":
            per_layer = 2 * d + 2 * self.normed_heads + (self.query + 2 * self.key if self.biased else 0)
            return total + self.layers * per_layer + d
        biases = self.query + 2 * self.key + d + self.inner + d
        total += self.layers * (4 * d + biases) + (2 * d if self.final_norm else 0)
        return total + (2 * d * self.projected if self.projected else 0)

    @property
    def adapted(self) -> int:
        """Sum over the linear layers of their inputs' and outputs' widths: parameters of adapters of rank 1."""
        d, q, k, i = self.hidden, self.query, self.key, self.inner
        return self.layers * (4 * d + 2 * q + 2 * k + (3 if self.family == "gated" else 2) * (d + i))

    def saved(self, compiled: bool) -> float:
        """Elements that one layer keeps of each token for its backward pass."""
        attention = 4 * self.query  # queries, keys and values, repeated for every head, and what comes out
        if self.family == "gated":
            # Gate, its activation, up and their product; compiled, the activation is made again. Each eager RMSNorm
            # keeps its input in fp32 and its output.
            return attention + (3 * self.inner + 2.7 * self.hidden if compiled else 4 * self.inner + 6 * self.hidden)
        mlp = self.inner if self.family == "opt" else 2 * self.inner  # ReLU keeps its output alone, GELU both
        return attention + mlp + 4 * self.hidden


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape in a model's `config.json`. Raises ConfigError for a family that is not known."""
    kind = str(config.get("model_type"))
    known = {"opt": "opt", "gpt_neox": "gpt_neox"} | dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3"), "gated"
    )
    if kind not in known:
        raise ConfigError(f"memory of a {kind} cannot be told; known: {', '.join(sorted(known))}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    if kind == "opt":
        projected = config.get("word_embed_proj_dim", hidden)
        return Shape(
            "opt", hidden, config["ffn_dim"], config["num_hidden_layers"], hidden, hidden, config["vocab_size"],
            config.get("tie_word_embeddings", True), config["max_position_embeddings"] + 2,
            projected if projected != hidden else 0, final_norm=config.get("do_layer_norm_before", True),
        )  # fmt: skip
    return Shape(
        known[kind], hidden, config["intermediate_size"], config["num_hidden_layers"], heads * head,
        (config.get("num_key_value_heads") or heads) * head, config["vocab_size"],
        config.get("tie_word_embeddings", False), biased=kind == "qwen2", normed_heads=head if kind == "qwen3" else 0,
    )  # fmt: skip


def shape_of_model(model: str | TinyModel) -> Shape | None:
    """The shape of a configured model; None where its config.json is not on this machine."""
    if isinstance(model, TinyModel):
        width = model.hidden_size
        return Shape("gated", width, 4 * width, model.layers, width, width, model.vocab_size, tied=True)
    config = config_of_model(model)
    return None if config is None else shape_of(config)


def config_of_model(model: str) -> dict[str, Any] | None:
    """The config.json of a model folder or of a name on the hub; None where it is not on this machine."""
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model, "config.json")
        except HFValidationError:  # no name of the hub
            return None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    return dict(json.loads(path.read_text()))


def shape_of_folder(folder: Path) -> Shape:
    """The shape of a model folder. Raises ConfigError as `shape_of`."""
    return shape_of(json.loads((folder / "config.json").read_text()))


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The tokens of the longest sequence that a model can read, by its `config.json`; None where that does not tell.

    Learnt positions end there; rotary ones go on, to where the model was never trained, unless they are stretched,
    by which it is not told how far they reach.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        return None
    return config.get("max_position_embeddings", config.get("n_positions"))


def work_of(shape: Shape, lengths: Sequence[int], scores_tokens: bool, frozen_layers: int = 0) -> float:
    """FLOPs that a network needs, forward and backward, to train on sequences: its products and causal attention.

    Of the first `frozen_layers` only the forward pass is needed, a third.
    """
    head = shape.vocab * (shape.projected or shape.hidden) if scores_tokens else 0
    # Of each layer and token: scores and values over half of the sequence, 2 FLOPs each, three times.
    attention = 6 * shape.layers * shape.query * sum(length * length for length in lengths)
    passes = 1 - 2 / 3 * frozen_layers / shape.layers
    return 6 * (passes * shape.linear + head) * sum(lengths) + passes * attention


def peak_flops(device: str) -> float | None:
    """Dense 16-bit FLOP/s of a GPU by the name that CUDA gives it; None for one that is not in the table."""
    words = re.split(r"[\s-]", device.lower())
    return next((gpu.flops for name, gpu in GPUS.items() if name.partition("-")[0] in words), None)
