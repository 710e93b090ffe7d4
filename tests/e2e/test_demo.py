"""`make demo` as it is shipped: its figures mean what the README says they do, and a second run computes nothing."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression

from data_prep.tables import iter_rows
from tasks.stages import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = Path(__file__).parents[2] / "infra" / "runs" / "demo.yaml"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "workspace"


@pytest.fixture(scope="module")
def demo(command: Callable[..., Any], workspace: Path) -> Any:
    return command("run", str(DEMO), "--set", f"workspace={workspace}").end(seconds=600)


def metrics(workspace: Path, stage: str) -> dict[str, Any]:
    (directory,) = (workspace / stage).glob("*/")
    manifest = read_manifest(directory)
    assert manifest is not None
    return dict(manifest["metrics"])


def test_the_demo_ends_in_a_registered_champion(demo: Any) -> None:
    assert demo.code == 0, demo.output
    assert "demo-policy version 1 (candidate, champion)" in " ".join(demo.output.split())
    assert re.search(r"^Report: .+\.html$", demo.output, re.MULTILINE)
    assert demo.left == []


def test_the_reward_model_learns_what_words_and_length_do_not_tell(demo: Any, workspace: Path) -> None:
    reward = metrics(workspace, "reward")
    assert reward["accuracy"] >= 0.85
    assert reward["length_accuracy"] <= 0.65
    assert bag_of_words_accuracy(next(workspace.glob("split/*/"))) <= 0.65


def test_ppo_gains_a_standard_deviation_by_reward_and_by_true_score(demo: Any, workspace: Path) -> None:
    found = metrics(workspace, "evaluate")
    for measure in ("reward", "true_score"):
        assert found[f"ppo_{measure}"] - found[f"sft_{measure}"] >= found[f"sft_{measure}_std"], measure
    assert 0 < found["ppo_kl"] < 12


def test_the_gold_reward_model_judges_as_the_true_score_does(demo: Any, workspace: Path) -> None:
    assert metrics(workspace, "gold")["accuracy_low"] > 0.5
    found = metrics(workspace, "evaluate")
    assert found["gold_win_rate_low"] > 0.5
    assert "by the gold reward model" in " ".join(demo.output.split())


def test_a_second_run_computes_nothing(demo: Any, command: Callable[..., Any], workspace: Path) -> None:
    written = {path: path.stat().st_mtime for path in workspace.glob("*/*/manifest.json")}
    again = command("run", str(DEMO), "--set", f"workspace={workspace}").end()
    assert again.code == 0, again.output
    assert {path: path.stat().st_mtime for path in workspace.glob("*/*/manifest.json")} == written
    assert "is the champion already; nothing changes" in " ".join(again.output.split())


def bag_of_words_accuracy(split: Path) -> float:
    """Held-out accuracy of a logistic regression on the difference of the two answers' word counts."""

    def rows(name: str) -> tuple[list[dict[str, int]], list[bool]]:
        differences, labels = [], []
        for number, row in enumerate(iter_rows(split / f"reward-{name}.arrow")):
            chosen_first = number % 2 == 0
            first, second = (row["chosen"], row["rejected"]) if chosen_first else (row["rejected"], row["chosen"])
            counts = Counter(words(first))
            counts.subtract(words(second))
            differences.append(dict(counts))
            labels.append(chosen_first)
        return differences, labels

    vectorizer = DictVectorizer()
    train, train_labels = rows("train")
    held_out, labels = rows("eval")
    model = LogisticRegression(max_iter=300).fit(vectorizer.fit_transform(train), train_labels)
    return float(model.score(vectorizer.transform(held_out), labels))


def words(messages: list[dict[str, str]]) -> list[str]:
    return re.findall(r"\w+", json.dumps([message["content"] for message in messages]).lower())
