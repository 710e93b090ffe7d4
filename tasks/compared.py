"""What the answers of two models to the same prompts say: the figures of `evaluate` and `compare`.

A row is a prompt with both answers; columns are `name` (the text), `name_reward`, `name_gold`, `name_tokens`, ... The
scorers are the reward model that PPO was trained on (the proxy) and, where the run has one, the gold reward model, that
it was not trained on. What a policy gains by the first and not by the second it gained by the first one's errors: so
the gap of their win rates, and of their gains in standard deviations, shows reward hacking (Gao, Schulman & Hilton
2023).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks import diversity
from tasks.paired import estimate, length_controlled, standardised_gain, wins

Row = Mapping[str, Any]
PROXY, GOLD = "reward", "gold"
SCORERS = {PROXY: "", GOLD: "gold_"}
"""Scorer -> how its figures are called."""
MEANS = {
    "reward": "reward",
    "gold": "gold",
    "true_score": "true_score",
    "tokens": "tokens",
    "ended": "eos_rate",
    "kl": "kl",
    "repetition": "repetition",
}
"""Column -> the name of its mean."""
WITH_SPREAD = ("reward", "gold", "true_score")
DISTINCT = (1, 2, 3)


def comparison(rows: Sequence[Row], first: str, second: str) -> dict[str, Any]:
    """The first against the second: by each scorer, all prompts together and per source.

    Returns win rates (ties count half), the same at equal length, gains in standard deviations of the second's scores,
    each with its 95 % interval as `_low` and `_high`; with both scorers also `win_rate_gap` and `gain_gap`, proxy minus
    gold; `per_source`.
    """
    found = _contest(rows, first, second)
    for scorer in scorers(rows, first):
        found |= standardised_gain(*scores(rows, first, second, scorer)).named(f"{SCORERS[scorer]}gain")
    if "gold_gain" in found:
        found["gain_gap"] = found["gain"] - found["gold_gain"]
    return found | {"per_source": per_source(rows, first, second)}


def per_source(rows: Sequence[Row], first: str, second: str) -> dict[str, dict[str, Any]]:
    """Source -> prompts, the figures of `comparison` but the gains, and what was `measured` of the first's answers."""
    found = {}
    for source in sorted({row["source"] for row in rows}):
        part = [row for row in rows if row["source"] == source]
        found[source] = _contest(part, first, second) | measured(part, first)
    return found


def _contest(rows: Sequence[Row], first: str, second: str) -> dict[str, Any]:
    """How many prompts there are, and what of them the first wins: by each scorer, at equal length, the gap."""
    found: dict[str, Any] = {"prompts": len(rows)}
    longer = longer_by(rows, first, second)
    for scorer in scorers(rows, first):
        prefix, won = SCORERS[scorer], wins(*scores(rows, first, second, scorer))
        found |= estimate(won).named(f"{prefix}win_rate")
        found |= length_controlled(won, longer).named(f"{prefix}length_controlled_win_rate")
    if "gold_win_rate" in found:
        found |= estimate(win_gap(rows, first, second)).named("win_rate_gap")
    return found


def measured(rows: Sequence[Row], name: str) -> dict[str, float]:
    """Of one model's answers: the means of their columns, and distinct-1, -2 and -3."""
    found = {}
    for column, called in MEANS.items():
        if f"{name}_{column}" in rows[0]:
            values = column_of(rows, name, column)
            found[f"{name}_{called}"] = float(values.mean())
            if column in WITH_SPREAD:
                found[f"{name}_{called}_std"] = float(values.std())
    texts = [row[name] for row in rows]
    return found | {f"{name}_distinct_{n}": diversity.distinct(texts, n) for n in DISTINCT}


def scorers(rows: Sequence[Row], name: str) -> list[str]:
    """Who scored the answers."""
    return [scorer for scorer in SCORERS if f"{name}_{scorer}" in rows[0]]


def scores(rows: Sequence[Row], first: str, second: str, scorer: str) -> tuple[np.ndarray, np.ndarray]:
    """Both models' scores by a scorer, [prompts] each."""
    return column_of(rows, first, scorer), column_of(rows, second, scorer)


def longer_by(rows: Sequence[Row], first: str, second: str) -> np.ndarray:
    """How many characters the first model's answers are longer, [prompts]."""
    return np.array([len(row[first]) - len(row[second]) for row in rows], dtype=float)


def win_gap(rows: Sequence[Row], first: str, second: str) -> np.ndarray:
    """Prompt by prompt, the win by the proxy less the win by the gold reward model, [prompts]."""
    proxy, gold = (wins(*scores(rows, first, second, scorer)) for scorer in (PROXY, GOLD))
    gap: np.ndarray = proxy - gold
    return gap


def column_of(rows: Sequence[Row], name: str, column: str) -> np.ndarray:
    """A column of one model's answers as floats, [prompts]."""
    return np.array([float(row[f"{name}_{column}"]) for row in rows])
