"""Generate the answers of base, champion and merged model to the held-out questions, and compare them.

Answers are generated as for a user, from the merged folder alone, so a mistake in an earlier step (template, slicing,
merge, saving) changes the scores. The base model gets the same samples with the same slicing, so only the weights
differ. The champion, if there is one, answers the same samples again, with the slicing that it would be served with,
whatever its score was when it was evaluated itself: only then are all scores from the same data. Answers of base and
champion that an earlier run has generated are used again.
"""

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minicpmv_finetune import storage
from minicpmv_finetune.data.samples import Sample, SampleError, read_info, read_samples
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.git_commit import git_commit
from minicpmv_finetune.minicpmv.answer import Answer, answer, inference_device
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.progress import progress, report_outcome
from minicpmv_finetune.reports.training_record import RECORD_FILE, read_record
from minicpmv_finetune.run_records import folder_beside_runs
from minicpmv_finetune.tracking.step_runs import step_run

from .assessment import Evaluation, Prediction, assess
from .known_answers import ANSWERS_FOLDER, answer_what_is_new
from .metrics import METRICS_VERSION, check_metrics, expected_answers
from .report import format_percent, metric_title, write_report
from .settings import EvaluationSettings
from .settings import settings_from as settings_from  # pipelines that 0.1.0 compiled import it from here


def evaluate(
    model: Path,
    base_model_uri: str,
    dataset: Path,
    predictions_file: Path,
    report_file: Path,
    settings: EvaluationSettings,
    champion_uri: str = "",
) -> Evaluation:
    """Generate answers, score and compare them, apply the gate and write the reports.

    Args:
        model: Merged folder.
        base_model_uri: Model that is compared with; empty evaluates the merged model alone.
        dataset: Folder written by validate_data; its evaluation split is used.
        predictions_file: Receives one JSON object for each sample.
        report_file: Receives the HTML report.
        settings: Settings of the evaluation.
        champion_uri: Champion that the merged model may replace; empty when there is none.

    Returns:
        Answers, scores, comparisons and the decision of the gate.

    Raises:
        UserError: A checkpoint, the data or the metric is unusable.
    """
    started = time.monotonic()
    info = read_info(dataset)
    models = _find_models(model, base_model_uri, champion_uri)
    samples, left_out = _samples_to_evaluate(dataset, [encoder for _, encoder in models.values()])
    own = models["tuned"][1]
    samples = _with_written_answers(samples, own)
    check_metrics(samples, settings.metric)
    facts = _facts(own, base_model_uri, info.fingerprint, settings)
    with step_run("evaluate") as run:
        run.log_parameters({**facts, **{f"gate/{name}": value for name, value in asdict(settings.gate).items()}})
        answers, known = _answers(models, own, samples, settings)
        evaluation = assess(
            samples,
            answers.get("base"),
            answers["tuned"],
            settings.metric,
            left_out,
            champion=answers.get("champion"),
            gate=settings.gate,
        )
        # Not a parameter of the run: a retry could not change it if the champion has moved.
        facts |= {"champion": champion_uri or "none", "scored_turn": _scored_turn(samples)}
        if known:
            facts["answers_of_earlier_runs"] = ", ".join(f"{name} {count:,}" for name, count in known.items())
        facts["seconds"] = round(time.monotonic() - started)
        # The merge step copies the record to the folder; a model from another source has none.
        record = read_record(model) if (model / RECORD_FILE).is_file() else None
        write_report(report_file, evaluation, facts, record)
        # The predictions are written last, so that there is a report whenever there are predictions.
        _write_predictions(predictions_file, evaluation)
        run.log_metrics({f"evaluate/{name}": value for name, value in evaluation.metrics.items()})
        run.log_headline(_headline_figures(evaluation), {"metric": evaluation.metric})
        run.log_report(report_file, "evaluation.html")
    report_outcome(_outcome_sentence(evaluation))
    return evaluation


def _find_models(model: Path, base_model_uri: str, champion_uri: str) -> dict[str, tuple[Path, Encoder]]:
    """The checkpoint and encoder of each model by name, the tuned model last."""
    encoder = Encoder.from_checkpoint(model)
    models: dict[str, tuple[Path, Encoder]] = {}
    if base_model_uri:
        base = storage.fetch(base_model_uri)
        models["base"] = base, Encoder.from_checkpoint(base, max_slice_nums=encoder.slicing.max_slice_nums)
    if champion_uri:
        champion = storage.fetch(champion_uri)
        models["champion"] = champion, Encoder.from_checkpoint(champion)
    return {**models, "tuned": (model, encoder)}


def _facts(
    encoder: Encoder, base_model_uri: str, data_fingerprint: str, settings: EvaluationSettings
) -> dict[str, Any]:
    """The circumstances of the evaluation, for MLflow and the report."""
    return {
        "metric": settings.metric,
        "metrics_version": METRICS_VERSION,
        "base_model": base_model_uri or "none",
        "generation": encoder.generation.version,
        "data_fingerprint": data_fingerprint,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "max_slice_nums": encoder.slicing.max_slice_nums,
        "git_commit": git_commit(),
    }


def _headline_figures(evaluation: Evaluation) -> dict[str, float]:
    """The numbers by which the runs of pipelines are compared in MLflow."""
    tuned = evaluation.tuned
    figures = {"score": tuned.value, "score_low": tuned.low, "score_high": tuned.high}
    if gain := evaluation.improvement:
        figures |= {"improvement": gain.value, "improvement_low": gain.low, "improvement_high": gain.high}
    # Kubeflow's names too, so that a person finds the same headline in both; the others are those of 0.1.0.
    return {**figures, **{name: value for name, value in evaluation.headline.items() if name.startswith("answer_")}}


def _scored_turn(samples: Sequence[Sample]) -> str:
    """Which answer of a conversation is scored, and what the models see before it."""
    conversations = sum(sum(turn.role == "user" for turn in sample.turns) > 1 for sample in samples)
    if not conversations:
        return "the only answer of each sample"
    return (
        f"the last answer with loss; in conversations of several questions ({conversations:,} here), the models see "
        "the earlier answers of the data and not their own"
    )


def _outcome_sentence(evaluation: Evaluation) -> str:
    before = f"{format_percent(evaluation.comparison.base.value)} → " if evaluation.comparison else ""
    after = format_percent(evaluation.tuned.value)
    samples = len(evaluation.predictions)
    return f"{metric_title(evaluation.metric)} {before}{after} on {samples:,} held-out samples"


def _samples_to_evaluate(dataset: Path, encoders: Sequence[Encoder]) -> tuple[list[Sample], int]:
    """The evaluation samples, and the number of those left out because their text contains a special token."""
    samples, left_out = [], 0
    for whole in read_samples(dataset, "eval"):
        sample = whole.up_to_scored_turn()
        try:
            for encoder in encoders:
                encoder.encode_prompt(sample)
            samples.append(sample)
        except SampleError:
            left_out += 1
    if not samples:
        raise UserError(
            f"{dataset / 'eval.jsonl'}: no sample to evaluate ({left_out} contain special tokens); give evaluation "
            "data."
        )
    return samples, left_out


def _answers(
    models: Mapping[str, tuple[Path, Encoder]], own: Encoder, samples: Sequence[Sample], settings: EvaluationSettings
) -> tuple[dict[str, list[Answer]], dict[str, int]]:
    """The answers of each model by name, and how many of them earlier runs had generated."""
    answers, known = {}, {}
    folder = folder_beside_runs(ANSWERS_FOLDER)
    for name, (checkpoint, encoder) in models.items():
        generate = partial(_generate_answers, f"{name} model", checkpoint, encoder, settings)
        if folder and name != "tuned":
            given, count = answer_what_is_new(folder, checkpoint, encoder, samples, settings.max_new_tokens, generate)
            if count:
                known[name] = count
                print(f"{name} model: {count:,} of {len(samples):,} answers are known from an earlier run", flush=True)
        else:
            given = generate(samples)
        # As the tuned model writes text; models of other generations write differently.
        answers[name] = [replace(one, text=own.normalize_answer(one.text)) for one in given]
    return answers, known


def _generate_answers(
    name: str, checkpoint: Path, encoder: Encoder, settings: EvaluationSettings, samples: Sequence[Sample]
) -> list[Answer]:
    """The answers of one model, which is removed from memory afterwards, so that two models need not fit at once."""
    model, _ = load_model(checkpoint, device_map=inference_device())
    with progress(name, len(samples), " answers") as bar:
        answers = answer(model, encoder, samples, settings.max_new_tokens, settings.batch_size, on_done=bar.update)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return answers


def _with_written_answers(samples: Sequence[Sample], encoder: Encoder) -> list[Sample]:
    """The samples with their expected answers as the tuned model writes them; see `Encoder.normalize_answer`."""
    return [
        sample.model_copy(
            update={"answers": tuple(encoder.normalize_answer(text) for text in expected_answers(sample))}
        )
        for sample in samples
    ]


def _write_predictions(path: Path, evaluation: Evaluation) -> None:
    lines = [json.dumps(_line(prediction), ensure_ascii=False) + "\n" for prediction in evaluation.predictions]
    storage.write_bytes(str(path), "".join(lines).encode())


def _line(prediction: Prediction) -> dict[str, object]:
    """The line of a sample in the predictions file."""
    sample = prediction.sample
    models = {"base": prediction.base, "champion": prediction.champion, "tuned": prediction.tuned}
    answers = {name: scored for name, scored in models.items() if scored is not None}
    reasoning = {name: scored.answer.reasoning for name, scored in answers.items() if scored.answer.reasoning}
    return {
        "id": sample.id,
        "question": prediction.question,
        "scored_turn": len(sample.turns) - 1,  # from 0; the turns before it are the history
        "expected": list(prediction.expected),
        **{name: scored.answer.text for name, scored in answers.items()},
        **({"reasoning": reasoning} if reasoning else {}),
        "outcome": prediction.outcome if prediction.base else None,
        "metric": prediction.metric,
        "scores": {name: {prediction.metric: scored.score, "anls": scored.anls} for name, scored in answers.items()},
        "new_tokens": {name: scored.answer.new_tokens for name, scored in answers.items()},
        "hit_limit": {name: scored.answer.hit_limit for name, scored in answers.items()},
        "tags": list(sample.tags),
        "pictures": [image.uri for image in sample.images],
    }
