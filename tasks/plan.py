"""What a run would do, without making a stage: the graph's stages in order, each done already or not, and why.

Files are read, and the hub is asked for the newest commits of its sets: no server of ours, no import of what makes a
stage. Only with `remote` the workspace changes: what is finished there is fetched, and its split ledger taken over, as
by a run, since their files decide what comes later.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infra.machine import gpu_count
from infra.shipped import SHIPPED
from tasks import dag, stages
from tasks.config import ConfigError, RunConfig, TinyModel
from tasks.dag import Choice, Node
from tasks.fit import Setting, cheapest, check_layers, check_positions, of_ppo, of_training, scalar_shape
from tasks.shapes import GIB, GPUS, Gpu, Shape, config_of_model, positions_of, shape_of_folder, shape_of_model
from tasks.stages import MANIFEST, Stage, StageRef, checkpoint_step


@dataclass(frozen=True)
class Line:
    """A stage of the plan."""

    key: str
    stage: str
    cached: bool
    why: str
    """Why it would run; empty for a cached one."""
    reads: tuple[str, ...]
    """The keys of the stages that it reads."""
    directory: Path | None
    """Where it lies or would lie; None while that depends on a stage that is yet to run."""
    metrics: Mapping[str, Any]


def plan(config: RunConfig, choice: Choice | None = None) -> list[Line]:
    """A line per stage, in the order of the run, up to `--until`."""
    return _looked_up(config, choice or Choice())[0]


def finished(config: RunConfig, until: str | None = None) -> dict[str, StageRef] | None:
    """The stages up to a step (None: the last) by key, if they are all finished, else None."""
    lines, refs = _looked_up(config, Choice(until=until))
    return refs if len(refs) == len(lines) else None


def _looked_up(config: RunConfig, choice: Choice) -> tuple[list[Line], dict[str, StageRef]]:
    """A line per stage, and those that are finished by key."""
    refs: dict[str, StageRef] = {}
    lines = []
    graph = dag.graph(config)
    choice.check(graph)
    for node in graph.values():
        line, ref = _line(config, choice, node, refs)
        lines.append(line)
        if ref is not None:
            refs[node.key] = ref
        if choice.is_reached(graph, {line.key for line in lines}):
            break
    return lines, refs


def together(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines in groups: those of one stage of which the same is to be said, one per source, are one."""
    groups: dict[tuple[str, bool, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.stage, line.cached, line.why), []).append(line)
    return list(groups.values())


@dataclass(frozen=True)
class Fit:
    """Whether a training stage, as it is configured, fits its GPU, and the fastest setting that does."""

    stage: str
    setting: Setting
    fits: bool
    cheapest: Setting | None
    measured: float | None = None
    """GiB that torch had allocated at the peak of this stage, made with this config on a GPU; to be held against
    `setting.memory.allocated`."""

    @property
    def compared(self) -> str:
        """Prediction and measurement beside each other; empty without a measurement."""
        if self.measured is None:
            return ""
        predicted = self.setting.memory.allocated / GIB
        return f"{self.measured:.1f} GiB measured, {predicted:.1f} predicted ({predicted / self.measured - 1:+.0%})"


def will_it_fit(
    config: RunConfig, gpu: Gpu, gpus: int, made: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Fit]:
    """A Fit per training stage. ConfigError for a model of no known kind, or whose config.json is not here.

    `made` are the metrics of the stages that are finished, with their measured peaks, by stage.
    """
    policy = _shape(config.models.policy, "models.policy")
    reward = policy if config.models.reward is None else _shape(config.models.reward, "models.reward")
    return _fits(config, {"sft": policy, "reward": reward, "gold": reward}, gpu, gpus, made or {})


def measured(config: RunConfig, refs: Mapping[str, StageRef]) -> list[Fit]:
    """A Fit of each training stage of a run whose peak was measured; none for a model of no known kind."""
    made = {name: refs[name].metrics for name in ("sft", "reward", "gold", "ppo") if name in refs}
    if not any("peak_gib" in metrics for metrics in made.values()):
        return []
    try:
        models = [name for name in ("sft", "reward", "gold") if name in refs]
        shapes = {name: shape_of_folder(refs[name].directory / "model") for name in models}
    except ConfigError:
        return []
    fits = _fits(config, shapes, GPUS["h100"], gpus_of(config), made)  # memory is the same on every GPU
    return [fit for fit in fits if fit.measured is not None]


def _fits(
    config: RunConfig, shapes: Mapping[str, Shape], gpu: Gpu, gpus: int, made: Mapping[str, Mapping[str, Any]]
) -> list[Fit]:
    """A Fit of each stage whose model, or that model's base, has its shape in `shapes`; PPO's critic is `reward`."""
    prompt, answer = config.data.max_prompt_tokens, config.data.max_answer_tokens
    sections = {"sft": config.sft, "reward": config.reward, **({"gold": config.gold} if config.has_gold else {})}
    trained = {stage: section for stage, section in sections.items() if stage in shapes}
    options = {
        stage: of_training(section, shapes[stage], stage == "sft", prompt + answer, gpus, gpu, stage)
        for stage, section in trained.items()
    }
    if "reward" in shapes:
        critic = scalar_shape(config.reward, shapes["reward"])
        options["ppo"] = of_ppo(config.ppo, shapes["sft"], critic, prompt, answer, gpus, gpu)
    configured = {stage: (section.engine, section.lora) for stage, section in trained.items()}
    configured["ppo"] = (config.ppo.policy_engine, config.ppo.policy_lora)
    found = []
    for stage, settings in options.items():
        engine, lora = configured[stage]
        own = next(setting for setting in settings if (setting.engine, setting.lora) == (engine, lora))
        peak = made.get(stage, {}).get("peak_gib")
        found.append(Fit(stage, own, own.memory.needed <= gpu.memory, cheapest(settings, gpu.memory), peak))
    return found


def gpus_of(config: RunConfig) -> int:
    """GPUs of the run's infrastructure; 1 where that is a CPU or a block of the user's own."""
    return int(SHIPPED.get(config.infrastructure, {}).get("gpus_per_node", 1))


def _shape(model: str | TinyModel, where: str) -> Shape:
    shape = shape_of_model(model)
    if shape is None:
        raise ConfigError(f"--gpu needs the sizes of {where}, but {model} has no config.json here; download it first")
    return shape


def check_reward_models(config: RunConfig) -> None:
    """ConfigError if a reward model shall keep more layers than its base has, where the base's sizes are known here.

    Where they are not, a model of the hub or of a family that is not known, its stage tells it.
    """
    sections = {"reward": config.reward, "gold": config.gold}
    if not any(section.layers or section.frozen_layers for section in sections.values()):
        return
    try:
        shape = shape_of_model(config.models.policy if config.models.reward is None else config.models.reward)
    except ConfigError:
        return
    if shape is None:
        return
    for where, section in sections.items():
        check_layers(section, shape, where)


def check_lengths(config: RunConfig) -> None:
    """ConfigError if a base model has fewer positions than it shall read tokens, where its config.json is here.

    Where it is not, the step that gets the model tells it.
    """
    for where, model in (("models.policy", config.models.policy), ("models.reward", config.models.reward)):
        if isinstance(model, str) and (found := config_of_model(model)) is not None:
            check_positions(config, positions_of(found), where)


def check_machine(config: RunConfig) -> None:
    """ConfigError if the run wants a GPU, or a precision that only GPUs have, and this machine has none for it."""
    device = SHIPPED.get(config.infrastructure, {}).get("device")
    if device == "cuda" and gpu_count() == 0:
        raise ConfigError(
            f"infrastructure: {config.infrastructure} needs a GPU and this machine shows none; use "
            "`--set infrastructure=local-cpu`, or check `nvidia-smi -L`"
        )
    if device == "cpu":
        for where, section in _sections(config):
            if getattr(section, "precision", None) == "fp16":
                raise ConfigError(
                    f"{where}.precision: fp16 needs a GPU, and infrastructure {config.infrastructure} is a CPU; "
                    "use bf16 or fp32"
                )


def _sections(section: BaseModel, where: str = "") -> Iterator[tuple[str, BaseModel]]:
    """All sections of a config with their paths."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            path = f"{where}.{name}" if where else name
            yield path, value
            yield from _sections(value, path)


def check_finished(config: RunConfig, choice: Choice) -> None:
    """ConfigError that names what is missing if a stage before `--from` is not finished."""
    if choice.from_step is None:
        return
    refs: dict[str, StageRef] = {}
    unfinished = []
    for node in dag.graph(config).values():
        if choice.must_be_finished(node.stage):  # its inputs must be too; what comes after is not looked at
            _, ref = _line(config, Choice(), node, refs)
            if ref is None:
                unfinished.append(node.stage)
            else:
                refs[node.key] = ref
    missing = list(dict.fromkeys(unfinished))
    if missing:
        raise ConfigError(
            f"--from {choice.from_step} needs all before it, but not finished: {', '.join(missing)}; run without --from"
        )


def _line(config: RunConfig, choice: Choice, node: Node, refs: Mapping[str, StageRef]) -> tuple[Line, StageRef | None]:
    reads = tuple(dict.fromkeys(node.inputs.values()))
    waits = [key for key in reads if key not in refs]
    if waits:
        why = f"after {waits[-1].partition(':')[0]}"
        return Line(node.key, node.stage, False, why, reads, None, {}), None
    try:
        stage = dag.stage(config, node, refs)
    except ConnectionError:
        return Line(node.key, node.stage, False, "the hub gives no answer", reads, None, {}), None
    if choice.forces(node.stage):
        return Line(node.key, node.stage, False, "forced", reads, stage.directory, {}), None
    ref = stages.finished(stage)
    if ref is None:
        return Line(node.key, node.stage, False, _why(stage, node), reads, stage.directory, {}), None
    return Line(node.key, node.stage, True, "", reads, stage.directory, ref.metrics), ref


def _why(stage: Stage, node: Node) -> str:
    """Why a stage that could be looked up would run."""
    directory = stage.directory
    if (directory / MANIFEST).exists():
        return "its files are damaged"
    if node.resumable and (step := checkpoint_step(directory)) is not None:
        return f"goes on from step {step}"
    if directory.exists():
        return "was interrupted"
    siblings = list(directory.parent.glob(f"*/{MANIFEST}")) if directory.parent.is_dir() else []
    return _difference(stage, siblings)


def _difference(stage: Stage, manifests: list[Path]) -> str:
    """What sets a stage apart from the nearest one that was made: the part of its identity that changed."""
    made = [known for path in manifests if (known := stages.read_manifest(path.parent)) is not None]
    same_source = [known for known in made if known["config"].get("source") == stage.config.get("source")]
    if not same_source:
        return "not made yet"
    newest = max(same_source, key=lambda known: known["started"])
    changed = sorted(_changed_keys(newest["config"], dict(stage.config)))
    if changed:
        return f"changed: {', '.join(changed[:3])}" + (" ..." if len(changed) > 3 else "")
    inputs = {role: ref.digest for role, ref in stage.inputs.items()}
    if {role: entry["digest"] for role, entry in newest["inputs"].items()} != inputs:
        return "its input changed"
    return "its code changed"


def _changed_keys(old: Any, new: Any, prefix: str = "") -> set[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = {*old, *new}
        return {
            name for key in keys for name in _changed_keys(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        }
    return set() if json.dumps(old) == json.dumps(new) else {prefix}
