"""What Prefect and MLflow cost on top of the steps themselves: a whole run, a trainer's log, the flow's import.

    python tests/bench/overhead.py [demo] [logs] [import] [--config infra/runs/demo.yaml] [--record]

demo     `rlhf run` with everything computed, less the same steps without Prefect and MLflow (a loop over the graph in a
         process of its own, which heeds no metric); and a second run, with all of it cached
         The difference is given twice. `seconds` is over the bare steps alone, whose clock starts when that process has
         its imports; `seconds_over_bare_run` is over the whole process, less its import of Prefect, which comes with
         the steps' modules: it imports what a run needs anyhow, and writes the data's report and the run's, with
         their figures, as a run does. It registers and promotes nothing.
         Training alone takes ten seconds more or less from one run to the next, so `seconds_beside_workers` leaves the
         launched stages out on both sides, by their manifests; what such a stage costs more in a run is not in it.
logs     20,000 lines of a trainer through the way that every step is launched, less a trainer that prints none
import   `import flows.retrain`

The stores (Prefect's database, MLflow's) are made before the clock starts. Beside the seconds on the clock stand those
of the processors, and those that other programs took meanwhile (`others`): a difference means something where these are
small. Other programs lengthen the processors' seconds too, since torch's threads spin while they wait.
"""

import argparse
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

RLHF = Path(sys.executable).with_name("rlhf")
LINES = 20_000
IMPORTS, LAUNCHES = 5, 3
TRAINER = "import sys\nfor step in range(int(sys.argv[1])): print(f'step {step} loss 0.6931 lr 1.0e-05 tokens/s 12345')"


@dataclass(frozen=True)
class Spent:
    """Seconds on the clock, of the processors, and of the processors for other programs."""

    wall: float
    cpu: float
    others: float

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.wall - other.wall, self.cpu - other.cpu, self.others - other.others)


def main() -> None:
    options = _options()
    figures: list[tuple[str, str, float, str, dict[str, Any] | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PREFECT_HOME": f"{folder}/prefect", "DO_NOT_TRACK": "1", "PYTHONPATH": str(ROOT)}
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            os.environ.pop(name, None)
        for case in options.cases:
            figures += MEASURES[case](Path(folder), options.config)
    for case, metric, value, unit, baseline in figures:
        besides = f"   ({baseline['name']}: {baseline['value']:.1f})" if baseline else ""
        print(f"{case:<8}{metric:<24}{value:>10.2f} {unit}{besides}")
    if options.record:
        from tests.bench.records import record

        for case, metric, value, unit, baseline in figures:
            record("overhead", case, metric, value, unit, baseline)


def demo(folder: Path, config: Path) -> list[Any]:
    """A run with everything computed and one with all of it cached, against the bare steps."""
    workspace = folder / "workspace"
    run = [RLHF, "run", str(config), "--set", f"workspace={workspace}"]
    spent_by([*run, "--until", "demo"])  # makes the stores; the demo's raw sets are made anew below
    process, output = spent_by([sys.executable, __file__, "--bare", str(folder / "bare"), "--config", str(config)])
    told = {name: Spent(**spent) for name, spent in json.loads(output.splitlines()[-1]).items()}
    steps, bare_run = told["steps"], process - told["prefect"]
    whole, _ = spent_by([*run, "--from", "demo"])
    cached, _ = spent_by(run)
    print(f"bare steps {steps}\nbare run {bare_run}\nwhole {whole}\ncached {cached}")
    beside = whole.wall - _by_workers(workspace, config)
    bare_beside = bare_run.wall - _by_workers(folder / "bare", config)
    baseline = {"name": "bare run beside its workers", "value": bare_beside}
    figures: list[Any] = [("demo", "seconds_beside_workers", beside - bare_beside, "s", baseline)]
    for name, bare_side, suffix in (("bare steps", steps, ""), ("bare run", bare_run, "_over_bare_run")):
        over = whole - bare_side
        figures += [
            ("demo", f"seconds{suffix}", over.wall, "s", {"name": name, "value": bare_side.wall}),
            ("demo", f"cpu_seconds{suffix}", over.cpu, "s", {"name": name, "value": bare_side.cpu}),
        ]
    return [
        *figures,
        ("demo", "others_cpu_seconds", whole.others, "s", {"name": "bare run", "value": bare_run.others}),
        ("demo", "cached_seconds", cached.wall, "s", None),
        ("demo", "cached_cpu_seconds", cached.cpu, "s", None),
    ]


def _by_workers(workspace: Path, config: Path) -> float:
    """Seconds that the launched stages of a workspace took, each made once."""
    from tasks import dag, stages
    from tasks.config import load

    names = {node.stage for node in dag.graph(load(config)).values() if node.launched}
    made = [stages.read_manifest(folder) for name in names for folder in (workspace / name).glob("*/")]
    return sum(manifest["seconds"] for manifest in made if manifest is not None)


def bare(workspace: Path, config: Path) -> None:
    """The steps up to the evaluation, one after the other, with nobody told, and the two reports.

    Prints what the steps took, and what the import of Prefect.
    """
    from data_prep import workers
    from infra.shipped import SHIPPED
    from tasks import dag, stages
    from tasks.config import load

    begun = so_far(time.process_time())
    assert "prefect" not in sys.modules
    from infra.gpu import GpuInfrastructure
    from tasks import launched, prepare

    prefect = so_far(time.process_time()) - begun
    assert "mlflow" not in sys.modules
    parsed = load(config, [f"workspace={workspace}"])
    infrastructure = GpuInfrastructure(**SHIPPED[parsed.infrastructure])

    def by_worker(stage: stages.Stage, out: Path) -> Any:
        return launched.run_worker(stage, out, infrastructure, lambda *told: None, lambda *told: None)

    def here(stage: stages.Stage, out: Path) -> Any:
        with workers.over_cores() as mapped:
            return prepare.work(stage, out, mapped)

    begun = so_far(time.process_time())
    refs: dict[str, stages.StageRef] = {}
    for node in dag.graph(parsed).values():
        stage = dag.stage(parsed, node, refs)
        started = time.monotonic()
        refs[node.key] = stages.run(stage, partial(by_worker if node.launched else here, stage))
        print(f"{node.key:<40}{time.monotonic() - started:6.2f} s", flush=True)
    steps = so_far(time.process_time()) - begun
    _report(parsed, refs)
    print(json.dumps({"steps": asdict(steps), "prefect": asdict(prefect)}))


def _report(config: Any, refs: Any) -> None:
    """The data's report and the run's, as a run writes them."""
    import yaml

    from tasks import dag, data_report, headlines, report

    data_report.make(config, refs)
    summary = report.RunSummary(
        name=config.name,
        flow_run="bare",
        verdict="Nobody decided.",
        promoted=False,
        rows=headlines.rows(refs.values()),
        refs=refs,
        config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )
    report.write(dag.workspace(config) / "reports" / "bare.html", summary)


def logs(folder: Path, config: Path) -> list[Any]:
    """A flow whose step prints, against one whose step prints nothing; and what of it lies in Prefect's database."""
    from flows.local import PrefectServer

    with PrefectServer(folder / "logs") as server:
        from prefect import flow, task

        from infra import launch

        (folder / "trainer.py").write_text(TRAINER)

        @task
        def train(lines: int) -> float:
            started = time.monotonic()
            env = {"PYTHONPATH": f"{folder}:{ROOT}"}
            outcome = launch.run("trainer", [str(lines)], log=folder / f"{lines}.log", env=env)
            assert outcome.exit_code == 0, outcome.tail
            return time.monotonic() - started

        @flow
        def training(lines: int) -> float:
            return train(lines)

        with server.connected():
            spent = {lines: min(training(lines) for _ in range(LAUNCHES)) for lines in (0, LINES)}
    written = (folder / f"{LINES}.log").read_text().count("\n")
    assert written == LAUNCHES * LINES, f"{written} lines in the log"
    with sqlite3.connect(folder / "prefect" / "prefect.db") as database:
        (rows,) = database.execute("select count(*) from log where message like 'step %'").fetchone()
    return [
        ("logs", "seconds", spent[LINES] - spent[0], "s", {"name": "a step without a line", "value": spent[0]}),
        ("logs", "database_rows", float(rows), "rows", None),
    ]


def imports(folder: Path, config: Path) -> list[Any]:
    """The fastest of a few imports, each in a new process."""
    every = [spent_by([sys.executable, "-c", "import flows.retrain"])[0] for _ in range(IMPORTS)]
    nothing, _ = spent_by([sys.executable, "-c", "pass"])
    baseline = {"name": "Python itself", "value": nothing.wall}
    return [
        ("import", "seconds", min(spent.wall for spent in every), "s", baseline),
        ("import", "cpu_seconds", min(spent.cpu for spent in every), "s", None),
    ]


MEASURES = {"demo": demo, "logs": logs, "import": imports}


def spent_by(command: list[Any]) -> tuple[Spent, str]:
    """What a command and all below it take, and what it prints; shown as well."""
    begun = so_far()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    spent = so_far() - begun
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    print(ended.stdout[-2500:], flush=True)
    return spent, ended.stdout


def so_far(own: float = 0.0) -> Spent:
    """The clock, the processors' seconds of this process's children, with its `own` where given, and of all others."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = usage.ru_utime + usage.ru_stime + own
    return Spent(time.monotonic(), used, _used_by_all() - used)


def _used_by_all() -> float:
    """Seconds that the machine's processors were busy since boot."""
    user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*MEASURES, []], default=[])
    parser.add_argument("--config", type=Path, default=ROOT / "infra" / "runs" / "demo.yaml")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help="append to tests/bench/results/overhead.jsonl")
    options = parser.parse_args()
    options.cases = options.cases or list(MEASURES)
    return options


if __name__ == "__main__":
    if "--bare" in sys.argv:
        given = _options()
        bare(given.bare, given.config)
    else:
        main()
