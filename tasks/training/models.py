"""The networks: policy and reference (a causal language model), critic and reward model (a scalar head on every token).

All are plain Hugging Face folders, loaded strictly: a weight that is missing or left over is an error, since a silent
partial load is a model that nobody trained. Dropout is off everywhere, also in SFT: with it the policy that samples
and the policy that is trained would differ, and a resumed run would depend on more random state than its own.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tasks.training.attention import inside, use_packed
from tasks.training.logprobs import TokenScores, scores_from_hidden
from tasks.training.packing import in_few_shapes, is_dense
from tasks.training.types import Packed, Sequences

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCORE_MEAN = "rlhf_score_mean"
"""Key of the model config that holds the mean score of the held-out chosen answers; our scorer subtracts it."""


class Policy(nn.Module):
    """A causal language model that returns log-probabilities, never logits, to whoever trains it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        use_packed(model)
        self.model = model
        self.compiled = False
        """Whether layers and what follows the head are compiled: packed rows then come in few shapes."""

    def forward(
        self,
        sequences: Sequences | Packed,
        which: int | Tensor,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> TokenScores:
        """Log-probabilities of tokens, and their entropy if asked for.

        Args:
            which: of padded sequences, the position (at least 1) from which on the tokens are read; of a packed row,
                the places [M] of the tokens that are read, none of them the first of its sample.

        Returns: [B, T - which] or [M].
        """
        hidden = hidden_states(self.model, sequences, self.compiled)
        ids = sequences.input_ids
        if isinstance(sequences, Packed):
            hidden, tokens = hidden[0, which - 1], ids[0, which]
        else:
            hidden, tokens = hidden[:, which - 1 : -1], ids[:, which:]
        head = self.model.get_output_embeddings()
        return scores_from_hidden(hidden, head.weight, head.bias, tokens, temperature, with_entropy, self.compiled)


class ScalarModel(nn.Module):
    """A sequence classifier with one label, read at every token: the critic's values, the reward model's score."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        use_packed(model)
        self.model = model
        self.compiled = False
        """Whether the layers are compiled: packed rows then come in few shapes."""

    @property
    def score_mean(self) -> float:
        """What is subtracted from the head's output: the mean of held-out chosen answers, so that 0 is as good as those
        (as Ouyang et al. 2022, section 3.5, do by a bias)."""
        return float(getattr(self.model.config, SCORE_MEAN, 0.0))

    def forward(self, sequences: Sequences | Packed) -> Tensor:
        """[B, T] (or [1, N]) fp32: the score at every token, by the same zero in a reward model and in its critic."""
        raw = self.model.score(hidden_states(self.model, sequences, self.compiled)).squeeze(-1).float()
        return raw - self.score_mean


def hidden_states(model: PreTrainedModel, sequences: Sequences | Packed, compiled: bool = False) -> Tensor:
    """What the head of a model reads. Returns: [B, T, D], or [1, N, D] of a packed row."""
    backbone = getattr(model, model.base_model_prefix)
    static = True
    if isinstance(sequences, Packed):
        row = in_few_shapes(sequences) if compiled else sequences
        inputs, static = inside(row), is_dense(row.cu_seqlens, row.max_seqlen, row.input_ids.shape[1])
    else:
        inputs = sequences._asdict()
    # Rows of samples of many lengths are compiled for any shape at once, not first for that of the first row.
    with torch._dynamo.config.patch(assume_static_by_default=static):
        states: Tensor = backbone(**inputs, use_cache=False).last_hidden_state
    return states[:, : sequences.input_ids.shape[1]]


def load_policy(folder: str | Path, trusted: bool = False) -> Policy:
    """The causal language model of a Hugging Face folder, in fp32. Raises ValueError if its weights do not fit.

    Code that the folder brings runs only if it is `trusted`.
    """
    model, _ = _load(AutoModelForCausalLM, folder, trusted, may_miss=())
    return Policy(model)


def load_scalar(
    folder: str | Path, pad_token_id: int, new_head_seed: int | None = None, trusted: bool = False
) -> ScalarModel:
    """The one-label sequence classifier of a Hugging Face folder, in fp32; `trusted` as for `load_policy`.

    With `new_head_seed` the folder may be a causal language model: its head is then drawn from N(0, 1/(d+1)), d the
    width of its input (Huang et al. 2024, detail 10). Raises ValueError if the weights do not fit.
    """
    new_head = new_head_seed is not None
    model, missing = _load(
        AutoModelForSequenceClassification,
        folder,
        trusted,
        may_miss=(r"score\.weight",) if new_head else (),
        may_be_left=(r"lm_head\..*", r"embed_out\..*") if new_head else (),
        num_labels=1,
    )
    model.config.pad_token_id = pad_token_id
    if new_head_seed is not None and missing:
        width = model.score.weight.shape[1]
        generator = torch.Generator().manual_seed(new_head_seed)
        with torch.no_grad():
            model.score.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
    return ScalarModel(model)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a network, the first one first; none of a module that is no transformers model."""
    names = getattr(getattr(model, "model", None), "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def keep_first(model: ScalarModel, count: int | None, where: str) -> None:
    """Leave out all decoder layers after the first `count`, so that the last norm and the head follow these; None keeps
    all. What is written is a plain folder of a model with fewer layers.

    The last layers have learnt to say the next token, which a score does not need (top layers dropped before
    fine-tuning: Sajjad et al. 2023, "On the effect of dropping layers of pre-trained transformer models"). Raises
    ValueError if the model has not so many; `where` is the config path, for messages.
    """
    if count is None:
        return
    layers = _first_layers(model, count, where, "remove it")
    stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and layers[0] in [*module])
    del stack[count:]
    config = model.model.config
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:  # of each layer, whether its attention is full or sliding
        config.layer_types = config.layer_types[:count]


def freeze_first(model: ScalarModel, count: int, where: str) -> None:
    """Leave the embeddings and the first `count` layers as they are; 0 freezes nothing.

    Few pairs are then fitted with fewer weights, and the backward pass ends above the frozen layers (trlX's
    num_layers_unfrozen, counted from the other end). Raises ValueError if the model has not so many; `where` is the
    config path, for messages.
    """
    if not count:
        return
    layers = _first_layers(model, count, where, "set it to 0")
    # OPT-350M widens its embeddings by a linear layer of its own.
    before = [module for name, module in model.named_modules() if name.endswith("project_in")]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in (*embeddings, *before, *layers):
        module.requires_grad_(False)


def _first_layers(model: ScalarModel, count: int, where: str, otherwise: str) -> list[Any]:
    """The first `count` decoder layers. ValueError if they are not so many, or, with what to do then, not known."""
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"{where} is {count}, but the code of this model does not say what its layers are; {otherwise}"
        )
    if count > len(layers):
        raise ValueError(f"{where} is {count}, but this model has {len(layers)} layers; lower it")
    return layers[:count]


def without_dropout(config: Any) -> Any:
    """The model config with every dropout probability set to 0."""
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and re.search(r"dropout|pdrop|layerdrop", key):
            setattr(config, key, 0.0)
    return config


def _load(
    auto_class: Any,
    folder: str | Path,
    trusted: bool,
    may_miss: Iterable[str],
    may_be_left: Iterable[str] = (),
    **config_changes: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the keys that its folder had no weights for: all of them match `may_miss`."""
    config = without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=trusted, **config_changes))
    try:
        model, report = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            trust_remote_code=trusted,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        raise ValueError(
            f"neither transformers nor {folder} has an {auto_class.__name__} of type {config.model_type}; add it "
            "to its code and its auto_map, or take another model (models.reward for reward model and critic)"
        ) from None
    missing = [key for key in report["missing_keys"] if not _matches(key, may_miss)]
    left_over = [key for key in report["unexpected_keys"] if not _matches(key, may_be_left)]
    if missing or left_over or report["mismatched_keys"]:
        raise ValueError(
            f"the weights in {folder} do not fit a {auto_class.__name__}: missing {missing or 'none'}, "
            f"left over {left_over or 'none'}, of another shape {list(report['mismatched_keys']) or 'none'}; "
            "point the config at a model of the right kind"
        )
    return model, list(report["missing_keys"])


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)
