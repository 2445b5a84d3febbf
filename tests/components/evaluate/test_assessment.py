"""Scores, comparisons, groups and confusion matrix of given answers."""

import json
from collections.abc import Sequence

import pytest

from minicpmv_finetune.components.evaluate.assessment import Evaluation, assess
from minicpmv_finetune.components.evaluate.gate import Gate
from minicpmv_finetune.data.samples import Sample, Turn
from minicpmv_finetune.minicpmv.answer import Answer


def sample(number: int, expected: str, metric: str | None = None, tags: tuple[str, ...] = ()) -> Sample:
    turns = (Turn(role="user", parts=("Which?",)), Turn(role="assistant", parts=(expected,)))
    return Sample(id=str(number), images=(), turns=turns, source="data.json", metric=metric, tags=tags)


def answers_of(texts: Sequence[str]) -> list[Answer]:
    return [Answer(text, new_tokens=3, hit_limit=text.endswith("…")) for text in texts]


def evaluate_answers(
    samples: list[Sample], base: list[str] | None, tuned: list[str], metric: str = "exact_match"
) -> Evaluation:
    return assess(samples, None if base is None else answers_of(base), answers_of(tuned), metric)


def test_metrics_contain_the_scores_of_both_models() -> None:
    samples = [sample(number, "cat") for number in range(4)]
    found = evaluate_answers(samples, ["dog…", "cat", "cat", "dog"], ["cat", "cat", "cap", "dog"])
    assert [prediction.outcome for prediction in found.predictions] == ["fixed", "both_right", "broken", "both_wrong"]
    figures = found.metrics
    assert figures["base_exact_match"] == figures["tuned_exact_match"] == 0.5
    assert figures["tuned_anls"] == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)
    assert (figures["base_hit_limit"], figures["tuned_hit_limit"]) == (1, 0)
    assert (figures["improvement"], figures["fixed"], figures["broken"]) == (0, 1, 1)
    json.dumps(figures, allow_nan=False)


def test_metrics_of_a_single_sample_have_no_interval() -> None:
    figures = evaluate_answers([sample(0, "cat")], ["dog"], ["cat"]).metrics
    assert figures["improvement"] == 1
    assert "improvement_low" not in figures


def test_without_a_base_there_is_no_comparison() -> None:
    found = evaluate_answers([sample(0, "cat"), sample(1, "cat")], None, ["cat", "dog"])
    assert found.comparison is found.improvement is None
    assert found.metrics["tuned_exact_match"] == 0.5
    assert not any("base" in name for name in found.metrics)


def test_error_rates_pool_lengths_and_improve_when_they_fall() -> None:
    samples = [sample(0, "ab"), sample(1, "abcdefgh")]
    found = evaluate_answers(samples, ["xx", "abcdefgh"], ["ab", "abcdefgx"], "cer")
    assert found.metrics["base_cer"] == pytest.approx(2 / 10)
    assert found.metrics["tuned_cer"] == pytest.approx(1 / 10)
    assert found.improvement is not None
    assert found.improvement.value == pytest.approx(1 / 10)
    assert found.improvement.low <= found.improvement.value <= found.improvement.high


def test_each_tag_is_compared() -> None:
    samples = [sample(0, "cat", tags=("animal", "short")), sample(1, "oak", tags=("tree",)), sample(2, "cat")]
    found = evaluate_answers(samples, ["dog", "oak", "cat"], ["cat", "elm", "cat"])
    assert {tag: (count, score.value) for tag, (count, score, _) in found.by_group.items()} == {
        "animal": (1, 1),
        "short": (1, 1),
        "tree": (1, 0),
    }
    comparison = found.by_group["tree"][2]
    assert comparison is not None
    assert comparison.outcomes["broken"] == 1


def test_samples_may_name_their_own_metrics() -> None:
    samples = [sample(0, "cat", metric="contains"), sample(1, "cat")]
    found = evaluate_answers(samples, None, ["a cat", "a cat"])
    assert found.metric == "mixed"
    assert found.metrics["tuned_mixed"] == 0.5
    assert {name: score.value for name, (_, score, _) in found.by_group.items()} == {"contains": 1, "exact_match": 0}


def test_few_expected_answers_have_a_confusion_matrix() -> None:
    samples = [sample(number, "cat" if number < 3 else "dog") for number in range(5)]
    found = evaluate_answers(samples, None, ["cat", "dog", "I say", "dog", "dog"])
    assert found.confusion is not None
    assert found.confusion.labels == ("cat", "dog", "(other)")
    assert found.confusion.counts == ((1, 1, 1), (0, 2, 0), (0, 0, 0))


def test_many_or_unrepeated_expected_answers_have_no_confusion_matrix() -> None:
    many = [sample(number, f"answer {number % 21}") for number in range(63)]
    assert evaluate_answers(many, None, ["?"] * 63).confusion is None
    unrepeated = [sample(number, f"answer {number}") for number in range(5)]
    assert evaluate_answers(unrepeated, None, ["?"] * 5).confusion is None


def test_the_champion_is_compared_on_the_same_samples() -> None:
    samples = [sample(0, "cat", tags=("animal",)), sample(1, "cat", tags=("animal",)), sample(2, "oak", tags=("tree",))]
    found = assess(
        samples,
        answers_of(["dog", "dog", "oak"]),
        answers_of(["cat", "cat", "elm"]),
        "exact_match",
        champion=answers_of(["cat", "dog", "oak"]),
        gate=Gate(min_improvement=-0.1, max_regression=0.5),
    )
    figures = found.metrics
    assert figures["champion_exact_match"] == pytest.approx(2 / 3)
    assert (figures["improvement"], figures["improvement_on_champion"]) == (pytest.approx(1 / 3), 0)
    assert found.champion_by_group["tree"].outcomes["broken"] == 1
    assert not found.decision.promote, "the gate uses the comparison with the champion"
    assert found.decision.reason == (
        "worse than the champion by more than 50.0 points on tree (100.0 points, samples: 1)"
    )


def test_without_a_champion_the_gate_compares_with_the_base() -> None:
    samples = [sample(0, "ab"), sample(1, "abcdefgh")]
    assert evaluate_answers(samples, ["xx", "abcdefgh"], ["ab", "abcdefgx"], "cer").decision.reason == (
        "10.0 points better than the base model (95 % interval −12.5 to +100.0, within noise)"
    )
    assert not evaluate_answers(samples, ["ab", "abcdefgh"], ["ab", "abcdefgx"], "cer").decision.promote
    assert evaluate_answers(samples, None, ["xx", "xx"]).decision.promote
