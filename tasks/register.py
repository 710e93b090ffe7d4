"""Registers what a run made: the policy and its reward model, with tags that name all they come from.

A registered version has a directory of its own, `register/<fingerprint>/`, of hard links to the stages' files: an
MLmodel may not be written into a finished stage, and the model shall stay when the stage that made it is cleared away.

    policy/ reward/ ema/  MLmodel, requirements.txt: what MLflow loads
      model/              the plain Hugging Face folder: what transformers and vLLM load
      README.md           the model card
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from data_prep import licences
from tasks import dag, gates, lineage, tracking
from tasks.card import Licences, card
from tasks.config import RunConfig
from tasks.stages import Stage, StageRef, finished, read_manifest, run
from tasks.tracking.mlmodel import describe_model

ROOTS = ("tasks.register", "tasks.card", "tasks.lineage", "tasks.tracking.mlmodel")
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
    ema: str | None
    """The moving average of the policy's weights; None where the run kept none."""
    ema_version: int | None
    directory: str
    cached: bool
    """All were registered before and their files are whole: nothing was done."""
    seconds: float = 0.0
    """What it took; if nothing was done, what it took then to link the models' folders."""

    @property
    def versions(self) -> dict[str, int]:
        """Registered name -> version."""
        names = {self.policy: self.policy_version, self.reward: self.reward_version}
        return names | ({self.ema: self.ema_version} if self.ema and self.ema_version else {})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def register_models(store: tracking.Store, config: RunConfig, refs: Mapping[str, StageRef], run_id: str | None) -> Any:
    """Register the models of a run as `NAME-policy`, `NAME-reward` and `NAME-ema` with the alias `candidate`.

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
    began = time.monotonic()
    stage = registration_stage(config, refs)
    folder = run(stage, lambda directory: _link_models(directory, config, refs))
    made = models(config, refs)
    # A version's files may have been made anew elsewhere, and another store knows nothing of it: ask this one.
    before = {model.name: {version.digest for version in tracking.versions(store, model.name)} for model in made}
    cached = folder.cached and all(refs[model.stage].digest in before[model.name] for model in made)
    numbers = {}
    for model in made:
        tags = version_tags(refs, model)
        description = "\n".join(_summary(refs, model))
        if run_id is not None and refs[model.stage].digest not in before[model.name]:
            table = refs["tokenise"].directory / f"{'ppo' if model.stage == 'ppo' else 'reward'}-eval.arrow"
            tags["logged_model"] = tracking.log_model(store, run_id, model.name, measured(refs, model), table)
        number = tracking.register_version(store, model.name, folder.directory / model.part, run_id, tags, description)
        tracking.set_alias(store, model.name, tracking.CANDIDATE, number)
        numbers[model.part] = number
    ema = ema_name(config.name) if "ema" in numbers else None
    if ema is None:  # another policy's average is none of this candidate
        tracking.set_alias(store, ema_name(config.name), tracking.CANDIDATE, None)
    return Registration(
        policy_name(config.name),
        numbers["policy"],
        reward_name(config.name),
        numbers["reward"],
        ema,
        numbers.get("ema"),
        folder.path,
        cached,
        folder.seconds if cached else time.monotonic() - began,
    )


@dataclass(frozen=True)
class Model:
    """A model that a run registers."""

    name: str
    part: str
    """Folder in the registration's directory."""
    stage: str
    """Key of the stage that made it."""
    folder: str
    """Where in that stage's directory."""
    pipeline: str
    purpose: str


def models(config: RunConfig, refs: Mapping[str, StageRef]) -> list[Model]:
    """What a run registers, the policy last: whoever sees a new policy finds what belongs to it in place."""
    generation = "text-generation"
    reward = Model(reward_name(config.name), "reward", "reward", "model", "text-classification", PURPOSES["reward"])
    ema = Model(ema_name(config.name), "ema", "ppo", "ema", generation, PURPOSES["ema"])
    policy = Model(policy_name(config.name), "policy", "ppo", "model", generation, PURPOSES["policy"])
    return [reward, *([ema] if (refs["ppo"].directory / "ema").is_dir() else []), policy]


def registration_stage(config: RunConfig, refs: Mapping[str, StageRef]) -> Stage:
    """The stage whose directory holds the files of the registered models."""
    inputs = {"policy": refs["ppo"], "reward": refs["reward"], "evaluate": refs["evaluate"]}
    return Stage("register", dag.workspace(config), {"name": config.name}, inputs, ROOTS, config.remote)


def registered_already(store: tracking.Store, config: RunConfig, refs: Mapping[str, StageRef]) -> bool:
    """Whether `register` would find all models registered in this store and their files whole (for the plan)."""
    if finished(registration_stage(config, refs)) is None:
        return False
    return all(
        refs[model.stage].digest in {version.digest for version in tracking.versions(store, model.name)}
        for model in models(config, refs)
    )


def policy_name(name: str) -> str:
    """The registered name of a run's policy."""
    return f"{name}-policy"


def reward_name(name: str) -> str:
    """The registered name of a run's reward model."""
    return f"{name}-reward"


def ema_name(name: str) -> str:
    """The registered name of the moving average of a run's policy."""
    return f"{name}-ema"


def version_tags(refs: Mapping[str, StageRef], model: Model) -> dict[str, str]:
    """Tags of a model's version: its identity, what it comes from, and what was measured of it."""
    made = refs[model.stage]
    code = (read_manifest(made.directory) or {}).get("code", {})
    tags = {"digest": made.digest, "fingerprint": made.fingerprint, "code": code.get("digest", "")}
    if "commit" in code:
        tags["commit"] = code["commit"] + ("+changes" if code.get("dirty") else "")
    for role, ref in _lineage(refs, model.stage).items():
        tags[f"input.{role}"] = ref.fingerprint
        tags[f"input.{role}.digest"] = ref.digest
    return tags | {f"metric.{name}": f"{value:.6g}" for name, value in measured(refs, model).items()}


def measured(refs: Mapping[str, StageRef], model: Model) -> dict[str, float]:
    """The figures of a model: the reward stage's, or those of the evaluation that are about this policy."""
    found = refs["evaluate" if model.stage == "ppo" else model.stage].metrics
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and (model.stage != "ppo" or name == "prompts" or name.startswith("ema_") == (model.part == "ema"))
    }


def _link_models(directory: Path, config: RunConfig, refs: Mapping[str, StageRef]) -> dict[str, Any]:
    """Write a folder per model."""
    sizes = {}
    for model in models(config, refs):
        folder = directory / model.part
        made = refs[model.stage]
        _link_tree(made.directory / model.folder, folder / "model")
        describe_model(folder, model.pipeline, gates.answers(refs["evaluate"].directory)[0]["prompt"])
        record = lineage.write(folder, made.directory)
        made_from = _lineage(refs, model.stage) | {"model": made}
        wanted = config.promote.gates.sentences if model.part == "policy" else {}
        told = card(
            model.name, model.purpose, _lines(refs, model), wanted, record, _licences(config, refs, record), made_from
        )
        (folder / "README.md").write_text(told)
        sizes[f"{model.part}_bytes"] = sum(file.stat().st_size for file in (folder / "model").iterdir())
    return sizes


def _licences(config: RunConfig, refs: Mapping[str, StageRef], record: lineage.Record) -> Licences:
    """Of the sets and of the base model behind a model."""
    stated = {name: source.licence for name, source in config.data.sources.items()}
    names = {source.name for source in lineage.sources(record)}
    sets = {name: licences.of_set(name, stated.get(name)) for name in names}
    if config.data.demo is not None:
        sets = dict.fromkeys(names, "generated by this project, Apache-2.0")
    return Licences(sets, _base_licence(config, refs["base"].directory))


def _base_licence(config: RunConfig, base: Path) -> str:
    if not isinstance(config.models.policy, str):
        return "none, its weights were drawn at random"
    if str(config.models.policy_revision).startswith("models:/"):
        return f"that of {config.models.policy_revision}"
    pointer = base / "base.json"
    return licences.of_model(Path(json.loads(pointer.read_text())["model"]) if pointer.is_file() else base / "model")


PURPOSES = {
    "policy": "A chat model: fine-tuned on preferred answers, then trained with PPO on a reward model's score.",
    "ema": "A chat model: the moving average of a policy's weights during PPO.",
    "reward": "A reward model: scores an answer to a prompt; higher is what people preferred.",
}


def _lineage(refs: Mapping[str, StageRef], key: str) -> dict[str, StageRef]:
    """Role -> the stages that stage `key` comes from."""
    before = list(LINEAGE.values()).index(key)
    return {role: refs[stage] for role, stage in list(LINEAGE.items())[:before] if stage in refs}


def _lines(refs: Mapping[str, StageRef], model: Model) -> list[tuple[str, Any]]:
    return [(name.replace("_", " "), value) for name, value in measured(refs, model).items()]


def _summary(refs: Mapping[str, StageRef], model: Model) -> list[str]:
    """The description of a version in the registry."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in _lines(refs, model)[:8])
    return [model.purpose, "", f"Measured: {figures}." if figures else "Not measured."]


def _link_tree(source: Path, target: Path) -> None:
    """Hard links to all files of a folder; copies where the file system has none."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        assert file.is_file(), f"{file}: a model folder is flat"
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
