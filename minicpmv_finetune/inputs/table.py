"""Every input of the pipelines in one table: name, type, default, range, help text and group.

The signatures of the pipelines, the options of `minicpmv-finetune run` and `retrain`, the help texts, and the checks
before a run are made from this table. A component's own signature is literal, because Kubeflow Pipelines reads its
source; a test compares it with the table. To add an input: add a row here, add the parameter to the component that
needs it, and use it in the step.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.options import Accepted, parse_value, raise_mistakes

Group = Literal["data", "model", "training", "evaluation", "registry"]
REQUIRED = None
"""The default of an input that has none."""


@dataclass(frozen=True)
class Input:
    """One input of a pipeline.

    Attributes:
        name: Name in the pipeline and in the components that take it.
        type: str, int, float, bool or dict.
        help: Meaning of the input, for the command line, the documentation and the pipeline's description.
        group: Part of the run that it belongs to.
        default: Default value; `REQUIRED` if there is none.
        option: Option on the command line, if it is not the name with dashes.
        choices: Accepted values; empty accepts all.
        at_least: Smallest accepted value.
        above: Bound that the value must exceed.
        at_most: Largest accepted value.
    """

    name: str
    type: type
    help: str
    group: Group
    default: Any = REQUIRED
    option: str = ""
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None

    @property
    def accepted(self) -> Accepted:
        """The accepted values of the type."""
        return Accepted(self.choices, self.at_least, self.above, self.at_most)

    def parse(self, value: Any) -> Any:
        """The value in the input's type; see `parse_value`.

        Raises:
            UserError: The value has another type or is not accepted.
        """
        return parse_value(self.name, value, self.type, self.accepted)


_TABLE = (
    Input(
        "data_uri",
        str,
        "Training data in MiniCPM-V's JSON format (array or JSON Lines): a path, an s3:// URI or a pattern.",
        "data",
        option="--data",
    ),
    Input(
        "eval_data_uri",
        str,
        "Evaluation data in the same format; without it, part of the training data's images is held out.",
        "data",
        "",
        option="--eval-data",
    ),
    Input(
        "max_reject_ratio",
        float,
        "Share of rejected samples above which a step fails.",
        "data",
        0.05,
        at_least=0,
        at_most=1,
    ),
    Input(
        "data_options",
        dict,
        'Further options of validate-data, such as {"eval_fraction": 0.2, "exif_transpose": true}.',
        "data",
        {},
    ),
    Input(
        "seed",
        int,
        "Seed for the evaluation split, the initial adapters and the order of samples.",
        "data",
        42,
        at_least=0,
        at_most=2**32 - 1,
    ),
    Input(
        "base_model_uri",
        str,
        "Base checkpoint: a path, an s3:// URI or a hub id.",
        "model",
        "openbmb/MiniCPM-V-4.6",
        option="--base-model",
    ),
    Input(
        "max_slice_nums",
        int,
        "Maximum number of slices of an image, besides its overview; more show finer detail and need more tokens.",
        "model",
        9,
        at_least=1,
        at_most=1000,
    ),
    Input(
        "model_max_length",
        int,
        "Maximum length of a sample in tokens; a longer sample is rejected with its length, never truncated.",
        "model",
        2048,
        at_least=1,
        at_most=2**20,
    ),
    Input("use_lora", bool, "Train LoRA adapters on the language model.", "training", True),
    Input("tune_vision", bool, "Train the vision tower too.", "training", True),
    Input("tune_llm", bool, "Train the language model's own weights; needs use_lora false.", "training", False),
    Input("lora_r", int, "Rank of the adapters.", "training", 64, at_least=1, at_most=8192),
    Input(
        "lora_alpha",
        int,
        "Scale of the adapters; their update is multiplied by lora_alpha / lora_r.",
        "training",
        64,
        at_least=1,
        at_most=1_000_000,
    ),
    Input("learning_rate", float, "Peak learning rate.", "training", 1e-4, above=0, at_most=1),
    Input(
        "num_train_epochs",
        float,
        "Number of passes over the training data.",
        "training",
        3.0,
        above=0,
        at_most=100_000,
    ),
    Input(
        "per_device_train_batch_size",
        int,
        "Samples that a device processes at once.",
        "training",
        4,
        at_least=1,
        at_most=65_536,
    ),
    Input(
        "training_flags",
        dict,
        'Further flags of the training script by name, such as {"gradient_accumulation_steps": 4}; "num_nodes" above '
        "1 trains on that many nodes.",
        "training",
        {},
    ),
    Input(
        "start_from",
        str,
        "Start of the training: base, or champion to continue from the champion's adapter.",
        "training",
        "base",
        choices=("base", "champion"),
    ),
    Input(
        "metric",
        str,
        "Metric that scores the answers, such as exact_match or anls.",
        "evaluation",
        "exact_match",
        # The names in `components/evaluate/metrics.py`, which is not imported for a help text.
        choices=(
            "exact_match",
            "anls",
            "vqa_accuracy",
            "relaxed_accuracy",
            "contains",
            "token_f1",
            "cer",
            "wer",
            "rouge_l",
            "multiple_choice",
            "json_fields",
            "teds",
        ),
    ),
    Input(
        "evaluation_options",
        dict,
        'Options of evaluate, such as {"max_new_tokens": 64, "gate": {"min_metric": 0.8}}.',
        "evaluation",
        {},
    ),
    Input(
        "registered_model",
        str,
        "Name in MLflow's registry, or empty to register nothing.",
        "registry",
        "minicpmv-finetune",
    ),
)
INPUTS: Mapping[str, Input] = {item.name: item for item in _TABLE}


def rows(names: str) -> tuple[Input, ...]:
    """Rows of the table by their names, separated by spaces."""
    return tuple(INPUTS[name] for name in names.split())


FINETUNE_INPUTS = rows(
    "data_uri eval_data_uri base_model_uri max_slice_nums model_max_length max_reject_ratio data_options use_lora "
    "tune_vision tune_llm lora_r lora_alpha learning_rate num_train_epochs per_device_train_batch_size training_flags "
    "seed metric evaluation_options registered_model"
)
RETRAIN_INPUTS = rows(
    "data_uri eval_data_uri base_model_uri registered_model start_from max_slice_nums model_max_length "
    "max_reject_ratio data_options training_flags seed metric evaluation_options"
)


def defaults(inputs: Iterable[Input]) -> dict[str, Any]:
    """The default of every input that has one."""
    return {item.name: item.default for item in inputs if item.default is not REQUIRED}


def check_inputs(inputs: Sequence[Input], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given values in their types; the result contains no defaults for other inputs.

    Args:
        inputs: The inputs of the pipeline.
        given: Values by name.

    Returns:
        The given values in their types.

    Raises:
        UserError: A name is unknown, a required input is missing, or a value is not accepted; all mistakes at once.
    """
    checked, mistakes = read_inputs(inputs, given)
    raise_mistakes(mistakes)
    return checked


def read_inputs(inputs: Sequence[Input], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The given values in their types as far as they are accepted, and a sentence for each mistake."""
    known = {item.name: item for item in inputs}
    checked: dict[str, Any] = {}
    mistakes = []
    for name, value in given.items():
        if name in known and known[name].default is REQUIRED and value is None:
            continue
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            meant = close[0] if close else f"one of {', '.join(known)}"
            mistakes.append(f"{name}: the pipeline has no such input; did you mean {meant}?")
            continue
        try:
            checked[name] = known[name].parse(value)
        except UserError as error:
            mistakes.append(str(error))
    for item in inputs:
        if item.default is REQUIRED and given.get(item.name) in (None, ""):
            mistakes.append(f"{item.name}: missing; give this input ({item.help})")
    return checked, mistakes
