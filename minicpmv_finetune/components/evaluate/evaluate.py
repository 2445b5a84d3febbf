"""Let base and merged model answer the held-out questions freely, and compare them sample by sample.

Answers are generated as a user's would be, from the merged folder alone, so a mistake anywhere before (template,
slicing, merge, saving) shows in the figures. The base model sees the same samples with the same slicing, so what
differs between the two are the weights. The champion, if there is one, answers the same samples anew as it would be
served, whatever it reached when it was evaluated itself: only so are the figures of one and the same data.
"""

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict

from minicpmv_finetune import storage
from minicpmv_finetune.data.samples import Sample, SampleError, read_info, read_samples
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.answer import Answer, answer, inference_device
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.options import settings_from_options
from minicpmv_finetune.progress import progress, report_outcome
from minicpmv_finetune.reports.training_record import RECORD_FILE, read_record
from minicpmv_finetune.tracking.step_runs import step_run

from .assessment import Evaluation, Prediction, assess, check_metrics
from .gate import Gate
from .metrics import METRICS_VERSION
from .report import metric_title, percent, write_report


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are asked and scored.

    Attributes:
        metric: scores the samples that name none of their own; a name in `metrics.METRICS`.
        max_new_tokens: longest answer in tokens; how many reached it is counted.
        batch_size: samples asked at once.
        gate: what the tuned model must reach to be promoted.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    metric: str = "exact_match"
    max_new_tokens: int = 128
    batch_size: int = 16
    gate: Gate = field(default_factory=Gate)


def settings_from(options: Mapping[str, Any]) -> EvaluationSettings:
    """The settings that a JSON object names; see `settings_from_options`."""
    return settings_from_options(
        EvaluationSettings,
        options,
        "evaluation_options",
        "max_new_tokens, batch_size and gate, and of the gate min_metric, min_improvement and max_regression",
    )


def evaluate(
    model: Path,
    base_model_uri: str,
    dataset: Path,
    predictions_file: Path,
    report_file: Path,
    settings: EvaluationSettings,
    champion_uri: str = "",
) -> Evaluation:
    """Answer, score, compare, judge, report.

    Args:
        model: the merged folder.
        base_model_uri: what it is compared with; empty evaluates the merged model alone.
        dataset: folder written by validate_data, of which the evaluation split is asked.
        predictions_file: receives one JSON object a sample.
        report_file: receives the HTML report.
        settings: see there.
        champion_uri: the model whose place the merged one may take; empty when there is none.

    Raises:
        UserError: a checkpoint, the data or the metric is unusable.
    """
    started = time.monotonic()
    info = read_info(dataset)
    encoder = Encoder.from_checkpoint(model)
    others: dict[str, tuple[Path, Encoder]] = {}
    if base_model_uri:
        base = storage.fetch(base_model_uri)
        others["base"] = base, Encoder.from_checkpoint(base, max_slice_nums=encoder.slicing.max_slice_nums)
    if champion_uri:
        champion = storage.fetch(champion_uri)
        others["champion"] = champion, Encoder.from_checkpoint(champion)
    samples, left_out = _askable(dataset, [encoder, *(other for _, other in others.values())])
    check_metrics(samples, settings.metric)
    facts = {
        "metric": settings.metric,
        "metrics_version": METRICS_VERSION,
        "base_model": base_model_uri or "none",
        "generation": encoder.generation.version,
        "data_fingerprint": info.fingerprint,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "max_slice_nums": encoder.slicing.max_slice_nums,
    }
    with step_run("evaluate") as run:
        run.log_parameters(facts)
        answers = {
            name: _ask(f"{name} model", checkpoint, its_encoder, samples, settings)
            for name, (checkpoint, its_encoder) in [*others.items(), ("tuned", (model, encoder))]
        }
        evaluation = assess(
            samples,
            answers.get("base"),
            answers["tuned"],
            settings.metric,
            left_out,
            champion=answers.get("champion"),
            gate=settings.gate,
        )
        # Not a parameter of the run, which a retry could not change when the champion has moved.
        facts |= {"champion": champion_uri or "none", "seconds": round(time.monotonic() - started)}
        # The merge step leaves the record in the folder; a model from elsewhere has none.
        record = read_record(model) if (model / RECORD_FILE).is_file() else None
        write_report(report_file, evaluation, facts, record)
        # Last, so that whoever finds them finds the report too.
        lines = [json.dumps(_line(prediction), ensure_ascii=False) + "\n" for prediction in evaluation.predictions]
        storage.write_bytes(str(predictions_file), "".join(lines).encode())
        run.log_metrics({f"evaluate/{name}": value for name, value in evaluation.metrics.items()})
        # MLflow shows a file by its ending, which Kubeflow's artifact paths lack.
        with tempfile.TemporaryDirectory() as folder:
            run.log_file(str(shutil.copyfile(report_file, Path(folder) / "evaluation.html")))
    before = f"{percent(evaluation.comparison.base.value)} → " if evaluation.comparison else ""
    now = percent(evaluation.tuned.value)
    report_outcome(f"{metric_title(evaluation.metric)} {before}{now} on {len(samples):,} held-out samples")
    return evaluation


def _askable(dataset: Path, encoders: Sequence[Encoder]) -> tuple[list[Sample], int]:
    """The evaluation samples, and how many were left out because their text holds a special token."""
    samples, left_out = [], 0
    for sample in read_samples(dataset, "eval"):
        try:
            for encoder in encoders:
                encoder.encode_prompt(sample)
            samples.append(sample)
        except SampleError:
            left_out += 1
    if not samples:
        raise UserError(
            f"{dataset / 'eval.jsonl'}: no sample to evaluate ({left_out} hold special tokens); give evaluation data."
        )
    return samples, left_out


def _ask(
    name: str, checkpoint: Path, encoder: Encoder, samples: Sequence[Sample], settings: EvaluationSettings
) -> list[Answer]:
    """One model's answers; it is gone from memory afterwards, so that only one model at a time need fit."""
    model, _ = load_model(checkpoint, device_map=inference_device())
    with progress(name, len(samples), " answers") as bar:
        answers = answer(model, encoder, samples, settings.max_new_tokens, settings.batch_size, on_done=bar.update)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return answers


def _line(prediction: Prediction) -> dict[str, object]:
    """A sample's line of the predictions file."""
    sample, judged = (
        prediction.sample,
        {"base": prediction.base, "champion": prediction.champion, "tuned": prediction.tuned},
    )
    asked = {name: one for name, one in judged.items() if one is not None}
    return {
        "id": sample.id,
        "question": prediction.question,
        "expected": list(prediction.expected),
        **{name: one.answer.text for name, one in asked.items()},
        "outcome": prediction.outcome if prediction.base else None,
        "metric": prediction.metric,
        "scores": {name: {prediction.metric: one.score, "anls": one.anls} for name, one in asked.items()},
        "new_tokens": {name: one.answer.new_tokens for name, one in asked.items()},
        "hit_limit": {name: one.answer.hit_limit for name, one in asked.items()},
        "tags": list(sample.tags),
        "pictures": [image.uri for image in sample.images],
    }
