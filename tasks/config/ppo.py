"""The section `ppo`, and how answers are sampled."""

from typing import Literal

from pydantic import Field, model_validator

from tasks.config.engine import EngineConfig, LoraConfig, OptimizerConfig
from tasks.config.section import Positive, PositiveFloat, Ratio, Section


class SamplingConfig(Section):
    temperature: PositiveFloat = 1.0
    """Divides the logits when sampling and in every log-probability of PPO."""
    top_k: int = Field(0, ge=0)
    """Sample from so many likeliest tokens; 0: from all. Log-probabilities stay those of the whole distribution."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this probability together; 1: from all."""


class RolloutConfig(Section):
    """How PPO's answers are sampled: in slots, which are refilled as answers end, or by a plain loop over batches."""

    engine: Literal["auto", "slots", "plain"] = "auto"
    """auto: slots where the policy allows it (not with top_k or top_p, nor under ZeRO-3 without `gather`)."""
    gather: bool = False
    """Where ZeRO-3 holds the policy in parts: gather it whole on every GPU for each rollout, not anew for each token.
    Its weights must fit there beside the cache."""
    slots: Positive | None = None
    """Answers that a process samples at a time, each with its share of the cache; null: the rollout's, at most 256."""
    keep_cache: bool = True
    """Keep the cache while the networks train; false gives its memory to them and makes it anew for each rollout."""

    def slots_for(self, prompts: int) -> int:
        """Slots of a process with so many prompts: more than 256 make a step longer, hardly a rollout faster."""
        return min(self.slots or 256, prompts)


class LimitsConfig(Section):
    """What a run of PPO has collapsed beyond, as means of its last rollouts; null: never."""

    kl: PositiveFloat | None = None
    """Nats per answer."""
    eos_rate: Ratio | None = None
    """The least share of answers that end by themselves."""
    distinct_2: Ratio | None = None
    """The least share of an answer's token pairs that are not repetitions."""
    rollouts: Positive = 5
    """So many rollouts make a mean."""


class PPOOptimizerConfig(OptimizerConfig):
    """Also where a config sets the learning rate alone, eps is that of PPO's implementation detail 35."""

    eps: PositiveFloat = 1e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Ratio = 0.0


class PPOConfig(Section):
    seed: int | None = Field(None, ge=0)
    """Of PPO's order and answers; null: the run's seed, which also deals the data out."""
    steps: Positive = 200
    """Pools of experience; each is followed by `epochs` passes over its samples."""
    generation_batches: Positive = 1
    """Rollouts in a pool."""
    rollout_batch_size: Positive = 64
    """Prompts in one rollout, over all processes."""
    batch_size: Positive = 64
    """Samples in one optimizer step, over all processes; divides the pool's."""
    micro_batch_size: Positive = 8
    """Samples in one forward pass of one process."""
    epochs: Positive = 1
    """Passes over each pool."""
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the per-token KL penalty in the reward; the first one if `kl_target` is set."""
    kl_target: PositiveFloat | None = None
    """Nats per answer that the weight is adapted to; null: the weight stays."""
    kl_horizon: Positive = 10_000
    """Answers over which the weight follows."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    gamma: Ratio = 1.0
    gae_lambda: Ratio = 0.95
    """Below 1 the critic's estimate stands for what comes some 1 / (1 - lambda) tokens later. A critic that starts as
    the reward model knows neither penalties nor how answers end, so answers of hundreds of tokens may need 1."""
    clip_range: PositiveFloat = 0.2
    value_clip_range: PositiveFloat = 0.2
    max_approx_kl: PositiveFloat | None = None
    """The passes over a pool end early when the policy is so far from the one that sampled; nats per token."""
    max_ratio: PositiveFloat | None = 10.0
    """A micro-batch whose mean probability ratio is above this gives the policy no gradient."""
    normalise_rewards: bool = False
    """Scores are divided by the standard deviation of all scores so far, their mean taken off."""
    reward_clip: PositiveFloat | None = None
    """Scores of the reward model are clipped to plus or minus this."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Taken off the score of an answer that reached its limit without EOS."""
    length_penalty: float = Field(0.0, ge=0)
    """Taken off the score for each token of the answer, where the reward model pays for length."""
    whiten_advantages: bool = True
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of the language-model loss on unsupervised text in every policy step; 0: none."""
    ptx_batch_size: Positive = 64
    """Chunks of unsupervised text in one optimizer step, over all processes."""
    ema_decay: float | None = Field(0.992, ge=0, lt=1)
    """Of the moving average of the policy's weights that is kept beside it, per optimizer step; null: none."""
    limits: LimitsConfig = LimitsConfig()
    checkpoint_every: Positive = 20
    """Pools between checkpoints."""
    keep_checkpoints: Positive = 2
    """The last so many are kept while the stage runs: where the newest is damaged, the one before it serves."""
    profile: bool = False
    """Leave a trace of two pools by torch.profiler with the stage's records and in MLflow."""
    deterministic: bool = False
    """On a GPU too, resumed PPO is bit for bit that which nobody stopped; kernels that add in one order are slower."""
    policy_engine: EngineConfig = EngineConfig()
    critic_engine: EngineConfig = EngineConfig()
    reference_engine: EngineConfig = EngineConfig()
    reward_engine: EngineConfig = EngineConfig()
    policy_lora: LoraConfig | None = None
    """Train adapters of the policy; the reference is then the policy without them and takes no memory of its own."""
    critic_lora: LoraConfig | None = None
    policy_optimizer: PPOOptimizerConfig = PPOOptimizerConfig(learning_rate=1e-6)
    critic_optimizer: PPOOptimizerConfig = PPOOptimizerConfig(learning_rate=5e-6)

    @property
    def pool_size(self) -> int:
        """Samples of a pool, over all processes."""
        return self.generation_batches * self.rollout_batch_size

    @property
    def one_step(self) -> bool:
        """Whether a pool is one optimizer step, so that the policy that is trained is the one that sampled, exactly."""
        return self.epochs == 1 and self.batch_size == self.pool_size

    @model_validator(mode="after")
    def _sampling_can_be_repeated(self) -> "PPOConfig":
        if self.deterministic and self.sampling.top_p < 1:
            raise ValueError(
                "deterministic: torch adds up the probabilities of top_p in no fixed order on a GPU; drop one"
            )
        return self

    @model_validator(mode="after")
    def _whole_batches(self) -> "PPOConfig":
        if self.pool_size % self.batch_size:
            pool = "rollout_batch_size" + (" x generation_batches" if self.generation_batches > 1 else "")
            raise ValueError(f"batch_size {self.batch_size} does not divide {pool} {self.pool_size}")
        return self
