"""All steps in a row, over the demo's hub and over the mirror of the real sets."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from data_prep.blend import blend
from data_prep.clean import clean
from data_prep.sources import SOURCES, SourceSpec, download
from data_prep.splits import split
from data_prep.tables import read_arrow, read_table
from data_prep.tokenise import tokenise

CAP = 400


def prepare(hub: Path, root: Path, tokenizer: Path, max_rows: int | None = None) -> dict[str, Any]:
    cleaned, metrics = {}, {}
    for name in SOURCES:
        spec = SourceSpec(name, max_rows=max_rows)
        raw, cleaned[name] = root / "raw" / name, root / "clean" / name
        raw.mkdir(parents=True)
        cleaned[name].mkdir(parents=True)
        loaded = download(spec, str(hub), raw)
        metrics[name] = clean(spec, raw, cleaned[name])
        assert metrics[name]["total"]["rows_in"] == sum(loaded["rows"].values())
    for step in ("blend", "split", "tokens"):
        (root / step).mkdir()
    metrics["blend"] = blend(cleaned, {}, 0, root / "blend")
    metrics["split"] = split(root / "blend", [2, 4, 3, 1], 0.1, 0, root / "split")
    metrics["tokens"] = tokenise(root / "split", tokenizer, 1000, 1000, root / "tokens")
    return metrics


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*.arrow")
    }


def prompts(path: Path) -> set[str]:
    return {str(prompt) for prompt in read_arrow(path, ["prompt"])["prompt"].to_pylist()}


def test_the_demo_hub_from_end_to_end(demo_hub: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    metrics = prepare(demo_hub, tmp_path / "one", tokenizer_dir)
    # Each fault that the generator puts in is found.
    drops = {reason for name in SOURCES for reason in metrics[name]["total"]["drops"]}
    faults = {"identical", "empty", "broken_characters", "duplicate", "contradicted", "tie", "low_score_ratio"}
    assert drops == faults | {"too_many_pairs"}
    assert metrics["openai/webgpt_comparisons"]["total"]["fixes"]["citations"] > 0
    assert metrics["stanfordnlp/SHP"]["total"]["fixes"]["html_entities"] > 0
    # The second copy of rm-static has nothing of its own; most of rm-static's test rows leak into full-hh-rlhf.
    assert metrics["blend"]["sources"]["yitingxie/rlhf-reward-datasets"]["train"]["kept"] == 0
    static_test = metrics["Dahoas/rm-static"]["test"]["kept"]
    assert metrics["blend"]["sources"]["Dahoas/full-hh-rlhf"]["train"]["drops"]["leak"] >= 0.8 * static_test
    # No prompt that a model trains on is judged on, and none is in two phases.
    files = sorted((tmp_path / "one" / "split").glob("*-*[nl].arrow"))
    assert len(files) == 8
    for number, file in enumerate(files):
        for other in files[:number]:
            assert not prompts(file) & prompts(other), (file.name, other.name)
    assert all(
        counts["drops"].keys() <= {"duplicate"} for phase in metrics["tokens"].values() for counts in phase.values()
    )

    assert prepare(demo_hub, tmp_path / "two", tokenizer_dir) == metrics
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_mirror_from_end_to_end(mirror: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    metrics = prepare(mirror, tmp_path, tokenizer_dir, max_rows=CAP)
    webgpt = metrics["openai/webgpt_comparisons"]["train"]
    assert webgpt["drops"] == {"tie": 384, "cap": 3000 - 384 - CAP}
    assert metrics["Dahoas/rm-static"]["total"]["drops"]["identical"] == 34
    assert metrics["blend"]["leak"] > 0
    train = prompts(tmp_path / "blend" / "train.arrow")
    assert not train & prompts(tmp_path / "blend" / "test.arrow")
    rows = read_table(tmp_path / "blend" / "train.arrow")
    for row in rows:
        assert row["prompt"][-1]["role"] == "user"
        assert not row["chosen"][0]["content"].startswith(("Assistant:", "Human:", " "))
    assert {row["source"] for row in rows} >= set(SOURCES) - {"yitingxie/rlhf-reward-datasets"}


@pytest.mark.parametrize("side", ["train", "eval"])
def test_reward_rows_are_pairs_on_both_sides(demo_hub: Path, tmp_path: Path, tokenizer_dir: Path, side: str) -> None:
    prepare(demo_hub, tmp_path, tokenizer_dir)
    table = read_table(tmp_path / "tokens" / f"reward-{side}.arrow")
    assert table.num_rows > 0
    assert all(row["chosen"] != row["rejected"] for row in table)
