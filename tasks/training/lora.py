"""Low-rank adapters (Hu et al. 2021) in every linear layer, by peft: the base is frozen, W x + (alpha / rank) B A x.

The adapters are injected into the network itself, without peft's wrapper, so that all that reads a network reads one
with adapters too. B starts at zero: before the first step the network is its base, exactly. Differs from peft's own
recipes in that an export is always merged: a plain Hugging Face folder that anything can serve. Dropout is off here as
everywhere.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tasks.config import LoraConfig

ADAPTER = "default"
HEAD = "score"


def add_adapters(model: PreTrainedModel, config: LoraConfig, where: str) -> None:
    """Freeze a model and put an adapter beside each target; a scalar head is trained whole, since it is new.

    `where` is the config path, for messages. Raises ValueError for a pattern that no linear layer's name matches.
    """
    from peft import LoraConfig as PeftConfig  # its import takes a second, which runs without adapters save
    from peft import inject_adapter_in_model

    names = target_names(model, config.targets, where)
    settings = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=names, base_model_name_or_path=""
    )
    model.requires_grad_(False)
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    if hasattr(model, HEAD):
        getattr(model, HEAD).requires_grad_(True)


def target_names(model: PreTrainedModel, patterns: Sequence[str] | None, where: str) -> list[str]:
    """Full names of the linear layers that get an adapter: all but the heads, or those that the patterns match.

    A pattern is the end of a name, with wildcards: `q_proj`, `self_attn.*`, `layers.0.*.down_proj`. Raises ValueError
    that lists near names where one matches nothing.
    """
    heads = {id(model.get_output_embeddings()), id(getattr(model, HEAD, None))}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in heads
    ]
    if patterns is None:
        return linear
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in linear):
            raise ValueError(
                f"{where}.targets: {pattern} matches no linear layer of this model; {_near(pattern, linear)}"
            )
    return [name for name in linear if any(_matches(name, pattern) for pattern in patterns)]


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The network is its base inside."""
    layers = [layer for _, layer in adapted_layers(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Base:
    """The base of an adapted network, to be called: PPO's reference, which costs no memory beside the policy."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with adapters_off(self.engine.module):
            return self.engine(*args, **kwargs)


def adapted_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Name and layer of everything that has an adapter."""
    return [(name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_A")]


def merged(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the same network without adapters: B A (alpha / rank) added to each base in fp32, rounded once.

    Args:
        weights: parameter name -> whole tensor, adapters and their bases among them.
    """
    plain = dict(weights)
    for name, layer in adapted_layers(model):
        down = plain.pop(f"{name}.lora_A.{ADAPTER}.weight").float()
        up = plain.pop(f"{name}.lora_B.{ADAPTER}.weight").float()
        base = plain.pop(f"{name}.base_layer.weight")
        change = layer.scaling[ADAPTER] * (up @ down)
        if isinstance(layer.get_base_layer(), Conv1D):  # GPT-2 keeps its matrices transposed
            change = change.T
        plain[f"{name}.weight"] = (base.float() + change).to(base.dtype)
        if (bias := plain.pop(f"{name}.base_layer.bias", None)) is not None:
            plain[f"{name}.bias"] = bias
    return plain


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name, f"*.{pattern}")


def _near(pattern: str, names: Sequence[str]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(pattern.rpartition(".")[2], ends, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(ends)}"
