import pytest

from tasks.diversity import distinct, repetition


def test_distinct_counts_over_all_texts():
    texts = ["a b a b", "a b c"]
    assert distinct(texts, 1) == 3 / 7  # a, b, c
    assert distinct(texts, 2) == 3 / 5  # ab, ba, bc of ab ba ab, ab bc
    assert distinct(texts, 3) == 1.0  # aba, bab, abc
    assert distinct(["a", ""], 2) == 0.0


@pytest.mark.parametrize(
    ("text", "share"),
    [("a b c d e", 0.0), ("a a a a a a", 2 / 3), ("a b c d a b c d", 1 / 5), ("too few words", 0.0), ("", 0.0)],
)
def test_repetition_is_the_share_of_runs_that_stood_before(text, share):
    assert repetition(text) == pytest.approx(share)
