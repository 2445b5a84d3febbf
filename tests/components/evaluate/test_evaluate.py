"""The evaluate step with a tiny model: predictions, report, scores in MLflow, and the component."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from kfp import dsl
from PIL import Image

from minicpmv_finetune.components.evaluate.component import evaluate as component
from minicpmv_finetune.components.evaluate.evaluate import EvaluationSettings, evaluate, settings_from
from minicpmv_finetune.components.evaluate.gate import Gate
from minicpmv_finetune.components.evaluate.metrics import METRICS_VERSION
from minicpmv_finetune.data.samples import ImageRef, Sample, Turn, read_info, read_samples
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.answer import Answer
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import write_max_slices
from minicpmv_finetune.reports.training_record import RECORD_FILE
from minicpmv_finetune.run_records import working_for
from minicpmv_finetune.tracking.promotion_record import read_promotion_record
from tests.example_record import example_record

SETTINGS = EvaluationSettings(max_new_tokens=6, batch_size=5)


def write_eval(dataset: Path, folder: Path, samples: list[Sample]) -> Path:
    """A copy of the dataset with other evaluation samples."""
    copy = shutil.copytree(dataset, folder / "dataset")
    (copy / "eval.jsonl").write_text("".join(f"{sample.model_dump_json()}\n" for sample in samples))
    return copy


def sample_of(question: str, name: str = "s", images: tuple[ImageRef, ...] = (), expected: str = "yes") -> Sample:
    turns = (
        Turn(role="user", parts=(*range(len(images)), question)),
        Turn(role="assistant", parts=(expected,)),
    )
    return Sample(id=name, images=images, turns=turns, source="test")


def test_answers_are_compared_as_the_tokenizer_writes_them_and_without_reasoning(
    tiny: Callable[[str], Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tokenizer of 4.5 composes accents (NFC); a base of another generation may not.
    answers = {"tuned model": ["caf\u00e9", "3", "b"], "base model": ["cafe\u0301", "<think>a</think>3", "a"]}
    monkeypatch.setattr(
        "minicpmv_finetune.components.evaluate.evaluate._generate_answers",
        lambda name, *_: [Answer(text, 5, hit_limit=False) for text in answers[name]],
    )
    expected = ["cafe\u0301", "<think>\nA gap.\n</think>\n\n3", "b"]
    first = sample_of("Which?", expected=expected[0])
    asked_again = (*first.turns, *sample_of("And?", expected=expected[1]).turns)
    samples = [first, first.model_copy(update={"turns": asked_again}), sample_of("Which?", expected=expected[2])]
    data = write_eval(dataset, tmp_path, samples)
    model = tiny("4.5")
    found = evaluate(model, str(model), data, tmp_path / "predictions", tmp_path / "report", SETTINGS)
    assert [prediction.tuned.score for prediction in found.predictions] == [1, 1, 1]
    assert [prediction.base and prediction.base.score for prediction in found.predictions] == [1, 1, 0]
    lines = [json.loads(line) for line in (tmp_path / "predictions").read_text().splitlines()]
    assert [line["expected"] for line in lines] == [["caf\u00e9"], ["3"], ["b"]]
    assert [line["scored_turn"] for line in lines] == [1, 3, 1]
    assert "in conversations of several questions (1 here), the models see" in (tmp_path / "report").read_text()


def test_a_later_run_generates_only_what_is_new(
    tiny_46: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generated: list[tuple[str, int]] = []

    def generate(name: str, _: Path, __: Encoder, ___: EvaluationSettings, samples: Sequence[Sample]) -> list[Answer]:
        generated.append((name, len(samples)))
        return [Answer(sample.turns[0].text, 5, hit_limit=False) for sample in samples]

    monkeypatch.setattr("minicpmv_finetune.components.evaluate.evaluate._generate_answers", generate)
    samples = [sample_of("Which?"), sample_of("Why?", "t")]

    def run(number: int, samples: list[Sample], settings: EvaluationSettings = SETTINGS) -> list[str]:
        generated.clear()
        folder = tmp_path / "pipeline" / f"run-{number}"
        monkeypatch.setenv("KFP_RUN_ID", folder.name)
        data = write_eval(dataset, tmp_path / str(number), samples)
        with working_for(f"{folder}/evaluate/predictions"):
            found = evaluate(tiny_46, str(tiny_46), data, tmp_path / "predictions", tmp_path / "report", settings)
        return [one.base.answer.text for one in found.predictions if one.base]

    assert run(1, samples) == ["Which?", "Why?"]
    assert generated == [("base model", 2), ("tuned model", 2)]
    # A model that is compared with itself is another model to this table: only base and champion stay the same.
    assert run(2, [*samples, sample_of("Where?", "u"), samples[0]]) == ["Which?", "Why?", "Where?", "Which?"]
    assert generated == [("base model", 1), ("tuned model", 4)]
    assert "base model: 3 of 4 answers are known from an earlier run" in capsys.readouterr().out
    assert "base 3" in (tmp_path / "report").read_text()
    run(3, samples, replace(SETTINGS, max_new_tokens=7))
    assert generated == [("base model", 2), ("tuned model", 2)]
    (answers, _) = sorted((tmp_path / "pipeline" / "minicpmv-answers").iterdir())
    answers.write_text("damaged")
    run(4, samples)
    run(5, samples, replace(SETTINGS, max_new_tokens=7))
    assert answers.read_text() != "damaged"


def test_both_models_answer_every_sample(
    tiny_46: Path, dataset: Path, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    predictions, report = tmp_path / "out" / "predictions", tmp_path / "out" / "report"
    found = evaluate(tiny_46, str(tiny_46), dataset, predictions, report, SETTINGS)
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    samples = list(read_samples(dataset, "eval"))
    assert [line["id"] for line in lines] == [sample.id for sample in samples]
    assert [line["expected"] for line in lines] == [[sample.turns[-1].text] for sample in samples]
    assert lines[0]["question"] == "Which digit is written in the picture?"
    assert lines[0]["pictures"] == [samples[0].images[0].uri]
    assert all(set(line["scores"]) == set(line["hit_limit"]) == {"base", "tuned"} for line in lines)
    assert [line["base"] for line in lines] == [line["tuned"] for line in lines], (
        "the same model gives the same answers"
    )
    assert found.metrics["samples"] == 12
    assert found.metrics["improvement"] == found.metrics["improvement_high"] == 0
    assert report.read_text().startswith("<!doctype html>")

    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("minicpmv-finetune")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id])[0]
    assert run.data.metrics["evaluate/tuned_exact_match"] == found.metrics["tuned_exact_match"]
    assert (run.data.params["metric"], run.data.params["metrics_version"]) == ("exact_match", METRICS_VERSION)
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["evaluation.html"]


def test_an_evaluation_is_deterministic(tiny_46: Path, dataset: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("first", "second")]
    for file in files:
        evaluate(tiny_46, "", dataset, file, tmp_path / "report.html", SETTINGS)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "base" not in json.loads(files[0].read_text().splitlines()[0])


def test_the_base_gets_the_same_slices_as_the_merged_model(tiny_46: Path, dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.linear_gradient("L").resize((400, 250)).save(path)
    image = ImageRef(uri=str(path), sha256=sha256(path.read_bytes()).hexdigest(), width=400, height=250)
    data = write_eval(dataset, tmp_path, [sample_of("What is it?", images=(image,))])
    merged = shutil.copytree(tiny_46, tmp_path / "merged")
    write_max_slices(merged, 1)

    def answers(model: Path, base: str) -> dict[str, str]:
        evaluate(
            model, base, data, tmp_path / "predictions", tmp_path / "report", EvaluationSettings(max_new_tokens=12)
        )
        line = json.loads((tmp_path / "predictions").read_text())
        return {name: line[name] for name in ("base", "tuned") if name in line}

    one_slice = answers(merged, str(tiny_46))
    assert one_slice["base"] == one_slice["tuned"]
    assert answers(tiny_46, "")["tuned"] != one_slice["tuned"], (
        "the slicing must change the answer, or the test checks nothing"
    )


def test_samples_with_special_tokens_are_counted_not_evaluated(tiny_46: Path, dataset: Path, tmp_path: Path) -> None:
    data = write_eval(dataset, tmp_path, [sample_of("fine"), sample_of("an <|im_end|> inside", "bad")])
    found = evaluate(tiny_46, "", data, tmp_path / "predictions", tmp_path / "report", SETTINGS)
    assert (found.metrics["samples"], found.metrics["left_out"]) == (1, 1)


@pytest.mark.parametrize(
    ("metric", "questions", "words"),
    [("exactly", ["fine"], "'exactly' is not accepted"), ("exact_match", [], "no sample to evaluate")],
)
def test_data_that_cannot_be_evaluated_is_refused_before_any_answer(
    tiny_46: Path, dataset: Path, tmp_path: Path, metric: str, questions: list[str], words: str
) -> None:
    data = write_eval(dataset, tmp_path, [sample_of(question) for question in questions])
    with pytest.raises(UserError, match=words):
        evaluate(tiny_46, "", data, tmp_path / "predictions", tmp_path / "report", EvaluationSettings(metric=metric))
    assert not (tmp_path / "predictions").exists()


def test_the_champion_answers_the_same_samples_and_must_be_beaten(tiny_46: Path, dataset: Path, tmp_path: Path) -> None:
    predictions = tmp_path / "predictions"
    found = evaluate(tiny_46, "", dataset, predictions, tmp_path / "report", SETTINGS, champion_uri=str(tiny_46))
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert all(line["champion"] == line["tuned"] and set(line["scores"]) == {"champion", "tuned"} for line in lines)
    assert not found.decision.promote
    assert found.decision.reason == "as good as the champion, better is required"


def test_the_curves_of_a_merged_folders_training_are_drawn(tiny_46: Path, dataset: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(tiny_46, tmp_path / "merged")
    record = example_record(history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    (merged / RECORD_FILE).write_text(record.model_dump_json())
    evaluate(merged, "", dataset, tmp_path / "predictions", tmp_path / "report", SETTINGS)
    assert "Training loss over the steps" in (tmp_path / "report").read_text()


def test_options_have_defaults_and_invalid_ones_are_named() -> None:
    settings = settings_from({"metric": "anls", "batch_size": 2.0, "gate": {"min_metric": 0.5}})
    assert settings == EvaluationSettings("anls", batch_size=2, gate=Gate(min_metric=0.5))
    for options, place in (
        ({"batchsize": 2}, "batchsize"),
        ({"gate": {"max_regression": "no"}}, "gate.max_regression"),
    ):
        with pytest.raises(UserError, match=f"evaluation_options: {place}: "):
            settings_from(options)


def test_the_component_writes_matrix_table_and_promotion_record(
    tiny_46: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = write_eval(
        dataset, tmp_path, [sample_of("Yes?", f"{number}", expected="yn"[number % 2]) for number in range(4)]
    )
    outputs = {
        name: str(tmp_path / name)
        for name in ("predictions", "promotion_record", "metrics", "summary", "report", "decision")
    }
    metrics = dsl.Metrics(uri=outputs["metrics"])
    confusion = dsl.ClassificationMetrics(uri=str(tmp_path / "confusion"))
    component.python_func(
        model=dsl.Model(uri=str(tiny_46), metadata={"adapter_uri": "s3://adapters/1", "generation": "4.6"}),
        base_model_uri=str(tiny_46),
        dataset=dsl.Dataset(uri=str(data)),
        metric="exact_match",
        evaluation_options={"max_new_tokens": 2, "gate": {"min_improvement": -0.1}},
        registered_model="model",
        predictions=dsl.Artifact(uri=outputs["predictions"]),
        promotion_record=dsl.Artifact(uri=outputs["promotion_record"]),
        evaluation_metrics=metrics,
        confusion=confusion,
        evaluation_summary=dsl.Markdown(uri=outputs["summary"]),
        evaluation_report=dsl.HTML(uri=outputs["report"]),
        decision=outputs["decision"],
    )
    assert Path(outputs["decision"]).read_text() == "promote"
    assert metrics.metadata.pop("display_name") == "evaluation_metrics (exact_match)"
    assert sorted(metrics.metadata)[:3] == ["answer_score", "answer_score_base", "answer_score_gain"]
    assert len(metrics.metadata) <= 10
    matrix = confusion.metadata["confusionMatrix"]
    assert [label["displayName"] for label in matrix["annotationSpecs"]] == ["n", "y", "(other)"]
    assert sum(sum(row["row"]) for row in matrix["rows"]) == 4
    summary = Path(outputs["summary"]).read_text().replace("\u00a0", "")
    assert "| as good as the base model | passed |" in summary
    record = read_promotion_record(Path(outputs["promotion_record"]))
    assert (record.promote, record.champion, record.adapter_uri) == (True, "", "s3://adapters/1")
    assert record.data_fingerprint == read_info(data).fingerprint
