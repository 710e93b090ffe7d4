from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tasks import dag, steps, tracking, train
from tasks.config import ConfigError, RunConfig, parse
from tasks.dag import Choice
from tasks.stages import StageRef
from tasks.steps import Progress, Run, artifact_key, datasets, stage_page
from tasks.tracking import Version
from tasks.watch import Nobody, watched_by, watcher

ARTIFACT = UUID(int=7)


@pytest.mark.parametrize(
    ("key", "artifact"),
    [
        ("clean:Dahoas/rm-static", "clean-dahoas-rm-static"),
        ("download:openai/webgpt_comparisons", "download-openai-webgpt-comparisons"),
    ],
)
def test_artifact_keys_are_those_that_prefect_takes(key: str, artifact: str) -> None:
    assert artifact_key(key) == artifact


def test_datasets_of_a_stage(config: RunConfig, make_all: Any) -> None:
    refs = make_all(config)
    graph = dag.graph(config)
    folder = refs["tokenise"].directory

    def read(key: str) -> list[tuple[str, Path, str]]:
        return datasets(dag.stage(config, graph[key], refs))

    assert read("reward") == [
        ("reward-train", folder / "reward-train.arrow", "training"),
        ("reward-eval", folder / "reward-eval.arrow", "evaluation"),
    ]
    assert read("evaluate") == [("ppo-eval", folder / "ppo-eval.arrow", "evaluation")]
    assert read("blend") == []


def test_page_of_a_stage_names_its_inputs(config: RunConfig, make_all: Any, run: Run) -> None:
    refs = make_all(config)
    page = stage_page(run, "tokenise", replace(refs["tokenise"], metrics={}), refs)
    assert refs["split"].fingerprint in page
    assert refs["base"].digest[:16] in page
    assert f"`{refs['tokenise'].path}`" in page


def test_progress_is_told_at_once_and_kept_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, kept, told = [0.0], [], []
    monkeypatch.setattr(steps.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(steps, "create_progress_artifact", lambda percent, **o: kept.append(percent) or ARTIFACT)
    monkeypatch.setattr(steps, "update_progress_artifact", lambda artifact, progress, **o: kept.append(progress))

    class Listener(Nobody):
        def progressed(self, step: str, done: int, total: int, metrics: Any) -> None:
            told.append((step, done, total))

    with watched_by(Listener()):
        progress = Progress("sft")
        for step in range(1, 41):
            now[0] += 1
            progress(step, 40, {"loss": 1.0})
    assert told == [("sft", step, 40) for step in range(1, 41)]
    assert kept == [100 * step / 40 for step in range(5, 41, 5)]
    assert isinstance(watcher(), Nobody)


def test_a_short_stage_has_no_progress_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "create_progress_artifact", None)
    Progress("sft")(1, 1, {})


def version(source: str) -> Version:
    return Version("unit-policy", 3, (), {"digest": "d" * 64, "fingerprint": "f" * 16}, source, None, 0.0)


@pytest.fixture
def run(config: RunConfig) -> Run:
    from infra.gpu import GpuInfrastructure

    store = tracking.Store("sqlite:////x.db", config.workspace, None, "e", "1")
    return Run(config, Choice(), store, "run", GpuInfrastructure(device="cpu"), {})


def model(folder: Path) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    return folder


def test_a_champion_is_read_where_it_is_registered(run: Run, tmp_path: Path) -> None:
    folder = model(tmp_path / "register me" / "policy")
    ref = train.standing(run, version(folder.as_uri()))
    assert (ref.directory, ref.digest, ref.stage) == (folder, "d" * 64, "champion")


def test_a_champion_of_a_server_is_read_from_the_stage_that_made_it(run: Run) -> None:
    made = model(dag.workspace(run.config) / "ppo" / ("f" * 16))
    assert train.standing(run, version("runs:/abc/policy")).directory == made


def test_a_champion_that_is_nowhere(run: Run) -> None:
    with pytest.raises(ConfigError, match="unit-policy version 3, cannot be compared"):
        train.standing(run, version("runs:/abc/policy"))


def test_infrastructure_that_is_none(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"infrastructure: .*did you mean 'local-cpu'"):
        steps.infrastructure(run.config.model_copy(update={"infrastructure": "local-cp"}))


def test_every_stage_in_this_process_has_its_work(run: Run) -> None:
    from tasks.prepare import WORK

    # The unsupervised text's is only there in runs that name some.
    assert set(WORK) - {"ptx"} == {node.stage for node in run.graph.values() if not node.launched}


def test_a_stage_before_from_has_to_be_there(run: Run) -> None:
    late = Run(run.config, Choice(from_step="sft"), run.store, run.run_id, run.infrastructure, {})
    with pytest.raises(ConfigError, match="demo before it is not finished"):
        steps._finished_or_made(late, late.graph["demo"], dag.stage(late.config, late.graph["demo"], {}), None, print)


@pytest.mark.parametrize(("key", "role"), [("base", "policy"), ("reward-base", "reward")])
def test_a_model_of_the_hub_is_refused_where_it_has_too_few_positions(
    run: Run, monkeypatch: pytest.MonkeyPatch, key: str, role: str
) -> None:
    models = {"policy": "org/base", "reward": "org/other"}
    config = parse({**run.config.model_dump(mode="json"), "models": models})
    made = StageRef("base", "f", "d", "/x", False, 1.0, {"vocabulary": 9, "positions": 511})
    monkeypatch.setattr(steps, "_finished_or_made", lambda *others: made)
    with pytest.raises(ConfigError, match=rf"max_answer_tokens is 512, but models\.{role} has 511 positions"):
        steps.make(replace(run, config=config), key, {})


def test_refs_are_small_and_plain() -> None:
    ref = StageRef("sft", "f", "d", "/x", True, 1.0, {"loss": 1.0})
    assert StageRef(**ref.to_json()) == ref
