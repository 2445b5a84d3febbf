"""Training flags that name raw JSON, as the published script takes it: the data is validated and prepared first."""

from collections.abc import Sequence
from pathlib import Path

from ..components.preprocess.preprocess import PreprocessSettings, preprocess
from ..components.train.arguments import Arguments, parse
from ..components.validate_data.validate import ValidationSettings, validate_data


def with_prepared_data(flags: Sequence[str]) -> list[str]:
    """The same flags with `--data_path` naming shards; those are written beside the output folder if need be.

    Raises:
        UserError: the flags or the data are not usable.
    """
    arguments = _read(flags)
    if _is_raw(arguments):
        prepared = _folder(arguments)
        validate_data(
            arguments.data.data_path,
            arguments.data.eval_data_path,
            prepared / "dataset",
            prepared / "rejects.jsonl",
            # The published script evaluates only on data of its own.
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
    return prepared_flags(flags)


def prepared_flags(flags: Sequence[str]) -> list[str]:
    """The flags that train on what `with_prepared_data` prepared."""
    arguments = _read(flags)
    if not _is_raw(arguments):
        return list(flags)
    return [*flags, "--data_path", str(_folder(arguments) / "shards")]


def _read(flags: Sequence[str]) -> Arguments:
    return parse(flags, announce=lambda sentence: None)


def _is_raw(arguments: Arguments) -> bool:
    return arguments.data.data_path.endswith((".json", ".jsonl"))


def _folder(arguments: Arguments) -> Path:
    return Path(f"{arguments.training.output_dir}-data")
