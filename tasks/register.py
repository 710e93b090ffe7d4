"""Registers what a run made: the policy and its reward model, with tags that name all they come from.

A registered version has a directory of its own, `register/<fingerprint>/`, of hard links to the stages' files: an
MLmodel may not be written into a finished stage, and the model shall stay when the stage that made it is cleared away.

    policy/  reward/      MLmodel, requirements.txt: what MLflow loads
      model/              the plain Hugging Face folder: what transformers and vLLM load
      README.md           the model card
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from tasks import dag, tracking
from tasks.card import card
from tasks.config import RunConfig
from tasks.stages import Stage, StageRef, finished, read_manifest, run

ROOTS = ("tasks.register", "tasks.card")
LINEAGE = {
    "data": "tokenise",
    "base": "base",
    "reward-base": "reward-base",
    "sft": "sft",
    "reward": "reward",
    "ppo": "ppo",
    "evaluate": "evaluate",
}
"""Role -> key of the stage that a version's tags and card name, if the run has it; each after what it reads."""


@dataclass(frozen=True)
class Registration:
    """The versions that a run's models have in the registry."""

    policy: str
    policy_version: int
    reward: str
    reward_version: int
    directory: str
    cached: bool
    """Both were registered before and their files are whole: nothing was done."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@task(name="register", cache_policy=NO_CACHE, persist_result=False)
def register_models(store: tracking.Store, config: RunConfig, refs: Mapping[str, StageRef], run_id: str | None) -> Any:
    """Register the models of a run as `NAME-policy` and `NAME-reward` with the alias `candidate`.

    Args:
        refs: the run's finished stages by key; ppo, reward and evaluate have to be there.
        run_id: the MLflow run of the flow run.

    Returns a Registration; if nothing had to be done, in a state named Cached.
    """
    registration = register(store, config, refs, run_id)
    return Completed(name="Cached", data=registration) if registration.cached else registration


def register(
    store: tracking.Store, config: RunConfig, refs: Mapping[str, StageRef], run_id: str | None
) -> Registration:
    """What `register_models` does, without Prefect."""
    stage = registration_stage(config, refs)
    folder = run(stage, lambda directory: _link_models(directory, config, refs))
    policy, reward = policy_name(config.name), reward_name(config.name)
    # A version's files may have been made anew elsewhere, and another store knows nothing of it: ask this one.
    before = {name: {version.digest for version in tracking.versions(store, name)} for name in (policy, reward)}
    cached = folder.cached and refs["ppo"].digest in before[policy] and refs["reward"].digest in before[reward]
    numbers = {}
    for name, part, key in ((reward, "reward", "reward"), (policy, "policy", "ppo")):
        tags = version_tags(refs, key)
        summary = _summary(refs, key)
        numbers[name] = tracking.register_version(
            store, name, folder.directory / part, run_id, tags, description="\n".join(summary)
        )
        held = tracking.alias(store, name, tracking.CANDIDATE)
        if held is None or held.version != numbers[name]:
            tracking.set_alias(store, name, tracking.CANDIDATE, numbers[name])
    return Registration(policy, numbers[policy], reward, numbers[reward], folder.path, cached)


def registration_stage(config: RunConfig, refs: Mapping[str, StageRef]) -> Stage:
    """The stage whose directory holds the files of the registered models."""
    inputs = {"policy": refs["ppo"], "reward": refs["reward"], "evaluate": refs["evaluate"]}
    return Stage("register", dag.workspace(config), {"name": config.name}, inputs, ROOTS)


def registered_already(store: tracking.Store, config: RunConfig, refs: Mapping[str, StageRef]) -> bool:
    """Whether `register` would find both models registered in this store and their files whole (for the plan)."""
    if finished(registration_stage(config, refs)) is None:
        return False
    pairs = ((policy_name(config.name), "ppo"), (reward_name(config.name), "reward"))
    return all(refs[key].digest in {v.digest for v in tracking.versions(store, name)} for name, key in pairs)


def policy_name(name: str) -> str:
    """The registered name of a run's policy."""
    return f"{name}-policy"


def reward_name(name: str) -> str:
    """The registered name of a run's reward model."""
    return f"{name}-reward"


def version_tags(refs: Mapping[str, StageRef], key: str) -> dict[str, str]:
    """Tags of the version made by stage `key`: its identity, what it comes from, and its main figures."""
    made = refs[key]
    code = (read_manifest(made.directory) or {}).get("code", {})
    tags = {"digest": made.digest, "fingerprint": made.fingerprint, "code": code.get("digest", "")}
    if "commit" in code:
        tags["commit"] = code["commit"] + ("+changes" if code.get("dirty") else "")
    for role, ref in _lineage(refs, key).items():
        tags[f"input.{role}"] = ref.fingerprint
        tags[f"input.{role}.digest"] = ref.digest
    figures = refs["evaluate" if key == "ppo" else key].metrics
    return tags | {
        f"metric.{name}": f"{value:.6g}"
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _link_models(directory: Path, config: RunConfig, refs: Mapping[str, StageRef]) -> dict[str, Any]:
    """Write policy/ and reward/."""
    parts = (
        ("policy", "ppo", "text-generation", policy_name(config.name)),
        ("reward", "reward", "text-classification", reward_name(config.name)),
    )
    for part, key, pipeline, name in parts:
        folder = directory / part
        _link_tree(refs[key].directory / "model", folder / "model")
        tracking.describe_model(folder, pipeline)
        lineage = _lineage(refs, key) | {"model": refs[key]}
        (folder / "README.md").write_text(card(name, PURPOSES[key], _measured(refs, key), lineage))
    sizes = {part: sum(f.stat().st_size for f in (directory / part / "model").iterdir()) for part, *_ in parts}
    return {f"{part}_bytes": size for part, size in sizes.items()}


PURPOSES = {
    "ppo": "A chat model: fine-tuned on preferred answers, then trained with PPO on a reward model's score.",
    "reward": "A reward model: scores an answer to a prompt; higher is what people preferred.",
}


def _lineage(refs: Mapping[str, StageRef], key: str) -> dict[str, StageRef]:
    """Role -> the stages that stage `key` comes from."""
    before = list(LINEAGE.values()).index(key)
    return {role: refs[stage] for role, stage in list(LINEAGE.items())[:before] if stage in refs}


def _measured(refs: Mapping[str, StageRef], key: str) -> list[tuple[str, Any]]:
    figures = refs["evaluate" if key == "ppo" else key].metrics
    return [(name.replace("_", " "), value) for name, value in figures.items() if isinstance(value, int | float)]


def _summary(refs: Mapping[str, StageRef], key: str) -> list[str]:
    """The description of a version in the registry."""
    measured = ", ".join(f"{name} {value:.4g}" for name, value in _measured(refs, key)[:8])
    return [PURPOSES[key], "", f"Measured: {measured}." if measured else "Not measured."]


def _link_tree(source: Path, target: Path) -> None:
    """Hard links to all files of a folder; copies where the file system has none."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        assert file.is_file(), f"{file}: a model folder is flat"
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
