"""The evaluation of the models' answers: scores of each sample, of all samples together, and of each tag."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from minicpmv_finetune.data.samples import Sample
from minicpmv_finetune.minicpmv.answer import Answer

from .comparison import Comparison, Estimate, Outcome, classify_outcome, compare, estimate
from .gate import Decision, Gate, GateInput, decide
from .metrics import METRICS, Metric, anls, expected_answers, metric_of

MIXED = "mixed"
OTHER = "(other)"
_MAX_CLASSES = 20


@dataclass(frozen=True)
class ScoredAnswer:
    """The answer of one model to one sample, with its scores.

    Attributes:
        answer: Answer of the model.
        score: Score by the sample's metric.
        anls: Score by ANLS.
        is_right: Whether the answer counts as right by the sample's metric.
    """

    answer: Answer
    score: float
    anls: float
    is_right: bool


@dataclass(frozen=True)
class Prediction:
    """One sample with the answers of the models.

    Attributes:
        sample: Sample of the evaluation split.
        expected: Accepted answers.
        metric: Name of the metric that scores the sample.
        weight: Weight of the sample in the score of the data set.
        base: Answer of the base model; None without a base model.
        tuned: Answer of the tuned model.
        champion: Answer of the champion; None without a champion.
    """

    sample: Sample
    expected: tuple[str, ...]
    metric: str
    weight: float
    base: ScoredAnswer | None
    tuned: ScoredAnswer
    champion: ScoredAnswer | None = None

    @property
    def outcome(self) -> Outcome:
        """The effect of tuning; without a base, right answers are "fixed" and wrong ones "both_wrong"."""
        return classify_outcome(self.base is not None and self.base.is_right, self.tuned.is_right)

    @property
    def question(self) -> str:
        """The text of the last question."""
        return next((turn.text for turn in reversed(self.sample.turns) if turn.role == "user"), "")


@dataclass(frozen=True)
class Confusion:
    """Counts of pairs of expected answer (row) and given answer (column); the last label is for all other answers."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Evaluation:
    """The result of the step.

    Attributes:
        metric: Name of the metric, or "mixed" when the samples name different metrics.
        predictions: All samples with their answers, in the order of the data.
        tuned: Score of the tuned model.
        comparison: Comparison of the tuned model with the base; None without a base.
        by_group: For each tag and, if metrics are mixed, each metric: the number of samples, the score of the tuned
            model, and its comparison with the base (None without a base).
        confusion: Confusion matrix of the tuned model; None unless the expected answers are a few classes.
        left_out: Number of samples that were not evaluated, because their text contains a special token.
        champion: Comparison of the tuned model with the champion; None without a champion.
        champion_by_group: Comparison with the champion for each group; empty without a champion.
        decision: Decision of the gate.
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
        """The difference to the base, positive where the tuned model is better."""
        return None if self.comparison is None else improvement_of(self.comparison, self.lower_is_better)

    @property
    def improvement_on_champion(self) -> Estimate | None:
        """The difference to the champion, positive where the tuned model is better."""
        return None if self.champion is None else improvement_of(self.champion, self.lower_is_better)

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers by name, for Kubeflow's and MLflow's tables."""
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
        # The interval of a single sample is infinite, and JSON has no infinity.
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    @property
    def headline(self) -> dict[str, float]:
        """The most important numbers, by names that are the same for every metric, for Kubeflow's table of metrics.

        The UI sorts by name and shows ten rows.
        """
        figures: dict[str, float] = {"answer_score": self.tuned.value, "samples": len(self.predictions)}
        if self.comparison is not None and self.improvement is not None:
            figures |= {
                "answer_score_base": self.comparison.base.value,
                "answer_score_gain": self.improvement.value,
                "answer_score_gain_high": self.improvement.high,
                "answer_score_gain_low": self.improvement.low,
                "broken": self.comparison.outcomes["broken"],
                "fixed": self.comparison.outcomes["fixed"],
            }
        if self.champion is not None and self.improvement_on_champion is not None:
            figures |= {
                "answer_score_champion": self.champion.base.value,
                "answer_score_gain_on_champion": self.improvement_on_champion.value,
            }
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _figures_of(self, model: str, answers: Sequence[ScoredAnswer], score: Estimate) -> dict[str, float]:
        return {
            f"{model}_{self.metric}": score.value,
            f"{model}_anls": sum(scored.anls for scored in answers) / len(answers),
            f"{model}_hit_limit": sum(scored.answer.hit_limit for scored in answers),
        }


def assess(
    samples: Sequence[Sample],
    base: Sequence[Answer] | None,
    tuned: Sequence[Answer],
    default_metric: str,
    left_out: int = 0,
    champion: Sequence[Answer] | None = None,
    gate: Gate = Gate(),  # noqa: B008  (frozen)
) -> Evaluation:
    """Score the answers, compare the models and apply the gate.

    Args:
        samples: At least one sample; all have passed `check_metrics`.
        base: Answers of the base model, in the order of the samples; None without a base model.
        tuned: Answers of the tuned model.
        default_metric: Metric of samples that name none.
        left_out: Number of samples that were not evaluated.
        champion: Answers of the champion; None without a champion.
        gate: Rules that the tuned model must pass.
    """
    predictions = _score_answers(samples, base, tuned, champion, default_metric)
    is_mixed = len({prediction.metric for prediction in predictions}) > 1
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        for name in dict.fromkeys([*prediction.sample.tags, *([prediction.metric] if is_mixed else [])]):
            groups.setdefault(name, []).append(prediction)
    groups = dict(sorted(groups.items()))
    score, comparison = _summarize(predictions)
    by_group = {name: (len(group), *_summarize(group)) for name, group in groups.items()}
    with_champion, champion_by_group = None, {}
    if champion is not None:
        with_champion = _compare_with_champion(predictions)
        champion_by_group = {name: _compare_with_champion(group) for name, group in groups.items()}
    compared = champion_by_group or {name: found for name, (_, _, found) in by_group.items() if found is not None}
    return Evaluation(
        metric=MIXED if is_mixed else predictions[0].metric,
        predictions=tuple(predictions),
        tuned=score,
        comparison=comparison,
        by_group=by_group,
        confusion=_confusion(predictions),
        left_out=left_out,
        champion=with_champion,
        champion_by_group=champion_by_group,
        decision=decide(_gate_input(predictions, score, comparison, with_champion, compared), gate),
    )


def _score_answers(
    samples: Sequence[Sample],
    base: Sequence[Answer] | None,
    tuned: Sequence[Answer],
    champion: Sequence[Answer] | None,
    default_metric: str,
) -> list[Prediction]:
    predictions = []
    for number, sample in enumerate(samples):
        metric, expected = metric_of(sample, default_metric), expected_answers(sample)
        predictions.append(
            Prediction(
                sample=sample,
                expected=expected,
                metric=metric.name,
                weight=metric.weight(expected),
                base=None if base is None else _score_answer(base[number], expected, metric),
                tuned=_score_answer(tuned[number], expected, metric),
                champion=None if champion is None else _score_answer(champion[number], expected, metric),
            )
        )
    if len({prediction.metric for prediction in predictions}) > 1:
        # Weights in words and weights in characters cannot be added.
        return [replace(prediction, weight=1.0) for prediction in predictions]
    return predictions


def _gate_input(
    predictions: Sequence[Prediction],
    score: Estimate,
    base: Comparison | None,
    champion: Comparison | None,
    by_group: Mapping[str, Comparison],
) -> GateInput:
    """The numbers that the gate decides by: those of the comparison with the champion, or else with the base."""
    lower_is_better = _lower_is_better(predictions)
    comparison = champion or base
    improvement = improvement_of(comparison, lower_is_better) if comparison else None
    return GateInput(
        score=score.value,
        lower_is_better=lower_is_better,
        opponent="champion" if champion else "base model" if base else "",
        improvement=improvement.value if improvement else 0.0,
        interval=(improvement.low, improvement.high) if improvement else None,
        tags={name: (one.samples, improvement_of(one, lower_is_better).value) for name, one in by_group.items()},
    )


def improvement_of(comparison: Comparison, lower_is_better: bool) -> Estimate:
    """The difference of the scores with the sign that is positive where the tuned model is better."""
    difference = comparison.difference
    return Estimate(-difference.value, -difference.high, -difference.low) if lower_is_better else difference


def _lower_is_better(predictions: Sequence[Prediction]) -> bool:
    return METRICS[predictions[0].metric].lower_is_better


def _score_answer(answer: Answer, expected: Sequence[str], metric: Metric) -> ScoredAnswer:
    score = metric.score(answer.text, expected)
    return ScoredAnswer(answer, score, anls(answer.text, expected), metric.is_right(score))


def _summarize(predictions: Sequence[Prediction]) -> tuple[Estimate, Comparison | None]:
    weights = [prediction.weight for prediction in predictions]
    tuned = [prediction.tuned.score for prediction in predictions]
    base = [prediction.base.score for prediction in predictions if prediction.base is not None]
    if not base:
        return estimate(tuned, weights), None
    comparison = compare(base, tuned, weights, [prediction.outcome for prediction in predictions])
    return comparison.tuned, comparison


def _compare_with_champion(predictions: Sequence[Prediction]) -> Comparison:
    pairs = [(one.champion, one) for one in predictions if one.champion is not None]
    return compare(
        [champion.score for champion, _ in pairs],
        [one.tuned.score for _, one in pairs],
        [one.weight for _, one in pairs],
        [classify_outcome(champion.is_right, one.tuned.is_right) for champion, one in pairs],
    )


def _confusion(predictions: Sequence[Prediction]) -> Confusion | None:
    """The confusion matrix; None unless the expected answers are a few classes, each with several samples."""
    expected = [prediction.expected[0].strip() for prediction in predictions]
    classes = sorted(set(expected))
    if not 2 <= len(classes) <= _MAX_CLASSES or len(expected) < 2 * len(classes):
        return None
    pairs = Counter(
        (right, given if (given := prediction.tuned.answer.text) in classes else OTHER)
        for right, prediction in zip(expected, predictions, strict=True)
    )
    labels = (*classes, OTHER)
    return Confusion(labels, tuple(tuple(pairs[row, column] for column in labels) for row in labels))
