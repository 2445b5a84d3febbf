"""Intervals and tests of the comparison of two models, against formulas and known values."""

import math

import numpy as np
import pytest

from minicpmv_finetune.components.evaluate.comparison import (
    Comparison,
    classify_outcome,
    compare,
    estimate,
    mcnemar,
)


@pytest.mark.parametrize(("fixed", "broken"), [(10, 2), (2, 10), (1, 1), (7, 0), (30, 21)])
def test_mcnemar_equals_the_two_sided_sign_test(fixed: int, broken: int) -> None:
    trials = fixed + broken
    tail = sum(math.comb(trials, k) for k in range(min(fixed, broken) + 1)) / 2**trials
    assert mcnemar(fixed, broken) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_without_disagreement_is_one() -> None:
    assert mcnemar(0, 0) == 1.0


def test_the_outcome_names_the_effect_of_tuning() -> None:
    assert [classify_outcome(base, tuned) for base in (True, False) for tuned in (True, False)] == [
        "both_right",
        "broken",
        "fixed",
        "both_wrong",
    ]


def compare_scores(base: list[float], tuned: list[float]) -> Comparison:
    outcomes = [classify_outcome(before == 1, after == 1) for before, after in zip(base, tuned, strict=True)]
    return compare(base, tuned, [1.0] * len(base), outcomes)


def test_the_interval_of_the_difference_uses_pairs() -> None:
    # Tuning fixes five samples of two hundred and breaks none: a small but certain improvement.
    base = [1.0] * 100 + [0.0] * 100
    result = compare_scores(base, [1.0] * 105 + [0.0] * 95)
    assert result.difference.value == pytest.approx(0.025)
    assert 0 < result.difference.low < 0.025 < result.difference.high < 0.06
    assert result.tuned.low < result.base.high, "the two separate intervals overlap"
    assert result.outcomes == {"fixed": 5, "broken": 0, "both_right": 100, "both_wrong": 95}


def test_the_interval_agrees_with_the_normal_approximation_and_is_seeded() -> None:
    scores = [float(number % 4 == 0) for number in range(400)]
    found = estimate(scores, [1.0] * 400)
    half_width = 1.96 * np.std(scores) / np.sqrt(400)
    assert (found.low, found.high) == pytest.approx((0.25 - half_width, 0.25 + half_width), abs=0.006)
    assert found == estimate(scores, [1.0] * 400)


def test_an_estimate_weights_its_samples() -> None:
    assert estimate([0.5, 0.0], [2, 8]).value == pytest.approx(0.1)


def test_the_interval_of_a_single_sample_is_infinite() -> None:
    result = compare_scores([0.0], [1.0])
    assert (result.difference.low, result.difference.high) == (-math.inf, math.inf)
