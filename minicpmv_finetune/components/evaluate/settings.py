"""The settings of the evaluation and their ranges, without the libraries that generate answers.

They can be checked at once, before the run that ends with the evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.options import Accepted, check_settings, settings_from_options

from .gate import Gate
from .metrics import METRICS


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the evaluation.

    Attributes:
        metric: Metric of samples that name none; a name in `metrics.METRICS`.
        max_new_tokens: Longest answer in tokens; the report contains the number of answers that reached it.
        batch_size: Number of samples that are answered at the same time.
        gate: Rules that the tuned model must pass to be promoted.
    """

    metric: Annotated[str, Accepted(tuple(METRICS))] = "exact_match"
    max_new_tokens: Annotated[int, Accepted(at_least=1, at_most=2**20)] = 128
    batch_size: Annotated[int, Accepted(at_least=1, at_most=65_536)] = 16
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        check_settings(self)
        metric = METRICS[self.metric]
        for name in ("min_metric", "min_improvement", "min_improvement_low", "max_regression"):
            value = getattr(self.gate, name)
            if value is not None and abs(value) > 1 and not metric.lower_is_better:
                raise UserError(
                    f"gate.{name}: {value!r} is not accepted; scores by {metric.name} are from 0 to 1, so give a share "
                    "such as 0.05 for five points."
                )


def settings_from(options: Mapping[str, Any]) -> EvaluationSettings:
    """Read the settings from a JSON object; see `settings_from_options`."""
    return settings_from_options(EvaluationSettings, options, "evaluation_options")
