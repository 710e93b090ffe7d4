"""RunConfig: everything that a run can be told, typed, frozen, with every default in one place.

`load` reads a YAML file, applies `path=value` overrides and returns a validated RunConfig. A mistake is a
ConfigError with one line per fault: where, what was given, what would be right. This module imports neither torch
nor Prefect, so that `rlhf --help`, the forms of a deployment and the tests of a config stay fast.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tasks import sentences

Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]

SIX_SETS = (
    "Dahoas/rm-static",
    "Dahoas/full-hh-rlhf",
    "Dahoas/synthetic-instruct-gptj-pairwise",
    "yitingxie/rlhf-reward-datasets",
    "openai/webgpt_comparisons",
    "stanfordnlp/SHP",
)


UNSUPERVISED = "unsupervised"
"""What the unsupervised text is called among the sources."""


SECRET = re.compile(r"token|secret|password|passwd|api_?key|credential", re.IGNORECASE)
"""Names of values that are kept nowhere: a config is a parameter of Prefect and a record of every stage."""


class ConfigError(ValueError):
    """A config that a user can mend; the message says how."""


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SourceConfig(Section):
    """One set: preference pairs, conversations for SFT alone, or ranked answers."""

    kind: Literal["pairs", "sft", "ranked"] | None = None
    """What the rows are: prompt, chosen, rejected; or messages; or prompt, responses, scores. None: one of the six
    sets, or local files whose columns tell. Any other set of the hub needs it."""
    path: str | None = None
    """A local JSON, JSONL, CSV or Parquet file (or a folder with train.* and test.*); None: a set of the hub."""
    revision: str | None = None
    """Commit or branch on the hub; None: the newest."""
    licence: str | None = None
    """Of the rows, for the model's card; None: what is known of one of the six sets."""
    weight: PositiveFloat = 1.0
    """Share of the set's groups that is used (up to 1), or the weight of its rows in the loss (above 1)."""
    max_rows: Positive | None = None
    """Cap on the train rows that are read."""
    min_score_ratio: float = Field(2.0, ge=1)
    """SHP only: pairs whose scores are closer than this are dropped, as its authors advise."""
    max_pairs_per_post: Positive = 5
    """SHP only: at most so many pairs of one post."""


class DemoData(Section):
    """Preference data that the project generates: six sets in their native columns, with a known true score."""

    pairs: int = Field(9000, ge=200)
    seed: int = 0


class TextConfig(Section):
    """Unsupervised text for PPO's language-model loss, read when `ppo.ptx_coef` is above 0."""

    name: str | None = None
    """A set on the hub, for example Salesforce/wikitext."""
    subset: str | None = None
    """The folder of the set's files, where it has several, for example wikitext-2-raw-v1."""
    path: str | None = None
    """A local .txt (a line a row), JSON, JSONL, CSV or Parquet file, or a folder of them, instead."""
    revision: str | None = None
    """Commit or branch on the hub; None: main."""
    column: str = "text"
    train_split: str = "train"
    eval_split: str | None = None
    """None: `data.eval_fraction` of the documents."""
    document_start: str | None = None
    """A row that matches this regular expression begins a document, for WikiText ` = [^=]+ = $`; None: every row is
    one."""
    chunk_tokens: Positive = 256
    """Tokens in a row that is trained on."""

    @field_validator("document_start")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _one_place(self) -> "TextConfig":
        if (self.name is None) == (self.path is None):
            raise ValueError("needs either a name (of a set on the hub) or a path (of local text)")
        return self


class DataConfig(Section):
    hub: str | None = None
    """Folder in hub layout that is read instead of the Hugging Face hub."""
    demo: DemoData | None = None
    """Generate the six sets instead of reading them."""
    sources: dict[str, SourceConfig] = Field(default_factory=lambda: {name: SourceConfig() for name in SIX_SETS})
    """Hub name of a set (or any label, with `path`) -> how it is read."""
    unsupervised: TextConfig | None = None
    phases: tuple[PositiveFloat, ...] = (2, 4, 3, 1)
    """Shares of SFT : reward model : PPO : judge, a second reward model that PPO never sees; [2, 4, 4]: no judge."""
    eval_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Share of the groups that is held out, where a set has no test split of its own; a group that an earlier run of
    the workspace has split stays on its side."""
    max_prompt_tokens: Positive = 256
    max_answer_tokens: Positive = 256
    max_chars: Positive = 20_000
    """Rows with more characters are dropped before they are tokenised."""
    cluster: str | None = None
    """Dask scheduler (tcp://host:port) on whose workers the sets are downloaded, cleaned and searched for duplicates;
    they share the workspace folder and reach the Prefect server. null: this machine. The rows are the same."""

    @field_validator("cluster")
    @classmethod
    def _scheduler(cls, cluster: str | None) -> str | None:
        if cluster is not None and not re.fullmatch(r"(tcp|tls)://[^\s:/]+:\d+", cluster):
            raise ValueError(f"{cluster} is no address of a Dask scheduler, such as tcp://10.0.0.5:8786")
        return cluster

    @field_validator("phases")
    @classmethod
    def _three_or_four_phases(cls, phases: tuple[float, ...]) -> tuple[float, ...]:
        if len(phases) not in (3, 4):
            raise ValueError(
                "needs the shares of SFT : reward model : PPO and perhaps the judge, for example [2, 4, 3, 1] or "
                f"[2, 4, 4]; got {len(phases)}"
            )
        return phases

    @field_validator("sources")
    @classmethod
    def _some_source(cls, sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        if not sources:
            raise ValueError("names no source; leave it out for the six sets")
        if UNSUPERVISED in sources:
            raise ValueError(f"{UNSUPERVISED} is no name for a source; text without answers goes to data.unsupervised")
        return sources

    @model_validator(mode="after")
    def _one_origin(self) -> "DataConfig":
        if self.hub is not None and self.demo is not None:
            raise ValueError("hub and demo are both set; remove one of them")
        return self


class TinyModel(Section):
    """A small Llama-shaped model with random weights and a tokenizer trained on the run's own text."""

    hidden_size: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    vocab_size: int = Field(512, ge=300)
    positions: Positive = 1024

    @model_validator(mode="after")
    def _heads_divide(self) -> "TinyModel":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of 2 x heads ({2 * self.heads})")
        return self


class ModelsConfig(Section):
    policy: str | TinyModel = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """The base of the policy: a Hugging Face folder, a hub name, a registered model such as
    models:/chat-policy@champion, or the shape of a tiny model to start from scratch."""
    policy_revision: str | None = None
    policy_trust_remote_code: bool = False
    """Code that this model brings may run, also where what it becomes is loaded; else the model is refused or, where
    transformers knows its architecture, the code left alone."""
    reward: str | None = None
    """The base of reward model and critic, named likewise; None: the SFT model. Its tokenizer must be the policy's; a
    reward model keeps its head."""
    reward_revision: str | None = None
    reward_trust_remote_code: bool = False
    """The same of `reward`."""


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
    """Compile the decoder layers on first use, half a minute; steps on a GPU are faster then. Not with ZeRO 3."""
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
        if self.compile_layers and self.zero_stage == 3:
            raise ValueError("compile_layers does not go with zero_stage 3, whose parameters come and go; remove one")
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


class TrainConfig(Section):
    """What SFT and the reward model have in common."""

    epochs: Positive = 1
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
    """The last so many are kept while the stage runs: where the newest is damaged, the one before it serves."""
    profile: bool = False
    """Leave a trace of two steps by torch.profiler with the stage's records and in MLflow."""
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
    centering_coef: float = Field(0.0, ge=0)
    """Draws the mean score of each prompt's two answers to zero; 0.01 is usual, 0 is off."""
    margin: float = Field(0.0, ge=0)
    """The chosen answer's score shall be above the other's by so much (log-odds); 0: Bradley-Terry as it is."""


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
    """auto: slots where the policy allows it (not under ZeRO-3, nor with top_k or top_p)."""
    slots: Positive | None = None
    """Answers that a process samples at a time, each with its share of the cache; null: the rollout's, at most 256."""
    keep_cache: bool = True
    """Keep the cache while the networks train; false gives its memory to them and makes it anew for each rollout."""


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


class PPOConfig(Section):
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
    policy_engine: EngineConfig = EngineConfig()
    critic_engine: EngineConfig = EngineConfig()
    reference_engine: EngineConfig = EngineConfig()
    reward_engine: EngineConfig = EngineConfig()
    policy_lora: LoraConfig | None = None
    """Train adapters of the policy; the reference is then the policy without them and takes no memory of its own."""
    critic_lora: LoraConfig | None = None
    # PPO implementation detail 35: Adam's eps is 1e-5 for both networks.
    policy_optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-6, eps=1e-5, schedule="linear", warmup_ratio=0.0
    )
    critic_optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=5e-6, eps=1e-5, schedule="linear", warmup_ratio=0.0
    )

    @property
    def pool_size(self) -> int:
        """Samples of a pool, over all processes."""
        return self.generation_batches * self.rollout_batch_size

    @property
    def one_step(self) -> bool:
        """Whether a pool is one optimizer step, so that the policy that is trained is the one that sampled, exactly."""
        return self.epochs == 1 and self.batch_size == self.pool_size

    @model_validator(mode="after")
    def _whole_batches(self) -> "PPOConfig":
        if self.pool_size % self.batch_size:
            pool = "rollout_batch_size" + (" x generation_batches" if self.generation_batches > 1 else "")
            raise ValueError(f"batch_size {self.batch_size} does not divide {pool} {self.pool_size}")
        return self


class ApiJudgeConfig(Section):
    """A judge behind an OpenAI-compatible API, asked for each pair of answers twice (`tasks.api_judge`)."""

    base_url: str = "https://api.openai.com/v1"
    model: str
    key_variable: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the key, which is kept nowhere else; null: the server wants none."""
    prompts: Positive = 100
    """At most so many prompts of a comparison are judged, by two calls each."""
    max_calls: Positive = 500
    """A comparison is judged by at most so many requests, retries included."""
    max_cost: PositiveFloat | None = None
    """A comparison's judging ends when it has cost so much, in the unit of `prices`; null: only calls count."""
    prices: tuple[float, float] = (0.0, 0.0)
    """Of a million tokens that the judge reads, and of a million that it writes."""
    calls_per_minute: PositiveFloat = 60
    retries: int = Field(5, ge=0)
    """After an error of the server or of the connection, and where it asks to wait; each waits longer."""
    timeout_seconds: PositiveFloat = 60
    max_reply_tokens: Positive = 512

    @model_validator(mode="after")
    def _costs_are_known(self) -> "ApiJudgeConfig":
        if self.max_cost is not None and not any(self.prices):
            raise ValueError("max_cost needs prices, of a million tokens read and written; set them as well")
        if re.search(r"//[^/]*@", self.base_url):
            raise ValueError("base_url holds a password; give it by the environment variable that key_variable names")
        return self


class EvaluateConfig(Section):
    prompts: Positive = 200
    """Held-out prompts that SFT and PPO answer."""
    batch_size: Positive = 32
    sampling: SamplingConfig = SamplingConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    text_chunks: Positive = 64
    """At most so many chunks of held-out unsupervised text, where the run has some, are read for perplexities."""
    api_judge: ApiJudgeConfig | None = None
    """Ask a judge behind an API as well; null: none."""
    samples: Positive = 8
    """Answers shown side by side in the report."""


class GatesConfig(Section):
    """What a candidate has to pass to become champion: a sentence per measure (`tasks.sentences`), null for no gate."""

    win_rate_vs_champion: str | None = ">= 0.52 (lower bound >= 0.5)"
    """Share of the held-out prompts won against the present champion; the first model's against its SFT model."""
    win_rate_vs_sft: str | None = None
    """Share of the held-out prompts won against the run's SFT model."""
    length_controlled_win_rate_vs_champion: str | None = None
    """The share that would be won if both answers were as long, by the regression of AlpacaEval 2 (`tasks.paired`)."""
    length_controlled_win_rate_vs_sft: str | None = None
    proxy_win_rate_vs_champion: str | None = None
    """The win rate by the reward model that PPO was trained on, whoever judges the others."""
    api_win_rate_vs_champion: str | None = None
    """The win rate by the judge behind an API."""
    win_rate_gap: str | None = None
    """Win rate against the SFT model by the run's reward model, less that by the gold one: what of it is hacking."""
    reward: str | None = None
    """Mean score of the answers by the run's reward model; the baseline sft is that of the SFT model's answers."""
    reward_accuracy: str | None = None
    """Share of held-out pairs that the reward model orders as people did; the baseline length_baseline is the share
    that preferring the longer answer gets right."""
    gold_reward: str | None = None
    """Mean score of the answers by the gold reward model; the baseline sft is that of the SFT model's answers."""
    gold_accuracy: str | None = None
    """As reward_accuracy, of the gold reward model."""
    kl: str | None = None
    """From the SFT model, nats per answer."""
    tokens: str | None = None
    """Mean length of the answers; the baseline sft is that of the SFT model's."""
    eos_rate: str | None = None
    """Share of the answers that end by themselves; the baseline sft is that of the SFT model's."""
    repetition: str | None = None
    """Mean share of an answer's runs of four words that stood in it before; the baseline sft is the SFT model's."""
    text_loss: str | None = None
    """Loss on the held-out unsupervised text, nats per token (the logarithm of the perplexity); the baseline sft is the
    SFT model's."""

    @field_validator("*")
    @classmethod
    def _readable(cls, sentence: str | None, info: ValidationInfo) -> str | None:
        if sentence is not None:
            assert info.field_name is not None
            sentences.parse(info.field_name, sentence)
        return sentence

    @property
    def sentences(self) -> dict[str, str]:
        """Measure -> sentence of the gates that are set."""
        return {name: sentence for name, sentence in self.model_dump().items() if sentence is not None}


class PromoteConfig(Section):
    judge: Literal["gold", "reward"] = "gold"
    """Whose scores decide the win rates of the gates: the gold reward model's, where the run has one that is surely
    better than chance, or the run's own."""
    gates: GatesConfig = GatesConfig()
    approval: Literal["none", "manual"] = "none"
    """manual: a candidate that passes its gates waits until a person approves it in Prefect. The run of a deployment is
    suspended meanwhile; without a deployment the candidate stays registered, for `rlhf promote`."""
    approval_hours: PositiveFloat = 72.0
    """A candidate that nobody decided on for so long is not promoted. Of a deployment, set when it is made."""
    reminder_hours: PositiveFloat = 24.0
    """After so long the notification blocks are told once more that a candidate waits. Of a deployment as well."""


class RunConfig(Section):
    """One run: data in, a registered model out."""

    name: str = "chat"
    """Models are registered as NAME-policy and NAME-reward."""
    workspace: str = "workspace"
    """Folder of the stage directories and of the default MLflow store."""
    seed: int = Field(0, ge=0)
    infrastructure: str = "local-cpu"
    """GpuInfrastructure block that training and evaluation run on."""
    data: DataConfig = DataConfig()
    models: ModelsConfig = ModelsConfig()
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    gold: RewardConfig = RewardConfig()
    """The gold reward model, trained on the judge's share of `data.phases`: PPO never sees it, evaluation does. What is
    not set here is as in `reward`."""
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
            raise ValueError("use lower case letters, digits, - and _ (at most 63, no leading - or _)")
        return name

    @model_validator(mode="before")
    @classmethod
    def _gold_is_trained_as_the_reward_model(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("gold", {}), dict):
            return tree
        reward = tree.get("reward", {})
        reward = reward.model_dump() if isinstance(reward, RewardConfig) else reward
        return {**tree, "gold": _laid_over(reward, tree.get("gold", {}))}

    @property
    def has_gold(self) -> bool:
        """Whether a gold reward model is trained: there are pairs for it."""
        return len(self.data.phases) == 4

    @model_validator(mode="after")
    def _gates_measure_what_there_is(self) -> "RunConfig":
        missing = {
            "gold": None if self.has_gold else "a gold reward model; give data.phases a fourth share, for the judge",
            "api": None if self.evaluate.api_judge is not None else "evaluate.api_judge, a judge behind an API; set it",
            "text": None if self.ppo.ptx_coef > 0 else "unsupervised text, which is read where ppo.ptx_coef is above 0",
        }
        for name in self.promote.gates.sentences:
            if (need := sentences.MEASURES[name].needs) and missing[need]:
                raise ValueError(f"promote.gates.{name} needs {missing[need]}, or remove the gate")
        return self

    @model_validator(mode="after")
    def _positions_hold_the_text(self) -> "RunConfig":
        longest = self.data.max_prompt_tokens + self.data.max_answer_tokens
        if isinstance(self.models.policy, TinyModel) and self.models.policy.positions < longest:
            raise ValueError(
                f"models.policy.positions is {self.models.policy.positions}, but data.max_prompt_tokens + "
                f"data.max_answer_tokens is {longest}; raise the one or lower the others"
            )
        text = self.data.unsupervised
        if isinstance(self.models.policy, TinyModel) and text and self.models.policy.positions < text.chunk_tokens:
            raise ValueError(
                f"models.policy.positions is {self.models.policy.positions}, but data.unsupervised.chunk_tokens is "
                f"{text.chunk_tokens}; raise the one or lower the other"
            )
        return self


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The RunConfig of a YAML file, with `path=value` overrides (values are YAML) laid over it.

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type or a value out of range.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no config file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not keys and values")
    for override in overrides:
        _set(tree, override)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """The RunConfig of a plain tree of values. Raises ConfigError with one line per fault."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error))) from None


def _set(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: write it as path=value, for example ppo.kl_coef=0.1")
    *parents, leaf = path.split(".")
    if parents[:2] == ["data", "sources"]:
        _name_sources(tree)
    for key in parents:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {key} holds a value, not keys")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        tree[leaf] = value


def _laid_over(below: Any, above: Any) -> Any:
    """A tree of values with those of another in their places."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _laid_over(below.get(key), value) for key, value in above.items()}


def _name_sources(tree: dict[str, Any]) -> None:
    """Write the default sources into a tree that names none, so that an override of one keeps the others."""
    data = tree.setdefault("data", {}) or {}
    if isinstance(data, dict) and data.get("sources") is None:
        tree["data"] = {**data, "sources": {name: {} for name in SIX_SETS}}


def _faults(error: ValidationError) -> Iterator[str]:
    seen = set()
    for fault in error.errors(include_url=False):
        # Members of a union appear as extra steps in the location: no key of the user's.
        location = [str(step) for step in fault["loc"] if step != "str" and "TinyModel" not in str(step)]
        where = ".".join(location) or "config"
        if fault["type"] == "string_type" and "str" in fault["loc"]:
            continue  # the other member of the union says what is wrong
        if fault["type"] == "extra_forbidden":
            known = _keys(RunConfig, fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {known[near[0]]}?" if near else f"known: {', '.join(known)}"
            line = f"{where}: unknown key; {hint}"
        elif fault["type"] == "value_error":
            line = f"{where}: {fault['ctx']['error']}"
        else:
            given = fault["input"]
            shown = f" (got {given!r})" if not isinstance(given, dict) and not _long(given) else ""
            line = f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}{shown}"
        # What is wrong in `reward` was laid under `gold`: it is said once.
        if line not in seen and line.replace("gold.", "reward.", 1) not in seen:
            seen.add(line)
            yield line


def _long(value: Any) -> bool:
    return len(repr(value)) > 80 or (isinstance(value, float) and math.isnan(value))


def _keys(section: Any, location: tuple[str | int, ...]) -> dict[str, str]:
    """Key -> dotted path of the keys known at a location of the tree, those of its sections after its own."""
    for step in location:
        if _is_section(section) and step in section.model_fields:
            section = _section_of(section.model_fields[str(step)].annotation)
    if not _is_section(section):
        return {}
    own = {key: key for key in section.model_fields}
    nested = {
        inner: f"{key}.{inner}"
        for key, field in section.model_fields.items()
        if _is_section(child := _section_of(field.annotation))
        for inner in child.model_fields
    }
    return {**nested, **own}


def _section_of(annotation: Any) -> Any:
    """The Section inside an annotation such as `Section | None` or `dict[str, Section]`."""
    if _is_section(annotation):
        return annotation
    return next((part for part in map(_section_of, get_args(annotation)) if _is_section(part)), None)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
