"""Whether a model is good enough to take the place of the one it is compared with.

A pure function of the figures, so that the same figures give the same decision wherever they come from. The model is
held against the champion where there is one, else against its base. Every rule is judged, also after one has failed,
because a person who reads why a model was kept back wants to read all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

_ROUNDING = 1e-9  # 0.3 - 0.2 is less than 0.1
_NAMED = 5  # tags that a reason names


@dataclass(frozen=True)
class Gate:
    """What a model must reach.

    Attributes:
        min_metric: worst acceptable score: at least this much, or for an error rate at most.
        min_improvement: how much better than the model it is compared with; a tie passes only if this is negative.
        max_regression: how much worse it may be on any single tag; none to leave tags out of it.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    min_metric: float | None = None
    min_improvement: float = 0.0
    max_regression: float | None = None


@dataclass(frozen=True)
class Figures:
    """What is judged.

    Attributes:
        score: of the model, as the metric counts.
        lower_is_better: whether the metric counts errors.
        opponent: name of the model it is compared with; empty when there is none.
        improvement: over the opponent, positive where the model is better; 0 without one.
        tags: number of samples and improvement of each tag; empty without an opponent.
    """

    score: float
    lower_is_better: bool = False
    opponent: str = ""
    improvement: float = 0.0
    tags: Mapping[str, tuple[int, float]] | None = None


@dataclass(frozen=True)
class Check:
    """One rule's outcome, in words."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """Whether to promote, and why."""

    checks: tuple[Check, ...]

    @property
    def promote(self) -> bool:
        """Whether every rule is kept."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """What decided, as one phrase: the broken rules, or all when none is."""
        return "; ".join(check.reason for check in self.checks if check.passed == self.promote)


def decide(figures: Figures, gate: Gate) -> Decision:
    """Judge a model by the gate's rules."""
    checks = [_improvement(figures, gate.min_improvement)]
    if gate.min_metric is not None:
        checks.append(_metric(figures, gate.min_metric))
    if gate.max_regression is not None and figures.tags:
        checks.append(_regression(figures, figures.tags, gate.max_regression))
    return Decision(tuple(checks))


def _improvement(figures: Figures, least: float) -> Check:
    if not figures.opponent:
        return Check(True, "there is no other model to beat")
    gain = figures.improvement
    passed = gain >= least - _ROUNDING and (gain > _ROUNDING or least < 0)
    if abs(gain) <= _ROUNDING:
        text = f"as good as the {figures.opponent}"
    else:
        text = f"{_points(abs(gain))} {'better' if gain > 0 else 'worse'} than the {figures.opponent}"
    if passed and least <= 0:
        return Check(True, text)
    wanted = f"at least {_points(least)} better" if least > 0 else "better"
    return Check(passed, f"{text}, {wanted if least >= 0 else f'at most {_points(-least)} worse'} is asked")


def _metric(figures: Figures, worst: float) -> Check:
    sign = -1 if figures.lower_is_better else 1
    passed = sign * (figures.score - worst) >= -_ROUNDING
    bound = "at most" if figures.lower_is_better else "at least"
    return Check(passed, f"a score of {figures.score:.1%}, {bound} {worst:.1%} is asked")


def _regression(figures: Figures, tags: Mapping[str, tuple[int, float]], most: float) -> Check:
    lost = {tag: -gain for tag, (_, gain) in tags.items() if -gain > most + _ROUNDING}
    if not lost:
        return Check(True, f"no tag is more than {_points(most)} worse than the {figures.opponent}")
    worst = sorted(lost, key=lambda tag: -lost[tag])
    named = ", ".join(f"{tag} ({_points(lost[tag])}, samples: {tags[tag][0]:,})" for tag in worst[:_NAMED])
    rest = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    return Check(False, f"worse than the {figures.opponent} by more than {_points(most)} on {named}{rest}")


def _points(difference: float) -> str:
    return f"{difference * 100:.1f} points"
