"""Training flags that name raw JSON, as the published script takes it: the data is validated and prepared first."""

from collections.abc import Sequence
from pathlib import Path

from ..components.preprocess.preprocess import PreprocessSettings, preprocess
from ..components.train.arguments import parse
from ..components.validate_data.validate import ValidationSettings, validate_data


def with_prepared_data(flags: Sequence[str]) -> list[str]:
    """The same flags with `--data_path` naming shards; those are written beside the output folder if need be.

    Raises:
        UserError: the flags or the data are not usable.
    """
    arguments = parse(flags, announce=lambda sentence: None)
    data, training = arguments.data, arguments.training
    if not data.data_path.endswith((".json", ".jsonl")):
        return list(flags)
    prepared = Path(f"{training.output_dir}-data")
    validate_data(
        data.data_path,
        data.eval_data_path,
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
        PreprocessSettings(max_slice_nums=training.max_slice_nums, model_max_length=training.model_max_length),
    )
    return [*flags, "--data_path", str(prepared / "shards")]
