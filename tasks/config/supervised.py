"""The sections `sft`, `reward` and `gold`."""

from pydantic import Field, model_validator

from tasks.config.engine import EngineConfig, LoraConfig, OptimizerConfig
from tasks.config.section import Positive, PositiveFloat, Section


class TrainConfig(Section):
    """What SFT and the reward model have in common."""

    epochs: Positive = 1
    seed: int | None = Field(None, ge=0)
    """Of this stage's order and new weights; null: the run's seed, which also deals the data out."""
    max_steps: Positive | None = None
    """Stop after so many optimizer steps, whatever `epochs` says."""
    batch_size: Positive = 64
    """Samples (or pairs) in one optimizer step, over all processes."""
    micro_batch_tokens: Positive = 8192
    """Tokens in one forward pass of one process: samples (or pairs) are packed into rows of so many; a longer one has a
    row to itself."""
    checkpoint_every: Positive = 100
    """Optimizer steps between checkpoints."""
    checkpoint_minutes: PositiveFloat | None = 30.0
    """At most so many minutes lie between two checkpoints, whatever the steps; null: only the steps count."""
    keep_checkpoints: Positive = 2
    """The last so many are kept while the stage runs, beside the best one that each of them knows (`keep_best`): where
    the newest is damaged, the one before it serves."""
    profile: bool = False
    """Leave a trace of two steps by torch.profiler with the stage's records and in MLflow."""
    deterministic: bool = False
    """On a GPU too, a resumed stage is bit for bit the one that nobody stopped; kernels that add in one order are
    slower."""
    eval_rows: Positive = 512
    """At most so many held-out samples are evaluated."""
    eval_every: Positive | None = None
    """Optimizer steps between evaluations; null: only at the end."""
    keep_best: bool = False
    """The stage's model is that of the evaluation with the least loss, not the last one."""
    patience: Positive | None = None
    """Training ends after so many evaluations without a lower loss; null: never early."""
    engine: EngineConfig = EngineConfig()
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the whole model; null: the whole model."""

    @model_validator(mode="after")
    def _evaluations_to_choose_from(self) -> "TrainConfig":
        if self.eval_every is None and (self.keep_best or self.patience is not None):
            raise ValueError(f"{'keep_best' if self.keep_best else 'patience'} needs eval_every; set it as well")
        return self


class SFTConfig(TrainConfig):
    prompt_loss: bool = False
    """Prompts are learnt as well as answers."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5)


class RewardConfig(TrainConfig):
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    head_learning_rate: PositiveFloat | None = None
    """Of the score's head, which is drawn and not trained before; null: that of the optimizer."""
    centering_coef: float = Field(0.0, ge=0)
    """Draws the mean score of each prompt's two answers to zero; 0.01 is usual, 0 is off."""
    margin: float = Field(0.0, ge=0)
    """The chosen answer's score shall be above the other's by so much (log-odds); 0: Bradley-Terry as it is."""
    layers: Positive | None = None
    """The score is read after so many of the base model's layers, and the others are left out, of the critic as well;
    null: after all."""
    frozen_layers: int = Field(0, ge=0)
    """The embeddings and so many of the first layers stay as they are: less to compute, and less to overfit few pairs
    with; 0: all are trained."""

    @model_validator(mode="after")
    def _adapters_freeze_all(self) -> "RewardConfig":
        if self.lora is not None and self.frozen_layers:
            raise ValueError(
                "with lora every layer is frozen already; drop lora or set frozen_layers: 0 (gold takes from reward "
                "what it does not set itself)"
            )
        return self

    @model_validator(mode="after")
    def _frozen_layers_are_there(self) -> "RewardConfig":
        if self.layers is not None and self.frozen_layers > self.layers:
            raise ValueError(f"frozen_layers is {self.frozen_layers}, but layers leaves {self.layers}; lower it")
        return self
