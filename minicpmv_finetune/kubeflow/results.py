"""The result of a finished run: score, gate, report and registered version, from what its steps left in the store.

Kubeflow's API lists no artifact of a task, so they are found by their place:
`<pipeline root>/<pipeline>/<run>/<step>/<execution>/<artifact>`. What a run came to stands beside the steps' folders
(`run_records`).
"""

from dataclasses import dataclass

import kfp_server_api

from minicpmv_finetune import storage
from minicpmv_finetune.run_records import read_outcome
from minicpmv_finetune.tracking.promotion_record import PromotionRecord

from .client import Cluster
from .store import run_folder, use_store

_OF_REGISTER = ("promoted", "challenger", "not registered")  # the results that register notes


@dataclass(frozen=True)
class Result:
    """What a run has achieved.

    Attributes:
        metric: Name of the metric.
        score: The tuned model's score; None if the evaluation has no single one.
        base_score: The base model's score, likewise.
        passed: Whether the model passed the gate.
        reason: Why, in words.
        report: Address of the evaluation's report.
        model: Address of the merged model.
        registration: What register did, in a sentence; empty if it did not run.
    """

    metric: str
    score: float | None
    base_score: float | None
    passed: bool
    reason: str
    report: str
    model: str
    registration: str

    def lines(self) -> list[str]:
        """The result as lines of text."""
        score = "" if self.score is None else f"{self.metric} {self.score:.4g}"
        base = "" if self.base_score is None else f" (base model {self.base_score:.4g})"
        registered = self.registration or ("not registered" if self.passed else "not registered, as the gate decided")
        facts = {
            "score": f"{score}{base}",
            "gate": f"{'passed' if self.passed else 'failed'}, {self.reason}",
            "report": self.report,
            "model": self.model,
            "version": registered,
        }
        return [f"  {name:<9}{text}" for name, text in facts.items() if text]


def read_result(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> Result | None:
    """The result of a run; None if it evaluated nothing, as a scheduled run without new data.

    Args:
        cluster: The server of the run.
        run: The run, with its tasks.

    Raises:
        UserError: The store cannot be read with the keys that are known here.
        RetryableError: The store does not answer.
    """
    use_store(cluster.profile)
    folder = run_folder(cluster.profile, run)
    files = storage.walk(folder)
    record_name = _newest(files, "evaluate", "promotion_record")
    if not record_name:
        return None
    record = PromotionRecord.model_validate_json(storage.read_bytes(storage.join(folder, record_name)))
    report = _newest(files, "evaluate", "report")
    outcome = read_outcome(folder)
    return Result(
        metric=record.metric,
        score=record.metrics.get("answer_score", record.metrics.get(f"tuned_{record.metric}")),
        base_score=record.metrics.get("answer_score_base", record.metrics.get(f"base_{record.metric}")),
        passed=record.promote,
        reason=record.reason,
        report=storage.join(folder, report) if report else "",
        model=record.model_uri,
        registration=outcome.sentence.rstrip(".") if outcome and outcome.result in _OF_REGISTER else "",
    )


def why_without_result(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> str:
    """What a run came to that evaluated nothing: that nothing was new; empty if it has not said so.

    Raises:
        UserError, RetryableError: See `read_result`.
    """
    use_store(cluster.profile)
    outcome = read_outcome(run_folder(cluster.profile, run))
    return outcome.sentence.rstrip(".") if outcome else ""


def _newest(files: dict[str, storage.StoredFile], step: str, artifact: str) -> str:
    """The newest file of a step whose artifact's name ends so; empty if there is none."""
    found = [name for name in files if step in name.split("/")[:-1] and name.endswith(artifact)]
    return max(found, key=lambda name: files[name].written, default="")
