"""Everything that can be known about a run before its first step, checked at once and without torch.

A mistake that a step finds after minutes, or after the training, costs a GPU. So before a run, the inputs, the flags of
the training, the options of all steps, the kind of the base model and the beginning of the data are checked together,
and one error names all mistakes. The steps check again what they get.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from minicpmv_finetune import storage
from minicpmv_finetune.components.evaluate.metrics import METRICS, check_metrics
from minicpmv_finetune.components.evaluate.settings import settings_from as evaluation_settings
from minicpmv_finetune.components.train.flags import (
    as_flags,
    check_flags,
    find_contradictions,
    find_mistakes,
    pop_num_nodes,
    replace_removed_flags,
)
from minicpmv_finetune.components.validate_data.validate import settings_from as validation_settings
from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.checking import InspectedImage, check_record
from minicpmv_finetune.data.reading import Record, local_copy, read_records
from minicpmv_finetune.data.samples import ImageRef, Reject, Sample, SampleError
from minicpmv_finetune.errors import MistakesError, RetryableError, UserError
from minicpmv_finetune.minicpmv.generations import detect_generation, generation_of
from minicpmv_finetune.options import raise_mistakes

from .inputs import FINETUNE_INPUTS, Input, defaults, read_inputs

ROWS = 1000
"""Samples at the beginning of the data that are checked, without decoding their images."""
_CHARACTERS = 1 << 25  # of these samples, because a sample may contain its images itself
_LOOK_UP_SECONDS = 8  # for a store or the hub to answer
_SET_BY_THE_PIPELINE = {
    "model_name_or_path": "base_model_uri",
    "data_path": "data_uri",
    "eval_data_path": "eval_data_uri",
    "max_slice_nums": "max_slice_nums",
    "output_dir": "",
    "checkpoint_uri": "",
}


def check_run(inputs: Sequence[Input], given: Mapping[str, Any], reads_places: bool = True) -> dict[str, Any]:
    """The given inputs of a run in their types, after every check that is possible before its first step.

    Args:
        inputs: Inputs of the pipeline.
        given: Values by name.
        reads_places: Whether to read the base model's configuration and the beginning of the data. A cluster's places
            cannot be read from everywhere.

    Raises:
        UserError: Inputs, flags, options, the base model or the data cannot be used; all mistakes at once.
    """
    checked, mistakes = read_inputs(inputs, given)
    run = {**defaults(FINETUNE_INPUTS), **defaults(inputs), **checked}
    mistakes += _flag_mistakes(run)
    mistakes += _option_mistakes(run)
    if "start_from" in run and not run["registered_model"]:
        mistakes.append("registered_model: empty, so there is no champion to compare with; give a name.")
    if reads_places:
        if "base_model_uri" in checked or "base_model_uri" not in given:
            mistakes += _base_model_mistakes("base_model_uri", run["base_model_uri"])
        mistakes += _data_mistakes(run)
    raise_mistakes(mistakes)
    return checked


def check_training(argv: Sequence[str]) -> None:
    """Check the flags of a training, and whether its base model and data are there; no torch is imported.

    Args:
        argv: Flags of the training script; a YAML file of flags may come first.

    Raises:
        UserError: Flags, the base model or the data cannot be used; all mistakes at once.
    """
    values, _ = find_mistakes(check_flags(argv))
    mistakes = []
    if model := values.get("model_name_or_path"):
        mistakes += _base_model_mistakes("--model_name_or_path", model)
    data, evaluation = values["data_path"], values.get("eval_data_path", "")
    if data.endswith((".json", ".jsonl")):
        for name, uri in (("--data_path", data), ("--eval_data_path", evaluation)):
            mistakes += _noted(name, lambda uri=uri: _read_data(uri)) if uri else []
    elif "://" not in data and not Path(data).expanduser().is_dir():
        mistakes.append(
            f"--data_path: {data}: no such folder; give the shards folder that preprocess wrote, or a .json or .jsonl "
            "file."
        )
    raise_mistakes(mistakes)


def _flag_mistakes(run: Mapping[str, Any]) -> list[str]:
    """What is wrong with the training flags of a run, alone and together with its inputs."""
    given = dict(run["training_flags"])
    mistakes = _noted("", lambda: pop_num_nodes(given))
    values: dict[str, Any] = {}

    def read() -> None:
        found, sentences = find_mistakes(replace_removed_flags(as_flags(given), lambda sentence: None))
        values.update(found)
        mistakes.extend(f"training_flags: {sentence.removeprefix('--')}" for sentence in sentences)

    mistakes += _noted("training_flags", read)
    for name in values:
        if name in _SET_BY_THE_PIPELINE:
            own = _SET_BY_THE_PIPELINE[name]
            instead = f"give the input {own} instead" if own else "leave it out"
            mistakes.append(f"training_flags: {name}: the pipeline sets this flag itself; {instead}.")
    return mistakes + find_contradictions({**run, **values})


def _option_mistakes(run: Mapping[str, Any]) -> list[str]:
    """What is wrong with the JSON objects of options."""
    mistakes = _noted("", lambda: validation_settings(run["data_options"]))
    mistakes += _noted("", lambda: evaluation_settings({"metric": run["metric"], **run["evaluation_options"]}))
    if not mistakes and not run["eval_data_uri"] and not validation_settings(run["data_options"]).eval_fraction:
        mistakes.append("data_options: eval_fraction 0 leaves nothing to evaluate; give eval_data_uri, or a share.")
    return mistakes


def _base_model_mistakes(name: str, uri: str) -> list[str]:
    """Why a base model cannot be used: it is missing, or of a kind that this project does not support."""

    def look_up() -> None:
        path = Path(uri).expanduser()
        if "://" not in uri and path.is_dir():
            detect_generation(path)
            return
        place = f"{uri}/config.json"
        try:
            config = json.loads(storage.read_model_file(uri, "config.json"))
        except ValueError as error:
            raise UserError(f"{place}: not valid JSON ({error}); the checkpoint is damaged.") from error
        generation_of(config if isinstance(config, dict) else {}, place)

    return _noted(name, lambda: _within(_LOOK_UP_SECONDS, look_up))


def _data_mistakes(run: Mapping[str, Any]) -> list[str]:
    """What is wrong with the beginning of the data, and with the metrics that its samples name."""
    mistakes = []
    metric = run["evaluation_options"].get("metric", run["metric"])
    default_metric = metric if metric in METRICS else "exact_match"
    scored = "eval_data_uri" if run["eval_data_uri"] else "data_uri"
    for name in ("data_uri", "eval_data_uri"):
        uri = run.get(name, "")

        def read(uri: str = uri, is_scored: bool = name == scored) -> None:
            samples = _read_data(uri)
            if is_scored:
                check_metrics(samples, default_metric)

        mistakes += _noted(name, read) if uri else []
    return mistakes


def _read_data(pattern: str) -> list[Sample]:
    """The usable samples among the first of the data; none from a store, where only the file's existence is checked.

    Raises:
        UserError: A file is missing or unreadable, or none of the first samples can be used.
    """
    storage.require_allowed(pattern)
    if storage.is_object_uri(pattern):
        _within(_LOOK_UP_SECONDS, lambda: storage.size(storage.expand(pattern)[0]))
        return []
    accepted, rejected = [], []
    for record in _first_records(storage.expand(pattern)):
        outcome = check_record(record, _without_decoding)
        if record.is_last and record.problem:
            place = f"line {record.line}" if record.index is None else f"sample {record.index}"
            raise UserError(f"{record.file}, {place}: {record.problem}")
        if isinstance(outcome, Reject):
            rejected.append(outcome)
        else:
            accepted.append(Sample.model_validate_json(outcome.line))
    if not accepted:
        reasons = {reject.reason: reject for reject in reversed(rejected)}
        listed = " ".join(f"{one.reason}: sample {one.index}: {one.message}" for one in reasons.values())
        raise UserError(f"{pattern}: none of the first {len(rejected):,} samples can be used. {listed}")
    return accepted


def _first_records(uris: Sequence[str]) -> Iterator[Record]:
    characters = 0
    records = chain.from_iterable(read_records(uri, local_copy(uri)) for uri in uris)
    for number, record in enumerate(records):
        if number == ROWS or characters > _CHARACTERS:
            return
        characters += record.length
        yield record


def _without_decoding(address: str) -> InspectedImage | SampleError:
    """Accept an image that exists; those in archives and stores are not looked up."""
    is_file = not image_files.is_data_uri(address) and not image_files.archive_of(address) and "://" not in address
    if is_file and not Path(address).exists():
        return SampleError("image_missing", f"{address}: not found; check the path or URI.")
    return InspectedImage(ImageRef(uri=address, sha256="", width=1, height=1), b"", ())


def _within(seconds: float, look_up: Callable[[], object]) -> None:
    """Call a function that may wait for a store; when it takes too long, go on without its result.

    Raises:
        UserError: The function raised it.
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            look_up()
        except BaseException as error:
            raised.append(error)

    # A daemon, because the end of the process must not wait for it.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise RetryableError(f"no answer within {seconds:g} seconds")
    if raised:
        raise raised[0]


def _noted(name: str, check: Callable[[], object]) -> list[str]:
    """The sentences of the mistakes that a check finds; what cannot be known yet is only a warning."""
    try:
        check()
    except UserError as error:
        sentences = error.sentences if isinstance(error, MistakesError) else (str(error),)
        return [one if not name or one.startswith(name) else f"{name}: {one}" for one in sentences]
    except RetryableError as error:
        print(f"warning: {name}: not checked before the run: {error}", file=sys.stderr)
    return []
