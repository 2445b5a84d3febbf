"""The quality gate: the rules that decide whether a model is promoted.

The decision is a pure function of the numbers, so that the same numbers give the same decision wherever they come
from. The model is compared with the champion if there is one, else with its base. Every rule is checked, also after
one has failed, because a person who reads why a model failed the gate needs all reasons.
"""

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
        max_regression: Largest accepted loss on any single tag; None accepts every loss.
    """

    min_metric: Annotated[float | None, Accepted(at_least=0)] = None
    min_improvement: float = 0.0
    max_regression: Annotated[float | None, Accepted(at_least=0)] = None


@dataclass(frozen=True)
class GateInput:
    """The numbers that the gate decides by.

    Attributes:
        score: Score of the model by the metric.
        lower_is_better: Whether the metric counts errors.
        opponent: Name of the model that is compared with; empty when there is none.
        improvement: Improvement on the opponent, positive where the model is better; 0 without an opponent.
        tags: Number of samples and improvement of each tag; empty without an opponent.
    """

    score: float
    lower_is_better: bool = False
    opponent: str = ""
    improvement: float = 0.0
    tags: Mapping[str, tuple[int, float]] | None = None


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
    if passed and least <= 0:
        return Check(True, text)
    required = f"at least {_points(least)} better" if least > 0 else "better"
    return Check(passed, f"{text}, {required if least >= 0 else f'at most {_points(-least)} worse'} is required")


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
