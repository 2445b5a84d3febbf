"""The rules of the quality gate."""

import pytest

from minicpmv_finetune.components.evaluate.gate import Gate, GateInput, decide


def is_promoted(improvement: float, **rules: float) -> bool:
    return decide(GateInput(score=0.8, opponent="champion", improvement=improvement), Gate(**rules)).promote


@pytest.mark.parametrize(
    ("improvement", "least", "promote"),
    [
        *((0.01, 0.0, True), (0.0, 0.0, False), (-0.01, 0.0, False), (0.3 - 0.2, 0.1, True), (0.09, 0.1, False)),
        *((0.0, -0.02, True), (-0.02, -0.02, True), (-0.03, -0.02, False)),
    ],
)
def test_a_model_must_improve_and_a_tie_is_no_improvement(improvement: float, least: float, promote: bool) -> None:
    assert is_promoted(improvement, min_improvement=least) is promote


@pytest.mark.parametrize(
    ("score", "is_error", "promote"), [(0.8, False, True), (0.79, False, False), (0.81, True, False), (0.8, True, True)]
)
def test_the_score_itself_can_be_required(score: float, is_error: bool, promote: bool) -> None:
    decision = decide(GateInput(score, lower_is_better=is_error), Gate(min_metric=0.8))
    assert decision.promote is promote
    assert f"at {'most' if is_error else 'least'} 80.0% is required" in decision.checks[1].reason


def test_a_tag_must_not_get_much_worse() -> None:
    tags = {"tables": (40, -0.1), "signs": (10, -0.04), "charts": (50, 0.3)}
    figures = GateInput(0.8, opponent="champion", improvement=0.1, tags=tags)
    assert decide(figures, Gate(max_regression=0.1)).promote
    decision = decide(figures, Gate(max_regression=0.05))
    assert not decision.promote
    assert decision.reason == "worse than the champion by more than 5.0 points on tables (10.0 points, samples: 40)"
    assert decide(figures, Gate()).promote, "tags are checked only with max_regression"


def test_the_reason_names_five_tags_and_counts_the_rest() -> None:
    tags = {f"tag {number}": (3, -0.1) for number in range(9)}
    reason = decide(GateInput(0.8, opponent="base model", improvement=0.1, tags=tags), Gate(max_regression=0.0)).reason
    assert reason.endswith("and 4 more")


def test_without_another_model_only_the_score_is_checked() -> None:
    assert decide(GateInput(0.8), Gate(min_improvement=0.5, max_regression=0.0)).promote
    assert not decide(GateInput(0.8), Gate(min_metric=0.9)).promote


def test_the_reason_names_all_failed_rules() -> None:
    figures = GateInput(0.5, opponent="champion", improvement=0.01)
    decision = decide(figures, Gate(min_metric=0.9, min_improvement=0.05))
    assert decision.reason == (
        "1.0 points better than the champion, at least 5.0 points better is required; a score of 50.0%, at least 90.0% "
        "is required"
    )
    assert decide(figures, Gate()).reason == "1.0 points better than the champion"
    tie = GateInput(0.5, opponent="champion")
    assert decide(tie, Gate()).reason == "as good as the champion, better is required"


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((-0.016, 0.093), "3.3 points better than the champion (95 % interval −1.6 to +9.3, within noise)"),
        ((0.0, 0.093), "3.3 points better than the champion (95 % interval +0.0 to +9.3, within noise)"),
        ((0.004, 0.093), "3.3 points better than the champion (95 % interval +0.4 to +9.3)"),
        ((float("-inf"), float("inf")), "3.3 points better than the champion"),
    ],
)
def test_the_reason_says_whether_an_improvement_is_within_noise(interval: tuple[float, float], words: str) -> None:
    figures = GateInput(0.8, opponent="champion", improvement=0.033, interval=interval)
    decision = decide(figures, Gate())
    assert decision.promote
    assert decision.reason == words


@pytest.mark.parametrize(
    ("low", "least", "promote"),
    [
        *((0.01, 0.0, True), (0.0, 0.0, False), (-0.01, 0.0, False), (0.3 - 0.2, 0.1, True), (0.09, 0.1, False)),
        *((-0.01, -0.02, True), (-0.03, -0.02, False), (float("-inf"), -9.0, False)),
    ],
)
def test_the_lower_end_of_the_interval_can_be_required(low: float, least: float, promote: bool) -> None:
    figures = GateInput(0.8, opponent="champion", improvement=0.2, interval=(low, 0.4))
    decision = decide(figures, Gate(min_improvement_low=least))
    assert decision.promote is promote
    assert f"{least * 100:+.1f} is required".replace("-", "−") in decision.checks[1].reason
    assert decide(GateInput(0.8), Gate(min_improvement_low=least)).promote, "without another model there is no interval"
    assert not decide(GateInput(0.8, opponent="champion", improvement=0.2), Gate(min_improvement_low=least)).promote
