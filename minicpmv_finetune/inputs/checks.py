"""Everything that can be known about a run before its first step, checked at once and without torch.

A mistake that a step finds after minutes, or after the training, costs a GPU. So before a run, the inputs, the flags of
the training, the options of all steps, the kind of the base model and the beginning of the data are checked together,
and one error names all mistakes. The steps check again what they get.
"""

import json
import os
import re
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

from minicpmv_finetune import storage
from minicpmv_finetune.components.evaluate.metrics import METRICS, check_metrics, expected_answers
from minicpmv_finetune.components.evaluate.settings import settings_from as evaluation_settings
from minicpmv_finetune.components.train.checkpoint_place import PLACEHOLDER
from minicpmv_finetune.components.train.checkpoints import check_local_folder, local_folder, seal_of
from minicpmv_finetune.components.train.flags import (
    adapter_targets,
    as_flags,
    find_contradictions,
    find_flags_without_gpu,
    find_missing_gpus,
    find_mistakes,
    find_unfit_flags,
    pop_num_nodes,
    read_flags,
    replace_removed_flags,
    take_processes,
    trained_twice,
)
from minicpmv_finetune.components.validate_data.validate import settings_from as validation_settings
from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.checking import InspectedImage, check_record
from minicpmv_finetune.data.reading import Record, local_copy, read_records, require_source
from minicpmv_finetune.data.samples import ImageRef, Reject, Sample, SampleError
from minicpmv_finetune.errors import AccessError, MistakesError, RetryableError, UserError
from minicpmv_finetune.estimate.published import published_vision_layers
from minicpmv_finetune.minicpmv.generations import Generation, count_experts, generation_of, parse_json, read_json
from minicpmv_finetune.options import raise_mistakes
from minicpmv_finetune.outputs import check_cache, check_folder
from minicpmv_finetune.shards.format import read_manifest
from minicpmv_finetune.terminal import print_sentence
from minicpmv_finetune.tracking.registry import check_name

from .table import FINETUNE_INPUTS, INPUTS, Input, defaults, read_inputs

_REASONING = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)

ROWS = 1000
"""Samples at the beginning of the data that are checked, without decoding their images."""
_CHARACTERS = 1 << 25  # of these samples, because a sample may contain its images itself
_LOOK_UP_SECONDS = 8  # for a store or the hub to answer
_CONFIGURATIONS = ("deepspeed", "fsdp_config", "accelerator_config")
_INPUT_FLAGS = ("model_name_or_path", "data_path", "eval_data_path", "lora_weight_path", "resume_from_checkpoint")
_SET_BY_THE_PIPELINE = {
    "model_name_or_path": "base_model_uri",
    "data_path": "data_uri",
    "eval_data_path": "eval_data_uri",
    "max_slice_nums": "max_slice_nums",
    "output_dir": "",
    "checkpoint_uri": "",
}


def check_run(
    inputs: Sequence[Input], given: Mapping[str, Any], runs_here: bool = True, trains_here: bool = True
) -> dict[str, Any]:
    """The given inputs of a run in their types, after every check that is possible before its first step.

    Args:
        inputs: Inputs of the pipeline.
        given: Values by name.
        runs_here: Whether the steps run on this machine. For a cluster only stores and the hub are looked up, and a
            place that this machine may not read is no mistake.
        trains_here: Whether training needs the GPUs and packages of this machine; an estimate needs neither.

    Raises:
        UserError: Inputs, flags, options, the base model or the data cannot be used; all mistakes at once.
    """
    checked, mistakes = read_inputs(inputs, given)
    run = {**defaults(FINETUNE_INPUTS), **defaults(inputs), **checked}
    flags, flag_mistakes = _read_training_flags(run, runs_here and trains_here)
    mistakes += flag_mistakes
    mistakes += _option_mistakes(run)
    if "start_from" in run and not run["registered_model"]:
        mistakes.append("registered_model: empty, so there is no champion to compare with; give a name.")
    if name := run["registered_model"]:
        mistakes += _noted("registered_model", lambda: check_name(name))
    # A default that is used in place of a wrong value is not looked up.
    looked_up = {item.name for item in inputs} - (set(given) - set(checked))
    places = [place for place in _places(run, flags) if place.name in looked_up]
    mistakes += _place_mistakes([*places, *_flag_places(flags, "training_flags: ")], runs_here)
    raise_mistakes(mistakes)
    return checked


def inputs_among(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a component's arguments that are inputs of a pipeline, by name."""
    return {name: value for name, value in values.items() if name in INPUTS}


def check_in_first_step(given: Mapping[str, Any]) -> None:
    """Check the inputs of a run in its first step, because nobody has checked those of the Kubeflow UI's form.

    What only another step's pod can read, such as a base model on a volume, is left to that step.

    Args:
        given: Values by name; an empty `base_model_uri` or `start_from` means that the pipeline has no such input.

    Raises:
        UserError: Inputs, flags or options cannot be used; all mistakes at once.
    """
    known = {name: value for name, value in given.items() if value or name not in ("base_model_uri", "start_from")}
    check_run([INPUTS[name] for name in known], known, runs_here=False)


def check_training(argv: Sequence[str]) -> None:
    """Check the flags of a training, and whether its base model and data are there; no torch is imported.

    Args:
        argv: Flags of the training script; a YAML file of flags may come first.

    Raises:
        UserError: Flags, the base model or the data cannot be used; all mistakes at once.
    """
    _, values, mistakes = read_flags(argv)
    mistakes += find_flags_without_gpu(values)
    places = _flag_places(values, "--")
    inputs = {f"--{name}": str(values.get(name) or "") for name in _INPUT_FLAGS}
    mistakes += _noted("--cache_dir", lambda: check_cache(str(values.get("cache_dir") or ""), inputs))
    if out := values.get("output_dir"):
        found = _noted("--output_dir", lambda: check_folder(out, "train", inputs))
        mistakes += found or _noted("--checkpoint_uri", lambda: _check_checkpoints(values, inputs))
    elif not any(sentence.startswith("--output_dir:") for sentence in mistakes):
        # transformers would write to trainer_output in the working directory.
        mistakes.append("--output_dir: missing; give the folder that receives the result.")
    if model := values.get("model_name_or_path"):
        places.append(_Place("--model_name_or_path", model, lambda: _check_kind(model, values), True))
    if data := values.get("data_path"):
        is_raw = data.endswith((".json", ".jsonl"))
        check_data: Callable[[], object] = partial(_read_data, data) if is_raw else partial(_check_shards, data, values)
        places.append(_Place("--data_path", data, check_data))
        if is_raw and (evaluation := values.get("eval_data_path")):
            places.append(_Place("--eval_data_path", evaluation, lambda: _read_data(evaluation)))
    raise_mistakes(mistakes + _place_mistakes(places, runs_here=True))


def check_data(path: str) -> None:
    """Check whether the first samples of a data file of this machine can be used.

    Raises:
        UserError: The file is missing or unreadable, or none of its first samples can be used.
    """
    _read_data(path)


def check_base_model(option: str, uri: str) -> None:
    """Check that a base model is there and of a supported kind, before a step imports torch.

    Raises:
        UserError: It is not.
    """
    raise_mistakes(_place_mistakes([_Place(option, uri, lambda: _check_kind(uri), True)], runs_here=True))


def _read_training_flags(run: Mapping[str, Any], trains_here: bool) -> tuple[dict[str, Any], list[str]]:
    """The training flags of a run by name as far as they are accepted, and what is wrong with them.

    They are checked alone and together with the inputs of the run.
    """
    given = dict(run["training_flags"])
    mistakes = _noted("", lambda: pop_num_nodes(given))
    values: dict[str, Any] = {}

    def read() -> None:
        flags = as_flags({name: value for name, value in given.items() if name != "nproc_per_node"})
        found, sentences = find_mistakes(replace_removed_flags(flags, lambda sentence: None))
        values.update(found)
        mistakes.extend(f"training_flags: {sentence.removeprefix('--')}" for sentence in sentences)

    mistakes += _noted("training_flags", read)
    processes: list[int | None] = []
    mistakes += _noted("training_flags", lambda: processes.append(take_processes(as_flags(given))[1]))
    if trains_here and processes:
        mistakes += [f"training_flags: {sentence}" for sentence in find_missing_gpus(processes[0])]
    for name in values:
        if name in _SET_BY_THE_PIPELINE:
            own = _SET_BY_THE_PIPELINE[name]
            instead = f"give the input {own} instead" if own else "leave it out"
            mistakes.append(f"training_flags: {name}: the pipeline sets this flag itself; {instead}.")
    mistakes += find_flags_without_gpu(values) if trains_here else []
    return values, mistakes + find_contradictions({**run, **values}, trains_here)


def _option_mistakes(run: Mapping[str, Any]) -> list[str]:
    """What is wrong with the JSON objects of options."""
    mistakes = _noted("", lambda: validation_settings(run["data_options"]))
    mistakes += _noted("", lambda: evaluation_settings({"metric": run["metric"], **run["evaluation_options"]}))
    if not mistakes and not run["eval_data_uri"] and not validation_settings(run["data_options"]).eval_fraction:
        mistakes.append("data_options: eval_fraction 0 leaves nothing to evaluate; give eval_data_uri, or a share.")
    return mistakes


@dataclass(frozen=True)
class _Place:
    """A path or URI among the inputs.

    Attributes:
        name: Name of the input, for messages.
        uri: The path or URI.
        check: Function that looks it up, and raises one of the two errors.
        may_be_on_hub: Whether a name that is no path may be that of a model on the hub.
    """

    name: str
    uri: str
    check: Callable[[], object]
    may_be_on_hub: bool = False

    @property
    def is_remote(self) -> bool:
        """Whether a store or the hub must answer."""
        is_path = self.uri.startswith((".", "/", "~")) or os.path.exists(self.uri)  # noqa: PTH110 - see below
        return "://" in self.uri or (self.may_be_on_hub and not is_path)


def _places(run: Mapping[str, Any], flags: Mapping[str, Any]) -> list[_Place]:
    """The base model, which must fit the training flags, and the data of a run."""
    base, data, evaluation = (run.get(name, "") for name in ("base_model_uri", "data_uri", "eval_data_uri"))
    metric = run["evaluation_options"].get("metric", run["metric"])
    default_metric = metric if metric in METRICS else "exact_match"
    places = [_Place("base_model_uri", base, lambda: _check_kind(base, {**run, **flags}), True)]
    if data:
        read: Callable[[str], object] = (
            _read_data if evaluation else partial(_check_scored_data, default_metric=default_metric)
        )
        places.append(_Place("data_uri", data, lambda: read(data)))
    if evaluation:
        places.append(_Place("eval_data_uri", evaluation, lambda: _check_scored_data(evaluation, default_metric)))
    return places


def _flag_places(values: Mapping[str, Any], before: str) -> list[_Place]:
    """The files and folders that training flags name beside base model and data.

    Args:
        values: Values of flags by name.
        before: What a message writes before the flag's name.
    """
    checks: dict[str, Callable[[str], object]] = dict.fromkeys(_CONFIGURATIONS, _check_configuration)
    checks |= {"lora_weight_path": _check_adapter, "resume_from_checkpoint": _check_checkpoint}
    found = {name: values[name] for name in checks if isinstance(values.get(name), str) and values[name]}
    return [_Place(f"{before}{name}", value, partial(checks[name], value)) for name, value in found.items()]


def _place_mistakes(places: Sequence[_Place], runs_here: bool) -> list[str]:
    """Why places cannot be used; the remote ones are looked up at the same time, and not waited for long."""
    remote = {place.name: _LookUp(place) for place in places if place.is_remote}
    deadline = time.monotonic() + _LOOK_UP_SECONDS
    mistakes = []
    for place in places:
        if place.name in remote:
            mistakes += _noted(place.name, partial(remote[place.name].finish, deadline), runs_here)
        elif runs_here:
            mistakes += _noted(place.name, place.check)
    return mistakes


class _LookUp(threading.Thread):
    """A check that may wait for a store; the end of the process does not wait for it."""

    def __init__(self, place: _Place) -> None:
        super().__init__(daemon=True)
        self._place = place
        self._raised: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Call the check."""
        try:
            self._place.check()
        except BaseException as error:
            self._raised = error

    def finish(self, deadline: float) -> None:
        """Wait for the check until a time of the monotonic clock, and raise what it raised.

        Raises:
            RetryableError: It has not ended.
        """
        self.join(max(deadline - time.monotonic(), 0))
        if self.is_alive():
            instead = f"; {storage.WITHOUT_HUB}" if self._place.may_be_on_hub else "."
            raise RetryableError(f"{self._place.uri}: no answer within {_LOOK_UP_SECONDS:g} seconds{instead}")
        if self._raised:
            raise self._raised


def _check_kind(uri: str, flags: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Check that a base model is of a supported kind, by its config.json, and can honor the training flags."""
    if not uri:
        raise UserError("empty; give a checkpoint's folder, an s3:// URI or a hub id.")
    if "://" not in uri and (path := storage.local_path(uri)).is_dir():
        place = str(path / "config.json")
        config = read_json(path / "config.json")
    else:
        place = f"{uri}/config.json"
        config = parse_json(storage.read_model_file(uri, "config.json"), place)
    generation = generation_of(config, place)
    unfit = find_unfit_flags(flags, generation, count_experts(config))
    raise_mistakes(unfit + _find_trained_twice(flags, generation))


def _find_trained_twice(flags: Mapping[str, Any], generation: Generation) -> list[str]:
    """A sentence if adapters are asked for on the vision tower or the merger, and one of them whole too.

    The published models have the names of the layers; training itself looks at the model, also inside of other modules.
    """
    expression = str(flags.get("lora_target_modules") or "")
    if not flags.get("use_lora") or not expression or find_contradictions(flags, trains_here=False):
        return []  # or flags that cannot be read, each with a sentence of its own
    named = [name.strip() for name in str(flags.get("lora_modules_to_save") or "").split(",")]
    names_merger = any(name and f".{generation.merger}".endswith(f".{name}") for name in named)
    whole = {"--tune_vision true": generation.vision_tower} if flags.get("tune_vision") else {}
    whole |= {"--lora_modules_to_save": generation.merger} if names_merger else {}
    targets = adapter_targets(flags)
    layers = [layer for layer in published_vision_layers(generation) if targets.chooses(layer, generation)]
    pairs = {flag: next((one for one in layers if one.startswith(f"{place}.")), "") for flag, place in whole.items()}
    return [trained_twice(expression, layer, whole[flag], flag) for flag, layer in pairs.items() if layer]


def _check_configuration(path: str) -> None:
    """Check that a file of settings, can be read; the text may also be such a file in Base64."""
    if not os.path.exists(path):  # noqa: PTH110 - a long text is no path, and Path.exists would fail
        with suppress(ValueError):
            json.loads(b64decode(path, altchars=b"-_", validate=True))
            return
    try:
        is_object = isinstance(json.loads(storage.read_bytes(path)), dict)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct it.") from error
    if not is_object:
        raise UserError(f"{path}: not a JSON object; write settings by name.")


def _check_adapter(uri: str) -> None:
    """Check that there is an adapter."""
    storage.require_no_file(uri)
    storage.size(storage.join(uri, "adapter_config.json"))


def _check_checkpoint(address: str) -> None:
    """Check that there is a checkpoint to resume from; `true` and `false` name none."""
    if address.lower() not in ("true", "false"):
        seal_of(address, address)


def _check_checkpoints(flags: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Check that a training may write its checkpoints where its flags say."""
    uri = str(flags.get("checkpoint_uri") or "")
    if PLACEHOLDER not in uri:  # whose folder is not known yet
        out = storage.real_path(flags["output_dir"])
        check_local_folder(local_folder(uri, out), out, inputs)


def _check_shards(uri: str, flags: Mapping[str, Any]) -> None:
    """Check that a local folder contains the manifest of shards, with samples to evaluate if the flags need some."""
    if "://" in uri:
        return
    folder = storage.local_path(uri)
    if not folder.is_dir():
        raise UserError(
            f"{uri}: no such folder; give the shards folder that preprocess wrote, or a .json or .jsonl file."
        )
    strategy = flags.get("eval_strategy", "no")
    if not read_manifest(folder).rows("eval") and strategy != "no":
        raise UserError(
            f"{uri}: has no samples to evaluate, which --eval_strategy {strategy} needs; give validate-data an "
            "eval_fraction or evaluation data, or leave the flag out."
        )


def _check_scored_data(pattern: str, default_metric: str) -> None:
    """Read the beginning of the data from which the evaluation's samples come, and check their metrics."""
    samples = []
    for sample in map(Sample.up_to_scored_turn, _read_data(pattern)):
        # Reasoning is not scored where the generation has it; evaluate checks what exactly is.
        scored = tuple(_REASONING.sub("", text) for text in expected_answers(sample))
        samples.append(sample.model_copy(update={"answers": scored}))
    check_metrics(samples, default_metric)


def _read_data(pattern: str) -> list[Sample]:
    """The usable samples among the first of the data; none from a store, where only the file's existence is checked.

    Raises:
        UserError: A file is missing or unreadable, or none of the first samples can be used.
    """
    storage.require_allowed(pattern)
    if storage.is_object_uri(pattern):
        require_source(pattern)
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
        listed = " ".join(f"{one.reason}: {one.place}: {one.message}" for one in reasons.values())
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
    if is_file:
        try:
            storage.size(address)
        except UserError as error:
            return SampleError("image_missing", str(error))
    return InspectedImage(ImageRef(uri=address, sha256="", width=1, height=1), b"", ())


def _noted(name: str, check: Callable[[], object], must_be_readable: bool = True) -> list[str]:
    """The sentences of the mistakes that a check finds; what cannot be known yet is only a warning."""
    try:
        check()
    except (RetryableError, AccessError) as error:
        if isinstance(error, UserError) and must_be_readable:
            return [f"{name}: {error}"]
        print_sentence(f"warning: {name}: not checked before the run: {error}")
    except UserError as error:
        sentences = error.sentences if isinstance(error, MistakesError) else (str(error),)
        return [one if not name or one.startswith(name) else f"{name}: {one}" for one in sentences]
    return []
