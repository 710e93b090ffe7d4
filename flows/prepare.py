"""The subflow that prepares the data: raw sets in, token ids out, and the base model whose tokenizer makes them."""

from collections.abc import Iterator

from prefect import flow, unmapped
from prefect.artifacts import create_table_artifact

from tasks import dag, prepare, report
from tasks.config import RunConfig
from tasks.dag import Choice
from tasks.stages import StageRef
from tasks.steps import Run, open_run

Refs = dict[str, StageRef]


@flow(name="prepare", flow_run_name="prepare {config.name}", persist_result=False, validate_parameters=False)
def prepare_data(config: RunConfig, choice: Choice, run_id: str) -> Refs:
    """Prepare the data of a run, up to `choice.until`.

    Args:
        run_id: the MLflow run of the flow run.

    Returns the finished stages by key.
    """
    run = open_run(config, choice, run_id)
    refs: Refs = {}
    for done in _steps(run, refs):
        refs |= done
    lines = report.data_table(refs)
    if lines:
        create_table_artifact([_table_line(line) for line in lines], key="data", description="Rows by source")
    return refs


def _steps(run: Run, refs: Refs) -> Iterator[Refs]:
    """The steps in order. Each yields what it made, and finds all that was made before it in `refs`."""
    graph, wanted = run.graph, run.choice.includes
    sources = list(run.config.data.sources)
    for key in ("base", "reward-base"):
        if key in graph and not graph[key].inputs and wanted("base"):
            yield {key: prepare.base(run, key, refs, return_state=True).result()}
    if "demo" in graph and wanted("demo"):
        yield {"demo": prepare.demo(run, return_state=True).result()}
    if wanted("download"):
        raw = prepare.download.map(unmapped(run), sources, unmapped(refs)).result()
        yield {f"download:{name}": ref for name, ref in zip(sources, raw, strict=True)}
    if wanted("clean"):
        cleaned = prepare.clean.map(unmapped(run), sources, raw).result()
        yield {f"clean:{name}": ref for name, ref in zip(sources, cleaned, strict=True)}
    if wanted("blend"):
        yield {"blend": prepare.blend(run, refs, return_state=True).result()}
    if wanted("split"):
        yield {"split": prepare.split(run, refs["blend"], return_state=True).result()}
    if wanted("base") and graph["base"].inputs:
        yield {"base": prepare.base(run, "base", refs, return_state=True).result()}
    if wanted("tokenise"):
        yield {"tokenise": prepare.tokenise(run, refs["split"], refs["base"], return_state=True).result()}
