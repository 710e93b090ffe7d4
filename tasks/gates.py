"""Gates: what a candidate has to pass to become champion, measured. How they are written: `tasks.sentences`.

Intervals are percentile bootstraps over the held-out prompts (`tasks.paired`); what is set against a baseline is
resampled in pairs, as the difference prompt by prompt.

Win rates are judged by the gold reward model where the run has one: a candidate was optimised against its own run's
reward model, the champion was not, so that this one would favour the candidate for its errors.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.compared import GOLD, PROXY, column_of, longer_by, scores, win_gap
from tasks.json_lines import read_rows
from tasks.paired import Estimate, estimate, length_controlled, wins
from tasks.sentences import MEASURES, Comparison, parse
from tasks.stages import StageRef

Row = Mapping[str, Any]
OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Judge:
    """Whose scores decide the win rates of the gates."""

    scorer: str
    said: str
    """As it stands behind "win rate"; empty where there is but one reward model."""


@dataclass(frozen=True)
class Evidence:
    """What was measured of a candidate."""

    answers: Sequence[Row]
    """Of `evaluate`: SFT's and PPO's answers to the same prompts with their scores."""
    compared: Sequence[Row] | None
    """Of `compare`: PPO's and the champion's; None where there is no champion yet."""
    reward: Mapping[str, Any]
    """Metrics of the reward model."""
    gold: Mapping[str, Any] | None = None
    """Metrics of the gold reward model; None where the run has none."""
    verdicts: Sequence[Row] = ()
    """Of the judge behind an API on PPO's answers against the champion's, or SFT's where there is none."""
    texts: Sequence[Row] = ()
    """Of `evaluate`: SFT's and PPO's loss on each chunk of unsupervised text."""
    prefer_gold: bool = True
    """Whether the gold reward model judges, if it can."""

    @property
    def judge(self) -> Judge:
        """The gold reward model, where there is one that is surely better than chance; else the run's reward model."""
        if self.gold is None:
            return Judge(PROXY, "")
        if not self.prefer_gold:
            return Judge(PROXY, " by the run's reward model")
        if self.gold["accuracy_low"] <= 0.5:
            right = f"right in {100 * self.gold['accuracy']:.0f} % of held-out pairs"
            return Judge(PROXY, f" by the run's reward model (the gold one, {right}, may be no better than chance)")
        return Judge(GOLD, " by the gold reward model")


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


Of = Callable[[Evidence, str | None], Estimate]


def answers(directory: Path, file: str = "answers.jsonl") -> Sequence[Row]:
    """The answers that `evaluate` or `compare` left in its directory, a row per prompt."""
    return read_rows(directory / file)


def verdicts(asked: StageRef | None) -> Sequence[Row]:
    """What a judge behind an API said, a row per pair; nothing where none was asked."""
    return answers(asked.directory, "verdicts.jsonl") if asked is not None else []


def texts(directory: Path) -> Sequence[Row]:
    """The losses on unsupervised text that `evaluate` left in its directory, a row per chunk."""
    return answers(directory, "texts.jsonl")


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
    own = replace(evidence, answers=rows, compared=None)
    return check({name: sentences[name] for name in OF_CHAMPION if name in sentences}, own)


def _result(name: str, sentence: str, evidence: Evidence) -> GateResult:
    of, gate = HOW[name], parse(name, sentence)
    value = of(evidence, None)
    kept = [_keeps(of(evidence, gate.value.baseline).value, gate.value)]
    named = [gate.value.baseline]
    if gate.bound is not None:
        side, comparison = gate.bound
        against = of(evidence, comparison.baseline)
        kept.append(_keeps(against.lower if side == "lower" else against.upper, comparison))
        named.append(comparison.baseline)
    baselines = {base: value.value - of(evidence, base).value for base in named if base is not None}
    rival = "the SFT model" if evidence.compared is None else "the champion"
    title = MEASURES[name].title.format(rival=rival, judge=evidence.judge.said)
    return GateResult(name, title, sentence, all(kept), value.value, value.lower, value.upper, baselines)


def _keeps(value: float, comparison: Comparison) -> bool:
    return OPERATORS[comparison.operator](value, comparison.number)


def _against(second: str, scorer: str | None, of: Callable[["Wins"], Estimate]) -> Of:
    """PPO against SFT, or against the champion (the first model, as there is none yet, against SFT).

    Args:
        scorer: reward or gold; None: the judge of the gates.
    """

    def measured(evidence: Evidence, baseline: str | None) -> Estimate:
        rows, rival = evidence.answers, "sft"
        if second == "champion" and evidence.compared is not None:
            rows, rival = evidence.compared, "champion"
        return of(Wins(rows, rival, scorer or evidence.judge.scorer))

    return measured


class Wins(NamedTuple):
    """The prompts that PPO's answers win over a rival's, by a scorer."""

    rows: Sequence[Row]
    rival: str
    scorer: str

    def rate(self) -> Estimate:
        """The win rate."""
        return estimate(self._won())

    def at_equal_length(self) -> Estimate:
        """The win rate with the lengths' part taken out."""
        return length_controlled(self._won(), longer_by(self.rows, "ppo", self.rival))

    def gap(self) -> Estimate:
        """The win rate by the reward model less that by the gold one."""
        return estimate(win_gap(self.rows, "ppo", self.rival))

    def _won(self) -> np.ndarray:
        return wins(*scores(self.rows, "ppo", self.rival, self.scorer))


def _by_api(evidence: Evidence, baseline: str | None) -> Estimate:
    """Of the pairs that the API's judge gave verdicts on; without any, nothing is known and the rate may be any."""
    won = np.array([row["won"] for row in evidence.verdicts if row["won"] is not None])
    return estimate(won) if len(won) else Estimate(float("nan"), 0.0, 1.0)


def _mean(column: str) -> Of:
    """The mean over PPO's answers, or over their differences from SFT's answers to the same prompts."""

    def of(evidence: Evidence, baseline: str | None) -> Estimate:
        values = column_of(evidence.answers, "ppo", column)
        return estimate(values - column_of(evidence.answers, baseline, column) if baseline else values)

    return of


def _text_loss(evidence: Evidence, baseline: str | None) -> Estimate:
    """Over the chunks of unsupervised text."""
    values = column_of(evidence.texts, "ppo", "loss")
    return estimate(values - column_of(evidence.texts, baseline, "loss") if baseline else values)


def _accuracy(of: Callable[[Evidence], Mapping[str, Any] | None]) -> Of:
    """Intervals are those that the model's own evaluation gives, of pairs where a baseline is taken off."""

    def measured(evidence: Evidence, baseline: str | None) -> Estimate:
        found = of(evidence)
        assert found is not None, "the config has no gate about a model that is not trained"
        if baseline is None:
            value, reach = found["accuracy"], found["accuracy_interval"]
        else:
            value, reach = found["accuracy"] - found["length_accuracy"], found["length_gain_interval"]
        return Estimate(value, value - reach, value + reach)

    return measured


HOW: Mapping[str, Of] = {
    "win_rate_vs_champion": _against("champion", None, Wins.rate),
    "win_rate_vs_sft": _against("sft", None, Wins.rate),
    "length_controlled_win_rate_vs_champion": _against("champion", None, Wins.at_equal_length),
    "length_controlled_win_rate_vs_sft": _against("sft", None, Wins.at_equal_length),
    "proxy_win_rate_vs_champion": _against("champion", PROXY, Wins.rate),
    "api_win_rate_vs_champion": _by_api,
    "win_rate_gap": _against("sft", None, Wins.gap),
    "reward": _mean("reward"),
    "gold_reward": _mean("gold"),
    "reward_accuracy": _accuracy(lambda evidence: evidence.reward),
    "gold_accuracy": _accuracy(lambda evidence: evidence.gold),
    "kl": _mean("kl"),
    "tokens": _mean("tokens"),
    "eos_rate": _mean("ended"),
    "repetition": _mean("repetition"),
    "text_loss": _text_loss,
}
"""Measure -> how it is measured: (evidence, baseline) -> the value less the baseline, or with None the value."""

OF_CHAMPION = (
    *("win_rate_vs_sft", "length_controlled_win_rate_vs_sft", "reward", "gold_reward"),
    *("tokens", "eos_rate", "repetition"),
)
"""Those that a comparison takes of the champion as well."""
