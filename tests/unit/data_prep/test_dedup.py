import random
from itertools import combinations

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import dedup
from data_prep.demo import make_pairs

WORDS = [f"w{number}" for number in range(400)]


def jaccard(first: str, second: str) -> float:
    """By the definition, on the runs of words themselves."""
    a, b = (
        {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))} for words in (first.split(), second.split())
    )
    return len(a & b) / len(a | b)


def texts(seed: int = 0) -> list[str]:
    """300 texts: 60 of their own, and of each four copies with ever more words changed."""
    draw = random.Random(seed)
    made = []
    for _ in range(60):
        words = draw.choices(WORDS, k=draw.randint(20, 120))
        made.append(" ".join(words))
        for share in (0.01, 0.03, 0.1, 0.4):
            changed = [draw.choice(WORDS) if draw.random() < share else word for word in words]
            made.append(" ".join(changed))
    return made


def labels_of(made: list[str]) -> np.ndarray:
    return dedup.clusters(dedup.signatures_of(made))


def test_clusters_agree_with_brute_force() -> None:
    made = texts()
    labels = labels_of(made)
    similar = {pair: jaccard(made[pair[0]], made[pair[1]]) for pair in combinations(range(len(made)), 2)}
    # The estimate from 126 hashes has a standard error of 0.036 at the threshold, so close calls may go either way.
    clear = [(i, j) for (i, j), similarity in similar.items() if similarity >= dedup.THRESHOLD + 0.1]
    assert len(clear) > 60
    assert all(labels[i] == labels[j] for i, j in clear)
    joined = [(i, j) for i, j in similar if labels[i] == labels[j]]
    chains = {(i, j) for i, j in joined if similar[i, j] < dedup.THRESHOLD - 0.12}
    assert len(chains) < 0.1 * len(joined)  # alike only through a third
    assert all(i // 5 == j // 5 for i, j in joined)  # never across two of the 60


def test_a_signature_is_datasketchs() -> None:
    text = texts()[0]
    made = MinHash(num_perm=dedup.PERMUTATIONS, seed=1, hashfunc=int)
    for shingle in dedup.shingles(text):
        made.update(shingle)
    assert made.hashvalues.tolist() == dedup.signatures_of([text])[0].tolist()


def test_texts_do_not_mix_when_their_signatures_are_made_together() -> None:
    made = [*texts()[:50], "", "one", "one two three", "!"]
    assert dedup.signatures_of(made).tolist() == [dedup.signatures_of([text])[0].tolist() for text in made]
    assert dedup.signatures_of([]).shape == (0, dedup.PERMUTATIONS)


def test_signatures_estimate_the_similarity() -> None:
    made = texts(1)
    errors = []
    for i in range(0, len(made), 5):
        for j in range(i + 1, i + 5):
            estimate = (dedup.signatures_of([made[i]])[0] == dedup.signatures_of([made[j]])[0]).mean()
            errors.append(estimate - jaccard(made[i], made[j]))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.05


@settings(deadline=None)
@given(st.permutations(range(40)), st.integers(0, 3))
def test_the_order_of_texts_does_not_matter(order: list[int], seed: int) -> None:
    made = texts(seed)[:40]
    labels = labels_of(made)
    shuffled = labels_of([made[place] for place in order])
    for i, j in combinations(range(40), 2):
        assert (labels[order[i]] == labels[order[j]]) == (shuffled[i] == shuffled[j])


def test_more_texts_split_no_cluster() -> None:
    made = texts()
    few, many = labels_of(made[:100]), labels_of(made)
    assert all(many[i] == many[j] for i, j in combinations(range(100), 2) if few[i] == few[j])


def test_only_texts_of_one_kind_are_compared() -> None:
    signature = dedup.signatures_of(["the very same words in both of them"])[0]
    assert dedup.clusters(np.stack([signature, signature, signature]), np.array([7, 8, 7])).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Hello there", "hello,  THERE!", True),
        ("Hello there", "hello here", False),
        ("???", "!!!", False),
        ("🙂", "🙂", True),
        ("", "", True),
        ("yes", "no", False),
    ],
)
def test_short_texts(first: str, second: str, same: bool) -> None:
    labels = labels_of([first, second])
    assert (labels[0] == labels[1]) == same


def test_no_texts() -> None:
    assert dedup.clusters(np.empty((0, dedup.PERMUTATIONS), dtype=np.uint32)).tolist() == []


def test_the_demos_prompts_are_no_near_duplicates() -> None:
    """They are made from a small language; were they taken for copies, the demo would lose its data."""
    prompts = sorted({pair.prompt for pair in make_pairs(random.Random(0), 500)})
    assert len(set(labels_of(prompts).tolist())) > 0.98 * len(prompts)


def test_many_copies_hang_together() -> None:
    """Copies of one text that differ in their last word: every band of most is the same."""
    made = [" ".join([*WORDS[:80], str(number)]) for number in range(130)]
    assert set(labels_of(made).tolist()) == {0}


def test_a_pair_is_found_however_many_others_share_its_only_band() -> None:
    draw = np.random.default_rng(0)
    made = draw.integers(0, 2**32, (400, dedup.PERMUTATIONS), dtype=np.uint32)
    made[:, : dedup.ROWS] = 7  # all meet in the first band, and none is like another
    made[390] = made[10]
    made[390, dedup.ROWS :: dedup.ROWS] += 1  # but these two, which meet in no other band
    labels = dedup.clusters(made)
    assert [(i, j) for i, j in combinations(range(400), 2) if labels[i] == labels[j]] == [(10, 390)]
