"""Gates: what a candidate has to pass to become champion, as sentences that are read as they are written.

    win_rate_vs_champion: ">= 0.52 (lower bound >= 0.5)"
    reward_accuracy: ">= length_baseline + 0.03"
    kl: "<= 15"

The first comparison is of the measured value, the one in brackets of a bound of its 95 % interval. A limit is a number,
or a baseline of the measure with a number added or taken off. Intervals are percentile bootstraps over the held-out
prompts (Efron & Tibshirani 1993, section 13.3); what is set against a baseline is resampled in pairs, as the difference
prompt by prompt. `MEASURES` says what can be measured; which gates a run has stands in its config.
"""

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Row = Mapping[str, Any]
OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 200  # of a few thousand prompts: some megabytes

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
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Evidence:
    """What was measured of a candidate."""

    answers: Sequence[Row]
    """Of `evaluate`: SFT's and PPO's answers to the same prompts with their scores."""
    compared: Sequence[Row] | None
    """Of `compare`: PPO's and the champion's; None where there is no champion yet."""
    reward: Mapping[str, Any]
    """Metrics of the reward model."""


@dataclass(frozen=True)
class GateResult:
    """A gate with what was measured. A plain tree of values, as it passes between Prefect tasks."""

    name: str
    title: str
    sentence: str
    passed: bool
    value: float
    lower: float
    upper: float
    baselines: dict[str, float]
    """The baselines that the sentence names."""

    @property
    def measured(self) -> str:
        """The value with its interval and the baselines beside it."""
        beside = "".join(f", {name} {value:.4g}" for name, value in self.baselines.items())
        return f"{self.value:.4g} [{self.lower:.4g}, {self.upper:.4g}]{beside}"

    @property
    def verdict(self) -> str:
        """One line: what was wanted, what was measured."""
        return f"{'passed' if self.passed else 'failed'}: {self.title} {self.measured}, wanted {self.sentence}"


@dataclass(frozen=True)
class Measure:
    """Something that a gate can be about."""

    title: str
    of: Callable[[Evidence, str | None], Estimate]
    """(evidence, baseline) -> the value less the baseline, or with None the value."""
    baselines: tuple[str, ...] = ()


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


def answers(directory: Path) -> list[Row]:
    """The answers that `evaluate` or `compare` left in its directory, a row per prompt."""
    return [json.loads(line) for line in (directory / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def check(sentences: Mapping[str, str], evidence: Evidence) -> list[GateResult]:
    """The verdict of every gate, by measure -> sentence."""
    return [_result(name, sentence, evidence) for name, sentence in sentences.items()]


def check_champion(sentences: Mapping[str, str], evidence: Evidence) -> list[GateResult]:
    """The verdict of the gates on the present champion, on the prompts that it was compared on; none without one.

    Only of measures that are taken of it: its KL, say, would be from the SFT model of another run.
    """
    if evidence.compared is None:
        return []
    answers = iter(evidence.answers)  # of which the compared ones are a subsequence
    rows = []
    for row in evidence.compared:
        ours = next(one for one in answers if (one["prompt"], one["ppo"]) == (row["prompt"], row["ppo"]))
        champion = {f"ppo{key.removeprefix('champion')}": row[key] for key in row if key.startswith("champion")}
        rows.append({**ours, **champion})
    own = Evidence(rows, None, evidence.reward)
    return check({name: sentences[name] for name in OF_CHAMPION if name in sentences}, own)


def _result(name: str, sentence: str, evidence: Evidence) -> GateResult:
    measure, gate = MEASURES[name], parse(name, sentence)
    value = measure.of(evidence, None)
    kept = [_keeps(measure.of(evidence, gate.value.baseline).value, gate.value)]
    named = [gate.value.baseline]
    if gate.bound is not None:
        side, comparison = gate.bound
        against = measure.of(evidence, comparison.baseline)
        kept.append(_keeps(against.lower if side == "lower" else against.upper, comparison))
        named.append(comparison.baseline)
    baselines = {base: value.value - measure.of(evidence, base).value for base in named if base is not None}
    title = measure.title.format(rival="the SFT model" if evidence.compared is None else "the champion")
    return GateResult(name, title, sentence, all(kept), value.value, value.lower, value.upper, baselines)


def _keeps(value: float, comparison: Comparison) -> bool:
    return OPERATORS[comparison.operator](value, comparison.number)


def estimate(values: "np.ndarray", seed: int = 0) -> Estimate:
    """The mean of one value per prompt, with the percentile bootstrap's 95 % interval; the same for the same values.

    Args:
        values: [prompts], float.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(0, len(values), (RESAMPLES_AT_ONCE, len(values)))].mean(1)
        for _ in range(RESAMPLES // RESAMPLES_AT_ONCE)
    ]
    lower, upper = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(float(values.mean()), float(lower), float(upper))


def _win_rate(rows: Sequence[Row], rival: str) -> Estimate:
    import numpy as np

    gains = np.array([row["ppo_reward"] - row[f"{rival}_reward"] for row in rows])
    return estimate((np.sign(gains) + 1) / 2)


def _against_champion(evidence: Evidence, baseline: str | None) -> Estimate:
    """Of the first model, against the SFT model that it comes from: there is no champion yet."""
    if evidence.compared is None:
        return _win_rate(evidence.answers, "sft")
    return _win_rate(evidence.compared, "champion")


def _mean(column: str) -> Callable[[Evidence, str | None], Estimate]:
    """The mean over PPO's answers, or over their differences from SFT's answers to the same prompts."""

    def of(evidence: Evidence, baseline: str | None) -> Estimate:
        import numpy as np

        values = np.array([float(row[f"ppo_{column}"]) for row in evidence.answers])
        if baseline is not None:
            values = values - np.array([float(row[f"{baseline}_{column}"]) for row in evidence.answers])
        return estimate(values)

    return of


def _reward_accuracy(evidence: Evidence, baseline: str | None) -> Estimate:
    """Intervals are those that the reward model's own evaluation gives, of pairs where a baseline is taken off."""
    found = evidence.reward
    if baseline is None:
        value, reach = found["accuracy"], found["accuracy_interval"]
    else:
        value, reach = found["accuracy"] - found["length_accuracy"], found["length_gain_interval"]
    return Estimate(value, value - reach, value + reach)


MEASURES: Mapping[str, Measure] = {
    "win_rate_vs_champion": Measure("win rate against {rival}", _against_champion),
    "win_rate_vs_sft": Measure(
        "win rate against the SFT model", lambda evidence, baseline: _win_rate(evidence.answers, "sft")
    ),
    "reward": Measure("reward of the answers", _mean("reward"), ("sft",)),
    "reward_accuracy": Measure("accuracy of the reward model", _reward_accuracy, ("length_baseline",)),
    "kl": Measure("KL to the SFT model in nats per answer", _mean("kl")),
    "tokens": Measure("tokens per answer", _mean("tokens"), ("sft",)),
    "eos_rate": Measure("share of answers that end by themselves", _mean("ended"), ("sft",)),
}
"""Measure -> how it is measured. `tasks.config.GatesConfig` has a field for each."""

OF_CHAMPION = ("win_rate_vs_sft", "reward", "tokens", "eos_rate")
"""Those that a comparison takes of the champion as well."""
