"""Near-duplicates by MinHash: which texts are almost the same, found without comparing every pair.

Broder 1997 (resemblance, shingles, minwise hashing) and Leskovec et al., Mining of Massive Datasets, section 3.4 (LSH
by bands). The hashing is datasketch's, so signatures agree with its `MinHash`. Its in-memory index is not used, since
it takes gigabytes at 700,000 texts: here a band is one sorted array at a time, and candidates are compared by their
signatures in bulk.

Near-duplicates are the connected components of the pairs found, so the answer depends neither on the order of the texts
nor on who is asked first; it may join two texts that are alike only through a third.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from xxhash import xxh32_intdigest

from data_prep.keys import normalised

SHINGLE_WORDS = 3
THRESHOLD = 0.8
"""Jaccard similarity of two texts' shingles from which they count as near-duplicates."""
BANDS, ROWS = 21, 6
"""At the threshold a pair meets in a band with probability 1 - (1 - 0.8 ** 6) ** 21 = 0.998, at a similarity of 0.5
with 0.28; then the signatures decide."""
PERMUTATIONS = BANDS * ROWS
PAIRS_AT_ONCE = 100_000  # 50 MB of signatures on either side
_MULTIPLIER = np.uint32(0x9E3779B1)

Signatures = NDArray[np.uint32]
"""[N, PERMUTATIONS]"""
Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The places of the firsts and of the seconds. [pairs], [pairs]"""


def shingles(text: str) -> NDArray[np.uint32]:
    """Hashes of the runs of three words of a text after normalising; of a shorter one, of all its words together.

    A text without a word (only signs or emoji) has one shingle of its own: it is like none but itself.
    """
    words = normalised(text).encode().split()
    if not words:
        return np.array([xxh32_intdigest(text.encode("utf-8", "surrogatepass"), seed=1)], dtype=np.uint32)
    hashes = np.array([xxh32_intdigest(word) for word in words], dtype=np.uint32)
    length = min(SHINGLE_WORDS, len(words))
    mixed = np.full(len(words) - length + 1, length, dtype=np.uint32)
    for place in range(length):  # wraps around at 2 ** 32, as is meant
        mixed = mixed * _MULTIPLIER + hashes[place : place + len(mixed)]
    return mixed


def signatures_of(texts: Sequence[str]) -> Signatures:
    """[N, PERMUTATIONS]; the share of equal entries of two estimates the similarity of their texts.

    Computed together: datasketch's numbers in half its time, which goes by text.
    """
    made = np.empty((len(texts), PERMUTATIONS), dtype=np.uint32)
    if not texts:
        return made
    sets = [shingles(text) for text in texts]
    begins = np.cumsum([0, *map(len, sets[:-1])])
    mixed = _mixed(np.concatenate(sets))
    for place, (factor, summand) in enumerate(_permutations().T):  # affine32: wraps around at 2 ** 32, as is meant
        made[:, place] = np.minimum.reduceat(mixed * factor + summand, begins)
    return made


def clusters(signatures: Signatures, within: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """A label for each text, the same for near-duplicates: the place of the first text of its kind.

    Args:
        signatures: [N, PERMUTATIONS].
        within: [N]; only texts with the same number here are compared.
    """
    labels = np.arange(len(signatures))
    apart = np.zeros(len(labels), dtype=np.int64) if within is None else within
    for band in range(BANDS):
        buckets = _buckets(_band_keys(signatures, band, apart))
        labels = _compared(signatures, apart, labels, [_with_first(buckets)])
        # Most buckets are of copies, which now are one; of the others every two are compared, so that a pair is found
        # whatever else there is: what is found among some of the texts is found among all.
        labels = _compared(signatures, apart, labels, _every_two(buckets, labels))
    return labels


def _compared(
    signatures: Signatures, apart: NDArray[np.int64], labels: NDArray[np.int64], candidates: Iterable[Pairs]
) -> NDArray[np.int64]:
    """The labels after joining those of the candidates that are alike."""
    waiting: list[Pairs] = []

    def joined() -> NDArray[np.int64]:
        first, second = (np.concatenate(places) for places in zip(*waiting, strict=True))
        waiting.clear()
        alike = np.concatenate([_alike(signatures, *part) for part in _parts(first, second)])
        return _joined(labels, first[alike], second[alike])

    for first, second in candidates:
        new = (labels[first] != labels[second]) & (apart[first] == apart[second])
        if new.any():
            waiting.append((first[new], second[new]))
        if sum(len(places) for places, _ in waiting) >= PAIRS_AT_ONCE:
            labels = joined()
    return joined() if waiting else labels


@cache
def _permutations() -> NDArray[np.uint32]:
    from datasketch import MinHash  # takes half a second, which those who only count rows need not wait

    return np.asarray(MinHash(num_perm=PERMUTATIONS, seed=1).permutations)


def _mixed(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """MurmurHash3's finaliser, which datasketch applies to a hash before it permutes it."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values = (values ^ (values >> np.uint32(shift))) * np.uint32(factor)
    return values ^ (values >> np.uint32(16))


def _band_keys(signatures: Signatures, band: int, apart: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One number a text that equal bands share; unequal ones seldom do, and the signatures tell them apart."""
    key = apart.astype(np.uint64)
    for column in signatures[:, band * ROWS : (band + 1) * ROWS].T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


class Buckets(NamedTuple):
    """Places in the order of their keys, where each key begins in that order, and how many places have it."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


def _with_first(buckets: Buckets) -> Pairs:
    """Each place with the first that has its key."""
    order, starts, sizes = buckets
    rest = np.setdiff1d(np.arange(len(order)), starts, assume_unique=True)
    return order[np.repeat(starts, sizes)[rest]], order[rest]


def _every_two(buckets: Buckets, labels: NDArray[np.int64]) -> Iterator[Pairs]:
    """Every two places with the same key, of the keys whose places have several labels."""
    order, starts, sizes = buckets
    if not len(order):
        return
    several = np.minimum.reduceat(labels[order], starts) != np.maximum.reduceat(labels[order], starts)
    rank = np.arange(len(order)) - np.repeat(starts, sizes)
    places = np.flatnonzero(np.repeat(several, sizes) & (rank > 0))
    for step in range(1, int(sizes.max())):
        places = places[rank[places] >= step]
        if not len(places):
            break
        yield order[places - step], order[places]


def _buckets(keys: NDArray[np.uint64]) -> Buckets:
    order = np.argsort(keys, kind="stable")
    _, starts, sizes = np.unique(keys[order], return_index=True, return_counts=True)
    return Buckets(order, starts, sizes)


def _parts(first: NDArray[np.int64], second: NDArray[np.int64]) -> Iterator[Pairs]:
    for begin in range(0, len(first), PAIRS_AT_ONCE):
        yield first[begin : begin + PAIRS_AT_ONCE], second[begin : begin + PAIRS_AT_ONCE]


def _alike(signatures: Signatures, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray((signatures[first] == signatures[second]).mean(axis=1) >= THRESHOLD)


def _joined(labels: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """The labels after joining pairs; a label is the smallest place that bears it."""
    if not len(first):
        return labels
    count = len(labels)
    rows, columns = np.r_[first, np.arange(count)], np.r_[second, labels]
    _, component = connected_components(coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(count, count)))
    smallest = np.full(component.max() + 1, count)
    np.minimum.at(smallest, component, np.arange(count))
    return smallest[component]
