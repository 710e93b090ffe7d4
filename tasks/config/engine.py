"""How one model is held and stepped: parts of `sft`, `reward`, `gold` and `ppo`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tasks.config.section import SECRET, Positive, PositiveFloat, Ratio, Section

DEEPSPEED_KEYS: Mapping[str, str] = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "gradient_clipping": "max_grad_norm of the optimizer",
    "optimizer": "the optimizer section",
    "scheduler": "schedule of the optimizer",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload_optimizer",
    "zero_optimization.offload_param": "offload_parameters",
}
"""Keys of DeepSpeed's own config that this config decides -> what decides them."""


class EngineConfig(Section):
    """How DeepSpeed holds one model."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False
    """Keep the optimizer's state and step in CPU memory (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep the parameters in CPU memory (ZeRO 3)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False
    compile_layers: bool = False
    """Compile the decoder layers on first use, half a minute; steps on a GPU are faster then. ZeRO 3 then gathers whole
    layers."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """More of DeepSpeed's own config, as it writes it, such as {fp16: {initial_scale_power: 12}}."""

    @field_validator("deepspeed")
    @classmethod
    def _no_conflict(cls, raw: dict[str, Any]) -> dict[str, Any]:
        for path, ours in DEEPSPEED_KEYS.items():
            section, _, key = path.partition(".")
            if section in raw and (not key or (isinstance(raw[section], dict) and key in raw[section])):
                raise ValueError(f"{path} is decided by {ours}; set that instead")
        for name, values in raw.items():
            for key, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, str) and SECRET.search(key):
                    raise ValueError(
                        f"{name}.{key} is a secret, which a config must not hold; set it in the environment"
                    )
        return raw

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "EngineConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; set it, or remove offload_optimizer")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, not {self.zero_stage}")
        if self.offload_parameters and not self.offload_optimizer:
            raise ValueError("offload_parameters needs offload_optimizer as well: ZeRO-3 steps where the optimizer is")
        return self


class OptimizerConfig(Section):
    learning_rate: PositiveFloat
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: Ratio = 0.03
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0: never."""


class LoraConfig(Section):
    """Low-rank adapters on a frozen model; what is written is merged, a plain model folder."""

    rank: Positive = 16
    alpha: PositiveFloat = 32.0
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Ends of the names of the linear layers that get one, with wildcards, such as q_proj; null: all but the heads."""
