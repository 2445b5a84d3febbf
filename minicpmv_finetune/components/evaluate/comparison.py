"""Whether one model answers better than another on the same samples, and how sure that is.

Both models saw the same samples, so each sample is a pair and the difference's interval comes from resampling pairs:
far narrower than two intervals side by side. McNemar's test asks the same of right and wrong alone: of the samples on
which the models disagree, could the split be chance?
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

CONFIDENCE = 0.95
_RESAMPLES = 2000
_SEED = 0  # the same answers give the same interval
_BATCH_ELEMENTS = 4_000_000  # bounds the bootstrap's memory: about 100 MB

Outcome = Literal["fixed", "broken", "both_right", "both_wrong"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval (percentile method; Efron and Tibshirani 1993, chapter 13)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The tuned model against another, sample by sample.

    Attributes:
        samples: how many.
        base: score of the other model.
        tuned: score of the tuned model.
        difference: tuned minus base, paired.
        outcomes: number of samples that tuning fixed, broke, or left right or wrong.
        p_value: of McNemar's exact two-sided test (McNemar 1947) on fixed against broken.
    """

    samples: int
    base: Estimate
    tuned: Estimate
    difference: Estimate
    outcomes: dict[Outcome, int]
    p_value: float


def estimate(scores: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The weighted mean of scores, with its interval."""
    return _bootstrapped(np.asarray(scores, float), np.asarray(weights, float))


def compare(
    base: Sequence[float], tuned: Sequence[float], weights: Sequence[float], outcomes: Sequence[Outcome]
) -> Comparison:
    """Compare two models' scores on the same samples.

    Args:
        base: a score for each sample; at least one.
        tuned: the same of the tuned model, in the same order.
        weights: of the samples in the mean.
        outcomes: what tuning did to each sample.
    """
    before, after, weight = (np.asarray(values, float) for values in (base, tuned, weights))
    counts: dict[Outcome, int] = {
        kind: list(outcomes).count(kind) for kind in ("fixed", "broken", "both_right", "both_wrong")
    }
    return Comparison(
        samples=len(after),
        base=_bootstrapped(before, weight),
        tuned=_bootstrapped(after, weight),
        difference=_bootstrapped(after - before, weight),
        outcomes=counts,
        p_value=mcnemar(counts["fixed"], counts["broken"]),
    )


def outcome(base_right: bool, tuned_right: bool) -> Outcome:
    """What tuning did to a sample."""
    if base_right:
        return "both_right" if tuned_right else "broken"
    return "fixed" if tuned_right else "both_wrong"


def mcnemar(fixed: int, broken: int) -> float:
    """The exact two-sided p-value of a split at least as uneven, were either way a coin's toss."""
    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


def _bootstrapped(values: NDArray[np.float64], weights: NDArray[np.float64]) -> Estimate:
    """Weighted mean and percentile interval; of a single sample nothing is known but the value."""
    value = float(np.average(values, weights=weights))
    if len(values) < 2:
        return Estimate(value, float("-inf"), float("inf"))
    interval = bootstrap(
        (values, weights),
        lambda v, w, axis: (v * w).sum(axis=axis) / w.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_ELEMENTS // len(values)),
        rng=_SEED,
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
