"""Training flags that name raw JSON, which the published script accepts: validate and prepare the data first."""

from collections.abc import Callable, Sequence
from pathlib import Path

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.train.arguments import Arguments, input_places, parse
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.outputs import check_folder


def with_prepared_data(flags: Sequence[str], prepare: Callable[[Arguments], None] | None = None) -> list[str]:
    """The same flags with the shards as `--data_path`; raw JSON is prepared in a folder beside the output folder.

    Args:
        flags: Flags of the published script.
        prepare: Function that replaces `prepare_data`.

    Raises:
        UserError: The flags or the data cannot be used.
    """
    arguments = parse(flags, announce=lambda sentence: None)
    check_folder(str(arguments.training.output_dir), "train", input_places(arguments))
    if not arguments.data.data_path.endswith((".json", ".jsonl")):
        return list(flags)
    (prepare or prepare_data)(arguments)
    return [*flags, "--data_path", str(_folder(arguments) / "shards")]


def prepare_data(arguments: Arguments) -> None:
    """Validate and preprocess the raw JSON that the arguments name."""
    prepared = _folder(arguments)
    validate_data(
        arguments.data.data_path,
        arguments.data.eval_data_path,
        prepared / "dataset",
        prepared / "rejects.jsonl",
        # The published script evaluates only on separate evaluation data.
        ValidationSettings(eval_fraction=0.0),
    )
    preprocess(
        prepared / "dataset",
        arguments.model.model_name_or_path,
        prepared / "shards",
        prepared / "preprocess-rejects.jsonl",
        PreprocessSettings(
            max_slice_nums=arguments.training.max_slice_nums, model_max_length=arguments.training.model_max_length
        ),
    )


def _folder(arguments: Arguments) -> Path:
    out = Path(str(arguments.training.output_dir)).expanduser().resolve()
    return out.with_name(f"{out.name}-data")
