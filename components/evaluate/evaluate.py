"""Let base and merged model answer the held-out questions freely, and compare them sample by sample.

Answers are generated as a user's would be, from the merged folder alone, so a mistake anywhere before (template,
slicing, merge, saving) shows in the figures. The base model sees the same samples with the same slicing, so what
differs between the two are the weights.
"""

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import storage
from ..errors import UserError
from ..minicpmv.answer import Answer, answer, answering_device
from ..minicpmv.checkpoint import load_model
from ..minicpmv.conversation import Encoder
from ..progress import conclude, progress
from ..samples import Sample, SampleError, read_info, read_samples
from ..tracking import step_run
from .assessment import Evaluation, Prediction, assess, check_metrics
from .metrics import METRICS_VERSION
from .report import metric_title, percent, write_report


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are asked and scored.

    Attributes:
        metric: scores the samples that name none of their own; a name in `metrics.METRICS`.
        max_new_tokens: longest answer in tokens; how many reached it is counted.
        batch_size: samples asked at once.
    """

    metric: str = "exact_match"
    max_new_tokens: int = 128
    batch_size: int = 16


def evaluate(
    model: Path,
    base_model_uri: str,
    dataset: Path,
    predictions_file: Path,
    report_file: Path,
    settings: EvaluationSettings,
) -> Evaluation:
    """Answer, score, compare, report.

    Args:
        model: the merged folder.
        base_model_uri: what it is compared with; empty evaluates the merged model alone.
        dataset: folder written by validate_data, of which the evaluation split is asked.
        predictions_file: receives one JSON object a sample.
        report_file: receives the HTML report.
        settings: see there.

    Raises:
        UserError: a checkpoint, the data or the metric is unusable.
    """
    started = time.monotonic()
    info = read_info(dataset)
    encoder = Encoder.from_checkpoint(model)
    samples, left_out = _askable(dataset, encoder)
    check_metrics(samples, settings.metric)
    base_model = storage.fetch(base_model_uri) if base_model_uri else None
    base_encoder = (
        Encoder.from_checkpoint(base_model, max_slice_nums=encoder.slicing.max_slice_nums) if base_model else None
    )
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
        base = None
        if base_model and base_encoder:
            base = _ask("base model", base_model, base_encoder, samples, settings)
        tuned = _ask("tuned model", model, encoder, samples, settings)
        evaluation = assess(samples, base, tuned, settings.metric, left_out)
        lines = [json.dumps(_line(prediction), ensure_ascii=False) + "\n" for prediction in evaluation.predictions]
        storage.write_bytes(str(predictions_file), "".join(lines).encode())
        write_report(report_file, evaluation, {**facts, "seconds": round(time.monotonic() - started)})
        run.log_metrics({f"evaluate/{name}": value for name, value in evaluation.metrics.items()})
        # MLflow shows a file by its ending, which Kubeflow's artifact paths lack.
        with tempfile.TemporaryDirectory() as folder:
            run.log_file(str(shutil.copyfile(report_file, Path(folder) / "evaluation.html")))
    before = f"{percent(evaluation.comparison.base.value)} → " if evaluation.comparison else ""
    now = percent(evaluation.tuned.value)
    conclude(f"{metric_title(evaluation.metric)} {before}{now} on {len(samples):,} held-out samples")
    return evaluation


def _askable(dataset: Path, encoder: Encoder) -> tuple[list[Sample], int]:
    """The evaluation samples, and how many were left out because their text holds a special token."""
    samples, left_out = [], 0
    for sample in read_samples(dataset, "eval"):
        try:
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
    """One model's answers; it is gone from memory afterwards, so that both models need fit only one at a time."""
    model, _ = load_model(checkpoint, device_map=answering_device())
    with progress(name, len(samples), " answers") as bar:
        answers = answer(model, encoder, samples, settings.max_new_tokens, settings.batch_size, on_done=bar.update)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return answers


def _line(prediction: Prediction) -> dict[str, object]:
    """A sample's line of the predictions file."""
    sample, judged = prediction.sample, {"base": prediction.base, "tuned": prediction.tuned}
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
        "pictures": [picture.uri for picture in sample.pictures],
    }
