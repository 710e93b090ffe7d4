"""The subflow that prepares the data: raw sets in, token ids out, and the base model whose tokenizer makes them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prefect import Flow, flow, unmapped
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from data_prep.workers import stopped_together
from tasks import data_report, page, prepare, steps, tracking
from tasks.config import ConfigError, RunConfig
from tasks.dag import Choice
from tasks.stages import StageRef
from tasks.steps import Run, open_run

Refs = dict[str, StageRef]
if TYPE_CHECKING:
    Formless = RunConfig
else:
    Formless = Any  # nobody starts a subflow by a form, which Prefect takes a tenth of a second at import to make


def preparation(config: RunConfig) -> Flow[[RunConfig, Choice, str], Refs]:
    """The subflow for a config: it maps the sources over threads, or over the workers of its Dask cluster."""
    if config.data.cluster is None:
        return prepare_data
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise ConfigError("data.cluster: prefect-dask is not installed; pip install 'rlhf-flows[dask]'") from None
    return prepare_data.with_options(task_runner=DaskTaskRunner(address=config.data.cluster))


@flow(name="prepare", flow_run_name="prepare {config.name}", persist_result=False, validate_parameters=False)
def prepare_data(config: Formless, choice: Choice, run_id: str) -> Refs:
    """Prepare the data of a run, up to `choice.until`.

    Args:
        run_id: the MLflow run of the flow run.

    Returns the finished stages by key.
    """
    run = open_run(config, choice, run_id)
    refs: Refs = {}
    with stopped_together():
        for made in _steps(run, refs):
            refs |= made
            if choice.is_reached(run.graph, refs):
                break
    if lines := data_report.data_table(refs):
        create_table_artifact(rows_by_source(lines), key="data", description="Rows by source, and drops by reason")
    if "tokenise" in refs:
        _report(run, refs)
    return refs


def _report(run: Run, refs: Refs) -> None:
    """The data's report as artifacts, and the sources as dataset inputs of the MLflow run."""
    made = data_report.make(run.config, refs)
    text = data_report.markdown(refs, made)
    create_markdown_artifact(text, key="data-report", description="Lengths, shares, drops, length bias")
    if not made.cached:  # else an earlier run has the same picture
        picture = (made.directory / data_report.FIGURES).read_bytes()
        create_image_artifact(page.embedded(picture), key="data-figures", description="The same, drawn")
    tracking.log_sources(run.store, run.run_id, steps.sources(run.config, refs))
    tracking.log_file(run.store, run.run_id, made.directory / data_report.PAGE, "data")


def _steps(run: Run, refs: Refs) -> Iterator[Refs]:
    """The steps in order. Each yields what it made, and finds all that was made before it in `refs`."""
    sources = list(run.config.data.sources)
    downloads = [node.source for node in run.graph.values() if node.stage == "download"]
    for key in ("base", "reward-base"):
        if key in run.graph and not run.graph[key].inputs:  # a model that is there already: checked before all else
            yield {key: prepare.base(run, key, refs, return_state=True).result()}
    if "demo" in run.graph:
        yield {"demo": prepare.demo(run, return_state=True).result()}
    raw = prepare.download.map(unmapped(run), downloads, unmapped(refs)).result()
    yield {f"download:{name}": ref for name, ref in zip(downloads, raw, strict=True)}
    cleaned = prepare.clean.map(unmapped(run), sources, raw[: len(sources)]).result()
    yield {f"clean:{name}": ref for name, ref in zip(sources, cleaned, strict=True)}
    yield {"blend": prepare.blend(run, refs, return_state=True).result()}
    yield {"split": prepare.split(run, refs["blend"], return_state=True).result()}
    if "base" not in refs:
        yield {"base": prepare.base(run, "base", refs, return_state=True).result()}
    yield {"tokenise": prepare.tokenise(run, refs["split"], refs["base"], return_state=True).result()}
    if "ptx" in run.graph:
        yield {"ptx": prepare.ptx(run, refs, return_state=True).result()}


def rows_by_source(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of `data_report.data_table` as a table in Prefect: a column per reason for which rows were dropped."""
    reasons = sorted({reason for line in lines for reason in line["counts"]})
    return [
        {"source": line["name"], "rows": line["rows_in"], "kept": line["kept"]}
        | {reason: line["counts"][reason] for reason in reasons}
        for line in lines
    ]
