"""The whole flow through the command line, with the real worker: what a user does on one day, in that order.

The runs build on each other, so each is a fixture of the module: a test takes the runs that it speaks of.
"""

import json
import os
import re
import signal
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.owned import processes_with
from tasks import tracking
from tasks.stages import read_manifest
from tests.api import ask

# Slow as a whole: with the other tests it would pass the ten minutes of `make test`. A run is a fixture of the first
# test that speaks of it, hence the long limit.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Rlhf = Callable[..., Any]
SOURCES = 6
STAGES = 3 + 2 * SOURCES + 7  # demo, blend, split; download and clean; base, tokenise, sft, rewards, ppo, evaluate
NEW_PPO = ("--set", "ppo.kl_coef=0.2", "--set", "ppo.steps=15")
STRICT = ("--set", "promote.gates.win_rate_vs_champion=>= 0.99")


@pytest.fixture(scope="module")
def first(rlhf: Rlhf) -> Any:
    """A first run, with a server of its own."""
    return rlhf("run").end()


@pytest.fixture(scope="module")
def again(rlhf: Rlhf, first: Any, folder: Path, prefect_api: str) -> tuple[Any, dict[str, float]]:
    """The same run a second time, and when each manifest was written before."""
    written = manifests(folder)
    return rlhf("run", api=prefect_api).end(), written


@pytest.fixture(scope="module")
def interrupted(rlhf: Rlhf, again: Any, folder: Path) -> tuple[Any, Path]:
    """A run with another PPO that gets Ctrl-C after a checkpoint, and the directory of its PPO."""
    before = set((folder / "workspace" / "ppo").glob("*/"))
    command = rlhf("run", *NEW_PPO)
    pointer = command.wait_for(
        lambda: [
            p for p in (folder / "workspace" / "ppo").glob("*/checkpoints/latest.json") if p.parents[1] not in before
        ]
    )[0]
    command.process.send_signal(signal.SIGINT)
    return command.end(), pointer.parents[1]


@pytest.fixture(scope="module")
def resumed(rlhf: Rlhf, interrupted: Any, folder: Path, prefect_api: str) -> tuple[Any, dict[str, float], int]:
    """The same once more, with a bar that the candidate misses; also the manifests before and the step gone on from."""
    written = manifests(folder)
    step = json.loads((interrupted[1] / "checkpoints" / "latest.json").read_text())["step"]
    return rlhf("run", *NEW_PPO, *STRICT, api=prefect_api).end(), written, step


@pytest.fixture(scope="module")
def killed(rlhf: Rlhf, again: Any, folder: Path, prefect_api: str) -> tuple[Any, Path]:
    """A run to yet another PPO whose worker is killed after a checkpoint, and the directory of its PPO; it registers
    nothing."""
    options = ("--set", "ppo.kl_coef=0.3", "--set", "ppo.steps=40")
    command = rlhf("run", *options, "--until", "ppo", api=prefect_api)
    known = set((folder / "workspace" / "ppo").glob("*/manifest.json"))
    pointer = command.wait_for(lambda: set((folder / "workspace" / "ppo").glob("*/checkpoints/latest.json")) - known)
    workers = [pid for pid in processes_with("RLHF_E2E", command.mark) if b"infra.rank" in command_line(pid)]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    return command.end(), next(iter(pointer)).parents[1]


def manifests(folder: Path) -> dict[str, float]:
    """Stage directory -> when its manifest was written."""
    paths = (folder / "workspace").glob("*/*/manifest.json")
    return {str(path.parent.relative_to(folder / "workspace")): path.stat().st_mtime for path in paths}


def runs_of(api: str, output: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Flow run, task runs (subflows' too) and artifacts of the run that a command's output names."""
    name = Path(report_of(output)).stem
    (parent,) = ask(api, "flow_runs/filter", flow_runs={"name": {"any_": [name]}})
    children = ask(api, "flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [parent["id"]]}})
    ids = [parent["id"], *(child["id"] for child in children)]
    tasks = ask(api, "task_runs/filter", flow_runs={"id": {"any_": ids}}, limit=200)
    artifacts = ask(api, "artifacts/filter", flow_runs={"id": {"any_": ids}}, limit=200)
    return parent, tasks, artifacts


def report_of(output: str) -> str:
    return re.findall(r"^Report: (.+)$", output, re.MULTILINE)[0].strip()


def store_of(folder: Path) -> tracking.Store:
    return tracking.open_store(folder / "workspace")


def test_the_first_run_ends_with_a_champion(first: Any, folder: Path) -> None:
    assert first.code == 0, first.output
    assert "tiny-policy version 1 (candidate, champion)" in " ".join(first.output.split())
    assert "becomes champion, it passes its gates: win rate against the SFT model" in " ".join(first.output.split())
    table = first.output.partition("main metric")[2]
    steps = (
        "demo",
        "download",
        "clean",
        "blend",
        "split",
        "base",
        "tokenise",
        "sft",
        "reward",
        "gold",
        "ppo",
        "evaluate",
    )
    positions = [re.search(rf"^{name}\b", table, re.MULTILINE) for name in (*steps, "register", "promote")]
    assert all(positions)
    assert [found.start() for found in positions if found] == sorted(found.start() for found in positions if found)
    page = Path(report_of(first.output)).read_text()
    assert "data:image/png;base64" in page
    assert first.left == []


def test_every_stage_left_a_manifest_and_what_it_is_for(first: Any, folder: Path) -> None:
    made = Counter(name.partition("/")[0] for name in manifests(folder))
    assert made["download"] == made["clean"] == SOURCES
    assert sum(made.values()) == STAGES + 2  # and those of the registered files and the report of the data
    for stage in ("base", "sft", "reward", "gold", "ppo"):
        (folder_,) = (folder / "workspace" / stage).glob("*/model")
        assert (folder_ / "model.safetensors").is_file()
        assert (folder_ / "tokenizer.json").is_file()
    assert list((folder / "workspace").glob("*/*/checkpoints")) == []


def test_mlflow_has_a_run_with_one_per_stage_in_it(first: Any, folder: Path) -> None:
    client = tracking.connect(store_of(folder).uri)
    runs = client.search_runs([store_of(folder).experiment_id], order_by=["attributes.start_time ASC"])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["ppo.kl_coef"] == "0.05"
    nested = {
        run.data.tags["rlhf.stage"]: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert set(nested) == {"base", "sft", "reward", "gold", "ppo", "evaluate"}
    losses = client.get_metric_history(nested["sft"].info.run_id, "sft/loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    assert {entry.dataset.name for entry in nested["ppo"].inputs.dataset_inputs} == {"ppo-train", "ppo-eval"}


def test_a_second_run_computes_nothing(again: Any, folder: Path, prefect_api: str) -> None:
    ended, written = again
    assert ended.code == 0, ended.output
    assert {name: manifests(folder)[name] for name in written} == written
    assert set(manifests(folder)) == set(written)
    assert "is the champion already; nothing changes" in ended.output
    assert ended.seconds < 60  # 25 on two free cores: tests/bench has the figure
    parent, tasks, _ = runs_of(prefect_api, ended.output)
    assert parent["state_type"] == "COMPLETED"
    states = Counter(task["state"]["name"] for task in tasks if task["name"].split("-")[0] != "promote")
    assert states["Cached"] == STAGES + 1
    assert ended.left == []


def test_prefect_shows_the_run_well(again: Any, prefect_api: str) -> None:
    parent, tasks, artifacts = runs_of(prefect_api, again[0].output)
    assert parent["tags"] == ["tiny"]
    names = {task["name"] for task in tasks}
    assert {"clean Dahoas/rm-static", "download stanfordnlp/SHP", "SFT: train the policy"} <= names
    keys = {artifact["key"] for artifact in artifacts}
    assert {
        "data",
        "steps",
        "metrics",
        "win-rates",
        "win-rates-by-source",
        "mlflow",
        "data-report",
        "clean-dahoas-rm-static",
        "ppo",
        "promotion",
    } <= keys
    reads = {task["name"]: task["task_inputs"] for task in tasks}
    upstream = {entry["id"] for entries in reads["tokenise"].values() for entry in entries}
    ids = {task["name"]: task["id"] for task in tasks}
    assert {ids["split"], ids["base"]} <= upstream


def test_ctrl_c_leaves_a_checkpoint_and_no_process(interrupted: Any, folder: Path) -> None:
    ended, ppo = interrupted
    assert ended.code == 130, ended.output
    assert "run the same command again and it goes on" in " ".join(ended.output.split())
    assert "Traceback" not in ended.output
    assert ended.left == []
    assert read_manifest(ppo) is None
    outcome = json.loads((ppo / "records" / "outcome.json").read_text())
    assert outcome["kind"] == "stopped"
    assert outcome["resumes_at"] == json.loads((ppo / "checkpoints" / "latest.json").read_text())["step"]
    kept = json.loads((ppo / "records" / "mlflow.json").read_text())["run_id"]
    assert tracking.connect(store_of(folder).uri).get_run(kept).data.tags["rlhf.stage"] == "ppo"


def test_the_next_run_goes_on_and_makes_only_ppo_and_what_follows(resumed: Any, interrupted: Any, folder: Path) -> None:
    ended, written, step = resumed
    assert ended.code == 0, ended.output
    assert {name: manifests(folder)[name] for name in written} == written
    new = Counter(name.partition("/")[0] for name in set(manifests(folder)) - set(written))
    assert new == {"ppo": 1, "evaluate": 1, "compare": 1, "register": 1}
    (compare,) = (name for name in set(manifests(folder)) - set(written) if name.startswith("compare/"))
    answered = json.loads((folder / "workspace" / compare / "manifest.json").read_text())["inputs"]["answered"]
    assert f"evaluate/{answered['fingerprint']}" in written, "the champion's answers are those of its own evaluation"
    rows = [json.loads(line) for line in (interrupted[1] / "records" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert 0 < step < 15
    assert ended.left == []


def test_a_candidate_that_does_not_win_stays_one(resumed: Any, folder: Path) -> None:
    said = " ".join(resumed[0].output.split())
    assert "tiny-policy version 2 stays a candidate, it misses a gate: win rate against the champion" in said
    store = store_of(folder)
    champion, candidate = (tracking.alias(store, "tiny-policy", name) for name in ("champion", "candidate"))
    assert champion is not None
    assert candidate is not None
    assert (champion.version, candidate.version) == (1, 2)


def test_impact_names_the_versions_that_a_set_went_into(command: Rlhf, resumed: Any, folder: Path) -> None:
    def impact(asked: str) -> Any:
        return command("lineage", "--impact", asked, "-w", str(folder / "workspace")).end()

    shown = impact("Dahoas/rm-static@local")
    assert shown.code == 0, shown.output
    rows = re.findall(r"^(\S+) +(\d+) +(.*?) *Dahoas/rm-static@local$", shown.output, re.MULTILINE)
    store = store_of(folder)
    every = [version for name in tracking.registered_names(store) for version in tracking.versions(store, name)]
    assert {version.name for version in every} == {"tiny-policy", "tiny-reward", "tiny-ema"}
    assert rows == [(version.name, str(version.version), ", ".join(version.aliases)) for version in every]
    assert [row for row in rows if row[0] == "tiny-policy"][-1] == ("tiny-policy", "1", "champion")
    for asked in ("Dahoas/rm-static@c0ffee", "nobody/nothing"):
        refused = impact(asked)
        assert refused.code == 2, refused.output
        (sentence,) = refused.output.splitlines()
        assert sentence.startswith(f"Error: No registered model comes from {asked}. Known: ")
        assert "Dahoas/rm-static@local" in sentence


def test_a_damaged_file_is_made_again(rlhf: Rlhf, again: Any, folder: Path, prefect_api: str) -> None:
    written = manifests(folder)
    damaged = sorted((folder / "workspace" / "clean").glob("*/train.arrow"))[0]
    before = damaged.read_bytes()
    damaged.write_bytes(before[: len(before) // 2])
    ended = rlhf("run", "--until", "blend", api=prefect_api).end()
    assert ended.code == 0, ended.output
    assert damaged.read_bytes() == before
    changed = {name for name, when in manifests(folder).items() if written.get(name) != when}
    assert changed == {f"clean/{damaged.parent.name}"}


def test_a_set_without_its_columns(rlhf: Rlhf, folder: Path, prefect_api: str) -> None:
    (folder / "mine.csv").write_text("question,chosen,rejected\nwhy?,so,not so\n")
    workspace = folder / "other"
    options = ["data.demo=null", f"workspace={workspace}", f"data.sources={{mine: {{path: {folder / 'mine.csv'}}}}}"]
    ended = rlhf("run", *(word for option in options for word in ("--set", option)), api=prefect_api).end()
    assert ended.code == 2
    sentence = " ".join(ended.output.split())
    assert "The set mine lacks the column prompt; found were question, chosen, rejected" in sentence
    assert "Traceback" not in ended.output
    assert list(workspace.glob("*/*/manifest.json")) == []
    assert ended.left == []


def test_a_killed_worker_is_started_again_and_goes_on(killed: tuple[Any, Path], prefect_api: str) -> None:
    ended, directory = killed
    assert ended.code == 0, ended.output
    assert re.findall(r"ppo was killed .*", ended.output) == [
        "ppo was killed (SIGKILL), most likely because the machine ran out of memory; lower its micro-batches; "
        "tried again in 5 s"
    ]
    rows = [json.loads(line) for line in (directory / "records" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    _, tasks, _ = runs_of(prefect_api, ended.output)
    assert {task["run_count"] for task in tasks if task["name"].startswith("PPO")} == {2}


def test_the_next_training_starts_from_the_champion(
    rlhf: Rlhf, command: Rlhf, again: Any, folder: Path, prefect_api: str
) -> None:
    champion = tracking.alias(store_of(folder), "tiny-policy", "champion")
    assert champion is not None
    written = manifests(folder)
    warm = ("--set", "models.policy=models:/tiny-policy@champion", "--set", "ppo.steps=2", *STRICT)
    ended = rlhf("run", *warm, api=prefect_api).end()
    assert ended.code == 0, ended.output
    new = Counter(name.partition("/")[0] for name in set(manifests(folder)) - set(written))
    again_made = ("base", "tokenise", "data-report", "sft", "reward", "gold", "ppo", "evaluate", "compare", "register")
    assert new == dict.fromkeys(again_made, 1)
    (base,) = (
        folder / "workspace" / name for name in set(manifests(folder)) - set(written) if name.startswith("base/")
    )
    folder_of_champion = Path(json.loads((base / "base.json").read_text())["model"])
    weights = (folder_of_champion / "model.safetensors").read_bytes()
    assert weights == (Path(champion.source.removeprefix("file://")) / "model" / "model.safetensors").read_bytes()
    candidate = tracking.alias(store_of(folder), "tiny-policy", "candidate")
    assert candidate is not None
    assert candidate.version > champion.version
    chain = command("lineage", "models:/tiny-policy@candidate", "-w", str(folder / "workspace")).end()
    assert f"models:/tiny-policy/{champion.version}" in " ".join(chain.output.split()), chain.output


def test_prune_removes_what_no_version_needs_once_it_is_told_to(
    rlhf: Rlhf, command: Rlhf, killed: tuple[Any, Path], folder: Path
) -> None:
    workspace = ("-w", str(folder / "workspace"))
    written = manifests(folder)
    shown = command("prune", *workspace).end()
    assert shown.code == 0, shown.output
    assert re.search(r"^ppo +1 +\d+ [KM]B +nothing registered needs it *$", shown.output, re.MULTILINE), shown.output
    told = re.search(r"^(\d+ [KM]B) in all\. Nothing is removed yet: add --yes\.$", shown.output, re.MULTILINE)
    assert told, shown.output
    assert manifests(folder) == written
    done = command("prune", "--yes", *workspace).end()
    assert done.code == 0, done.output
    assert f"\n{told[1]} removed." in done.output
    assert not killed[1].exists()
    left = manifests(folder)
    assert {name: written[name] for name in left} == left
    assert {name.partition("/")[0] for name in set(written) - set(left)} <= {"ppo", "compare", "data-report"}
    chain = command("lineage", "models:/tiny-policy@champion", *workspace).end()
    assert chain.code == 0, chain.output
    named = {"/".join(step) for step in re.findall(r"\b([a-z]+) ([0-9a-f]{16})\b", chain.output)}
    assert {name.partition("/")[0] for name in named} >= {"download", "clean", "base", "sft", "reward", "ppo"}
    assert named <= set(left)
    planned = rlhf("plan").end()
    assert f"{STAGES} of {STAGES} stages cached, 0 would run." in planned.output


def test_a_scheduled_run_that_finds_nothing_new_ends_at_once_and_ctrl_c_ends_all(
    command: Rlhf, again: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))  # with servers of its own, as on a machine alone
    said = tmp_path / "served.log"
    with said.open("w") as output:
        schedule = ("--name", "minutely", "--cron", "* * * * *", "--timezone", "Europe/Berlin")
        serving = command("serve", str(folder / "tiny.yaml"), *schedule, output=output)
    address = serving.wait_for(lambda: re.search(r"^Prefect: (\S+)$", said.read_text(), re.MULTILINE))[1]
    api = f"{address}/api"
    written = manifests(folder)
    (made,) = serving.wait_for(lambda: ask(api, "deployments/filter", deployments={"name": {"any_": ["minutely"]}}))
    (due,) = (entry["schedule"] for entry in made["schedules"] if entry["active"])
    assert (due["cron"], due["timezone"]) == ("* * * * *", "Europe/Berlin")
    over = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
    run = serving.wait_for(lambda: ask(api, "flow_runs/filter", flow_runs=over))[0]
    assert (run["deployment_id"], run["auto_scheduled"], run["state_type"]) == (made["id"], True, "COMPLETED")
    assert run["state"]["message"].startswith("Nothing new: data, config and code")
    assert run["total_run_time"] < 30
    assert manifests(folder) == written
    serving.process.send_signal(signal.SIGINT)
    ended = serving.end()
    assert ended.code == 130, said.read_text()
    assert ended.left == []
    assert "Traceback" not in said.read_text()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=5)


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
