"""A policy's layers as sampling runs them: one forward pass for all families, over the module's own weights.

transformers' forward builds masks and caches in Python, launches three products where one would do and cannot be told
how long each row is. Here tokens are flat, [N, width], and attention is a callback, so that one function serves the
prompts (causal attention over themselves) and the steps after them (one token a row, over a cache).

Nothing is copied. Weights that are read together, as those of query, key and value are, are one matrix if they lie next
to each other in memory. DeepSpeed's flat buffers lay them so; where each has memory of its own, they are moved into one
buffer that all of them then are views of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.training import decode
from tasks.training.attention import brings_code

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer number, query [N, Hq, D], key and value [N, Hkv, D] -> [N, Hq, D]. It turns query and key, where they turn."""


class UnsupportedError(ValueError):
    """A policy that only the plain loop can sample from; the message says why."""


class Joint:
    """Linear modules with one input, read as one product where their weights allow it."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self.linears = list(linears)
        self.order = list(range(len(self.linears)))
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if all(type(linear) is nn.Linear for linear in linears):
            self._join([linear for linear in linears if isinstance(linear, nn.Linear)])

    def _join(self, linears: list[nn.Linear]) -> None:
        weight = adjoined([linear.weight for linear in linears])
        if weight is None or len({linear.bias is None for linear in linears}) > 1:
            return
        order = sorted(self.order, key=lambda index: linears[index].weight.data_ptr())
        if linears[0].bias is not None:
            biases = [linear.bias for linear in linears]
            self.bias = adjoined(biases)
            if self.bias is None or order != sorted(self.order, key=lambda index: biases[index].data_ptr()):
                return
        self.weight, self.order = weight, order

    def __call__(self, hidden: Tensor) -> list[Tensor]:
        """The outputs of the modules, in their order; views of one product, not contiguous."""
        if self.weight is None:
            return [linear(hidden) for linear in self.linears]
        sizes = [int(self.linears[index].out_features) for index in self.order]  # type: ignore[arg-type]
        parts = F.linear(hidden, self.weight, self.bias).split(sizes, -1)
        return [parts[self.order.index(index)] for index in range(len(sizes))]


def adjoined(parameters: Sequence[Tensor]) -> Tensor | None:
    """Parameters of one width as one tensor that shares their memory, in order of address; None if there is none.

    Those that have memory of their own, each, are moved into one buffer first.
    """
    if len({(parameter.dtype, parameter.shape[1:]) for parameter in parameters}) > 1:
        return None
    ordered = sorted(parameters, key=lambda parameter: parameter.data_ptr())
    if not _adjacent(ordered):
        owns = [parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in parameters]
        if not all(owns) or len({parameter.data_ptr() for parameter in parameters}) < len(parameters):
            return None
        buffer = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
        ordered = list(parameters)
    first = ordered[0].detach()
    rows = sum(len(parameter) for parameter in ordered)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _adjacent(ordered: Sequence[Tensor]) -> bool:
    one_storage = len({parameter.untyped_storage().data_ptr() for parameter in ordered}) == 1
    return (
        one_storage
        and all(parameter.is_contiguous() for parameter in ordered)
        and all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(ordered))
    )


@dataclass(frozen=True)
class Layer:
    """The parts of one decoder layer."""

    qkv: Callable[[Tensor], list[Tensor]]
    """[N, width] -> query [N, Hq x D], key and value [N, Hkv x D]"""
    out: nn.Module
    mlp: Callable[[Tensor], Tensor]
    attention_norm: nn.Module
    mlp_norm: nn.Module
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None


@dataclass(frozen=True)
class Decoder:
    """A causal language model in parts."""

    layers: list[Layer]
    residual: Literal["pre", "post", "parallel"]
    """Norms before each half of a layer, after it (OPT-350M), or before halves that run side by side (GPT-NeoX)."""
    embed: Callable[[Tensor, Tensor], Tensor]
    """Token ids [N], positions [N] -> [N, width]"""
    final: Callable[[Tensor], Tensor]
    """Last norm and projection, if there are any."""
    head: nn.Module
    query_heads: int
    key_heads: int
    head_size: int
    scale: float
    """Of the attention's scores."""
    rotary: nn.Module | None
    """transformers' module for the angles of rotary embeddings."""

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """What the head reads. Args: [N] int64 each. Returns: [N, width]."""
        stream = self.embed(token_ids, positions)
        pending: Tensor | None = None
        for number, layer in enumerate(self.layers):
            if self.residual == "post":
                stream = layer.attention_norm(stream + self._attention(number, layer, stream, attend))
                stream = layer.mlp_norm(stream + layer.mlp(stream))
                continue
            stream, normed = decode.add_norm(stream, pending, layer.attention_norm)
            attention = self._attention(number, layer, normed, attend)
            if self.residual == "parallel":
                stream, pending = stream + attention, layer.mlp(layer.mlp_norm(stream))
            else:
                stream, normed = decode.add_norm(stream, attention, layer.mlp_norm)
                pending = layer.mlp(normed)
        return self.final(stream if pending is None else stream + pending)

    def _attention(self, number: int, layer: Layer, normed: Tensor, attend: Attend) -> Tensor:
        query, key, value = (part.unflatten(-1, (-1, self.head_size)) for part in layer.qkv(normed))
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = layer.query_norm(query), layer.key_norm(key)
        return layer.out(attend(number, query, key, value).flatten(1))

    def angles(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of every position's rotation, [length, D'] each, D' <= D; None without rotation."""
        if self.rotary is None:
            return None
        positions = torch.arange(length, device=device).unsqueeze(0)
        cosine, sine = self.rotary(torch.empty(1, device=device, dtype=dtype), positions)
        return cosine[0], sine[0]


def decoder_of(model: Any, length: int) -> Decoder:
    """The parts of a transformers causal language model that shall read `length` tokens.

    Raises UnsupportedError for families and options that only transformers' own forward knows.
    """
    config = model.config
    if brings_code(model):
        raise UnsupportedError("the model brings code, which alone knows its forward")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()) and model._forward_pre_hooks:
        raise UnsupportedError("ZeRO-3 holds the policy in parts (ppo.rollout.gather: true makes it whole)")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length and getattr(config, "use_sliding_window", True):
        raise UnsupportedError(f"the policy attends to the last {window} tokens only, fewer than {length}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedError(f"rotary embeddings of type {rope} depend on the length of the text")
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedError(f"no family {config.model_type}; known: {', '.join(FAMILIES)}")
    return family(model)


def _opt(model: Any) -> Decoder:
    decoder, config = model.model.decoder, model.config

    def embed(token_ids: Tensor, positions: Tensor) -> Tensor:
        tokens = decoder.embed_tokens(token_ids)
        if decoder.project_in is not None:
            tokens = decoder.project_in(tokens)
        return tokens + F.embedding(positions + decoder.embed_positions.offset, decoder.embed_positions.weight)

    def final(hidden: Tensor) -> Tensor:
        if decoder.final_layer_norm is not None:
            hidden = decoder.final_layer_norm(hidden)
        return hidden if decoder.project_out is None else decoder.project_out(hidden)

    def parts(layer: Any) -> Layer:
        attention = layer.self_attn
        return Layer(
            qkv=Joint([attention.q_proj, attention.k_proj, attention.v_proj]),
            out=attention.out_proj,
            mlp=lambda hidden: layer.fc2(layer.activation_fn(layer.fc1(hidden))),
            attention_norm=layer.self_attn_layer_norm,
            mlp_norm=layer.final_layer_norm,
        )

    return _decoder(
        model,
        layers=[parts(layer) for layer in decoder.layers],
        residual="pre" if config.do_layer_norm_before else "post",
        embed=embed,
        final=final,
        rotary=None,
    )


def _llama(model: Any) -> Decoder:
    backbone = model.model

    def parts(layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        gate_up = Joint([mlp.gate_proj, mlp.up_proj])

        def feed(hidden: Tensor) -> Tensor:
            gate, up = gate_up(hidden)
            return mlp.down_proj(decode.gated(mlp.act_fn, gate, up))

        return Layer(
            qkv=Joint([attention.q_proj, attention.k_proj, attention.v_proj]),
            out=attention.o_proj,
            mlp=feed,
            attention_norm=layer.input_layernorm,
            mlp_norm=layer.post_attention_layernorm,
            query_norm=getattr(attention, "q_norm", None),
            key_norm=getattr(attention, "k_norm", None),
        )

    return _decoder(
        model,
        layers=[parts(layer) for layer in backbone.layers],
        residual="pre",
        embed=lambda token_ids, positions: backbone.embed_tokens(token_ids),
        final=backbone.norm,
        rotary=backbone.rotary_emb,
    )


def _gpt_neox(model: Any) -> Decoder:
    backbone, config = model.gpt_neox, model.config
    heads = config.num_attention_heads

    def parts(layer: Any) -> Layer:
        attention = layer.attention

        def qkv(hidden: Tensor) -> list[Tensor]:
            # Each head's query, key and value stand side by side.
            by_head = attention.query_key_value(hidden).unflatten(-1, (heads, 3, -1))
            return [by_head[:, :, part].flatten(1) for part in range(3)]

        return Layer(
            qkv=qkv,
            out=attention.dense,
            mlp=layer.mlp,
            attention_norm=layer.input_layernorm,
            mlp_norm=layer.post_attention_layernorm,
        )

    return _decoder(
        model,
        layers=[parts(layer) for layer in backbone.layers],
        residual="parallel" if config.use_parallel_residual else "pre",
        embed=lambda token_ids, positions: backbone.embed_in(token_ids),
        final=backbone.final_layer_norm,
        rotary=backbone.rotary_emb,
    )


def _decoder(model: Any, **parts: Any) -> Decoder:
    config = model.config
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Decoder(
        head=model.get_output_embeddings(),
        query_heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=head_size,
        scale=head_size**-0.5,
        **parts,
    )


FAMILIES: dict[str, Callable[[Any], Decoder]] = {
    "opt": _opt,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt_neox": _gpt_neox,
}
"""transformers' name of a family -> its parts."""
