"""Every input of the pipelines in one table: name, type, default, range, help text and group.

The signatures of the pipelines, the options of `minicpmv-finetune run` and `retrain`, the help texts, and the checks
before a run are made from this table. A component's own signature is literal, because Kubeflow Pipelines reads its
source; a test compares it with the table. To add an input: add a row here, add the parameter to the component that
needs it, and use it in the step.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minicpmv_finetune.errors import UserError

Group = Literal["data", "model", "training", "evaluation", "registry"]
REQUIRED = None
"""The default of an input that has none."""
_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a JSON object"}


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

    def parse(self, value: Any) -> Any:
        """The value in the input's type; text is read as JSON where the type is not str.

        Raises:
            UserError: The value has another type or is out of range.
        """
        if isinstance(value, str) and self.type is not str:
            try:
                value = json.loads(value.lower() if self.type is bool else value)
            except ValueError as error:
                raise self._wrong_type(value) from error
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.type is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, self.type) or (isinstance(value, bool) and self.type is not bool):
            raise self._wrong_type(value)
        if remedy := self._range_remedy(value):
            raise UserError(f"{self.name}: {value!r} is not accepted; {remedy}.")
        return value

    def _wrong_type(self, value: Any) -> UserError:
        return UserError(f"{self.name}: {value!r} is not {_TYPE_NAMES[self.type]}; correct it.")

    def _range_remedy(self, value: Any) -> str:
        """What to give instead of a value out of range; empty if the value is accepted."""
        if self.choices and value not in self.choices:
            close = difflib.get_close_matches(str(value), self.choices, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            return f"{meant}choose one of {', '.join(self.choices)}"
        if self.at_least is not None and not value >= self.at_least:
            return f"give at least {self.at_least:g}"
        if self.above is not None and not value > self.above:
            return f"give more than {self.above:g}"
        if self.at_most is not None and not value <= self.at_most:
            return f"give at most {self.at_most:g}"
        return ""


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
    ),
    Input(
        "model_max_length",
        int,
        "Maximum length of a sample in tokens; a longer sample is rejected with its length, never truncated.",
        "model",
        2048,
        at_least=1,
    ),
    Input("use_lora", bool, "Train LoRA adapters on the language model.", "training", True),
    Input("tune_vision", bool, "Train the vision tower too.", "training", True),
    Input("tune_llm", bool, "Train the language model's own weights; needs use_lora false.", "training", False),
    Input("lora_r", int, "Rank of the adapters.", "training", 64, at_least=1),
    Input(
        "lora_alpha",
        int,
        "Scale of the adapters; their update is multiplied by lora_alpha / lora_r.",
        "training",
        64,
        at_least=1,
    ),
    Input("learning_rate", float, "Peak learning rate.", "training", 1e-4, above=0),
    Input("num_train_epochs", float, "Number of passes over the training data.", "training", 3.0, above=0),
    Input("per_device_train_batch_size", int, "Samples that a device processes at once.", "training", 4, at_least=1),
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
    Input("metric", str, "Metric that scores the answers, such as exact_match or anls.", "evaluation", "exact_match"),
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
        "Name in MLflow's registry for a model that passes the gate; empty registers none.",
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

    Raises:
        UserError: A name is unknown, a required input is missing, or a value is not accepted; all mistakes at once.
    """
    known = {item.name: item for item in inputs}
    checked, mistakes = {}, []
    for name, value in given.items():
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
        if item.default is REQUIRED and not checked.get(item.name) and item.name not in given:
            mistakes.append(f"{item.name}: missing; give it as {item.name}=value ({item.help})")
    if mistakes:
        count = f"{len(mistakes)} inputs are wrong. " if len(mistakes) > 1 else ""
        raise UserError(count + " ".join(mistakes))
    return checked
