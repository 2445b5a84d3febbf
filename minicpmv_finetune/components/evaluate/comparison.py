"""The comparison of two models on the same samples, with confidence intervals.

Both models answer the same samples, so each sample is a pair, and the interval of the difference comes from resampling
pairs: it is much narrower than two separate intervals. McNemar's test compares right and wrong answers alone: it
computes whether the split of the samples on which the models disagree could be chance.
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
_BATCH_ELEMENTS = 4_000_000  # limits the bootstrap's memory to about 100 MB

Outcome = Literal["fixed", "broken", "both_right", "both_wrong"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval (percentile method; Efron and Tibshirani 1993, chapter 13)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The comparison of the tuned model with another model, sample by sample.

    Attributes:
        samples: Number of samples.
        base: Score of the other model.
        tuned: Score of the tuned model.
        difference: Paired difference of the scores, tuned minus base.
        outcomes: Number of samples that tuning fixed, broke, or left right or wrong.
        p_value: P-value of McNemar's exact two-sided test (McNemar 1947) on the fixed and the broken samples.
    """

    samples: int
    base: Estimate
    tuned: Estimate
    difference: Estimate
    outcomes: dict[Outcome, int]
    p_value: float


def estimate(scores: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The weighted mean of scores, with its interval."""
    return _bootstrap(np.asarray(scores, float), np.asarray(weights, float))


def compare(
    base: Sequence[float], tuned: Sequence[float], weights: Sequence[float], outcomes: Sequence[Outcome]
) -> Comparison:
    """Compare the scores of two models on the same samples.

    Args:
        base: Scores of the other model, one for each sample; at least one.
        tuned: Scores of the tuned model, in the same order.
        weights: Weights of the samples in the mean.
        outcomes: Effect of tuning on each sample.
    """
    before, after, weight = (np.asarray(values, float) for values in (base, tuned, weights))
    counts: dict[Outcome, int] = {
        kind: list(outcomes).count(kind) for kind in ("fixed", "broken", "both_right", "both_wrong")
    }
    return Comparison(
        samples=len(after),
        base=_bootstrap(before, weight),
        tuned=_bootstrap(after, weight),
        difference=_bootstrap(after - before, weight),
        outcomes=counts,
        p_value=mcnemar(counts["fixed"], counts["broken"]),
    )


def classify_outcome(base_right: bool, tuned_right: bool) -> Outcome:
    """The effect of tuning on a sample."""
    if base_right:
        return "both_right" if tuned_right else "broken"
    return "fixed" if tuned_right else "both_wrong"


def mcnemar(fixed: int, broken: int) -> float:
    """The exact two-sided p-value: the probability of a split at least as uneven if both directions are as likely."""
    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


def _bootstrap(values: NDArray[np.float64], weights: NDArray[np.float64]) -> Estimate:
    """Weighted mean and percentile interval; the interval of a single sample is infinite."""
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
