"""The graph of a run: every stage, what it reads, and which config and code decide its result.

The flow, its tasks and `rlhf plan` share this one table, so that what the plan promises is what the flow does. Nothing
here imports Prefect or torch: building the graph takes milliseconds, and touches no more than the names, sizes and
times of local input files. What of a stage's identity is known only once its inputs are there is added by `stage`.
"""

import difflib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from data_prep.model_files import TOKENIZER_FILES
from tasks import remote, untrusted
from tasks.config import (
    SIX_SETS,
    UNSUPERVISED,
    ConfigError,
    PPOConfig,
    RunConfig,
    SourceConfig,
    TinyModel,
    TrainConfig,
)
from tasks.stages import Stage, StageRef, finished

STAGES = (
    *("demo", "download", "clean", "blend", "split", "base", "tokenise", "ptx"),
    *("sft", "reward", "gold", "ppo", "evaluate", "verdicts"),
)
"""The stages that leave a directory; `--force` takes one of them."""
STEPS = (*STAGES, "register", "promote")
"""What a run does, by the names that `--from` and `--until` take."""
EVALUATION = ("tasks.evaluate", "tasks.compared", "tasks.paired", "tasks.diversity")
"""Modules whose code decides an evaluation."""


@dataclass(frozen=True)
class Node:
    """One stage of a run, before its inputs are known."""

    key: str
    """Names it in this run: the stage's name, or `stage:source` where there is one per source."""
    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Role -> key of the node that is read."""
    roots: tuple[str, ...]
    """Modules whose code, with all that it imports of ours, decides the result."""
    launched: bool = False
    """Made by `tasks.worker` in processes of its own, not in this one."""
    resumable: bool = False

    @property
    def source(self) -> str | None:
        """The preference set that this node is about, None where it is about all."""
        return self.key.partition(":")[2] or None


Graph = Mapping[str, Node]
"""Key -> node, every node after its inputs."""


@dataclass(frozen=True)
class Choice:
    """What the user wants of a run beyond its config."""

    from_step: str | None = None
    """Everything before it has to be finished; it and all after it are made anew."""
    until: str | None = None
    """The last step."""
    force: str | None = None
    """This one stage is made anew, whatever lies there."""

    def __post_init__(self) -> None:
        _known("--from", self.from_step, STEPS)
        _known("--until", self.until, STEPS)
        _known("--force", self.force, STAGES)
        if self.from_step and self.until and STEPS.index(self.from_step) > STEPS.index(self.until):
            raise ConfigError(f"--until {self.until} comes before --from {self.from_step}; swap them")

    def forces(self, stage: str) -> bool:
        """Whether a stage is made anew even if it is finished."""
        return stage == self.force or (self.from_step is not None and not self.must_be_finished(stage))

    def must_be_finished(self, stage: str) -> bool:
        """Whether a stage stands before `--from`."""
        return self.from_step is not None and STEPS.index(stage) < STEPS.index(self.from_step)

    def is_reached(self, graph: "Graph", done: Container[str]) -> bool:
        """Whether `--until` is a stage of which every node is done: then the run ends."""
        return self.until in STAGES and all(key in done for key, node in graph.items() if node.stage == self.until)

    def check(self, graph: "Graph") -> None:
        """ConfigError if a stage is named that this run has not."""
        present = {node.stage for node in graph.values()} | set(STEPS) - set(STAGES)
        for option, name in (("--from", self.from_step), ("--until", self.until), ("--force", self.force)):
            if name is not None and name not in present:
                raise ConfigError(f"{option} {name}: this run has no such stage; it has {', '.join(sorted(present))}")


def graph(config: RunConfig) -> dict[str, Node]:
    """Key -> node of every stage of a run, each after its inputs.

    Raises ConfigError for local input that is not there: it is cheaper to say so before any work.
    """
    nodes = [*_base_first(config), *_sources(config), *_data(config), *_training(config)]
    trusted = _trusted(config)
    return {node.key: _trusting(node, trusted) for node in nodes}


def workspace(config: RunConfig) -> Path:
    """The folder of all stage directories."""
    return Path(config.workspace).expanduser().resolve()


def stage(config: RunConfig, node: Node, refs: Mapping[str, StageRef]) -> Stage:
    """A node with its inputs, ready to be looked up or made; `refs` are finished stages by key.

    Raises ConnectionError for a set of the hub that gives no answer, where nothing of it was downloaded before.
    """
    inputs = {role: refs[key] for role, key in node.inputs.items()}
    settings = node.config
    if node.stage == "download" and settings["path"] is None and settings["hub"] is None and "demo" not in inputs:
        settings = {**settings, "commit": _commit(settings)}
    if node.stage == "split":
        follow_ledger(config)
        settings = {**settings, "homes": _homes(settings, inputs["blend"].directory, ledger_file(workspace(config)))}
    return Stage(node.stage, workspace(config), settings, inputs, node.roots, config.remote)


def _commit(download: Mapping[str, Any]) -> str:
    """The commit on the hub that a set is read at: a run notices rows that were added since the last one."""
    from data_prep.sources import SOURCES, commit_of

    name, revision = download["source"], download["revision"]
    known = SOURCES[name].revision if name in SOURCES else "main"
    return commit_of(name, revision or known)


def ledger_file(workspace: Path) -> Path:
    """The split ledger of a workspace."""
    return workspace / "ledger.parquet"


def ledger_lock(workspace: Path) -> FileLock:
    """What whoever writes the ledger holds; whoever holds it may take it again."""
    file = ledger_file(workspace)
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file.with_name(f".{file.name}.lock"), is_singleton=True)


def follow_ledger(config: RunConfig) -> None:
    """Take over the remote's ledger where another machine has split since. ConfigError where both have, apart."""
    file = ledger_file(workspace(config))
    if config.remote is None or (found := remote.fetch_file(config.remote, file)) is None:
        return
    from data_prep.ledger import follow

    try:
        with ledger_lock(workspace(config)):
            follow(file, found)
    except ValueError as error:
        raise ConfigError(f"remote: {error}") from None


def _homes(split: Mapping[str, Any], blended: Path, ledger: Path) -> str:
    """What the ledger says of a blended set's groups. Once it has taken them in, it says the same for ever."""
    from data_prep.ledger import Ledger, digest_of, read_groups

    return digest_of(Ledger.read(ledger).settle(read_groups(blended), split["eval_fraction"], split["seed"]))


def comparison(config: RunConfig, refs: Mapping[str, StageRef], champion: StageRef) -> Stage:
    """The stage that sets a run's candidate against the present champion.

    A part of promotion and not of the graph: which model is champion is known only when the candidate is registered.
    Where the champion's own evaluation, on the same data and by the same reward models, is here, its answers are read
    (role `answered`); but a comparison that was made without it is not made again.
    """
    roles = {
        "data": "tokenise",
        "split": "split",
        "base": "base",
        "reward": "reward",
        "evaluate": "evaluate",
        "candidate": "ppo",
        **_gold_role(config),
    }
    inputs = {role: refs[key] for role, key in roles.items()} | {"champion": champion}
    trusted = _trusted(config)
    roles["champion"] = "ppo"  # as far as its code is the candidate's (`tasks.evaluate`)
    node = _trusting(Node("compare", "compare", _evaluation(config), roles, EVALUATION), trusted)
    anew = Stage("compare", workspace(config), node.config, inputs, EVALUATION, config.remote)
    own = stage(config, _trusting(_evaluate(config), trusted), {**refs, "ppo": champion})
    if finished(anew) is None and (answered := finished(own)) is not None:
        return replace(anew, inputs={**inputs, "answered": answered})
    return anew


def _trusted(config: RunConfig) -> set[str]:
    """Keys of the stages whose model may bring code that runs: the bases that the config says it of, and what they
    become."""
    models = config.models
    keys = {"base", "sft", "ppo"} if models.policy_trust_remote_code else set()
    if models.reward is not None and models.reward_trust_remote_code:
        keys.add("reward-base")
    keys |= {"reward"} if _reward_base(config) in keys else set()
    return keys | ({"gold"} if _gold_base(config) in keys else set())


def _trusting(node: Node, trusted: Container[str]) -> Node:
    """The node, its config with the roles whose model's code may run (`Job.trusts`), where there are any."""
    roles = [role for role, key in node.inputs.items() if key in trusted]
    roles += ["model"] if node.stage == "base" and node.key in trusted else []
    return replace(node, config={**node.config, "trusted": sorted(roles)}) if roles else node


def _base_first(config: RunConfig) -> list[Node]:
    """The models that are there before the data: what is wrong with them shows before any other work."""
    nodes = []
    models = config.models
    if isinstance(models.policy, str):
        nodes.append(_model("base", models.policy, models.policy_revision, "models.policy"))
    if models.reward is not None:
        nodes.append(_model("reward-base", models.reward, models.reward_revision, "models.reward"))
    return nodes


def _model(key: str, name: str, revision: str | None, where: str) -> Node:
    folder = Path(name).expanduser()
    config: dict[str, Any] = {"model": name, "revision": revision}
    if name.startswith("models:/"):  # a registered one, of which only a run's beginning tells the version
        return Node(key, "base", config, {}, ("tasks.base",), launched=True)
    if folder.is_dir() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        _check_model_folder(folder, where)
        registered = revision if revision and revision.startswith("models:/") else None
        files = _signature(folder, folder.iterdir())
        config = {"model": str(folder.resolve()), "revision": registered, "files": files}
    return Node(key, "base", config, {}, ("tasks.base",), launched=True)


def _check_model_folder(folder: Path, where: str) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{where}: there is no model folder {folder}; correct the path, or give a name of the hub")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{where}: {folder} is no model folder, it has no config.json; point it at one that has")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"{where}: {folder} holds no tokenizer; copy the model's tokenizer files into it")
    try:
        untrusted.check_weights(folder)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _sources(config: RunConfig) -> list[Node]:
    """Download and clean of every source, and before them the demo's own hub."""
    data = config.data
    nodes = []
    if data.demo is not None:
        demo = {"pairs": data.demo.pairs, "seed": data.demo.seed}
        nodes.append(Node("demo", "demo", demo, {}, ("data_prep.demo",)))
    nodes += [_download(config, name, source) for name, source in data.sources.items()]
    if _reads_text(config):
        nodes.append(_text(config))
    nodes += [_clean(config, name, source) for name, source in data.sources.items()]
    return nodes


def _download(config: RunConfig, name: str, source: SourceConfig) -> Node:
    if source.path is None and source.kind is None and name not in SIX_SETS:
        near = difflib.get_close_matches(name, SIX_SETS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(SIX_SETS)}"
        raise ConfigError(
            f"data.sources: unknown set {name}; {hint} (for a file of your own, give its path; for another set, its "
            "kind)"
        )
    settings: dict[str, Any] = {
        "source": name,
        "kind": source.kind,
        "path": None,
        "revision": source.revision,
        "hub": None,
    }
    inputs = {}
    if source.path is not None:
        settings |= _local_file(f"data.sources.{name}", Path(source.path).expanduser())
    elif config.data.demo is not None:
        inputs = {"demo": "demo"}
    elif config.data.hub is not None:
        settings |= _mirror(name, Path(config.data.hub).expanduser())
    return Node(f"download:{name}", "download", settings, inputs, ("data_prep.sources",))


def _reads_text(config: RunConfig) -> bool:
    """Whether there is unsupervised text. ConfigError if there is none for PPO to learn from."""
    if config.ppo.ptx_coef > 0 and config.data.unsupervised is None:
        raise ConfigError(
            f"ppo.ptx_coef is {config.ppo.ptx_coef:g}, but there is no unsupervised text; name some as "
            "data.unsupervised, or set ppo.ptx_coef: 0"
        )
    return config.data.unsupervised is not None


def _text(config: RunConfig) -> Node:
    """The raw unsupervised text."""
    text = config.data.unsupervised
    assert text is not None
    settings: dict[str, Any] = {
        "source": text.name or Path(text.path or "").name,
        "subset": text.subset,
        "path": None,
        "revision": text.revision,
        "column": text.column,
        "splits": [text.train_split, text.eval_split],
        "hub": None,
    }
    if text.path is not None:
        settings |= _local_file("data.unsupervised", Path(text.path).expanduser())
    elif config.data.hub is not None:
        settings |= _mirror(str(text.name), Path(config.data.hub).expanduser())
    return Node(f"download:{UNSUPERVISED}", "download", settings, {}, ("data_prep.unsupervised",))


def _local_file(where: str, path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"{where}.path: there is no file or folder {path}; correct the path")
    files = path.iterdir() if path.is_dir() else [path]
    return {"path": str(path.resolve()), "files": _signature(path if path.is_dir() else path.parent, files)}


def _mirror(name: str, hub: Path) -> dict[str, Any]:
    if not hub.is_dir():
        raise ConfigError(f"data.hub: there is no folder {hub}; correct it, or leave it out for the Hugging Face hub")
    if not (hub / name).is_dir():
        raise ConfigError(f"data.hub: the mirror {hub} has no folder {name}; complete it, or leave out that source")
    return {"hub": str(hub.resolve()), "files": _signature(hub / name, (hub / name).rglob("*.parquet"))}


def _signature(folder: Path, files: Iterable[Path]) -> dict[str, list[int]]:
    """Name -> size and time of files that are read where they lie: enough to notice that they changed.

    Digests would be the better identity, but gigabytes of input would be read before every run. A file that was only
    touched is read again, gives the same output, and nothing after it runs.
    """
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in sorted(files) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _clean(config: RunConfig, name: str, source: SourceConfig) -> Node:
    settings = {
        "source": name,
        "kind": source.kind,
        "local": source.path is not None,
        "max_rows": source.max_rows,
        "min_score_ratio": source.min_score_ratio,
        "max_pairs_per_prompt": source.max_pairs_per_prompt,
        "max_chars": config.data.max_chars,
    }
    return Node(f"clean:{name}", "clean", settings, {"raw": f"download:{name}"}, ("data_prep.clean",))


def _data(config: RunConfig) -> list[Node]:
    """From the cleaned sources to token ids."""
    data, seed = config.data, config.seed
    # Rows that two sources share stay with the first, so the order counts; a JSON object alone would not keep it.
    blend = {"weights": {name: s.weight for name, s in data.sources.items()}, "order": list(data.sources), "seed": seed}
    split = {"phases": list(data.phases), "eval_fraction": data.eval_fraction, "seed": seed}
    limits = {"max_prompt_tokens": data.max_prompt_tokens, "max_answer_tokens": data.max_answer_tokens}
    nodes = [
        Node("blend", "blend", blend, {name: f"clean:{name}" for name in data.sources}, ("data_prep.blend",)),
        Node("split", "split", split, {"blend": "blend"}, ("data_prep.splits",)),
    ]
    if isinstance(config.models.policy, TinyModel):
        tiny = {"model": config.models.policy.model_dump(mode="json"), "seed": seed}
        nodes.append(Node("base", "base", tiny, {"split": "split"}, ("tasks.base",), launched=True))
    inputs = {"split": "split", "base": "base"}
    nodes.append(Node("tokenise", "tokenise", limits, inputs, ("data_prep.tokenise",)))
    if data.unsupervised is not None:
        text = {
            "chunk_tokens": data.unsupervised.chunk_tokens,
            "document_start": data.unsupervised.document_start,
            "eval_fraction": data.eval_fraction,
        }
        inputs = {"raw": f"download:{UNSUPERVISED}", "base": "base"}
        nodes.append(Node("ptx", "ptx", text, inputs, ("data_prep.unsupervised",)))
    return nodes


def _training(config: RunConfig) -> list[Node]:
    """The stages that run in the worker on the infrastructure of the run."""
    answers = {"max_answer_tokens": config.data.max_answer_tokens}
    sft = {"sft": _dumped(config.sft), "seed": _seed(config, config.sft)}
    reward = {"reward": _dumped(config.reward), "seed": _seed(config, config.reward)}
    ppo = {"ppo": _dumped(config.ppo), "seed": _seed(config, config.ppo), **answers}
    data = {"data": "tokenise", "split": "split"}
    learnt = {"text": "ptx"} if config.ppo.ptx_coef > 0 else {}
    gold = {"gold": _dumped(config.gold), "seed": _seed(config, config.gold) + 1, "phase": "judge"}
    return [
        _trained("sft", sft, {**data, "base": "base"}),
        _trained("reward", reward, {**data, "base": _reward_base(config)}),
        *([_gold(gold, {**data, "base": _gold_base(config)})] if config.has_gold else []),
        _trained("ppo", ppo, {**data, **learnt, "sft": "sft", "reward": "reward"}),
        _evaluate(config),
        *([_verdicts(config, "evaluate")] if config.evaluate.api_judge is not None else []),
    ]


def _evaluate(config: RunConfig) -> Node:
    models = {**_gold_role(config), "sft": "sft", "reward": "reward", "ppo": "ppo"}
    text = {"text": "ptx"} if config.data.unsupervised is not None else {}
    inputs = {"data": "tokenise", "split": "split", **text, **models}
    return Node("evaluate", "evaluate", _evaluation(config), inputs, EVALUATION, launched=True)


def _dumped(section: TrainConfig | PPOConfig) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude={"seed"})  # which stands beside the section


def _seed(config: RunConfig, section: TrainConfig | PPOConfig) -> int:
    return config.seed if section.seed is None else section.seed


def _reward_base(config: RunConfig) -> str:
    return "reward-base" if config.models.reward is not None else "sft"


def _gold_base(config: RunConfig) -> str:
    # One that starts from a registered reward model would share its errors, which is what it is to show.
    return "sft" if str(config.models.reward_revision).startswith("models:/") else _reward_base(config)


def verdicts_on(config: RunConfig, answers: StageRef) -> Stage:
    """The stage that asks a judge behind an API about the answers of a comparison with the champion."""
    node = _verdicts(config, "compare")
    return Stage(node.stage, workspace(config), node.config, {"compare": answers}, node.roots, config.remote)


def _verdicts(config: RunConfig, answers: str) -> Node:
    assert config.evaluate.api_judge is not None
    # How it is reached and how fast changes no verdict, so that verdicts that were paid for stay.
    reached = {"key_variable", "calls_per_minute", "retries", "timeout_seconds"}
    settings = config.evaluate.api_judge.model_dump(mode="json", exclude=reached)
    roots = ("tasks.api_judge", "tasks.paired")
    return Node("verdicts", "verdicts", settings, {answers: answers}, roots, resumable=True)


def _trained(name: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Node:
    return Node(name, name, config, inputs, (f"tasks.training.{name}",), launched=True, resumable=True)


def _gold(config: Mapping[str, Any], inputs: Mapping[str, str]) -> Node:
    return Node("gold", "gold", config, inputs, ("tasks.training.reward",), launched=True, resumable=True)


def _gold_role(config: RunConfig) -> dict[str, str]:
    """The gold reward model as an input, if the run has one."""
    return {"gold": "gold"} if config.has_gold else {}


def _evaluation(config: RunConfig) -> dict[str, Any]:
    return {
        "evaluate": config.evaluate.model_dump(mode="json", exclude={"api_judge", "samples"}),
        "seed": config.seed,
        "max_answer_tokens": config.data.max_answer_tokens,
        "true_score": "demo" if config.data.demo is not None else None,
    }


def _known(option: str, name: str | None, names: tuple[str, ...]) -> None:
    if name is not None and name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise ConfigError(f"{option} {name}: unknown step; {hint}")
