"""Two models that answered the same prompts: how often one wins, how sure that is, and what of it is length.

Everything is paired and bootstrapped over prompts (percentile intervals, Efron & Tibshirani 1993, section 13.3): a
resample draws prompts, each with both of its answers. The same values give the same interval.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
RESAMPLES = 10_000
RESAMPLES_OF_FITS = 2_000  # each is a regression
RESAMPLES_AT_ONCE = 200  # of a few thousand prompts: some megabytes
NEWTON_STEPS = 25
FARTHEST = 30.0
"""Log-odds beyond which a win rate is 0 or 1 to a double's precision: where all prompts are won, the fit has no end."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    lower: float
    upper: float

    def named(self, name: str) -> dict[str, float]:
        """As metrics: `name`, `name_low`, `name_high`."""
        return {name: self.value, f"{name}_low": self.lower, f"{name}_high": self.upper}


def wins(first: Array, second: Array) -> Array:
    """1 where the first has the higher score, 1/2 in a tie, 0 where the second has; [prompts]."""
    won: Array = (np.sign(first - second) + 1) / 2
    return won


def estimate(values: Array, seed: int = 0) -> Estimate:
    """The mean of one value per prompt.

    Args:
        values: [prompts], float.
    """
    return bootstrapped(len(values), lambda counts: counts @ values / len(values), seed)


def standardised_gain(first: Array, second: Array, seed: int = 0) -> Estimate:
    """By how many standard deviations of the second's scores the first's mean is higher; 0 where those do not vary.

    So that the scores of two reward models, whose scales differ, can be set side by side.

    Args:
        first, second: scores of the two answers, [prompts] each.
    """

    def of(counts: Array) -> Array:
        total = len(second)
        mean = counts @ second / total
        spread = np.sqrt(np.maximum(counts @ second**2 / total - mean**2, 0.0))
        gain = counts @ (first - second) / total
        return np.divide(gain, spread, out=np.zeros_like(gain), where=spread > 1e-9 * np.abs(second).max(initial=1.0))

    return bootstrapped(len(second), of, seed)


def length_controlled(won: Array, longer_by: Array, seed: int = 0) -> Estimate:
    """The win rate that is left where both answers are as long (length-controlled, as AlpacaEval 2 reports it).

    A logistic regression of the wins on an intercept and tanh(d / std(d)), d the difference of lengths; the rate is
    that at d = 0 (Dubois et al. 2024, "Length-Controlled AlpacaEval", whose term for a prompt's difficulty
    needs many models and is left out with one pair). The slope has an L2 penalty of slope^2 / 2, so that lengths which
    tell the winner perfectly leave a finite one; the intercept has none.

    Args:
        won: 1, 1/2 or 0, [prompts].
        longer_by: how much longer the first answer is, [prompts], in characters as in AlpacaEval: models that are
            compared may have other tokens.
    """
    spread = longer_by.std()
    length = np.tanh(longer_by / spread) if spread > 0 else np.zeros_like(won)
    return bootstrapped(len(won), lambda counts: _rate_at_equal_length(counts, won, length), seed, RESAMPLES_OF_FITS)


def _rate_at_equal_length(counts: Array, won: Array, length: Array) -> Array:
    """The intercepts as shares, [resamples], of weighted logistic regressions fitted at once by Newton's method.

    Args:
        counts: how often each prompt is drawn, [resamples, prompts].
    """
    intercept, slope = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(NEWTON_STEPS):
        rate = 1 / (1 + np.exp(-(intercept[:, None] + slope[:, None] * length)))
        off = counts * (won - rate)
        weight = counts * rate * (1 - rate)
        gradient = off.sum(1), off @ length - slope
        a, b, c = weight.sum(1) + 1e-12, weight @ length, weight @ length**2 + 1
        determinant = a * c - b**2
        steps = (c * gradient[0] - b * gradient[1]) / determinant, (a * gradient[1] - b * gradient[0]) / determinant
        # A full step from far off may overshoot; three at a time is as good as a full one near the end.
        intercept = np.clip(intercept + np.clip(steps[0], -3, 3), -FARTHEST, FARTHEST)
        slope = slope + np.clip(steps[1], -3, 3)
        if max(np.abs(steps[0]).max(), np.abs(steps[1]).max()) < 1e-9:
            break
    shares: Array = 1 / (1 + np.exp(-intercept))
    return shares


def bootstrapped(prompts: int, of: Callable[[Array], Array], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """A figure of all prompts with its interval.

    Args:
        of: how often each prompt is drawn, [resamples, prompts] -> the figure of each resample, [resamples].
    """
    generator = np.random.default_rng(seed)
    found = [of(_drawn(generator, prompts)) for _ in range(resamples // RESAMPLES_AT_ONCE)]
    lower, upper = np.percentile(np.concatenate(found), [2.5, 97.5])
    return Estimate(float(of(np.ones((1, prompts)))[0]), float(lower), float(upper))


def _drawn(generator: np.random.Generator, prompts: int) -> Array:
    """How often each prompt is in a sample of as many with replacement, [RESAMPLES_AT_ONCE, prompts]."""
    shape = (RESAMPLES_AT_ONCE, prompts)
    places = generator.integers(0, prompts, shape) + prompts * np.arange(RESAMPLES_AT_ONCE)[:, None]
    return np.bincount(places.ravel(), minlength=RESAMPLES_AT_ONCE * prompts).reshape(shape).astype(float)
