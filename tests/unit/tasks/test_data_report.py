import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from data_prep.tables import PAIR_SCHEMA, write_table
from data_prep.tokenise import SCHEMAS
from flows.cli.main import app
from tasks import data_report, steps
from tasks.config import RunConfig, parse
from tasks.stages import Stage, StageRef, run

RM, OWN = "Dahoas/rm-static", "own"


def pair(source: str, chosen: str, rejected: str) -> dict[str, Any]:
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    prompt = [{"role": "user", "content": "q"}]
    return {"prompt": prompt, **answers, "source": source, "group": "g", "weight": 1.0}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "own.csv").write_text("prompt,chosen,rejected\n")
    sources = {RM: {}, OWN: {"path": str(tmp_path / "own.csv")}}
    return parse({"name": "unit", "workspace": str(tmp_path), "data": {"sources": sources}})


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., dict[str, StageRef]]:
    """The prepared stages by key; `ties` is a count that no output file shows."""

    def made(
        key: str, metrics: dict[str, Any], fill: Callable[[Path], Any] = lambda out: None, **more: Any
    ) -> StageRef:
        def work(out: Path) -> dict[str, Any]:
            fill(out)
            return metrics

        return run(Stage(key.partition(":")[0], tmp_path, {"key": key, **more}, {}, ()), work)

    def tokenised(out: Path) -> None:
        for phase in ("sft", "reward"):
            write_table([], out / f"{phase}-eval.arrow", SCHEMAS[phase])
        write_table([{"prompt": [1] * 4, "answer": [1] * 6, "source": RM}] * 3, out / "sft-train.arrow", SCHEMAS["sft"])
        row = {"prompt": [1] * 2, "chosen": [1] * 3, "rejected": [1], "weight": 1.0}
        rows = [{**row, "source": name} for name in (RM, OWN, OWN)]
        write_table(rows, out / "reward-train.arrow", SCHEMAS["reward"])

    def split(out: Path) -> None:
        rows = [pair(RM, "longer", "x"), pair(RM, "longest", "y"), pair(OWN, "z", "long"), pair(OWN, "p", "q")]
        write_table(rows, out / "reward-train.arrow", PAIR_SCHEMA)

    def refs(ties: int = 3) -> dict[str, StageRef]:
        cleaned = {"total": {"rows_in": 10, "kept": 10 - ties, "drops": {"tie": ties}}}
        phases = {
            "sft": {"train": {"rows_in": 5, "kept": 3, "drops": {"prompt_too_long": 2}}},
            "reward": {
                "train": {"rows_in": 3, "kept": 3, "drops": {}},
                "eval": {"rows_in": 1234, "kept": 1234, "drops": {}},
            },
        }
        return {
            f"download:{RM}": made(f"download:{RM}", {"revision": "0" * 40}),
            f"download:{OWN}": made(f"download:{OWN}", {"revision": "local"}),
            f"clean:{RM}": made(f"clean:{RM}", cleaned, ties=ties),
            f"clean:{OWN}": made(f"clean:{OWN}", cleaned, ties=ties),
            "split": made("split", {}, split),
            "tokenise": made("tokenise", phases, tokenised),
        }

    return refs


def test_report_holds_counts_lengths_and_preferences(
    config: RunConfig, prepared: Callable[..., dict[str, StageRef]]
) -> None:
    refs = prepared()
    made = data_report.make(config, refs)
    html = (made.directory / data_report.PAGE).read_text()
    assert (made.directory / data_report.FIGURES).read_bytes().startswith(b"\x89PNG")
    assert 'src="data:image/png;base64,' in html
    assert "http" not in html
    text = re.sub(r' class="[a-z]*"', "", " ".join(html.split()))
    assert "tie 3</span>" in text
    assert "<td>sft</td><td>sequence</td><td>total</td>" in text
    assert f"<td>{RM}</td><td>2</td><td>2.0</td>" in text  # pairs, and pairs of a prompt
    assert "66.7 %" in text  # two of the three pairs whose answers differ in length
    assert made.metrics == {"longer_chosen": pytest.approx(2 / 3)}


def test_report_is_made_once_and_again_when_only_a_count_changes(
    config: RunConfig, prepared: Callable[..., dict[str, StageRef]]
) -> None:
    first = data_report.make(config, prepared())
    assert data_report.make(config, prepared()).cached
    assert data_report.make(config, prepared(ties=4)).path != first.path


def test_artifact_has_every_source_and_the_way_to_the_page(
    config: RunConfig, prepared: Callable[..., dict[str, StageRef]]
) -> None:
    refs = prepared()
    made = data_report.make(config, refs)
    text = data_report.markdown(refs, made)
    assert f"| {OWN} | 10 | 7 | tie 3 |" in text
    assert "| all sources | 20 | 14 | tie 6 |" in text
    assert "| Reward model | 3 | 1,234 |" in text
    assert "preferred one in 66.7 %" in text
    assert str(made.directory / data_report.PAGE) in text


def test_sources_have_revision_digest_and_rows_of_each_phase(
    config: RunConfig, prepared: Callable[..., dict[str, StageRef]]
) -> None:
    refs = prepared()
    hub, own = steps.sources(config, refs)
    assert (hub.name, hub.path, hub.revision, hub.digest) == (RM, None, "0" * 40, refs[f"download:{RM}"].digest)
    held_out = {"rows.sft-eval": 0, "rows.reward-eval": 0}
    assert hub.rows == {"rows.sft-train": 3, "rows.reward-train": 1} | held_out
    assert own.rows == {"rows.sft-train": 0, "rows.reward-train": 2} | held_out
    assert own.path == str(refs[f"download:{OWN}"].directory)


def test_command_prints_counts_and_lengths(
    config: RunConfig, prepared: Callable[..., dict[str, StageRef]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refs = prepared()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setattr("tasks.plan.finished", lambda config, until: refs)
    result = CliRunner().invoke(app, ["data", str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "own 10 7 tie 3" in text
    assert "sft train 5 3 prompt too long 2" in text
    assert "rm-static 3 + 0 1 + 0" in text
    assert "sft sequence total 3 10 10 10 10 10 30" in text
    result = CliRunner().invoke(app, ["data", str(tmp_path / "run.yaml"), "--show", "1", "--phase", "judge"])
    assert result.exit_code == 2
    assert "this run has no judge-train rows" in result.output
    shown = []
    monkeypatch.setattr("flows.cli.data._show", lambda refs, *what: shown.append(what))
    for options in (["--phase", "reward"], ["--side", "eval"], ["--source", "own"], ["--show", "2"]):
        assert CliRunner().invoke(app, ["data", str(tmp_path / "run.yaml"), *options]).exit_code == 0
    assert shown == [
        ("reward-train", None, 5, False),
        ("sft-eval", None, 5, False),
        ("sft-train", "own", 5, False),
        ("sft-train", None, 2, False),
    ]
