import re
from collections import Counter
from pathlib import Path
from random import Random
from statistics import mean, stdev

import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression

from data_prep.demo import DemoPair, make_pairs, true_score, write_hub
from data_prep.demo_language import TOPICS, topic_of, vocabulary
from data_prep.sources import SOURCES

PAIRS = 4000


@pytest.fixture(scope="module")
def pairs() -> list[DemoPair]:
    return make_pairs(Random(11), PAIRS)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("hot cook, sweet spoon, salty soup.", 1.0),
        (" hot cook, sweet spoon, salty soup. ", 1.0),
        ("hot cook, muddy spoon, hot anchor, rusty axe.", 0.25),  # one word, the other, or both from elsewhere
        ("hot cook, hot cook, sweet cook, hot cook.", 0.5),  # a repetition counts once
        ("rusty axe, rusty axe, rusty axe.", 0.0),
        ("hot cook, sweet spoon.", 2 / 3),  # too short
        ("hot cook, sweet spoon, salty soup", 2 / 3),  # perhaps cut
        ("hot cook, sweet spoon, salty soup, hot", 0.75),
        ("hot cook sweet spoon.", 0.0),
        ("", 0.0),
    ],
)
def test_true_score(answer: str, score: float) -> None:
    assert true_score("Tell Anna about the kitchen today.", answer) == pytest.approx(score)
    assert true_score("\n\nHuman: What is in the kitchen?\n\nAssistant:", answer) == pytest.approx(score)


def test_a_prompt_without_a_topic_is_refused() -> None:
    with pytest.raises(ValueError, match="names no topic"):
        topic_of("Tell Anna about the moon.")


def test_the_language_is_small_and_sentences_are_short(pairs: list[DemoPair]) -> None:
    assert len(vocabulary()) <= 150
    assert len(TOPICS) == 6
    for pair in pairs:
        assert len(words(pair.prompt)) <= 16
        for answer in (pair.chosen, pair.rejected):
            assert 3 <= len(answer.split(", ")) <= 6
            assert set(words(answer)) <= vocabulary()
    assert len({pair.prompt for pair in pairs}) > PAIRS / 2


def test_the_preferred_answers_are_better_and_leave_room(pairs: list[DemoPair]) -> None:
    scores = [(true_score(pair.prompt, pair.chosen), true_score(pair.prompt, pair.rejected)) for pair in pairs]
    wrong = mean(chosen < rejected for chosen, rejected in scores)
    assert 0.01 < wrong < 0.03
    assert all(abs(chosen - rejected) >= 0.25 for chosen, rejected in scores)
    chosen = [score for score, _ in scores]
    assert 0.5 < mean(chosen) < 0.6
    assert 0.15 < stdev(chosen) < 0.25
    assert mean(chosen) + stdev(chosen) < 0.8


def test_length_does_not_tell_the_better_answer(pairs: list[DemoPair]) -> None:
    for measure in (len, lambda answer: answer.count(",")):
        longer = [measure(p.chosen) > measure(p.rejected) for p in pairs if measure(p.chosen) != measure(p.rejected)]
        assert 0.45 < mean(longer) < 0.55


def _features(first: str, second: str, prompt: str | None) -> dict[str, int]:
    counts = Counter(words(first))
    counts.subtract(words(second))
    bigrams = {f"prompt {word}": 1 for word in words(prompt)} if prompt else {}
    return {**counts, **bigrams}


@pytest.mark.parametrize("with_prompt", [False, True])
def test_a_bag_of_words_does_not_tell_the_better_answer(pairs: list[DemoPair], with_prompt: bool) -> None:
    rng = Random(3)
    rows, labels = [], []
    for pair in pairs:
        first_wins = rng.random() < 0.5
        answers = (pair.chosen, pair.rejected) if first_wins else (pair.rejected, pair.chosen)
        rows.append(_features(*answers, pair.prompt if with_prompt else None))
        labels.append(first_wins)
    matrix = DictVectorizer().fit_transform(rows)
    border = PAIRS * 3 // 4
    model = LogisticRegression(max_iter=300).fit(matrix[:border], labels[:border])
    assert model.score(matrix[border:], labels[border:]) <= 0.6


def test_reading_the_words_in_context_does_tell(pairs: list[DemoPair]) -> None:
    """The same classifier, given what goes with what: the task can be learned from pairs like these."""

    def context(pair: DemoPair, answer: str) -> Counter[str]:
        spoken = words(answer)
        topic = topic_of(pair.prompt)
        return Counter(f"{topic} {word}" for word in spoken)

    rng = Random(3)
    rows, labels = [], []
    for pair in pairs:
        first_wins = rng.random() < 0.5
        counts = context(pair, pair.chosen if first_wins else pair.rejected)
        counts.subtract(context(pair, pair.rejected if first_wins else pair.chosen))
        rows.append(dict(counts))
        labels.append(first_wins)
    matrix = DictVectorizer().fit_transform(rows)
    border = PAIRS * 3 // 4
    model = LogisticRegression(max_iter=300).fit(matrix[:border], labels[:border])
    assert model.score(matrix[border:], labels[border:]) >= 0.88


def test_the_hub_is_written_in_the_real_columns(demo_hub: Path, mirror: Path) -> None:
    files = sorted(mirror.glob("*/*/data/*.parquet"))
    assert len(files) == 11
    for file in files:
        ours = pq.read_schema(demo_hub / file.relative_to(mirror)).remove_metadata()
        assert ours.equals(pq.read_schema(file).remove_metadata()), file


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        write_hub(tmp_path / name, seed, 200)
    contents = [
        [file.read_bytes() for file in sorted((tmp_path / name).rglob("*.parquet"))] for name in ("a", "b", "c")
    ]
    assert contents[0] == contents[1] != contents[2]
    assert {str(folder.relative_to(tmp_path / "a")) for folder in (tmp_path / "a").glob("*/*")} == set(SOURCES)


def test_too_few_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too small"):
        write_hub(tmp_path, 0, 10)
