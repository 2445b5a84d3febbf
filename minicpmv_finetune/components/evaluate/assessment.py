"""From the models' answers to figures: each sample judged, all of them summed up, and the same for each tag."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minicpmv_finetune.data.samples import Sample
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.answer import Answer

from .comparison import Comparison, Estimate, Outcome, compare, estimate, outcome
from .gate import Decision, Figures, Gate, decide
from .metrics import METRICS, Metric, anls, expected_answers, metric_of

MIXED = "mixed"
OTHER = "(other)"
_MOST_CLASSES = 20


@dataclass(frozen=True)
class Judged:
    """One model's answer to one sample, scored."""

    answer: Answer
    score: float
    anls: float
    is_right: bool


@dataclass(frozen=True)
class Prediction:
    """One sample with what the models said; `base` and `champion` are None when they were not asked."""

    sample: Sample
    expected: tuple[str, ...]
    metric: str
    weight: float
    base: Judged | None
    tuned: Judged
    champion: Judged | None = None

    @property
    def outcome(self) -> Outcome:
        """What tuning did; without a base, right answers are "fixed" and wrong ones "both_wrong"."""
        return outcome(self.base is not None and self.base.is_right, self.tuned.is_right)

    @property
    def question(self) -> str:
        """The words of the last question."""
        return next((turn.text for turn in reversed(self.sample.turns) if turn.role == "user"), "")


@dataclass(frozen=True)
class Confusion:
    """How often an expected answer (row) met a given one (column); the last label collects all other answers."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Evaluation:
    """The step's result.

    Attributes:
        metric: its name, or "mixed" when samples name different ones.
        predictions: every sample, in the data's order.
        tuned: the tuned model's score.
        comparison: with the base, or None without one.
        by_group: the comparison (without a base: None) and the tuned score of each tag and, when mixed, each metric.
        confusion: of the tuned model, when few answers are expected.
        left_out: samples that could not be asked, because their text holds a special token.
        champion: the comparison with the champion, or None without one.
        champion_by_group: the same of each group.
        decision: whether the tuned model may take the champion's place, or without one the base's.
    """

    metric: str
    predictions: tuple[Prediction, ...]
    tuned: Estimate
    comparison: Comparison | None
    by_group: dict[str, tuple[int, Estimate, Comparison | None]]
    confusion: Confusion | None
    left_out: int
    champion: Comparison | None
    champion_by_group: dict[str, Comparison]
    decision: Decision

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric counts errors."""
        return _lower_is_better(self.predictions)

    @property
    def improvement(self) -> Estimate | None:
        """The difference to the base, positive where tuned is better."""
        return None if self.comparison is None else improvement(self.comparison, self.lower_is_better)

    @property
    def improvement_on_champion(self) -> Estimate | None:
        """The difference to the champion, positive where tuned is better."""
        return None if self.champion is None else improvement(self.champion, self.lower_is_better)

    @property
    def metrics(self) -> dict[str, float]:
        """All figures, flat, for Kubeflow's and MLflow's tables."""
        figures: dict[str, float] = {"samples": len(self.predictions), "left_out": self.left_out}
        figures |= self._figures_of("tuned", [prediction.tuned for prediction in self.predictions], self.tuned)
        base = [prediction.base for prediction in self.predictions if prediction.base is not None]
        if self.comparison is not None and self.improvement is not None:
            figures |= self._figures_of("base", base, self.comparison.base)
            figures |= {
                "improvement": self.improvement.value,
                "improvement_low": self.improvement.low,
                "improvement_high": self.improvement.high,
                "fixed": self.comparison.outcomes["fixed"],
                "broken": self.comparison.outcomes["broken"],
                "mcnemar_p": self.comparison.p_value,
            }
        champion = [prediction.champion for prediction in self.predictions if prediction.champion is not None]
        if self.champion is not None and self.improvement_on_champion is not None:
            figures |= self._figures_of("champion", champion, self.champion.base)
            figures |= {
                "improvement_on_champion": self.improvement_on_champion.value,
                "improvement_on_champion_low": self.improvement_on_champion.low,
                "improvement_on_champion_high": self.improvement_on_champion.high,
            }
        # The interval of a single sample is infinite, which JSON cannot say.
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _figures_of(self, model: str, judged: Sequence[Judged], score: Estimate) -> dict[str, float]:
        return {
            f"{model}_{self.metric}": score.value,
            f"{model}_anls": sum(one.anls for one in judged) / len(judged),
            f"{model}_hit_limit": sum(one.answer.hit_limit for one in judged),
        }


def check_metrics(samples: Sequence[Sample], default_metric: str) -> None:
    """Find out before any answer is generated that all can be scored.

    Raises:
        UserError: a metric does not exist or is undefined for a sample, or error rates would be averaged with scores.
    """
    metrics = {metric.name: metric for metric in (metric_of(sample, default_metric) for sample in samples)}
    if len({metric.lower_is_better for metric in metrics.values()}) > 1:
        raise UserError(
            f"metric: the samples' metrics {', '.join(sorted(metrics))} mix error rates with scores, whose mean says "
            "nothing; evaluate them apart."
        )


def assess(
    samples: Sequence[Sample],
    base: Sequence[Answer] | None,
    tuned: Sequence[Answer],
    default_metric: str,
    left_out: int = 0,
    champion: Sequence[Answer] | None = None,
    gate: Gate = Gate(),  # noqa: B008  (frozen)
) -> Evaluation:
    """Score and compare.

    Args:
        samples: at least one, all passed `check_metrics`.
        base: the base model's answers in the samples' order, or None.
        tuned: the tuned model's.
        default_metric: of samples that name none.
        left_out: samples that could not be asked.
        champion: the champion's answers, or None.
        gate: what the tuned model must reach.
    """
    predictions = []
    for number, sample in enumerate(samples):
        metric, expected = metric_of(sample, default_metric), expected_answers(sample)
        predictions.append(
            Prediction(
                sample=sample,
                expected=expected,
                metric=metric.name,
                weight=metric.weight(expected),
                base=None if base is None else _judge(base[number], expected, metric),
                tuned=_judge(tuned[number], expected, metric),
                champion=None if champion is None else _judge(champion[number], expected, metric),
            )
        )
    names = {prediction.metric for prediction in predictions}
    if len(names) > 1:
        # Lengths in words and in characters do not add up.
        predictions = [replace(prediction, weight=1.0) for prediction in predictions]
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        own = [prediction.metric] if len(names) > 1 else []
        for tag in dict.fromkeys([*prediction.sample.tags, *own]):
            groups.setdefault(tag, []).append(prediction)
    score, comparison = _summarise(predictions)
    by_group = {tag: (len(group), *_summarise(group)) for tag, group in sorted(groups.items())}
    against_champion, champion_by_group = None, {}
    if champion is not None:
        against_champion = _compared_with_champion(predictions)
        champion_by_group = {tag: _compared_with_champion(group) for tag, group in sorted(groups.items())}
    opponent = against_champion or comparison
    compared = champion_by_group or {tag: found for tag, (_, _, found) in by_group.items() if found is not None}
    is_error = _lower_is_better(predictions)
    figures = Figures(
        score=score.value,
        lower_is_better=is_error,
        opponent="" if opponent is None else "base model" if against_champion is None else "champion",
        improvement=0.0 if opponent is None else improvement(opponent, is_error).value,
        tags={tag: (found.samples, improvement(found, is_error).value) for tag, found in compared.items()},
    )
    return Evaluation(
        metric=MIXED if len(names) > 1 else predictions[0].metric,
        predictions=tuple(predictions),
        tuned=score,
        comparison=comparison,
        by_group=by_group,
        confusion=_confusion(predictions),
        left_out=left_out,
        champion=against_champion,
        champion_by_group=champion_by_group,
        decision=decide(figures, gate),
    )


def improvement(comparison: Comparison, lower_is_better: bool) -> Estimate:
    """How much better tuned is, whichever way the metric counts."""
    difference = comparison.difference
    return Estimate(-difference.value, -difference.high, -difference.low) if lower_is_better else difference


def _lower_is_better(predictions: Sequence[Prediction]) -> bool:
    return METRICS[predictions[0].metric].lower_is_better


def _judge(answer: Answer, expected: Sequence[str], metric: Metric) -> Judged:
    score = metric.score(answer.text, expected)
    return Judged(answer, score, anls(answer.text, expected), metric.is_right(score))


def _summarise(predictions: Sequence[Prediction]) -> tuple[Estimate, Comparison | None]:
    weights = [prediction.weight for prediction in predictions]
    tuned = [prediction.tuned.score for prediction in predictions]
    base = [prediction.base.score for prediction in predictions if prediction.base is not None]
    if not base:
        return estimate(tuned, weights), None
    comparison = compare(base, tuned, weights, [prediction.outcome for prediction in predictions])
    return comparison.tuned, comparison


def _compared_with_champion(predictions: Sequence[Prediction]) -> Comparison:
    asked = [(one.champion, one) for one in predictions if one.champion is not None]
    return compare(
        [champion.score for champion, _ in asked],
        [one.tuned.score for _, one in asked],
        [one.weight for _, one in asked],
        [outcome(champion.is_right, one.tuned.is_right) for champion, one in asked],
    )


def _confusion(predictions: Sequence[Prediction]) -> Confusion | None:
    """Only where answers are classes: few of them, and each expected several times."""
    expected = [prediction.expected[0].strip() for prediction in predictions]
    classes = sorted(set(expected))
    if not 2 <= len(classes) <= _MOST_CLASSES or len(expected) < 2 * len(classes):
        return None
    pairs = Counter(
        (wanted, given if (given := prediction.tuned.answer.text) in classes else OTHER)
        for wanted, prediction in zip(expected, predictions, strict=True)
    )
    labels = (*classes, OTHER)
    return Confusion(labels, tuple(tuple(pairs[row, column] for column in labels) for row in labels))
