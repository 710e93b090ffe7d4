"""The demo's corpus: a local hub folder with all six sets in their own columns and splits, written from the little
language of `demo_language`, with the faults that the real sets have (copies, leaks, ties, empty and broken rows)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.demo_language import topic_of, true_score, write_answer, write_prompt

__all__ = ["DemoPair", "make_pairs", "true_score", "write_hub"]

BEST_QUALITY = 0.6  # with it, preferred answers score 0.55 +- 0.2: good to learn from, and far from as good as can be
LEAST_DIFFERENCE = 0.3
LABEL_NOISE = 0.02

# Shares of the distinct pairs; rlhf-reward-datasets has none of its own.
SHARES = {"rm": 0.25, "hh": 0.30, "synthetic": 0.10, "webgpt": 0.15, "shp": 0.20}

Row = dict[str, Any]


class DemoPair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def make_pairs(rng: Random, count: int, prompt: str | None = None) -> list[DemoPair]:
    """Preference pairs, for one prompt or each for its own; the better true score is chosen, but for `LABEL_NOISE`."""
    return [_make_pair(rng, prompt or write_prompt(rng)) for _ in range(count)]


def _make_pair(rng: Random, prompt: str) -> DemoPair:
    topic = topic_of(prompt)
    while True:
        first, second = (write_answer(topic, rng.uniform(0, BEST_QUALITY), rng) for _ in range(2))
        difference = true_score(prompt, first) - true_score(prompt, second)
        if abs(difference) >= LEAST_DIFFERENCE:
            first_wins = (difference > 0) != (rng.random() < LABEL_NOISE)
            return DemoPair(prompt, *((first, second) if first_wins else (second, first)))


def write_hub(out: Path, seed: int = 0, pairs: int = 12_000) -> dict[str, Any]:
    """Write the six sets as `<out>/<name>/data/<split>-00000-of-00001.parquet`; the same seed gives the same files.

    pairs: how many distinct good pairs; copies and faulty rows come on top.  Returns {"pairs", "rows": {name: {split:
    rows}}}.  ValueError for fewer than 100 pairs, with which some split would have no rows.
    """
    if pairs < 100:
        raise ValueError(
            f"A demo corpus of {pairs} pairs is too small for six sets and their splits: take 100 or more."
        )
    rng = Random(seed)
    own = {name: make_pairs(rng, round(share * pairs)) for name, share in SHARES.items() if name != "shp"}
    static = _in_two(_with_faults(own["rm"], rng), 0.84)
    pool = _in_two(_with_faults(own["hh"], rng), 0.90)
    # full-hh-rlhf was split anew from the same conversations, so most of rm-static's test rows are in its train split.
    pool["train"] = _shuffled([*pool["train"], *static["train"][::3], *_most(static["test"])], rng)
    sets: dict[str, dict[str, pa.Table]] = {
        "Dahoas/rm-static": _tables(static, _static_row),
        "Dahoas/full-hh-rlhf": _tables(pool, _static_row),
        "Dahoas/synthetic-instruct-gptj-pairwise": _tables({"train": _contradicting(own["synthetic"])}, _plain_row),
        "yitingxie/rlhf-reward-datasets": _tables(static, _reward_row),
        "openai/webgpt_comparisons": {"train": _webgpt_table(own["webgpt"], rng)},
        "stanfordnlp/SHP": _shp_tables(round(SHARES["shp"] * pairs), rng),
    }
    for name, splits in sets.items():
        (out / name / "data").mkdir(parents=True)
        for split, table in splits.items():
            pq.write_table(table, out / name / "data" / f"{split}-00000-of-00001.parquet")
    rows = {name: {split: table.num_rows for split, table in splits.items()} for name, splits in sets.items()}
    return {"pairs": pairs, "rows": rows}


def _shuffled(pairs: list[DemoPair], rng: Random) -> list[DemoPair]:
    return rng.sample(pairs, len(pairs))


def _most(pairs: list[DemoPair]) -> list[DemoPair]:
    return [pair for number, pair in enumerate(pairs) if number % 10]


def _in_two(pairs: list[DemoPair], share: float) -> dict[str, list[DemoPair]]:
    border = round(share * len(pairs))
    return {"train": pairs[:border], "test": pairs[border:]}


def _with_faults(pairs: list[DemoPair], rng: Random) -> list[DemoPair]:
    """The pairs and, in between, about four per cent of rows that have to be dropped."""
    few = max(1, len(pairs) // 100)
    picks = iter(rng.sample(pairs, 4 * few))
    faults = [pair._replace(rejected=pair.chosen) for pair in (next(picks) for _ in range(few))]
    faults += [pair._replace(rejected="  ") for pair in (next(picks) for _ in range(few))]
    faults += [
        pair._replace(chosen=pair.chosen.replace("e", "\ufffd", 1)) for pair in (next(picks) for _ in range(few))
    ]
    faults += [next(picks) for _ in range(few)]  # exact copies
    return _shuffled([*pairs, *faults], rng)


def _contradicting(pairs: list[DemoPair]) -> list[DemoPair]:
    """The pairs, and a few of them once more with the other answer preferred."""
    return [*pairs, *(DemoPair(prompt, rejected, chosen) for prompt, chosen, rejected in pairs[::200])]


def _tables(splits: dict[str, list[DemoPair]], row: Callable[[DemoPair], Row]) -> dict[str, pa.Table]:
    return {split: pa.Table.from_pylist([row(pair) for pair in pairs]) for split, pairs in splits.items()}


def _plain_row(pair: DemoPair) -> Row:
    return pair._asdict()


def _static_row(pair: DemoPair) -> Row:
    chosen, rejected = f" {pair.chosen}", f" {pair.rejected}"
    prompt = f"\n\nHuman: {pair.prompt}\n\nAssistant:"
    return {"prompt": prompt, "response": chosen, "chosen": chosen, "rejected": rejected}


def _reward_row(pair: DemoPair) -> Row:
    return {
        "prompt": f"\n\nHuman: {pair.prompt}\n\n",
        "chosen": f"Assistant: {pair.chosen}",
        "rejected": f"Assistant: {pair.rejected}",
    }


_QUOTES = pa.struct([("title", pa.list_(pa.string())), ("extract", pa.list_(pa.string()))])
_TOKENS = pa.struct([("prefix", pa.list_(pa.int64())), ("completion", pa.list_(pa.int64()))])
_WEBGPT = pa.schema(
    [
        ("question", pa.struct([("dataset", pa.string()), ("id", pa.string()), ("full_text", pa.string())])),
        *((f"{name}_0", kind) for name, kind in (("quotes", _QUOTES), ("answer", pa.string()), ("tokens", _TOKENS))),
        ("score_0", pa.float64()),
        *((f"{name}_1", kind) for name, kind in (("quotes", _QUOTES), ("answer", pa.string()), ("tokens", _TOKENS))),
        ("score_1", pa.float64()),
    ]
)


def _webgpt_table(pairs: Sequence[DemoPair], rng: Random) -> pa.Table:
    """WebGPT's form: scores from -1 to 1 that sum to 0, one pair in eight repeated as a tie, citation marks."""
    rows = [_webgpt_row(number, pair, rng, tie=False) for number, pair in enumerate(pairs)]
    rows += [_webgpt_row(number, pair, rng, tie=True) for number, pair in enumerate(pairs[::8], start=len(rows))]
    return pa.Table.from_pylist(rng.sample(rows, len(rows)), schema=_WEBGPT)


def _webgpt_row(number: int, pair: DemoPair, rng: Random, tie: bool) -> Row:
    answers, score = [pair.chosen, pair.rejected], 0.0 if tie else rng.choice((0.5, 1.0))
    scores = [score, -score]
    if rng.random() < 0.5:
        answers.reverse()
        scores.reverse()
    row: Row = {"question": {"dataset": "demo", "id": f"demo-{number}", "full_text": pair.prompt}}
    for index, answer in enumerate(answers):
        row[f"quotes_{index}"] = {"title": ["Almanac", "Travels"], "extract": [answer, answer]}
        row[f"answer_{index}"] = _cited(answer, rng)
        row[f"tokens_{index}"] = {"prefix": [], "completion": []}
        row[f"score_{index}"] = scores[index]
    return row


def _cited(answer: str, rng: Random) -> str:
    mark = rng.choice(("", " [1]", "[2]", " [1, 2]", "[1][2]"))
    return answer.replace(",", mark + ",", 1)


def _shp_tables(count: int, rng: Random) -> dict[str, pa.Table]:
    """SHP's form: several pairs a post, now and then more than are taken; one in five not clear enough."""
    rows: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    post = 0
    while sum(map(len, rows.values())) < 1.25 * count or not (rows["validation"] and rows["test"]):
        split = "validation" if post % 10 == 8 else "test" if post % 10 == 9 else "train"
        for pair in make_pairs(rng, rng.choice((1, 1, 1, 2, 2, 3, 7)), write_prompt(rng)):
            rows[split].append(_shp_row(f"post{post}", split, len(rows[split]), pair, rng))
        post += 1
    return {split: pa.Table.from_pylist(split_rows) for split, split_rows in rows.items()}


def _shp_row(post: str, split: str, number: int, pair: DemoPair, rng: Random) -> Row:
    ratio = rng.choice((2.0, 2.5, 4.0, 6.0)) if rng.random() < 0.8 else 1.5
    worse = rng.randrange(2, 40, 2)
    better = int(worse * ratio)
    a_wins = rng.random() < 0.5
    first, second = (pair.chosen, pair.rejected) if a_wins else (pair.rejected, pair.chosen)
    if rng.random() < 0.05:
        first = first.replace(",", "&#44;")
    return {
        "post_id": post,
        "domain": f"askdemo_{split}",
        "upvote_ratio": 0.9,
        "history": pair.prompt,
        "c_root_id_A": f"a{number}",
        "c_root_id_B": f"b{number}",
        "created_at_utc_A": 1_600_000_000 + number,
        "created_at_utc_B": 1_600_003_600 + number,
        "score_A": better if a_wins else worse,
        "score_B": worse if a_wins else better,
        "human_ref_A": first,
        "human_ref_B": second,
        "labels": int(a_wins),
        "seconds_difference": 3600.0,
        "score_ratio": better / worse,
    }
