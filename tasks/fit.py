"""Will it fit? Memory per GPU and time per step of a training stage, from the model's shape alone.

Arithmetic on `config.json`: nothing is loaded, torch is not imported. Every term has its own line in `Memory`, so that
a measured peak can be set against it. Bytes per parameter are those of DeepSpeed 0.19 with fp32 master weights and Adam
states (Rajbhandari et al. 2020, section 3); saved activations are counted tensor by tensor from transformers' layers
(the way of Korthikanti et al. 2022, table 2, with attention that saves its output alone). The shares of the peak that a
GPU reaches are measured ones of a Llama-shaped 1.7B on an H100 (27 % eager and recomputed, 37 % eager, 51 % compiled).
"""

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from tasks.config import ConfigError, EngineConfig, LoraConfig, PPOConfig, RewardConfig, RunConfig, TrainConfig
from tasks.shapes import GIB, GPUS, Gpu, Shape, work_of

CONTEXT = 0.6 * GIB
"""CUDA's own, of one process."""
SLACK = 1.05
"""What torch's allocator holds over what is allocated (with expandable segments)."""
BUCKET = 5e8
"""Elements of a bucket of gradients that ZeRO sends at once."""
LOGITS = 2**26
"""Logits of a chunk (tasks/training/logprobs.py), of which five fp32 copies live at once in its backward pass."""
CPU_ADAM = 0.44e-9
"""Seconds a parameter of an offloaded step, transfers included (1.7B on one H100: 0.75 s)."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one GPU, by what they are for."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    """Master weights and Adam's two moments."""
    buffers: float = 0
    """ZeRO's buckets, and the layers that ZeRO-3 has gathered."""
    average: float = 0
    activations: float = 0
    logits: float = 0
    cache: float = 0
    """Keys and values of PPO's rollouts."""
    step: float = 0
    """What the optimizer's step takes beyond the activations, which are gone by then."""

    @property
    def allocated(self) -> float:
        """What torch reports as its peak (`memory/peak_gib`)."""
        return sum(asdict(self).values())

    @property
    def needed(self) -> float:
        """What the GPU must have free."""
        return self.allocated * SLACK + CONTEXT

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Load:
    """What one network does in one step, on one GPU."""

    tokens: int
    """In one forward pass."""
    total_tokens: int
    """In one optimizer step."""
    length: int
    """Of a sequence, for attention."""
    scores_tokens: bool = True
    """Whether it makes log-probabilities (a policy) or scalars (a critic, a reward model)."""
    frozen_layers: int = 0
    """Of the first layers, which stay as they are with the embeddings."""


def trained(shape: Shape, engine: EngineConfig, lora: LoraConfig | None, load: Load, gpus: int) -> Memory:
    """Memory of a network that is trained, per GPU, at its peak: as its backward pass begins, or in its step."""
    whole, learnt = shape.parameters, _learnt(shape, lora, load.frozen_layers)
    width = _width(engine)
    shards = {stage: gpus if engine.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    weights = 0.0 if engine.offload_parameters else width * whole / shards[3]
    optimizer = (8.0 if engine.precision == "fp32" and not engine.zero_stage else 12.0) * learnt / shards[1]
    made = width * learnt / shards[2]  # gradients at the end of the backward pass
    held = made if load.total_tokens > load.tokens else 0.0  # and those that wait for the next micro-batches
    if engine.zero_stage == 0:
        made = 4.0 * learnt  # DeepSpeed's bf16 optimizer sums them in fp32 as they are made
        held = made if engine.precision == "bf16" else held
    if engine.offload_optimizer:
        optimizer, held, made = 0.0, (0.0 if engine.zero_stage >= 2 else held), 0.0
    elif engine.zero_stage:
        made += 4.0 * learnt / shards[1]  # the step turns them into fp32
    layer = shape.linear / shape.layers
    buffers = min(BUCKET, learnt) * width if engine.zero_stage else 0.0
    if engine.zero_stage == 3 and (gpus > 1 or engine.offload_parameters):
        buffers += 2 * width * layer + width * shape.vocab * shape.hidden
    passes = _pass(shape, engine, load)
    step = max(0.0, made - held - passes.activations - passes.logits)
    return Memory(weights, held, optimizer, buffers, step=step) + passes


def _learnt(shape: Shape, lora: LoraConfig | None, frozen_layers: int = 0) -> float:
    """Parameters that are trained; where layers are frozen, those of a network with a scalar for its head."""
    if lora is not None:
        return lora.rank * shape.adapted
    if not frozen_layers:
        return shape.parameters
    return shape.without_embeddings * (1 - frozen_layers / shape.layers)


def frozen(shape: Shape, engine: EngineConfig, gpus: int) -> Memory:
    """Memory of a network that is only read."""
    if engine.offload_parameters:
        return Memory()
    return Memory(_width(engine) * shape.parameters / (gpus if engine.zero_stage == 3 else 1))


def _pass(shape: Shape, engine: EngineConfig, load: Load) -> Memory:
    width = _width(engine)
    layer = width * load.tokens * shape.saved(engine.compile_layers)
    kept = width * load.tokens * shape.hidden
    recomputed = engine.gradient_checkpointing
    layers = shape.layers - load.frozen_layers
    activations = layers * kept + layer if recomputed else layers * layer
    logits = 0.0
    if load.scores_tokens:
        chunk = min(LOGITS, load.tokens * shape.vocab)
        logits = 5 * 4.0 * chunk + 4 * shape.vocab * shape.hidden + 2 * kept
    return Memory(activations=activations + 2 * kept, logits=logits)


def seconds(shape: Shape, engine: EngineConfig, lora: LoraConfig | None, load: Load, gpu: Gpu) -> float:
    """Time of an optimizer step of a network on one GPU, without what several GPUs say to each other."""
    rows = load.total_tokens / load.length
    forward = rows * work_of(shape, [load.length], load.scores_tokens) / 3
    # A trained layer takes a second pass for its input's gradient, a third for its weights', one more if recomputed.
    learning = 1 - load.frozen_layers / shape.layers
    passes = 1 + learning * (1 + (lora is None) + engine.gradient_checkpointing)
    share = 0.51 if engine.compile_layers else 0.37
    time = passes * forward / (gpu.flops * share)
    learnt = _learnt(shape, lora, load.frozen_layers)
    return time * (1.1 if engine.zero_stage == 3 else 1) + (CPU_ADAM * learnt if engine.offload_optimizer else 0)


@dataclass(frozen=True)
class Setting:
    """One way to hold a network, with what it takes."""

    engine: EngineConfig
    lora: LoraConfig | None
    memory: Memory
    seconds: float

    @property
    def name(self) -> str:
        """What sets it apart, in the words of the config."""
        parts = [f"zero_stage {self.engine.zero_stage}"]
        parts += [key for key in ("gradient_checkpointing", "offload_optimizer") if getattr(self.engine, key)]
        parts += [f"lora of rank {self.lora.rank}"] if self.lora is not None else []
        return f"{', '.join(parts)} ({self.memory.needed / GIB:.1f} GiB, {self.seconds:.2f} s a step)"


def settings(
    shape: Shape, engine: EngineConfig, lora: LoraConfig | None, load: Load, gpus: int, gpu: Gpu
) -> list[Setting]:
    """The configured setting and those that take less memory, the fastest first; adapters last, as they learn less."""
    found = []
    stages = sorted({engine.zero_stage, 2, 3} if gpus > 1 else {engine.zero_stage, 2})
    adapters = [lora] if lora is not None else [None, LoraConfig()]
    for adapter, checkpointing, stage, offload in product(adapters, (False, True), stages, (False, True)):
        if offload and stage == 0:
            continue
        changed = _changed(engine, checkpointing, stage, offload)
        memory = trained(shape, changed, adapter, load, gpus)
        found.append(Setting(changed, adapter, memory, seconds(shape, changed, adapter, load, gpu)))
    return sorted(found, key=lambda s: (s.lora is not None and lora is None, s.seconds, s.engine.zero_stage))


def _changed(engine: EngineConfig, checkpointing: bool, stage: int, offload: bool) -> EngineConfig:
    """The engine with what `settings` tries; parameters stay offloaded where they may."""
    changes: dict[str, Any] = {
        "gradient_checkpointing": checkpointing,
        "zero_stage": stage,
        "offload_optimizer": offload,
        "offload_parameters": engine.offload_parameters and stage == 3 and offload,
    }
    return engine.model_copy(update=changes)


def cheapest(options: list[Setting], room: float) -> Setting | None:
    """The first setting that needs no more than `room` bytes."""
    return next((option for option in options if option.memory.needed <= room), None)


def of_training(
    config: TrainConfig, shape: Shape, scores_tokens: bool, longest: int, gpus: int, gpu: Gpu, where: str
) -> list[Setting]:
    """The settings of SFT, or of a reward model (each pair is two sequences); `longest` is a sequence's limit.

    `where` is the config path, for messages. Raises ConfigError for more layers than there are.
    """
    still = 0
    if isinstance(config, RewardConfig):
        check_layers(config, shape, where)
        shape, still = scalar_shape(config, shape), config.frozen_layers
    sequences = config.batch_size * (1 if scores_tokens else 2)
    total = max(sequences * longest // gpus, 1)
    load = Load(min(config.micro_batch_tokens, total), total, longest, scores_tokens, still)
    return settings(shape, config.engine, config.lora, load, gpus, gpu)


def check_layers(config: RewardConfig, base: Shape, where: str) -> None:
    """ConfigError if a reward model shall keep, or leave as they are, more layers than its base has."""
    for key, count in (("layers", config.layers or 0), ("frozen_layers", config.frozen_layers)):
        if count > base.layers:
            raise ConfigError(f"{where}.{key} is {count}, but the model has {base.layers} layers; lower it")


def check_positions(config: RunConfig, positions: int | None, where: str) -> None:
    """ConfigError if a base model shall read more tokens than it has positions for; None: it may read any number.

    `where` is its config path: the policy reads unsupervised text as well, the reward model does not.
    """
    data = config.data
    lengths = {"data.max_prompt_tokens + data.max_answer_tokens": data.max_prompt_tokens + data.max_answer_tokens}
    if data.unsupervised is not None and where == "models.policy":
        lengths["data.unsupervised.chunk_tokens"] = data.unsupervised.chunk_tokens
    for key, tokens in lengths.items():
        if positions is not None and tokens > positions:
            mend = key.replace(" + ", " or ")
            raise ConfigError(f"{key} is {tokens}, but {where} has {positions} positions for tokens; lower {mend}")


def scalar_shape(config: RewardConfig, base: Shape) -> Shape:
    """The shape of a reward model, and of its critic, that is made from a base."""
    return replace(base, layers=config.layers or base.layers)


def of_ppo(
    config: PPOConfig, policy: Shape, critic: Shape, prompt: int, answer: int, gpus: int, gpu: Gpu
) -> list[Setting]:
    """The settings of PPO: the configured one, and others with policy and critic changed alike.

    All four networks and a rollout's cache are in memory. The time is that of a pool: sampling, scoring and the
    optimizer steps on it. `prompt` and `answer` are limits.
    """
    longest = prompt + answer
    total = max(config.batch_size * longest // gpus, 1)
    load = Load(min(config.micro_batch_size * longest, total), total, longest)
    own = settings(policy, config.policy_engine, config.policy_lora, load, gpus, gpu)
    rows = max(config.rollout_batch_size // gpus, 1)
    per_token = 2 * _width(config.policy_engine) * policy.layers * policy.key
    # Four networks read every sequence once.
    scoring = rows * longest * 4 * (policy.linear + critic.linear) / (gpu.flops * 0.5)
    passes = config.pool_size // config.batch_size * config.epochs
    found = []
    for option in own:
        in_slots = _samples_in_slots(config, option.engine)
        at_once = config.rollout.slots_for(rows) if in_slots else rows
        # Every token reads all weights, for all answers at a time, and, on the mean, half of its answer's cache: two
        # thirds of the bound.
        weights = rows / at_once * _width(config.policy_engine) * policy.parameters
        read = weights + per_token * rows * (prompt + answer / 2)
        sampling = answer * read / (gpu.bandwidth * 0.6)
        memory, step = _with_the_others(
            option, config, policy, critic, load, per_token * at_once * longest, in_slots, gpus, gpu
        )
        time = config.generation_batches * (sampling + scoring) + passes * step
        found.append(Setting(option.engine, option.lora, memory, time))
    return found


def _samples_in_slots(config: PPOConfig, engine: EngineConfig) -> bool:
    """Whether a policy so held samples in slots, if its family can; else the plain loop samples all rows at once."""
    truncated = config.sampling.top_k or config.sampling.top_p < 1
    in_parts = engine.zero_stage == 3 and not config.rollout.gather
    return config.rollout.engine != "plain" and not truncated and not in_parts


def _with_the_others(
    option: Setting,
    config: PPOConfig,
    policy: Shape,
    critic: Shape,
    load: Load,
    cache: float,
    in_slots: bool,
    gpus: int,
    gpu: Gpu,
) -> tuple[Memory, float]:
    """Memory of all four networks where the policy is held as in `option`, and seconds of an optimizer step of both."""
    engine, lora = config.critic_engine, config.critic_lora
    if option.engine != config.policy_engine:
        own = option.engine
        engine = _changed(engine, own.gradient_checkpointing, own.zero_stage, own.offload_optimizer)
    if option.lora != config.policy_lora:
        lora = option.lora
    load = replace(load, scores_tokens=False)
    beside = trained(critic, engine, lora, load, gpus)
    # Only one of the two is in its backward pass.
    busy, idle = sorted((option.memory, beside), key=lambda m: m.activations + m.logits + m.step, reverse=True)
    whole = option.engine.zero_stage == 3 and config.rollout.gather
    if whole or not (in_slots and config.rollout.keep_cache):  # it is gone before the first backward pass
        cache += _width(option.engine) * policy.parameters if whole else 0
        cache = max(0.0, cache - busy.activations - busy.logits - busy.step)
    total = busy + replace(idle, activations=0, logits=0, step=0) + frozen(critic, config.reward_engine, gpus)
    total += Memory(cache=cache)
    if option.lora is None:
        total += frozen(policy, config.reference_engine, gpus)
    if config.ema_decay is not None:
        total += Memory(average=4 * _learnt(policy, option.lora) / (gpus if option.engine.zero_stage == 3 else 1))
    return total, option.seconds + seconds(critic, engine, lora, load, gpu)


def _width(engine: EngineConfig) -> int:
    """Bytes of a number."""
    return 4 if engine.precision == "fp32" else 2


def gpu_of(text: str) -> Gpu:
    """A GPU by its name, or by its memory in GiB (with an A100's speed). Raises ConfigError that lists the names."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        return replace(GPUS["a100"], memory=float(text) * GIB)
    except ValueError:
        raise ConfigError(f"--gpu {text}: give its memory in GiB or one of {', '.join(GPUS)}") from None
