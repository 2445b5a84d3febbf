"""Compare this project's MiniCPM-V with results that were recorded from the official code.

    python tests/parity/compare.py DIR [--json]

DIR contains a tiny checkpoint, images, an adapter and the recorded results (`expected.json`, `*.npz`; its README
explains the fields). Every case, name and size is read from DIR. The report has one line for each case and recorded
quantity: the largest difference and the tolerance, or the name of an intentional departure from the official code and
whether the departure explains the complete difference. A field is removed from the document when it is compared; a
field that remains at the end was not compared and counts as a miss. The exit code is 1 if there is any miss.
"""

import argparse
import copy
import hashlib
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.samples import ImageRef, Reject, Sample, SampleError, Turn, open_image, read_samples
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import load_with_adapter
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.minicpmv.modeling import UNTIMED, sincos_table
from minicpmv_finetune.minicpmv.slicing import SlicePlan, cut_slices
from minicpmv_finetune.shards.encoding import prepare

# Tolerances.
LOGITS = 1e-4  # absolute, also for outputs of the vision tower and the resampler
LOSS = 1e-5
GRADIENT = 1e-4  # relative
ZERO_GRADIENT = 1e-6  # absolute; the gradient of the keys' bias is zero in theory, and rounding noise in the record
PIXELS = 1e-6  # of the mean over a slice
TRAJECTORY = 1e-4  # five optimizer steps amplify rounding differences of the first step

# Intentional departures from the official code; docs/generations.md explains them, and a test compares the names.
IMAGE_ID = "image id: training numbers every image, as the processor does, and not only sliced ones"
LINE_BREAKS = "line breaks: a mark named in a dict is replaced in place, without additional line breaks"
LINE_BREAKS_FIRST = "line breaks first: line breaks at the beginning of an answer are removed"
BEGIN = "begin token: training begins with <s>, as the processor does"
TRAINED_AS_SERVED = "trained as served: training uses the processor's text, not the fine-tuning script's"
REPEATED_END = "repeated end: the token after the end of a turn is not supervised"
OLDER_RULE = "older label rule: only answers are supervised, as in the newer rule"
RUNS_ON = "rule runs on: after an empty answer the official rule supervises the user's text; such samples are refused"
EMPTY_THINKING = "thinking found anywhere: the official rule skips four tokens if any turn contains the empty block"
NO_TRUNCATION = "no truncation: a sample that is too long is rejected, not truncated"
MASKED_ZERO = "token 0 masked: only padding is masked, not the real token 0"
DROPPED_ZERO = "token 0 dropped: `chat` deletes token 0 from answers"
PUBLISHED_NAME = "published name: a name that the published documentation gives works, though its script fails on it"
TEXT_ORDER = "text order: images are in the order of their marks in the text, not of the dict"
STRICTER = "refused in validation"
SYSTEM_TURN = "system turn: accepted as the first turn, where the chat template supports it"
GROUPED_FRAMES = "grouped frames: refused as training data, so the recorded ids are used"
NO_TABLE = "no table: positions are computed when they are needed"
PADDING_POSITIONS = "padding positions: tokens hidden by the attention mask have no comparable position"
STORAGE_TYPE = "storage type: the official code stores ids in 32 bits, torch needs 64"

NOT_COMPARED = "provenance"

FLAGS = ["--data_path", "unused", "--output_dir", "unused", "--use_cpu", "true"]


@dataclass
class Finding:
    """One line of the report."""

    case: str
    quantity: str
    difference: float | None
    tolerance: float | None
    departure: str | None
    ok: bool

    def __str__(self) -> str:
        """The line of the printed report."""
        status = "ok  " if self.ok else "MISS"
        if self.departure:
            result = f"departs: {self.departure}"
        else:
            result = "equal" if self.tolerance == 0 and self.ok else f"{self.difference:.3g} (≤ {self.tolerance:.3g})"
        return f"{status} {self.case:24} {self.quantity:44} {result}"


@dataclass
class Report:
    """All findings, with one method for each kind of comparison."""

    findings: list[Finding] = field(default_factory=list)

    def close(
        self, case: str, quantity: str, found: Any, recorded: Any, tolerance: float, relative: bool = False
    ) -> None:
        """Compare numbers by their largest difference."""
        ours, theirs = (np.asarray(value, dtype=np.float64) for value in (found, recorded))
        if ours.shape != theirs.shape:
            self.findings.append(Finding(case, f"{quantity} (shape)", float("inf"), tolerance, None, ok=False))
            return
        difference = np.abs(ours - theirs)
        if relative:
            # Relative to the recorded value, after subtracting the rounding noise of gradients that are zero.
            difference = np.maximum(difference - ZERO_GRADIENT, 0) / np.maximum(np.abs(theirs), 1e-12)
        largest = float(difference.max()) if difference.size else 0.0
        self.findings.append(Finding(case, quantity, largest, tolerance, None, ok=largest <= tolerance))

    def equal(self, case: str, quantity: str, found: Any, recorded: Any) -> bool:
        """Compare values of any type exactly."""
        same = found == recorded
        self.findings.append(Finding(case, quantity, 0.0 if same else 1.0, 0.0, None, ok=same))
        if not same:
            print(f"  {case} {quantity}: found {str(found)[:300]}, recorded {str(recorded)[:300]}", file=sys.stderr)
        return bool(same)

    def departs(self, case: str, quantity: str, departure: str, explained: bool = True) -> None:
        """Record an intentional departure, and whether it explains the complete difference."""
        self.findings.append(Finding(case, quantity, None, None, departure, ok=explained))

    def equal_or(self, case: str, quantity: str, found: Any, recorded: Any, departure: str, explained: bool) -> None:
        """Compare exactly; a difference is a departure if the departure explains it."""
        if found == recorded:
            self.equal(case, quantity, found, recorded)
        else:
            self.departs(case, quantity, departure, explained)


@dataclass
class Case:
    """A sample, its images and its recorded results.

    Attributes:
        name: Name of the case.
        record: Recorded results; empty for a sample that only the truncation section uses.
        sample: The sample as validation accepts it.
        encoder: Encoder with the case's largest number of slices.
        dict_order: Numbers of the images in the order of the sample's dict of images.
        rejected: Reason code of validation, if validation rejects the sample.
    """

    name: str
    record: dict[str, Any]
    sample: Sample
    encoder: Encoder
    dict_order: list[int]
    rejected: str | None

    @property
    def finetune(self) -> dict[str, Any]:
        """The recorded results of the fine-tuning script."""
        return dict(self.record["finetune"])

    @cached_property
    def plans(self) -> list[SlicePlan]:
        """The slice plan of each image, in the order of the dict."""
        return self.encoder.plan(self.sample)

    @cached_property
    def cut_images(self) -> list[list[np.ndarray]]:
        """The slices of each image, in the order of the dict."""
        images = map(open_image, self.sample.images)
        return [cut_slices(image, plan, self.encoder.slicing) for image, plan in zip(images, self.plans, strict=True)]

    @property
    def text_order(self) -> list[int]:
        """Numbers of the images in the order of their marks in the text."""
        return [part for turn in self.sample.turns for part in turn.parts if isinstance(part, int)]

    def slices(self, order: Sequence[int]) -> list[np.ndarray]:
        """The slices of images, given by their numbers."""
        return [pixels for number in order for pixels in self.cut_images[number]]

    @property
    def official_slices(self) -> list[np.ndarray]:
        """The slices in the order of the dict, as in the fine-tuning script, except those without tokens."""
        return self.slices(self.dict_order)[: len(self.finetune["image_bound"])]


class Comparison:
    """The comparison of one folder of recorded results."""

    model: Any

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.recorded = json.loads((folder / "expected.json").read_text())
        self.remaining = copy.deepcopy(self.recorded)
        self.report = Report()
        self.model, self.generation = load_model(self.checkpoint, torch.float32)
        self.model.eval()
        self.default_encoder = Encoder.from_checkpoint(self.checkpoint)
        self.end = self._token_id(self.generation.end_of_turn)
        self.cases = self._read_cases()

    def run(self) -> Report:
        """Compare every recorded quantity."""
        for name in ("format", "set", "produced_with", "checkpoint_seed"):
            if self.remaining.pop(name, None) is not None:
                self.report.departs("set", name, NOT_COMPARED)
        for name, case in self.cases.items():
            self._compare_case(
                case, self.remaining["cases"].get(name) or self.remaining.pop("truncation_extra_sample", {})
            )
        for section in ("truncation", "refusals", "batches", "train_trajectory", "generation", "generation_batched"):
            self._compare_section(section)
        for section in ("chat", "lora", "temporal", "llm_type_outcomes"):
            self._compare_section(section)
        for path in _leaves(self.remaining):
            self.report.findings.append(Finding("set", f"not covered: {path}", float("inf"), 0.0, None, ok=False))
        return self.report

    def _compare_section(self, name: str) -> None:
        record = self.remaining.get(name)
        compare: Callable[[dict[str, Any]], None] = getattr(self, f"_compare_{name}")
        for item in record if isinstance(record, list) else [record] if record else []:
            compare(item)

    # Reading

    def _token_id(self, token: str) -> int:
        return int(self.default_encoder.tokenizer.get_vocab()[token])

    def _read_cases(self) -> dict[str, Case]:
        """Read the samples through validation, as any data; samples that it rejects are read without validation."""
        records = {name: record["sample"] for name, record in self.recorded["cases"].items()}
        extra = self.recorded.get("truncation_extra_sample")
        if extra:
            records[extra["id"]] = extra
        located = [{**self._located(sample), "id": name} for name, sample in records.items()]
        accepted, rejects = validate_samples(located)
        cases = {}
        for name, sample in records.items():
            record = self.recorded["cases"].get(name, {})
            rejected = rejects.get(name)
            read = accepted.get(name) or self._read_unvalidated(name, sample)
            encoder = Encoder.from_checkpoint(self.checkpoint, record.get("max_slice_nums"))
            cases[name] = Case(name, record, read, encoder, list(range(len(read.images))), rejected)
        return cases

    def _located(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample.get("image")
        if isinstance(image, dict):
            return {**sample, "image": {mark: str(self.folder / path) for mark, path in image.items()}}
        return {**sample, "image": str(self.folder / image)} if image else dict(sample)

    def _read_unvalidated(self, name: str, sample: dict[str, Any]) -> Sample:
        image = sample.get("image")
        paths = image if isinstance(image, dict) else {"<image>": image} if image else {}
        marks = re.compile("|".join(map(re.escape, paths)) or r"(?!)")
        numbers = {mark: number for number, mark in enumerate(paths)}
        turns = []
        for turn in sample["conversations"]:
            parts: list[str | int] = []
            end = 0
            for found in marks.finditer(turn["content"]):
                parts += [turn["content"][end : found.start()], numbers[found.group()]]
                end = found.end()
            turns.append(Turn(role=turn["role"], parts=tuple(p for p in (*parts, turn["content"][end:]) if p != "")))
        images = tuple(self._image(path) for path in paths.values())
        if isinstance(image, str) and not any(isinstance(part, int) for turn in turns for part in turn.parts):
            turns[0] = Turn(role=turns[0].role, parts=(0, "\n", *turns[0].parts))
        return Sample(id=name, images=images, turns=tuple(turns), source=name)

    def _image(self, path: str) -> ImageRef:
        file = self.folder / path
        with Image.open(file) as image:
            width, height = image.size
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return ImageRef(uri=str(file), sha256=digest, width=width, height=height)

    # Running the model

    def _inputs(self, ids: Sequence[int], slices: Sequence[np.ndarray], side: Any = "right") -> dict[str, torch.Tensor]:
        return collate([ModelInput("", list(ids), [], slices)], 0, self.patch_size, side)

    @property
    def patch_size(self) -> int:
        return self.default_encoder.slicing.patch_size

    def _sizes(self, slices: Sequence[np.ndarray]) -> list[list[int]]:
        return [[pixels.shape[0] // self.patch_size, pixels.shape[1] // self.patch_size] for pixels in slices]

    @torch.no_grad()
    def _logits(self, model: nn.Module, ids: Sequence[int], slices: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.as_tensor(model(**self._inputs(ids, slices)).logits[0])

    def _loss(self, model: nn.Module, cases: Sequence[Case], labels: str, rows: Any = None) -> torch.Tensor:
        """Compute the loss of a batch from recorded ids and labels; recorded labels are already shifted."""
        rows = rows or [(case.finetune["input_ids"], case.finetune[labels], case.official_slices) for case in cases]
        batch = collate(
            [ModelInput("", ids, given, slices) for ids, given, slices in rows], 0, self.patch_size, "right"
        )
        shifted = batch["labels"]
        return model(**batch, shift_labels=shifted).loss

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self.default_encoder.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _generate(
        self, ids: Sequence[Sequence[int]], slices: Sequence[np.ndarray], zeros: Sequence[Sequence[int]], **options: Any
    ) -> Any:
        """Generate from left-padded prompts; `zeros` are the positions of each prompt that the attention mask hides."""
        batch = collate([ModelInput("", list(row), [], []) for row in ids], 0, self.patch_size, "left")
        for row, positions in zip(batch["attention_mask"], zeros, strict=True):
            row[list(positions)] = 0
        if slices:
            batch |= {
                name: value
                for name, value in self._inputs([0], slices).items()
                if name not in {"input_ids", "attention_mask"}
            }
        settings = {
            "do_sample": False,
            "eos_token_id": self.default_encoder.stop_token_ids,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        length = batch["input_ids"].shape[1]
        # The official code generates from embeddings, so its penalty applies to new tokens only.
        penalty = RepetitionPenaltyLogitsProcessor(options.pop("repetition_penalty", 1.0), prompt_ignore_length=length)
        settings["logits_processor"] = LogitsProcessorList([penalty])
        return self.model.generate(**batch, **(settings | options)), length

    # One case

    def _compare_case(self, case: Case, record: dict[str, Any]) -> None:
        report, name = self.report, case.name
        if case.rejected:
            report.departs(name, "sample", f"{STRICTER} ({case.rejected})")
        if "sample" not in record:  # the additional sample of the truncation section
            record.clear()
            return
        for given in ("sample", "max_slice_nums", "max_length"):
            record.pop(given)
        npz = dict(np.load(self.folder / record.pop("npz")))
        self._compare_finetune(case, record["finetune"])
        logits = self._logits(self.model, case.finetune["input_ids"], case.official_slices)
        self._compare_logits(name, "ft", logits, npz)
        report.close(name, "logit_std_last8", logits[-8:].std(), record.pop("logit_std_last8"), LOGITS)
        if "image_influence_max_abs_logit_change_last8" in record:
            inputs = self._inputs(case.finetune["input_ids"], case.official_slices)
            inputs["pixel_values"] = -inputs["pixel_values"]
            with torch.no_grad():
                change = (self.model(**inputs).logits[0, -8:] - logits[-8:]).abs().max()
            influence = record.pop("image_influence_max_abs_logit_change_last8")
            report.close(name, "image_influence", change, influence, LOGITS)
        self._compare_losses(case, record["loss"])
        self._compare_vision(case, npz)
        self._compare_processor(case, record["processor"], npz)
        for remaining in npz:
            report.findings.append(Finding(name, f"not covered: npz {remaining}", float("inf"), 0.0, None, ok=False))

    def _compare_finetune(self, case: Case, record: dict[str, Any]) -> None:
        """Compare the model's inputs in the fine-tuning script."""
        report, name, encoder = self.report, case.name, case.encoder
        ids = case.finetune["input_ids"]
        length = len(ids)
        report.equal(name, "ft.position_ids", list(range(length)), record.pop("position_ids"))
        report.equal(name, "ft.image_bound", self._image_bounds(ids), record.pop("image_bound"))
        grids = dict(zip(self._marks(case), (plan.grid for plan in case.plans), strict=True))
        found_grids = {mark: [grid[1], grid[0]] if grid else None for mark, grid in grids.items()}
        report.equal(name, "ft.best_grid", found_grids, record.pop("best_grid"))
        self._compare_slices(case, "ft", case.slices(case.dict_order), record.pop("slices"))
        report.equal(name, "ft.tgt_sizes", self._sizes(case.slices(case.dict_order)), record.pop("tgt_sizes"))
        if case.text_order != case.dict_order:
            report.departs(name, "ft.slices order", TEXT_ORDER)
        # The recorded text, tokenized and labeled by this project.
        text = self._decode(ids)
        report.equal(name, "ft.decoded", self._abbreviated(text), record.pop("decoded"))
        try:
            found_labels = encoder.encode_text(text).labels
        except SampleError as error:
            found_labels = None
            begins = bool(LINE_BREAK_FIRST.search(text))
            report.departs(name, "ft.labels", LINE_BREAKS_FIRST, error.reason == "joined_answer" and begins)
        found_ids = list(encoder.tokenizer(text)["input_ids"])
        begin = encoder.tokenizer.bos_token_id
        if found_ids[:1] == [begin] != ids[:1]:
            report.departs(name, "ft.input_ids begin", BEGIN)
            found_ids, found_labels = found_ids[1:], found_labels and found_labels[1:]
        report.equal(name, "ft.input_ids of the text", found_ids, record.pop("input_ids"))
        older, newer = record.pop("labels"), record.pop("labels_head")
        if found_labels is not None:
            self._compare_labels(name, "ft.labels_head", ids, found_labels, newer)
            extra = sum(old != new for old, new in zip(older, newer, strict=True) if old != IGNORED_LABEL)
            supervised = [at for at, label in enumerate(found_labels) if label != IGNORED_LABEL]
            explained = all(older[at - 1] == found_labels[at] for at in supervised)
            report.departs(name, f"ft.labels ({extra} tokens more)", OLDER_RULE, explained)
        for kind in ("input_ids_dtype", "labels_dtype"):
            report.departs(name, f"ft.{kind} {record.pop(kind)}", STORAGE_TYPE)
        self._compare_training_text(case)

    def _compare_training_text(self, case: Case) -> None:
        """Compare the text that this project trains on with the recorded text."""
        report, name = self.report, case.name
        with suppress(SampleError):
            found = self._decode(prepare(case.sample, case.encoder, 10**9).input_ids)
            recorded = self._decode(case.finetune["input_ids"])
            begin = str(case.encoder.tokenizer.bos_token)
            normal = [_without_departures(text, begin) for text in (found, recorded)]
            departures = [
                departure
                for departure, pattern in (
                    (IMAGE_ID, r"<image_id>\d+</image_id>"),
                    (LINE_BREAKS, r"\n"),
                    (LINE_BREAKS_FIRST, LINE_BREAK_FIRST),
                )
                if len(re.findall(pattern, found)) != len(re.findall(pattern, recorded))
            ]
            if found == recorded:
                report.equal(name, "trained text", found, recorded)
            else:
                report.departs(
                    name, "trained text", "; ".join([*departures, TRAINED_AS_SERVED]), normal[0] == normal[1]
                )

    def _compare_labels(self, name: str, quantity: str, ids: list[int], found: list[int], shifted: list[int]) -> None:
        """Compare labels with recorded labels, which are shifted by one position."""
        recorded = [IGNORED_LABEL, *shifted[:-1]]
        differing = [at for at, (ours, theirs) in enumerate(zip(found, recorded, strict=True)) if ours != theirs]
        repeated = {
            at for at in differing if recorded[at] == self.end == ids[at - 1] != ids[at] and found[at] == IGNORED_LABEL
        }
        if repeated:
            self.report.departs(name, f"{quantity} ({len(repeated)} places)", REPEATED_END)
        rest = [at for at in differing if at not in repeated]
        if not rest:
            self.report.equal(name, f"{quantity} elsewhere" if repeated else quantity, 0, len(rest))
            return
        turns = self._turn_numbers(ids)
        contents = self._turn_contents(ids)
        empty = {number for number, content in contents.items() if not content.strip()}
        runs_on = all(turns[at] in empty or turns[at] - 1 in empty for at in rest)
        block = self.generation.empty_thinking
        in_last = len(rest) <= 4 and all(turns[at] == max(contents) for at in rest)
        thinks = bool(block) and block in self._decode(ids) and in_last
        departure = RUNS_ON if runs_on else EMPTY_THINKING
        self.report.departs(name, f"{quantity} ({len(rest)} places)", departure, explained=runs_on or thinks)

    def _turn_numbers(self, ids: Sequence[int]) -> list[int]:
        start = self._token_id("<|im_start|>")
        return np.cumsum([token == start for token in ids]).tolist()

    def _turn_contents(self, ids: Sequence[int]) -> dict[int, str]:
        """Return the text of the assistant's turns by the number of the turn."""
        parts = self._decode(ids).split("<|im_start|>")
        header = self.generation.assistant_header.removeprefix("<|im_start|>")
        return {
            number: part.removeprefix(header).split(self.generation.end_of_turn)[0]
            for number, part in enumerate(parts)
            if part.startswith(header)
        }

    def _compare_losses(self, case: Case, record: dict[str, Any]) -> None:
        for kind in list(record):
            labels = "labels_head" if kind == "labels_head" else "labels"
            self.model.train(kind == "labels_train_mode")
            with torch.no_grad():
                loss = self._loss(self.model, [case], labels)
            self.report.close(case.name, f"loss.{kind}", loss, record.pop(kind), LOSS)
        self.model.eval()

    @torch.no_grad()
    def _compare_vision(self, case: Case, npz: dict[str, np.ndarray]) -> None:
        """Compare the outputs of the vision tower and the resampler for each slice."""
        slices = case.slices(case.dict_order)
        if not slices:
            return
        inputs = self._inputs([0], slices)
        patches = self.model.vpm(inputs["pixel_values"], inputs["target_sizes"])
        features = self.model.resampler(patches, inputs["target_sizes"])
        report, name = self.report, case.name
        report.close(name, "vis_first_slice", features[0], npz.pop("vis_first_slice"), LOGITS)
        by_slice = {
            "vpm": patches.split(inputs["target_sizes"].prod(1).tolist()),
            "vis": list(features),
        }
        for part, outputs in by_slice.items():
            size = np.array([output.numel() for output in outputs])
            sums = [output.double().sum().item() for output in outputs]
            absolute = [output.double().abs().sum().item() for output in outputs]
            for quantity, found in ((f"{part}_slice_sum", sums), (f"{part}_slice_abssum", absolute)):
                report.close(name, f"{quantity} / size", np.array(found) / size, npz.pop(quantity) / size, LOGITS)

    def _compare_processor(self, case: Case, record: dict[str, Any], npz: dict[str, np.ndarray]) -> None:
        """Compare the model's inputs in serving."""
        report, name, encoder = self.report, case.name, case.encoder
        recorded = dict(record)
        ids = recorded["input_ids"]
        found = encoder.encode_prompt(case.sample, enable_thinking=False)
        report.equal(name, "proc.input_ids", found, record.pop("input_ids"))
        report.equal(name, "proc.prompt", self._with_marks(found), record.pop("prompt"))
        if "prompt_enable_thinking" in record:
            thinking = self._with_marks(encoder.encode_prompt(case.sample, enable_thinking=True))
            report.equal(name, "proc.prompt_enable_thinking", thinking, record.pop("prompt_enable_thinking"))
        zeros = record.pop("attention_mask_zero_positions")
        explained = zeros == [at for at, token in enumerate(ids) if token == 0]
        report.equal_or(name, "proc.attention_mask_zero_positions", [], zeros, MASKED_ZERO, explained)
        report.equal(name, "proc.image_bound", self._image_bounds(found), record.pop("image_bound"))
        images = [case.sample.images[number] for number in case.text_order]
        sizes = [[image.width, image.height] for image in images]
        sizes_by_dict = [[image.width, image.height] for image in case.sample.images]
        recorded_sizes = record.pop("image_sizes_wh")
        report.equal_or(name, "proc.image_sizes_wh", sizes, recorded_sizes, TEXT_ORDER, sizes_by_dict == recorded_sizes)
        order = case.text_order if sizes == recorded_sizes else case.dict_order
        slices = case.slices(order)
        report.equal(name, "proc.tgt_sizes", self._sizes(slices), record.pop("tgt_sizes"))
        self._compare_slices(case, "proc", slices, record.pop("slices"))
        if "max_abs_pixel_diff_vs_finetune" in record:
            # Here training and serving use the same function, so the difference is zero.
            report.close(name, "proc.max_abs_pixel_diff", 0.0, record.pop("max_abs_pixel_diff_vs_finetune"), 0)
        if "temporal_ids" in record:
            temporal = record.pop("temporal_ids")
            report.equal(name, "proc.temporal_ids", [[UNTIMED]] * len(slices), temporal or [])
            if temporal:
                inputs = self._inputs(found, slices)
                with torch.no_grad():
                    timed = self.model(**inputs, temporal_ids=temporal).logits[0, -1]
                report.close(name, "proc_last_logits, timed", timed, npz["proc_last_logits"], LOGITS)
        for kind in ("input_ids_dtype", "attention_mask_dtype"):
            report.departs(name, f"proc.{kind} {record.pop(kind)}", STORAGE_TYPE)
        logits = self._logits(self.model, ids, slices[: len(recorded["image_bound"])])
        report.close(name, "proc_last_logits", logits[-1], npz.pop("proc_last_logits"), LOGITS)

    def _compare_slices(
        self, case: Case, side: str, slices: Sequence[np.ndarray], records: list[dict[str, Any]]
    ) -> None:
        report, name = self.report, case.name
        report.equal(name, f"{side}.number of slices", len(slices), len(records))
        for number, (pixels, record) in enumerate(zip(slices, records, strict=False)):
            where = f"{side}.slice {number} "
            record = dict(record)
            packed = self._inputs([0], [pixels])["pixel_values"][0]
            rows, columns = pixels.shape[0] // self.patch_size, pixels.shape[1] // self.patch_size
            report.equal(name, where + "shape", list(packed.shape), record.pop("shape"))
            report.equal(name, where + "tgt_size_hw", [rows, columns], record.pop("tgt_size_hw"))
            total, absolute = packed.double().sum().item(), packed.double().abs().sum().item()
            report.close(name, where + "sum / size", total / packed.numel(), record.pop("sum") / packed.numel(), PIXELS)
            absolute_recorded = record.pop("abs_sum") / packed.numel()
            report.close(name, where + "abs_sum / size", absolute / packed.numel(), absolute_recorded, PIXELS)
            if "size_wh" in record:
                report.equal(name, where + "size_wh", [pixels.shape[1], pixels.shape[0]], record.pop("size_wh"))
            if "sha256_uint8" in record:
                digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
                report.equal(name, where + "sha256", digest, record.pop("sha256_uint8"))
            report.equal(name, where + "other fields", sorted(record), [])

    def _compare_logits(self, name: str, prefix: str, logits: torch.Tensor, npz: dict[str, np.ndarray]) -> None:
        found = {
            "logits_last8": logits[-8:],
            "mean": logits.mean(-1),
            "absmean": logits.abs().mean(-1),
            "logsumexp": logits.logsumexp(-1),
        }
        for quantity, values in found.items():
            if f"{prefix}_{quantity}" in npz:
                recorded = npz.pop(f"{prefix}_{quantity}")
                self.report.close(name, f"{prefix}_{quantity}", values.numpy(), recorded, LOGITS)

    # Sections

    def _compare_truncation(self, record: dict[str, Any]) -> None:
        report = self.report
        case, length = self.cases[record.pop("case")], record.pop("max_length")
        name = f"truncation {case.name} {length}"
        try:
            row = prepare(case.sample, case.encoder, length)
            refused = None
        except SampleError as error:
            refused = error.reason
        outcome = record.pop("outcome")
        if outcome == "raises":
            report.equal(name, "refused", refused is not None, True)
            for message in ("error_type", "error", "head_error"):
                record.pop(message, None)
            return
        ids, labels, newer = (record.pop(kind) for kind in ("input_ids", "labels", "labels_head"))
        cut_off = refused == "too_long"
        report.equal(name, "length", len(ids), record.pop("length"))
        explained = cut_off or (refused is None and len(row.input_ids) <= length) or case.rejected is not None
        report.departs(name, "outcome", NO_TRUNCATION if cut_off else "fits here too", explained)
        if case.record:
            whole = case.finetune
            report.equal(name, "input_ids", whole["input_ids"][: len(ids)], ids)
            report.equal(name, "labels_head", whole["labels_head"][: len(ids) - 1], newer[:-1])
            report.equal(name, "labels", whole["labels"][: len(ids) - 1], labels[:-1])
        else:
            text = self._decode(ids)
            encoded = case.encoder.encode_text(text)
            begin = int(encoded.input_ids[0] != ids[0])
            report.equal(name, "input_ids of the text", encoded.input_ids[begin:][: len(ids)], ids)
            if ids[-2:-1] == [self.end]:
                self._compare_labels(name, "labels_head", ids, encoded.labels[begin:], newer)
            else:
                report.departs(name, "labels_head, labels", NO_TRUNCATION)
        bounds = record.pop("image_bound")
        report.equal(name, "image_bound", self._image_bounds(ids), bounds)
        report.equal(name, "n_slices", len(case.slices(case.dict_order)), record.pop("n_slices"))
        # Images whose tokens were truncated are still passed to the official model, which ignores them.
        slices = case.slices(case.dict_order)[: len(bounds)]
        with torch.no_grad():
            report.close(
                name, "loss", self._loss(self.model, [], "labels", [(ids, labels, slices)]), record.pop("loss"), LOSS
            )

    def _compare_refusals(self, record: dict[str, Any]) -> None:
        name = record.pop("name")
        conversations = record.pop("conversations")
        text = json.dumps(conversations)
        path = next((path for path in sorted((self.folder / "images").iterdir())), None)
        image = {"<image_00>": str(path)} if "<image_0" in text else str(path)
        accepted, rejects = validate_samples([{"id": name, "image": image, "conversations": conversations}])
        if accepted and conversations[0]["role"] == "system":
            self.report.departs(f"refusal {name}", "accepted", SYSTEM_TURN)
        else:
            self.report.equal(f"refusal {name}", f"refused ({rejects.get(name)})", sorted(accepted), [])
        record.pop("error_type")
        record.pop("error")

    def _compare_batches(self, record: dict[str, Any]) -> None:
        report = self.report
        cases = [self.cases[name] for name in record.pop("cases")]
        name = "batch " + "+".join(case.name for case in cases)
        batch = collate(
            [
                ModelInput("", case.finetune["input_ids"], case.finetune["labels"], case.official_slices)
                for case in cases
            ],
            0,
            self.patch_size,
            "right",
        )
        lengths = batch["attention_mask"].sum(1).tolist()
        report.equal(name, "input_ids_shape", list(batch["input_ids"].shape), record.pop("input_ids_shape"))
        report.equal(
            name, "input_ids_row_last4", batch["input_ids"][:, -4:].tolist(), record.pop("input_ids_row_last4")
        )
        report.equal(name, "labels_row_last4", batch["labels"][:, -4:].tolist(), record.pop("labels_row_last4"))
        report.equal(name, "attention_mask_row_sums", lengths, record.pop("attention_mask_row_sums"))
        positions = (torch.arange(batch["input_ids"].shape[1]) * batch["attention_mask"])[:, -4:].tolist()
        report.departs(
            name, "position_ids_row_last4", PADDING_POSITIONS, positions == record.pop("position_ids_row_last4")
        )
        report.departs(name, f"attention_mask_dtype {record.pop('attention_mask_dtype')}", STORAGE_TYPE)
        slices = sum(len(case.slices(case.dict_order)) for case in cases)
        report.equal(name, "n_slices_total", slices, record.pop("n_slices_total"))
        supervised = int((batch["labels"] != IGNORED_LABEL).sum())
        report.equal(name, "n_supervised_tokens", supervised, record.pop("n_supervised_tokens"))
        recorded_means = record.pop("logsumexp_mean_valid")
        with torch.no_grad():
            logits = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        means = [logits[row, :length].logsumexp(-1).mean() for row, length in enumerate(lengths)]
        report.close(name, "logsumexp_mean_valid", means, recorded_means, LOGITS)
        for labels, suffix in (("labels", ""), ("labels_head", "_labels_head")):
            loss = self._backward(self.model, cases, labels)
            report.close(name, f"loss{suffix}", loss, record.pop(f"loss{suffix}"), LOSS)
            self._compare_gradients(name, self.model, record, suffix, lambda key: key.split(".")[0])
        self.model.zero_grad(set_to_none=True)

    def _backward(self, model: nn.Module, cases: Sequence[Case], labels: str) -> float:
        model.train()
        model.zero_grad(set_to_none=True)
        loss = self._loss(model, cases, labels)
        loss.backward()
        model.eval()
        return loss.item()

    def _compare_gradients(
        self, name: str, model: nn.Module, record: dict[str, Any], suffix: str, module_of: Callable[[str], str]
    ) -> None:
        per_parameter = record.pop(f"grad_norm_per_parameter{suffix}", None)
        per_module = record.pop(f"grad_norm{suffix}", None)
        found = {
            key: parameter.grad.double().norm().item() if parameter.grad is not None else 0.0
            for key, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        if per_parameter is not None:
            self.report.equal(name, f"parameters with a gradient{suffix}", sorted(found), sorted(per_parameter))
            for key, recorded in per_parameter.items():
                quantity = f"grad{suffix} {key}"
                self.report.close(name, quantity, found.get(key, float("nan")), recorded, GRADIENT, relative=True)
        if per_module is not None:
            squares = dict.fromkeys(per_module, 0.0)
            for key, norm in found.items():
                module = module_of(key)
                squares[module] = squares.get(module, 0.0) + norm**2
            self.report.equal(name, f"modules{suffix}", sorted(squares), sorted(per_module))
            for module, recorded in per_module.items():
                self.report.close(name, f"grad_norm{suffix} {module}", squares[module] ** 0.5, recorded, GRADIENT, True)

    def _compare_train_trajectory(self, record: dict[str, Any]) -> None:
        cases = [self.cases[name] for name in record.pop("cases")]
        self.report.equal("trajectory", "optimizer", record.pop("optimizer"), "torch.optim.AdamW")
        self.report.equal("trajectory", "max_grad_norm", record.pop("max_grad_norm"), None)
        self.report.equal("trajectory", "mode", record.pop("mode"), "train()")
        settings = {key: record.pop(key) for key in ("lr", "eps", "weight_decay")}
        model, _ = load_model(self.checkpoint, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), betas=tuple(record.pop("betas")), **settings)
        for number, recorded in enumerate(record.pop("loss_before_each_step")):
            loss = self._backward(model, cases, "labels")
            tolerance = LOSS if number == 0 else TRAJECTORY
            self.report.close("trajectory", f"loss before step {number}", loss, recorded, tolerance)
            optimizer.step()

    def _compare_generation(self, record: dict[str, Any]) -> None:
        report = self.report
        case = self.cases[record.pop("case")]
        name = f"generation {case.name}"
        processor = case.record["processor"]
        ids, zeros = processor["input_ids"], processor["attention_mask_zero_positions"]
        slices = case.slices(case.text_order)
        greedy = record.pop("greedy_ids")
        found, length = self._generate([ids], slices, [zeros], max_new_tokens=len(greedy))
        report.equal(name, "prompt_length", length, record.pop("prompt_length"))
        new = found.sequences[0, length:].tolist()
        report.equal(name, "greedy_ids", new, greedy)
        report.equal(name, "greedy_text", self._decode(new), record.pop("greedy_text"))
        best = torch.stack([step[0].topk(2).values for step in found.logits])
        report.close(name, "top2_margin", best[:, 0] - best[:, 1], record.pop("top2_margin"), 2 * LOGITS)
        for key in list(record):
            found_key = re.fullmatch(r"chat_default_beam(\d+)_rep([\d.]+)_ids", key)
            if found_key is None:
                continue
            recorded = record.pop(key)
            beams, _ = self._generate(
                [ids],
                slices,
                [zeros],
                num_beams=int(found_key[1]),
                repetition_penalty=float(found_key[2]),
                max_new_tokens=len(recorded),
            )
            report.equal(name, key, beams.sequences[0, length:].tolist(), recorded)

    def _compare_generation_batched(self, record: dict[str, Any]) -> None:
        cases = [self.cases[name] for name in record.pop("cases")]
        name = "generation batch " + "+".join(case.name for case in cases)
        encoder = Encoder.from_checkpoint(self.checkpoint, record.pop("max_slice_nums"))
        prompts = [encoder.encode_prompt(case.sample, enable_thinking=False) for case in cases]
        slices = [
            pixels
            for case in cases
            for number in case.text_order
            for pixels in cut_slices(
                open_image(case.sample.images[number]), encoder.plan(case.sample)[number], encoder.slicing
            )
        ]
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        self.report.equal(name, "padding_lengths", padding, record.pop("padding_lengths"))
        bounds = [
            [[start + shift, end + shift] for start, end in self._image_bounds(prompt)]
            for prompt, shift in zip(prompts, padding, strict=True)
        ]
        self.report.equal(name, "image_bound", bounds, record.pop("image_bound"))
        recorded = record.pop("greedy_ids")
        zeros = [
            [shift + at for at in self._masked_positions(prompt)]
            for prompt, shift in zip(prompts, padding, strict=True)
        ]
        found, length = self._generate(prompts, slices, zeros, max_new_tokens=max(map(len, recorded)))
        new = [row[: len(want)] for row, want in zip(found.sequences[:, length:].tolist(), recorded, strict=True)]
        self.report.equal(name, "greedy_ids", new, recorded)

    def _compare_chat(self, record: dict[str, Any]) -> None:
        case = self.cases[record.pop("case")]
        question = record.pop("question")
        options = record.pop("kwargs")
        options.pop("sampling")
        asked: list[str | int] = [part for number in case.text_order for part in (number, "\n")]
        user = Turn(role="user", parts=(*asked, question))
        for key in list(record):
            system = re.fullmatch(r"text_with_system_prompt_'(.*)'", key, re.DOTALL)
            thinking = key == "text_enable_thinking"
            if not (system or thinking or key == "text"):
                continue
            turns = (Turn(role="system", parts=(system[1],)), user) if system else (user,)
            encoder = self.default_encoder
            sample = case.sample.model_copy(update={"turns": turns})
            ids = encoder.encode_prompt(sample, enable_thinking=thinking)
            images = zip(map(open_image, sample.images), encoder.plan(sample), strict=True)
            slices = [pixels for image, plan in images for pixels in cut_slices(image, plan, encoder.slicing)]
            found, length = self._generate([ids], slices, [self._masked_positions(ids)], **options)
            new = found.sequences[0, length:].tolist()
            while new and new[-1] in encoder.stop_token_ids:
                new.pop()
            recorded = record.pop(key)
            prefix = "<think>\n" if thinking else ""
            text = prefix + self._decode(new).strip()
            without_zero = prefix + self._decode([token for token in new if token != 0]).strip()
            self.report.equal_or(f"chat {case.name}", key, text, recorded, DROPPED_ZERO, without_zero == recorded)

    @property
    def _masks_zero(self) -> bool:
        """Whether the official processor masked token 0 at every position."""
        recorded = [record["processor"] for record in self.recorded["cases"].values()]
        return all(0 not in side["input_ids"] or side["attention_mask_zero_positions"] for side in recorded)

    def _masked_positions(self, ids: Sequence[int]) -> list[int]:
        return [at for at, token in enumerate(ids) if token == 0] if self._masks_zero else []

    def _compare_lora(self, record: dict[str, Any]) -> None:
        report, config = self.report, dict(record.pop("config"))
        pattern, modules = config.pop("target_modules"), config.pop("modules_to_save")
        flags = [*FLAGS, "--use_lora", "true", "--tune_llm", "false"]
        flags += ["--tune_vision", str("vpm" in modules).lower(), "--lora_target_modules", pattern]
        flags += ["--lora_r", str(config.pop("r")), "--lora_bias", config.pop("bias")]
        for key in ("lora_alpha", "lora_dropout"):
            flags += [f"--{key}", str(config.pop(key))]
        report.equal("lora", "other settings", sorted(config), [])
        # In the checkpoint's own dtype, as in training.
        model, generation = load_model(self.checkpoint)
        trained = make_trainable(model, generation, parse(flags, announce=lambda _: None))
        shapes = {key: list(value.shape) for key, value in trained.named_parameters() if value.requires_grad}
        report.equal("lora", "trainable_parameters", shapes, record.pop("trainable_parameters"))
        numbers = dict(record.pop("get_parameter_number"))
        trainable, _ = count_parameters(trained)
        report.equal("lora", "Trainable", trainable, numbers.pop("Trainable"))
        # The published script counts what is trained whole a second time, as PEFT's frozen original.
        every = sum(parameter.numel() for parameter in trained.parameters())
        report.equal("lora", "Total", every, numbers.pop("Total"))
        with tempfile.TemporaryDirectory() as folder:
            trained.save_pretrained(folder)
            report.equal(
                "lora",
                "saved_keys",
                _tensor_headers(Path(folder) / "adapter_model.safetensors"),
                record.pop("saved_keys"),
            )
        adapter = self.folder / "adapter"
        tuned = load_with_adapter(self.checkpoint, adapter, torch.float32).eval()
        for case_name, case_record in record["cases"].items():
            self._compare_lora_case(self.cases[case_name], tuned, case_record)
        batch = record.pop("batch")
        self._compare_lora_batch(batch)
        record["batch"] = batch
        adapted: Any = load_with_adapter(self.checkpoint, adapter, torch.float32)
        merged = adapted.merge_and_unload()
        base = {key for file in self.checkpoint.glob("*.safetensors") for key in _tensor_headers(file)}
        same = set(merged.state_dict()) == base
        report.equal("lora", "merged_state_dict_keys_equal_base", same, record.pop("merged_state_dict_keys_equal_base"))

    def _compare_lora_case(self, case: Case, tuned: Any, record: dict[str, Any]) -> None:
        report, name = self.report, f"lora {case.name}"
        npz = dict(np.load(self.folder / record.pop("npz")))
        ids, slices = case.finetune["input_ids"], case.official_slices
        logits = self._logits(tuned, ids, slices)
        self._compare_logits(name, "adapter", logits, npz)
        with torch.no_grad():
            report.close(name, "loss", self._loss(tuned, [case], "labels"), record.pop("loss"), LOSS)
        base = self._logits(self.model, ids, slices)
        change = (logits[-8:] - base[-8:]).abs().max()
        report.close(name, "adapter against base", change, record.pop("max_abs_diff_adapter_vs_base_last8"), 2 * LOGITS)
        with tuned.disable_adapter():
            disabled = self._logits(tuned, ids, slices)
        same = bool((disabled - base).abs().max() <= LOGITS)
        report.equal(name, "disable_adapter_equals_base", same, record.pop("disable_adapter_equals_base"))
        with tempfile.TemporaryDirectory() as folder:
            tuned.save_pretrained(folder)
            reloaded = self._logits(load_with_adapter(self.checkpoint, Path(folder), torch.float32).eval(), ids, slices)
        report.close(
            name, "reloaded_max_abs_diff", (reloaded - logits).abs().max(), record.pop("reloaded_max_abs_diff"), 1e-6
        )
        adapted: Any = load_with_adapter(self.checkpoint, self.folder / "adapter", torch.float32)
        merged = adapted.merge_and_unload().eval()
        merged_logits = self._logits(merged, ids, slices)[-8:]
        report.close(name, "merged_logits_last8", merged_logits, npz.pop("merged_logits_last8"), LOGITS)
        apart = (merged_logits - logits[-8:]).abs().max()
        report.close(name, "merged against adapter", apart, record.pop("merged_vs_adapter_max_abs_diff_last8"), LOGITS)
        report.equal(name, "other npz fields", sorted(npz), [])

    def _compare_lora_batch(self, record: dict[str, Any]) -> None:
        cases = [self.cases[name] for name in record.pop("cases")]
        name = "lora batch " + "+".join(case.name for case in cases)
        dropout = record.pop("lora_dropout")
        base, _ = load_model(self.checkpoint, torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = PeftModel.from_pretrained(base, str(self.folder / "adapter"), is_trainable=True)
        for module in tuned.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        self.report.close(name, "loss", self._backward(tuned, cases, "labels"), record.pop("loss"), LOSS)
        modules = list(record["grad_norm"])
        self._compare_gradients(
            name, tuned, record, "", lambda key: next((part for part in modules if part in key), key)
        )

    @torch.no_grad()
    def _compare_temporal(self, record: dict[str, Any]) -> None:
        """Compare groups of video frames: the resampler's output, and the model's output for the recorded ids."""
        report, name = self.report, "temporal"
        npz = dict(np.load(self.folder / record.pop("npz")))
        encoder = Encoder.from_checkpoint(self.checkpoint, record.pop("max_slice_nums"))
        images = tuple(self._image(path) for path in record.pop("frames"))
        groups, ids = record.pop("temporal_ids"), record.pop("input_ids")
        sample = Sample(
            id=name, images=images, turns=(Turn(role="user", parts=tuple(range(len(images)))),), source=name
        )
        case = Case(name, {}, sample, encoder, list(range(len(images))), None)
        slices = case.slices(case.dict_order)
        self._compare_slices(case, "frames", slices, record.pop("slices"))
        report.equal(name, "tgt_sizes", self._sizes(slices), record.pop("tgt_sizes"))
        report.equal(name, "image_bound", self._image_bounds(ids), record.pop("image_bound"))
        report.equal(name, "processor_temporal_ids", groups, record.pop("processor_temporal_ids"))
        for unused in ("prompt", "use_image_id", "enable_thinking"):
            record.pop(unused)
            report.departs(name, unused, GROUPED_FRAMES)
        inputs = self._inputs(ids, slices)
        features = self.model.get_image_features(inputs["pixel_values"], inputs["target_sizes"], groups)
        report.equal(name, "resampler_output_shape", list(features.shape), record.pop("resampler_output_shape"))
        report.close(name, "resampler_groups", features, npz.pop("resampler_groups"), LOGITS)
        logits = self.model(**inputs, temporal_ids=groups).logits[0]
        self._compare_logits(name, "proc", logits, npz)
        width = record.pop("temporal_table_shape")[1]
        report.departs(name, "temporal_table_shape", NO_TABLE)
        for key in [key for key in npz if key.startswith("temporal_pos_embed_")]:
            row = sincos_table(torch.tensor([int(key.rsplit("_", 1)[1])]), width)[0]
            report.close(name, key, row, npz.pop(key), LOGITS)
        report.equal(name, "other npz fields", sorted(npz), [])

    def _compare_llm_type_outcomes(self, record: dict[str, Any]) -> None:
        report = self.report
        llm_type, case = record.pop("llm_type"), self.cases[record.pop("case")]
        name = f"llm_type {llm_type} {case.name}"
        try:
            arguments = parse([*FLAGS, "--llm_type", llm_type], announce=lambda _: None)
            make_trainable(load_model(self.checkpoint)[0], self.generation, arguments)
            accepted = True
        except UserError:
            accepted = False
        outcome = record.pop("outcome")
        if llm_type in self.generation.older_llm_types and outcome != "ok":
            report.departs(name, "accepted", PUBLISHED_NAME, accepted)
        else:
            report.equal(name, "accepted", accepted, outcome == "ok")
        if outcome != "ok":
            record.pop("error_type")
            record.pop("error")
            return
        ids, labels = record.pop("input_ids"), record.pop("labels_head")
        report.equal(name, "input_ids", case.finetune["input_ids"], ids)
        report.equal(name, "labels_head", case.finetune["labels_head"], labels)
        report.equal(name, "image_bound", self._image_bounds(ids), record.pop("image_bound"))
        report.equal(name, "n_slices", len(case.slices(case.dict_order)), record.pop("n_slices"))
        report.equal(name, "decoded", self._abbreviated(self._decode(ids)), record.pop("decoded"))
        with torch.no_grad():
            loss = self._loss(self.model, [], "labels_head", [(ids, labels, case.official_slices)])
        report.close(name, "loss_head", loss, record.pop("loss_head"), LOSS)

    # Text

    def _marks(self, case: Case) -> list[str]:
        image = case.record["sample"].get("image")
        return list(image) if isinstance(image, dict) else ["<image>"] if image else []

    def _image_bounds(self, ids: Sequence[int]) -> list[list[int]]:
        """Return the ranges of image tokens between the start and end tokens of images and slices."""
        is_image = [token == self.model.config.image_token_id for token in ids]
        starts = {self._token_id("<image>"), self._token_id("<slice>")}
        bounds: list[list[int]] = []
        for at, is_image_token in enumerate(is_image):
            if is_image_token and ids[at - 1] in starts:
                bounds.append([at, at + 1])
            elif is_image_token and bounds and bounds[-1][1] == at:
                bounds[-1][1] = at + 1
        return bounds

    def _abbreviated(self, text: str) -> str:
        token = re.escape(self.generation.image_token)
        return re.sub(f"(?:{token}){{2,}}", lambda found: f"<unk>*{found.group().count('<unk>')}", text)

    def _with_marks(self, ids: Sequence[int]) -> str:
        """Return the prompt with image marks in place of the images' tokens."""
        text = self._decode(ids).removeprefix(
            str(self.default_encoder.tokenizer.bos_token) if self._begins(ids) else ""
        )
        return IMAGE.sub(self.generation.image_mark, text)

    def _begins(self, ids: Sequence[int]) -> bool:
        """Whether the ids begin with the begin token, which some tokenizers insert before any text."""
        begin = self.default_encoder.tokenizer("")["input_ids"]
        return bool(begin) and list(ids[: len(begin)]) == begin


LINE_BREAK_FIRST = re.compile(r"(?<=<\|im_start\|>assistant\n)\n+")
IMAGE = re.compile(r"(?:<image_id>\d+</image_id>)?<image>(?:<unk>)+</image>(?:\n?<slice>(?:<unk>)+</slice>)*")


def _without_departures(text: str, begin: str) -> str:
    """Remove from a text everything in which training here departs from the fine-tuning script."""
    text = text.removeprefix(begin) if not text.startswith("<|im_start|>system") and begin != "<|im_start|>" else text
    text = LINE_BREAK_FIRST.sub("", text)
    text = IMAGE.sub(lambda found: re.sub(r"<image_id>\d+</image_id>", "", found.group()), text)
    return re.sub(r"\s*(<image>(?:<unk>)+</image>(?:\n?<slice>(?:<unk>)+</slice>)*)\s*", r"\1", text)


def validate_samples(records: list[dict[str, Any]]) -> tuple[dict[str, Sample], dict[str, str]]:
    """Run the validation step; returns the accepted samples and the reason of each rejected sample, by id."""
    with tempfile.TemporaryDirectory() as folder:
        data, rejects = Path(folder) / "data.json", Path(folder) / "rejects.jsonl"
        data.write_text(json.dumps(records))
        accepted = {}
        with suppress(UserError):  # every sample was rejected
            validate_data(
                str(data), str(data), Path(folder) / "dataset", rejects, ValidationSettings(max_reject_ratio=1)
            )
            accepted = {sample.id: sample for sample in read_samples(Path(folder) / "dataset", "train")}
        rejected = [Reject.model_validate_json(line) for line in rejects.read_text().splitlines()]
        return accepted, {str(reject.id): reject.reason for reject in rejected}


def _tensor_headers(file: Path) -> dict[str, list[Any]]:
    """Read the name, shape and type of each tensor of a file."""
    with safe_open(file, "pt") as tensors:
        return {
            key: [list(tensors.get_tensor(key).shape), str(tensors.get_tensor(key).dtype)]
            for key in tensors.keys()  # noqa: SIM118 - not a dict
        }


def _leaves(node: Any, path: str = "") -> list[str]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in _leaves(value, f"{path}.{key}")]
    if isinstance(node, list) and any(isinstance(value, dict) for value in node):
        return [leaf for number, value in enumerate(node) for leaf in _leaves(value, f"{path}[{number}]")]
    return [path.lstrip(".")]


def main(argv: Sequence[str]) -> int:
    """Print the report of a folder of recorded results; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON document in place of lines")
    arguments = parser.parse_args(argv)
    findings = Comparison(arguments.folder).run().findings
    misses = [finding for finding in findings if not finding.ok]
    if arguments.json:
        rows = [
            {key: None if value == float("inf") or value != value else value for key, value in asdict(finding).items()}
            for finding in findings
        ]
        print(json.dumps({"set": str(arguments.folder), "misses": len(misses), "findings": rows}, indent=1))
    else:
        print("\n".join(map(str, findings)))
        print(f"{len(findings)} compared, {len(misses)} missed")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
