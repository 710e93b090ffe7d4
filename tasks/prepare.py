"""The steps from raw sets to token ids, as Prefect tasks. All but the base model's are made in this process."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from prefect import get_run_logger, task
from prefect.runtime import task_run

from data_prep import spread, workers
from data_prep.spread import Mapper
from tasks import dag, remote
from tasks.stages import Stage, StageRef, read_manifest
from tasks.steps import STAGE, Run, Work, make, tried_again

Refs = Mapping[str, StageRef]
DELAYS = [5, 30, 120]
"""Seconds before a download is tried again."""


def _is_worth_another_try(error: Any) -> bool:
    """A hub that gave no answer may give one later; whatever else went wrong will again."""
    return isinstance(error, ConnectionError)


@task(name="demo", task_run_name="write the demo's sets", **STAGE)
def demo(run: Run) -> Any:
    """The demo's own six sets, as a local hub."""
    return make(run, "demo", {}, work)


@task(
    name="download",
    task_run_name="download {name}",
    retries=len(DELAYS),
    retry_condition_fn=tried_again(_is_worth_another_try, DELAYS),
    **STAGE,
)
def download(run: Run, name: str, refs: Refs) -> Any:
    """The raw rows of a source."""
    if (tried := (task_run.run_count or 1) - 1) > 0:  # Prefect's own delay would hold up a Ctrl-C until it is over
        get_run_logger().info("Asks the hub again in %d s", DELAYS[tried - 1])
        workers.pause(DELAYS[tried - 1])
    return make(run, f"download:{name}", refs, work)


@task(name="clean", task_run_name="clean {name}", **STAGE)
def clean(run: Run, name: str, raw: StageRef) -> Any:
    """A source's rows as preference pairs, each dropped row with its reason."""
    return make(run, f"clean:{name}", {f"download:{name}": raw}, work)


@task(name="blend", task_run_name="blend", **STAGE)
def blend(run: Run, cleaned: Refs) -> Any:
    """All sources in one set, by weight, without copies."""
    return make(run, "blend", cleaned, _spread(run))


@task(name="split", task_run_name="split", **STAGE)
def split(run: Run, blend: StageRef) -> Any:
    """The pairs of each phase, and those that are held out."""
    from data_prep import ledger

    file = dag.ledger_file(dag.workspace(run.config))
    with dag.ledger_lock(dag.workspace(run.config)):  # the groups of another run come before or after, not between
        made = make(run, "split", {"blend": blend}, _spread(run))
        # Only now: a split that failed, say for a side left empty, does not bind the next try.
        settings = run.graph["split"].config
        ledger.admit(file, blend.directory, settings["eval_fraction"], settings["seed"])
        if run.config.remote is not None:
            remote.store_file(run.config.remote, file)
    return made


@task(name="base", task_run_name="{key}", **STAGE)
def base(run: Run, key: str, refs: Refs) -> Any:
    """A base model, checked, with a tokenizer fit for training."""
    return make(run, key, refs, meanwhile=_load_tokenise)


def _load_tokenise() -> None:
    """What tokenising needs takes five seconds to import: while the worker makes the base model, none are waited."""
    Thread(target=import_module, args=("data_prep.tokenise",), daemon=True).start()


@task(name="tokenise", task_run_name="tokenise", **STAGE)
def tokenise(run: Run, split: StageRef, base: StageRef) -> Any:
    """Token ids of every phase and side."""
    return make(run, "tokenise", {"split": split, "base": base}, _spread(run))


@task(name="ptx", task_run_name="cut the unsupervised text", **STAGE)
def ptx(run: Run, refs: Refs) -> Any:
    """Unsupervised text as chunks of token ids."""
    return make(run, "ptx", refs, work)


def _spread(run: Run) -> Work:
    """`work`, with the shards of a stage spread over the run's Dask cluster, or over this machine's cores."""
    address = run.config.data.cluster

    def spread_out(stage: Stage, out: Path) -> Mapping[str, Any]:
        with spread.over_cluster(address) if address else workers.over_cores() as mapped:
            return work(stage, out, mapped)

    return spread_out


def work(stage: Stage, out: Path, mapped: Mapper = map) -> Mapping[str, Any]:
    """Make one of these stages in `out`. Returns its metrics."""
    inputs = {role: ref.directory for role, ref in stage.inputs.items()} | {"ledger": dag.ledger_file(stage.workspace)}
    return WORK[stage.name](stage.config, inputs, out, mapped)


# The imports are late: a run whose stages are all there needs none of what makes them, and they take seconds.


def _demo(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, mapped: Mapper) -> Mapping[str, Any]:
    from data_prep import demo

    return demo.write_hub(out, config["seed"], config["pairs"])


def _download(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, mapped: Mapper) -> Mapping[str, Any]:
    if "column" in config:
        return _download_text(config, out)
    from data_prep import sources

    spec = sources.SourceSpec(config["source"], path=config["path"], revision=config["revision"], kind=config["kind"])
    hub = str(inputs["demo"]) if "demo" in inputs else config["hub"]
    return sources.download(spec, hub, out, config.get("commit"))


def _download_text(config: Mapping[str, Any], out: Path) -> Mapping[str, Any]:
    from data_prep import unsupervised

    where = {name: config[name] for name in ("subset", "path", "revision", "column")}
    train, test = config["splits"]
    spec = unsupervised.TextSpec(config["source"], **where, train=train, test=test)
    return unsupervised.download_text(spec, config["hub"], out, config.get("commit"))


def _clean(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, mapped: Mapper) -> Mapping[str, Any]:
    from data_prep import clean, sources, workers

    spec = sources.SourceSpec(
        config["source"],
        path=str(inputs["raw"]) if config["local"] else None,  # says only that the set is none of the six
        kind=config["kind"],
        max_rows=config["max_rows"],
        min_score_ratio=config["min_score_ratio"],
        max_pairs_per_prompt=config["max_pairs_per_prompt"],
    )
    arguments = spec, inputs["raw"], out, config["max_chars"]
    large = sources.rows_of(inputs["raw"]) >= workers.ROWS_WORTH_A_PROCESS
    return workers.apart(clean.clean, *arguments) if large else clean.clean(*arguments)


def _blend(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, mapped: Mapper) -> Mapping[str, Any]:
    from data_prep import blend

    cleaned = {name: inputs[name] for name in config["order"]}
    return blend.blend(cleaned, config["weights"], config["seed"], out, mapped)


def _split(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, mapped: Mapper) -> Mapping[str, Any]:
    from data_prep import splits

    settings = config["phases"], config["eval_fraction"], config["seed"]
    metrics = splits.split(inputs["blend"], *settings, out, inputs["ledger"], mapped)
    blended = read_manifest(inputs["blend"])
    assert blended is not None, "an input is a finished stage"
    # After: the split has read its files again, and fails if it finds one.
    return {**metrics, "leaked_tests": {"before": blended["metrics"]["leaked_tests"], "after": 0}}


def _tokenise(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, mapped: Mapper) -> Mapping[str, Any]:
    from data_prep import tokenise

    limits = config["max_prompt_tokens"], config["max_answer_tokens"]
    return tokenise.tokenise(inputs["split"], inputs["base"] / "tokenizer", *limits, out, mapped, _trusted(config))


def _ptx(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, mapped: Mapper) -> Mapping[str, Any]:
    from data_prep import unsupervised

    settings = config["chunk_tokens"], config["document_start"], config["eval_fraction"]
    return unsupervised.chunk(inputs["raw"], inputs["base"] / "tokenizer", *settings, out, _trusted(config))


def _trusted(config: Mapping[str, Any]) -> bool:
    """Whether code that the policy's tokenizer brings may run."""
    return "base" in config.get("trusted", ())


WORK: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Path], Path, Mapper], Mapping[str, Any]]] = {
    "demo": _demo,
    "download": _download,
    "clean": _clean,
    "blend": _blend,
    "split": _split,
    "tokenise": _tokenise,
    "ptx": _ptx,
}
"""Stage -> what makes it: (config, inputs by role, directory, `map` for its shards) -> metrics."""
