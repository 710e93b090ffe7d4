"""What Prefect and MLflow cost on top of the steps themselves: a whole run, a trainer's log, the flow's import.

    python tests/bench/overhead.py [demo] [logs] [import] [--config infra/runs/demo.yaml] [--record]

demo     `rlhf run` with everything computed, less the same steps without Prefect and MLflow (a loop over the graph in a
         process of its own, which heeds no metric); and a second run, with all of it cached
logs     20,000 lines of a trainer through the way that every step is launched, less a trainer that prints none
import   `import flows.retrain`

The stores (Prefect's database, MLflow's) are made before the clock starts. Beside the seconds on the clock stand those
of the processors, since another program on the machine lengthens the first alone.
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
    """Seconds on the clock, and of all processors."""

    wall: float
    cpu: float

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.wall - other.wall, self.cpu - other.cpu)


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
    output = told_by([sys.executable, __file__, "--bare", str(folder / "bare"), "--config", str(config)])
    bare = Spent(**json.loads(output.splitlines()[-1]))
    whole = spent_by([*run, "--from", "demo"])
    cached = spent_by(run)
    print(f"bare {bare}\nwhole {whole}\ncached {cached}")
    return [
        ("demo", "seconds", (whole - bare).wall, "s", {"name": "bare steps", "value": bare.wall}),
        ("demo", "cpu_seconds", (whole - bare).cpu, "s", {"name": "bare steps", "value": bare.cpu}),
        ("demo", "cached_seconds", cached.wall, "s", None),
        ("demo", "cached_cpu_seconds", cached.cpu, "s", None),
    ]


def bare(workspace: Path, config: Path) -> None:
    """The steps up to the evaluation, one after the other, with nobody told."""
    from data_prep import workers
    from infra.gpu import GpuInfrastructure
    from infra.shipped import SHIPPED
    from tasks import dag, launched, prepare, stages
    from tasks.config import load

    parsed = load(config, [f"workspace={workspace}"])
    infrastructure = GpuInfrastructure(**SHIPPED[parsed.infrastructure])

    def by_worker(stage: stages.Stage, out: Path) -> Any:
        return launched.run_worker(stage, out, infrastructure, lambda *told: None, lambda *told: None)

    def here(stage: stages.Stage, out: Path) -> Any:
        with workers.over_cores() as mapped:
            return prepare.work(stage, out, mapped)

    begun = Spent(time.monotonic(), time.process_time() + _children())
    refs: dict[str, stages.StageRef] = {}
    for node in dag.graph(parsed).values():
        stage = dag.stage(parsed, node, refs)
        started = time.monotonic()
        refs[node.key] = stages.run(stage, partial(by_worker if node.launched else here, stage))
        print(f"{node.key:<40}{time.monotonic() - started:6.2f} s", flush=True)
    spent = Spent(time.monotonic(), time.process_time() + _children()) - begun
    print(json.dumps(asdict(spent)))


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
    every = [spent_by([sys.executable, "-c", "import flows.retrain"]) for _ in range(IMPORTS)]
    nothing = spent_by([sys.executable, "-c", "pass"])
    baseline = {"name": "Python itself", "value": nothing.wall}
    return [
        ("import", "seconds", min(spent.wall for spent in every), "s", baseline),
        ("import", "cpu_seconds", min(spent.cpu for spent in every), "s", None),
    ]


MEASURES = {"demo": demo, "logs": logs, "import": imports}


def spent_by(command: list[Any]) -> Spent:
    """What a command and all below it take."""
    begun = Spent(time.monotonic(), _children())
    told_by(command)
    return Spent(time.monotonic(), _children()) - begun


def told_by(command: list[Any]) -> str:
    """What a command prints; shown as well."""
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    print(ended.stdout[-2500:], flush=True)
    return ended.stdout


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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
