"""The sentences that gates are written in, read as they are written, and what they can be about.

    win_rate_vs_champion: ">= 0.52 (lower bound >= 0.5)"
    reward_accuracy: ">= length_baseline + 0.03"
    kl: "<= 15"

The first comparison is of the measured value, the one in brackets of a bound of its 95 % interval. A limit is a number,
or a baseline of the measure with a number added or taken off. `MEASURES` says what can be measured (`tasks.gates` how);
which gates a run has stands in its config.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NUMBER = r"\d+(?:\.\d+)?"
_COMPARISON = rf"(>=|>|<=|<)\s*(?:(-?{_NUMBER})|([a-z][a-z0-9_]*)(?:\s*([+-])\s*({_NUMBER}))?)"
SENTENCE = re.compile(rf"\s*{_COMPARISON}\s*(?:\(\s*(lower|upper) bound\s+{_COMPARISON}\s*\)\s*)?")


@dataclass(frozen=True)
class Comparison:
    """A limit: `operator baseline + number`; without a baseline, the number alone."""

    operator: str
    baseline: str | None
    number: float


@dataclass(frozen=True)
class Gate:
    """A sentence, understood."""

    value: Comparison
    bound: tuple[str, Comparison] | None
    """"lower" or "upper", and what that end of the interval has to keep."""


@dataclass(frozen=True)
class Measure:
    """Something that a gate can be about."""

    title: str
    """{rival}: the champion, or what stands for it; {judge}: whose scores decide."""
    baselines: tuple[str, ...] = ()
    needs: str | None = None
    """What not every run has: "gold", "api" or "text"."""


def parse(name: str, sentence: str) -> Gate:
    """A gate of a measure. Raises ValueError that says how a gate is written."""
    found = SENTENCE.fullmatch(sentence)
    if found is None:
        raise ValueError(
            f'"{sentence}" is no gate; write a comparison such as ">= 0.52" or "<= 15", if need be with a bound of '
            'the 95 % interval, such as ">= 0.52 (lower bound >= 0.5)"'
        )
    parts = found.groups()
    bound = (parts[5], _comparison(parts[6:])) if parts[5] else None
    gate = Gate(_comparison(parts[:5]), bound)
    known = MEASURES[name].baselines
    for comparison in (gate.value, *([bound[1]] if bound else [])):
        if comparison.baseline is not None and comparison.baseline not in known:
            may_be = f"it may be {' or '.join(known)}" if known else "this measure has none, so give a number"
            raise ValueError(f'"{sentence}" names the baseline {comparison.baseline}; {may_be}')
    return gate


def _comparison(parts: Sequence[str | None]) -> Comparison:
    sign, number, baseline, plus_or_minus, offset = parts
    assert sign is not None, "the pattern begins with an operator"
    if number is not None:
        return Comparison(sign, None, float(number))
    return Comparison(sign, baseline, float(f"{plus_or_minus}{offset}") if offset else 0.0)


MEASURES: Mapping[str, Measure] = {
    "win_rate_vs_champion": Measure("win rate against {rival}{judge}"),
    "win_rate_vs_sft": Measure("win rate against the SFT model{judge}"),
    "length_controlled_win_rate_vs_champion": Measure("win rate against {rival} at equal length{judge}"),
    "length_controlled_win_rate_vs_sft": Measure("win rate against the SFT model at equal length{judge}"),
    "proxy_win_rate_vs_champion": Measure("win rate against {rival} by the run's reward model"),
    "api_win_rate_vs_champion": Measure("win rate against {rival} by the judge behind an API", (), "api"),
    "win_rate_gap": Measure(
        "win rate against the SFT model by the run's reward model, less that by the gold one", (), "gold"
    ),
    "reward": Measure("reward of the answers", ("sft",)),
    "gold_reward": Measure("gold reward of the answers", ("sft",), "gold"),
    "reward_accuracy": Measure("accuracy of the reward model", ("length_baseline",)),
    "gold_accuracy": Measure("accuracy of the gold reward model", ("length_baseline",), "gold"),
    "kl": Measure("KL to the SFT model in nats per answer"),
    "tokens": Measure("tokens per answer", ("sft",)),
    "eos_rate": Measure("share of answers that end by themselves", ("sft",)),
    "repetition": Measure("share of an answer that repeats itself", ("sft",)),
    "text_loss": Measure("loss on unsupervised text in nats per token", ("sft",), "text"),
}
"""What a gate can be about, by its key. `tasks.config.GatesConfig` has a field for each."""
