"""How much answers repeat: each other, and themselves. In words, as models that are compared may have other tokens."""

from collections.abc import Sequence


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts together (distinct-n, Li et al. 2016); 0 without any.

    It falls with the amount of text, so compare it between models that answered the same prompts.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 4) -> float:
    """The share of a text's n-grams that stood in it before (seq-rep-n, Welleck et al. 2020); 0 without any."""
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[place:] for place in range(n)), strict=False))
