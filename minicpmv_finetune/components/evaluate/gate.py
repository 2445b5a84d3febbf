"""The quality gate: the rules that decide whether a model is promoted.

The decision is a pure function of the numbers, so that the same numbers give the same decision wherever they come
from. The model is compared with the champion if there is one, else with its base. Every rule is checked, also after
one has failed, because a person who reads why a model failed the gate needs all reasons.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from minicpmv_finetune.options import Accepted

_ROUNDING = 1e-9  # in floating-point numbers 0.3 - 0.2 is less than 0.1
_MAX_TAGS_NAMED = 5  # in the reason of a decision


@dataclass(frozen=True)
class Gate:
    """The rules of the gate.

    Attributes:
        min_metric: Worst accepted score: the least score, or the greatest error rate; None accepts every score.
        min_improvement: Least improvement on the model that is compared with; a tie passes only if this is negative.
        min_improvement_low: Least lower end of the improvement's 95 % interval; 0 requires an improvement that is not
            within noise; None accepts every interval.
        max_regression: Largest accepted loss on any single tag; None accepts every loss.
    """

    min_metric: Annotated[float | None, Accepted(at_least=0)] = None
    min_improvement: float = 0.0
    max_regression: Annotated[float | None, Accepted(at_least=0)] = None
    min_improvement_low: float | None = None


@dataclass(frozen=True)
class GateInput:
    """The numbers that the gate decides by.

    Attributes:
        score: Score of the model by the metric.
        lower_is_better: Whether the metric counts errors.
        opponent: Name of the model that is compared with; empty when there is none.
        improvement: Improvement on the opponent, positive where the model is better; 0 without an opponent.
        interval: The 95 % interval of the improvement; infinite with one sample, None if it is not known.
        tags: Number of samples and improvement of each tag; empty without an opponent.
    """

    score: float
    lower_is_better: bool = False
    opponent: str = ""
    improvement: float = 0.0
    tags: Mapping[str, tuple[int, float]] | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Check:
    """The result of one rule, with its reason in words."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The results of all rules."""

    checks: tuple[Check, ...]

    @property
    def promote(self) -> bool:
        """Whether the model passes every rule."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """The reason of the decision, as one phrase: the failed rules, or all rules when none failed."""
        return "; ".join(check.reason for check in self.checks if check.passed == self.promote)


def decide(figures: GateInput, gate: Gate) -> Decision:
    """Check a model by the rules of the gate."""
    checks = [_check_improvement(figures, gate.min_improvement)]
    if gate.min_improvement_low is not None and figures.opponent:
        checks.append(_check_interval(figures, gate.min_improvement_low))
    if gate.min_metric is not None:
        checks.append(_check_score(figures, gate.min_metric))
    if gate.max_regression is not None and figures.tags:
        checks.append(_check_regression(figures, figures.tags, gate.max_regression))
    return Decision(tuple(checks))


def _check_improvement(figures: GateInput, least: float) -> Check:
    if not figures.opponent:
        return Check(True, "there is no other model to compare with")
    gain = figures.improvement
    passed = gain >= least - _ROUNDING and (gain > _ROUNDING or least < 0)
    if abs(gain) <= _ROUNDING:
        text = f"as good as the {figures.opponent}"
    else:
        text = f"{_points(abs(gain))} {'better' if gain > 0 else 'worse'} than the {figures.opponent}"
        text += _interval_in_words(figures.interval)
    if passed and least <= 0:
        return Check(True, text)
    required = f"at least {_points(least)} better" if least > 0 else "better"
    return Check(passed, f"{text}, {required if least >= 0 else f'at most {_points(-least)} worse'} is required")


def _check_interval(figures: GateInput, least: float) -> Check:
    low = figures.interval[0] if figures.interval else -math.inf
    required = f"at least {_signed_points(least)} is required"
    if not math.isfinite(low):
        return Check(
            False, f"the improvement on the {figures.opponent} has no 95 % interval, a lower end of {required}"
        )
    text = f"the lower end of the improvement on the {figures.opponent} is {_signed_points(low)}"
    return Check(low >= least - _ROUNDING and (low > _ROUNDING or least != 0), f"{text}, {required}")


def _interval_in_words(interval: tuple[float, float] | None) -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    low, high = interval
    noise = ", within noise" if low <= _ROUNDING and high >= -_ROUNDING else ""
    return f" (95 % interval {_signed_points(low)} to {_signed_points(high)}{noise})"


def _check_score(figures: GateInput, worst: float) -> Check:
    sign = -1 if figures.lower_is_better else 1
    passed = sign * (figures.score - worst) >= -_ROUNDING
    bound = "at most" if figures.lower_is_better else "at least"
    return Check(passed, f"a score of {figures.score:.1%}, {bound} {worst:.1%} is required")


def _check_regression(figures: GateInput, tags: Mapping[str, tuple[int, float]], most: float) -> Check:
    lost = {tag: -gain for tag, (_, gain) in tags.items() if -gain > most + _ROUNDING}
    if not lost:
        return Check(True, f"no tag is more than {_points(most)} worse than the {figures.opponent}")
    worst = sorted(lost, key=lambda tag: -lost[tag])
    named = ", ".join(f"{tag} ({_points(lost[tag])}, samples: {tags[tag][0]:,})" for tag in worst[:_MAX_TAGS_NAMED])
    rest = f" and {len(worst) - _MAX_TAGS_NAMED} more" if len(worst) > _MAX_TAGS_NAMED else ""
    return Check(False, f"worse than the {figures.opponent} by more than {_points(most)} on {named}{rest}")


def _points(difference: float) -> str:
    return f"{difference * 100:.1f} points"


def _signed_points(difference: float) -> str:
    return f"{round(difference * 100, 1) + 0.0:+.1f}".replace("-", "−")
