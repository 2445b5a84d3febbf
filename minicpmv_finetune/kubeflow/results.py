"""The result of a finished run: score, gate, report and registered version, from the artifacts in the store.

Kubeflow's API lists no artifact of a task, so they are found by their place:
`<pipeline root>/<pipeline>/<run>/<step>/<execution>/<artifact>`.
"""

import html
import re
from dataclasses import dataclass

from minicpmv_finetune import storage
from minicpmv_finetune.tracking.promotion_record import PromotionRecord

from .client import Cluster
from .store import pipeline_root, use_store

_ESCAPED = re.compile(r"\\([^a-zA-Z0-9\s])")  # Markdown's way to keep a mark such as an underscore


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


def read_result(cluster: Cluster, pipeline: str, run_id: str) -> Result | None:
    """The result of a run; None if it evaluated nothing, as a scheduled run without new data.

    Args:
        cluster: The server of the run.
        pipeline: Name of the run's pipeline.
        run_id: Id of the run.

    Raises:
        UserError: The store cannot be read with the keys that are known here.
        RetryableError: The store does not answer.
    """
    use_store(cluster.profile)
    folder = storage.join(storage.join(pipeline_root(cluster.profile), pipeline), run_id)
    files = storage.walk(folder)
    record_name = _newest(files, "evaluate", "promotion_record")
    if not record_name:
        return None
    record = PromotionRecord.model_validate_json(storage.read_bytes(storage.join(folder, record_name)))
    report = _newest(files, "evaluate", "report")
    page = _newest(files, "register", "registration", "summary")
    registration = storage.read_bytes(storage.join(folder, page)).decode().strip() if page else ""
    return Result(
        metric=record.metric,
        score=record.metrics.get("answer_score", record.metrics.get(f"tuned_{record.metric}")),
        base_score=record.metrics.get("answer_score_base", record.metrics.get(f"base_{record.metric}")),
        passed=record.promote,
        reason=record.reason,
        report=storage.join(folder, report) if report else "",
        model=record.model_uri,
        registration=html.unescape(_ESCAPED.sub(r"\1", registration.partition("\n")[0])).rstrip("."),
    )


def _newest(files: dict[str, storage.StoredFile], step: str, *artifacts: str) -> str:
    """The newest file of a step whose artifact's name ends with one of these; empty if there is none."""
    found = [name for name in files if step in name.split("/")[:-1] and name.endswith(artifacts)]
    return max(found, key=lambda name: files[name].written, default="")
