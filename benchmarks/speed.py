"""Time and memory of a training step, with and without each optimization.

    python benchmarks/speed.py [--only switches evaluation roof] [--rounds 2]
    python benchmarks/speed.py --only scaling
    python benchmarks/speed.py --only sharing sharing-easy-vqa --rounds 5

Compared variants alternate in one run, each in a separate process, so that other load on the machine affects all of
them and the memory of one is not counted for another. Work is single-threaded and measured in processor time, which
other processes change little; the result is the ratio. A step is forward, backward and optimizer, with LoRA on all
linear layers of the language model, the merger trained in full and vision frozen; a batch is four photographs of mixed
size.
"""

import argparse
import ctypes
import itertools
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from public.easy_vqa import TASK
from public.task import prepare
from results import make_result, save_results
from rich.console import Console
from rich.table import Table
from shapes import (
    IMAGE_TOKEN,
    LANGUAGE_HEAVY,
    VISION_HEAVY,
    Shape,
    make_model,
    prepare_digits,
    write_base,
    write_photographs,
    write_questions,
    write_shards,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from minicpmv_finetune import environment
from minicpmv_finetune.components.train.fused_lora import fuse_adapters
from minicpmv_finetune.data.texts import read_texts
from minicpmv_finetune.minicpmv.batch import collate, collate_packed
from minicpmv_finetune.minicpmv.generations import generation_named
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.minicpmv.packed import enable_packing
from minicpmv_finetune.minicpmv.slicing import SlicingConfig, cut_slices, plan_slices

PROFILE = Path("docs/images/step.png")
BATCH = 4
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("scaled_dot_product",),
    "linear attention": ("DeltaRule", "linalg_solve_triangular", "aten::tril", "aten::cumsum", "conv1d", "convolution"),
    "element by element": ("aten::mul", "aten::add", "aten::exp", "silu", "gelu", "aten::div", "norm", "soft"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::where", "aten::select", "aten::clone"),
    "the rest": (),
}
"""Kinds of work, by parts of the names of torch's operations; the first kind that matches counts."""
SHAPES = {"vision-heavy": VISION_HEAVY, "language-heavy": LANGUAGE_HEAVY}


@dataclass(frozen=True)
class Switches:
    """The optimizations of a training step; the plain path has none of them.

    Attributes:
        sliced_before: Whether images were sliced before training.
        logits: Whether logits are computed only where the loss needs them.
        features: Whether the vision tower's output was stored before training.
        packing: Whether samples are packed into one row.
        fused: Whether LoRA adapters are fused.
    """

    sliced_before: bool = False
    logits: bool = False
    features: bool = False
    packing: bool = False
    fused: bool = False


PLAIN = Switches()
ALONE = {
    "sliced before": replace(PLAIN, sliced_before=True),
    "short logits": replace(PLAIN, logits=True),
    "stored features": replace(PLAIN, features=True),
    "packing": replace(PLAIN, packing=True),
    "fused adapters": replace(PLAIN, fused=True),
}
ALL = Switches(sliced_before=True, logits=True, features=True, packing=True, fused=True)
SAMPLES_ABOUT_IMAGES = 20
BEFORE_IMAGE, QUESTION, ANSWER = 5, 20, 3
"""Tokens of a sample of easy-VQA before its image of 64 tokens, after it with the chat template, and supervised."""
IMAGES_OF_EASY_VQA, QUESTIONS_OF_EASY_VQA = 24, (4, 20)
"""Images of its test split; most questions about each of them: the goal's number, and all, 9.6 on average."""
PACKED_TRAINING = {
    "use_cpu": True,
    "use_lora": True,
    "tune_llm": False,
    "tune_vision": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0,
    "packing": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1000,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}
"""Flags of two epochs with one optimizer step each, whose loss is that of all samples, however they share rows."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one run.

    Attributes:
        seconds: Duration of the steps.
        memory: Peak memory of the steps in bytes, above the memory before them; 0 where it was not measured.
        rows: Rows that packed samples fill.
        tokens: Tokens of all these rows.
        losses: Loss of each optimizer step.
    """

    seconds: float
    memory: int
    rows: int = 0
    tokens: int = 0
    losses: Sequence[float] = ()


def main() -> None:
    """Run the experiments, print tables, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS)[:-3])
    parser.add_argument("--rounds", type=int, default=2, help="number of measurements of each")
    parser.add_argument("--photographs", type=int, default=8, help="photographs per round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        images = [Path(folder) / sample["image"] for sample in write_photographs(Path(folder), options.photographs)]
        for name in options.only:
            rows += EXPERIMENTS[name](images, options.rounds)
    cores = os.cpu_count()
    facts = (
        f"{cores} cores, {platform.machine()}, torch {torch.__version__}, load {load:.1f} → {os.getloadavg()[0]:.1f}"
    )
    save_results(rows)
    _show(["name", "ratio", "target", "holds", "detail"], [[str(value) for value in row.values()] for row in rows])
    Console().print(facts)


def switches(images: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """Each optimization alone and all together against the plain path, for two generations and two shapes."""
    lines: list[list[str]] = []
    gains: dict[str, float] = {}
    logits: dict[str, float] = {}
    for version in ("4.6", "2.6"):
        for kind, shape in SHAPES.items():
            cases = {"plain": PLAIN, **ALONE, "all": ALL}
            found: dict[str, list[Measured]] = {name: [] for name in cases}
            for _ in range(rounds):
                for name, case in cases.items():
                    found[name].append(_run_in_fork(_train_steps, version, shape, case, images))
            plain = found["plain"]
            for name, runs in found.items():
                gain, less = _ratio(plain, runs, "seconds"), _ratio(plain, runs, "memory")
                seconds = ", ".join(f"{run.seconds:.2f}" for run in runs)
                memory = statistics.median(run.memory for run in runs) / 1e6
                lines.append([version, kind, name, f"{gain:.2f}", f"{less:.2f}", seconds, f"{memory:.0f}"])
            gains[f"{version} {kind}"] = _ratio(plain, found["all"], "seconds")
            logits[f"{version} {kind}"] = _ratio(plain, found["short logits"], "memory")
    _show(["model", "shape", "switch", "× as fast", "× less memory", "seconds", "MB"], lines)
    details = ["; ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items()) for ratios in (gains, logits)]
    return [
        make_result("all_switches_vs_plain", min(gains.values()), 4.0, f"smallest of {details[0]}"),
        make_result(
            "logits_memory_vs_plain", logits["4.6 language-heavy"], 2.0, f"4.6 language-heavy, of {details[1]}"
        ),
    ]


def evaluation(images: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """Speed of generating answers at most 16 at a time: against one at a time, and against fixed batches."""
    cases = [(questions, path) for questions in (1, 4) for path in ("alone", "fixed batches", "rows that leave")]
    found: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            found[case].append(_run_in_fork(_generate_answers, *case).seconds)
    seconds = {case: statistics.median(runs) for case, runs in found.items()}

    def result(name: str, questions: int, slower: str, target: float) -> dict[str, Any]:
        before, after = seconds[questions, slower], seconds[questions, "rows that leave"]
        detail = (
            f"128 prompts, {questions} for each digit, answers of 1 to 64 tokens, tiny 4.6, {before:.2f} s {slower}, "
            f"{after:.2f} s with rows that leave"
        )
        return make_result(name, before / after, target, detail)

    return [
        result("evaluate_batched_vs_single", 1, "alone", 5.0),
        result("evaluate_leaving_vs_fixed", 1, "fixed batches", 2.0),
        result("evaluate_shared_images_vs_fixed", 4, "fixed batches", 2.0),
    ]


def roof(images: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """Floating-point operations per second of a step, against those of matrix products of the same widths."""
    shares, lines = {}, {}
    for kind, shape in SHAPES.items():
        reached = [_run_in_fork(_step_flops, shape, images) for _ in range(rounds)]
        peak = [_run_in_fork(_matmul_flops, shape) for _ in range(rounds)]
        share = statistics.median(reached) / statistics.median(peak)
        shares[kind] = share
        lines[kind] = f"{kind} {share:.0%} of {statistics.median(peak) / 1e9:.1f} GFLOP/s"
    _draw_shares({kind: _run_in_fork(_time_shares, shape, images) for kind, shape in SHAPES.items()})
    return [
        make_result("step_vs_matmul", min(shares.values()), 0.3, "; ".join(lines.values())),
        make_result("vision_heavy_step_vs_matmul", shares["vision-heavy"], 0.75, lines["vision-heavy"]),
    ]


def scaling(images: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """How time and memory with all optimizations grow with samples, slices, length and processes."""
    lines: list[list[str]] = []
    with_samples: list[list[Measured]] = []
    for times in (1, 2, 4, 8):
        runs = [_run_in_fork(_train_steps, "4.6", VISION_HEAVY, ALL, [*images] * times) for _ in range(rounds)]
        lines.append(["samples", str(times * len(images)), *_format_medians(runs)])
        with_samples.append(runs)
    for slices in (1, 3, 5, 7, 9):
        runs = [_run_in_fork(_train_steps, "4.6", VISION_HEAVY, PLAIN, images, slices) for _ in range(rounds)]
        lines.append(["slices at most", str(slices), *_format_medians(runs)])
    for length in (512, 1024, 2048, 4096, 8192):
        runs = [_run_in_fork(_train_on_text, length) for _ in range(rounds)]
        lines.append(["tokens", str(length), *_format_medians(runs)])
    for processes in (1, 2):
        runs = [_run_in_fork(_train_digits, processes) for _ in range(rounds)]
        lines.append(["processes", str(processes), *_format_medians(runs)])
    _show(["grows", "to", "seconds", "MB"], lines)
    detail = f"8 × the samples, {len(images)} and {8 * len(images)}"
    ratios = {field: _ratio(with_samples[-1], with_samples[0], field) for field in ("seconds", "memory")}
    return [
        make_result("scaling_time_8x_samples", ratios["seconds"], 8.8, detail, at_most=True),
        # Answers have random lengths, so that the longest of more batches is longer.
        make_result("scaling_memory_8x_samples", ratios["memory"], 1.4, detail, at_most=True),
    ]


def sharing(images: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """Rows that have an image once against rows that have it with each question, of samples shaped like easy-VQA's."""

    def train(version: str, kind: str, questions: int, stored: bool, shared: bool) -> Measured:
        return _run_in_fork(_train_on_questions, version, SHAPES[kind], stored, questions, shared)

    return _compare_sharing("shared_images_vs_separate", train, (4, 10), rounds)


def sharing_easy_vqa(images: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """The same with images and questions of easy-VQA's test split, all of them or four an image, trained by `train`."""
    data = prepare(TASK, Path(f"build/public/{TASK.name}-{IMAGES_OF_EASY_VQA}/data"), IMAGES_OF_EASY_VQA)
    questions = data.tests["scores"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for version in ("2.6", "4.6"):
            for kind, shape in SHAPES.items():
                write_base(folder / version / kind, version, shape, read_texts(str(questions)))
            for most in QUESTIONS_OF_EASY_VQA:
                few = write_questions(questions, most, folder / f"{most}.jsonl")
                _run_in_fork(write_shards, folder / version / str(most), few, folder / version / "vision-heavy", "raw")

        def train(version: str, kind: str, most: int, stored: bool, shared: bool) -> Measured:
            place = folder / version
            return _run_in_fork(_train_on_shards, version, place / kind, place / str(most) / "shards", stored, shared)

        return _compare_sharing("shared_easy_vqa_vs_separate", train, QUESTIONS_OF_EASY_VQA, rounds)


def _compare_sharing(
    name: str, train: Callable[..., Measured], questions: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Alternate trainings with shared and with repeated images; all other switches are on in both.

    Args:
        name: Name of the row of results.
        train: Trains a version of a kind on so many questions an image, with stored features or not, shared or not.
        questions: Most questions about an image; the first number is the one of the goal.
        rounds: Number of measurements.
    """
    lines: list[list[str]] = []
    gains: dict[str, float] = {}
    at_goal: list[float] = []
    for version, kind, stored, most in itertools.product(("2.6", "4.6"), SHAPES, (False, True), questions):
        runs: list[list[Measured]] = [[], []]
        for _ in range(rounds):
            for shared in (False, True):
                runs[shared].append(train(version, kind, most, stored, shared))
        ratios = [one.seconds / two.seconds for one, two in zip(*runs, strict=True)]
        gain, less = statistics.median(ratios), _ratio(runs[0], runs[1], "memory")
        tower = "stored" if stored else "runs"
        one, two = runs[0][0], runs[1][0]
        differences = [abs(a - b) for a, b in zip(one.losses, two.losses, strict=True)]
        lines.append(
            [
                *(version, kind, tower, str(most), f"{gain:.2f}", f"{min(ratios):.2f} … {max(ratios):.2f}"),
                f"{less:.2f}" if less else "–",
                " → ".join(f"{statistics.median(run.seconds for run in found):.2f}" for found in runs),
                *(f"{one.rows} → {two.rows}", f"{one.tokens:,} → {two.tokens:,}", f"{max(differences):.0e}"),
            ]
        )
        gains[f"{version} {kind}, tower {tower}, {most} questions"] = gain
        if most == questions[0]:
            at_goal.append(gain)
    columns = ["model", "shape", "tower", "questions", "× as fast", "rounds", "× less memory"]
    _show([*columns, "seconds", "rows", "tokens", "losses differ by"], lines)
    detail = "; ".join(f"{case} {gain:.2f}" for case, gain in gains.items())
    return [make_result(name, min(at_goal), 2.0, f"smallest at {questions[0]} of {detail}")]


EXPERIMENTS: dict[str, Callable[[Sequence[Path], int], list[dict[str, Any]]]] = {
    "switches": switches,
    "evaluation": evaluation,
    "roof": roof,
    "sharing": sharing,
    "sharing-easy-vqa": sharing_easy_vqa,
    "scaling": scaling,
}


def _train_steps(version: str, shape: Shape, case: Switches, images: Sequence[Path], slices: int = 9) -> Measured:
    """Train one epoch on the images, after a warm-up step."""
    trained, base = _make_trainable(version, shape)
    language_model = generation_named(version).language_model
    if case.packing:
        enable_packing(base, language_model)
    if case.fused:
        fuse_adapters(trained)
    slicing = replace(_slicing(version), max_slice_nums=slices)
    ready = [_make_input(image, number, version, shape, slicing) for number, image in enumerate(images)]
    stored = [_compute_features(base, row) for row in ready] if case.features else []
    if not case.sliced_before and not case.features:
        ready = []
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def step(numbers: Sequence[int]) -> None:
        if ready:
            rows = [ready[number] for number in numbers]
        else:
            rows = [_make_input(images[number], number, version, shape, slicing) for number in numbers]
        if case.features:
            rows = [replace(row, slices=[]) for row in rows]
        batch: dict[str, Any] = collate_packed(rows, 14) if case.packing else collate(rows, 0, 14, "right")
        if case.features:
            batch["patch_features"] = torch.cat([stored[number][0] for number in numbers])
            batch["target_sizes"] = torch.cat([stored[number][1] for number in numbers])
        trained(**batch, loss_only=case.logits, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(range(BATCH))
    before = _reset_peak()
    started = time.process_time()
    for start in range(0, len(images), BATCH):
        step(range(start, min(start + BATCH, len(images))))
    return Measured(time.process_time() - started, _peak() - before)


def _train_on_questions(version: str, shape: Shape, stored: bool, questions: int, shared: bool) -> Measured:
    """Train one step on questions about small images, after a warm-up step."""
    trained, base = _make_trainable(version, shape)
    enable_packing(base, generation_named(version).language_model)
    fuse_adapters(trained)
    random = np.random.default_rng(0)
    slicing = _slicing(version)
    plan = plan_slices(64, 64, slicing)
    tokens = 64 if version == "2.6" else plan.target_sizes[0][0] * plan.target_sizes[0][1] // 16
    rows: list[ModelInput] = []
    beginning = BEFORE_IMAGE + tokens
    for _ in range(SAMPLES_ABOUT_IMAGES // questions):
        image = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        slices = cut_slices(image, plan, slicing)
        for _ in range(questions):
            rest = random.integers(10, shape.vocabulary, QUESTION + ANSWER).tolist()
            ids = [*range(10, 10 + BEFORE_IMAGE), *[IMAGE_TOKEN] * tokens, *rest]
            rows.append(ModelInput("", ids, [IGNORED_LABEL] * (len(ids) - ANSWER) + rest[-ANSWER:], slices))
    counts = [beginning if shared and number % questions else 0 for number in range(len(rows))]
    with_image = [row for row, count in zip(rows, counts, strict=True) if not count]
    features = [_compute_features(base, row) for row in with_image] if stored else []
    if stored:
        rows = [replace(row, slices=[]) for row in rows]
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        batch = collate_packed(rows, 14, shared=counts)
        if stored:
            batch["patch_features"] = torch.cat([patches for patches, _ in features])
            batch["target_sizes"] = torch.cat([sizes for _, sizes in features])
        loss = trained(**batch, loss_only=True, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    losses = [step()]
    before = _reset_peak()
    started = time.process_time()
    losses += [step(), step()]
    seconds, memory = time.process_time() - started, _peak() - before
    return Measured(seconds, memory, 1, sum(len(row.input_ids) for row in rows) - sum(counts), losses)


def _train_on_shards(version: str, base: Path, shards: Path, stored: bool, shared: bool) -> Measured:
    """Train two epochs as `train` does, each with one optimizer step; the time is that of the whole loop."""
    from minicpmv_finetune.components.train import finetune
    from minicpmv_finetune.components.train.arguments import as_flags
    from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer

    measured: list[Measured] = []
    trainer: Any = MiniCPMVTrainer
    train = trainer.train

    def timed(self: Any, **options: Any) -> Any:
        started = time.process_time()
        outcome = train(self, **options)
        seconds = time.process_time() - started
        if self.counter.runs_tower == stored:
            raise SystemExit(f"The tower of {base} {'runs' if stored else 'is stored'}.")
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        measured.append(Measured(seconds, 0, len(self.train_dataset), self.counter.tokens // 2, losses))
        return outcome

    generation = generation_named(version)
    language_model = re.escape(generation.language_model)
    with tempfile.TemporaryDirectory(dir=base.parent) as out:
        flags = {
            **PACKED_TRAINING,
            "model_name_or_path": base,
            "data_path": shards,
            "output_dir": out,
            "cache_dir": base.parent / "cache",
            "lora_target_modules": rf"{language_model}\.layers\..*proj.*",
            "lora_modules_to_save": f"none,{generation.merger}",
            "reuse_vision_features": stored,
            "share_images": shared,
        }
        trainer.train = timed
        os.environ[environment.QUIET.name] = "1"
        finetune.main(as_flags(flags))
    return measured[0]


def _train_on_text(length: int) -> Measured:
    """One forward and backward pass on a row of text tokens, after a short one that loads the compiled loops."""
    trained, _ = _make_trainable("4.6", VISION_HEAVY)

    def step(tokens: int) -> None:
        ids = torch.arange(tokens).unsqueeze(0) % 400 + 10
        trained(input_ids=ids, labels=ids, loss_only=True, use_cache=False).loss.backward()

    step(64)
    before, started = _reset_peak(), time.process_time()
    step(length)
    return Measured(time.process_time() - started, _peak() - before)


def _generate_answers(questions: int, path: str) -> Measured:
    """Generate answers of mixed lengths to several questions about each of some digits."""
    from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
    from minicpmv_finetune.data.samples import Turn, read_samples
    from minicpmv_finetune.minicpmv.answer import answer
    from minicpmv_finetune.minicpmv.conversation import Encoder
    from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
    from minicpmv_finetune.pipelines.demo import DEMO_CORPUS, write_digits

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = write_tiny_checkpoint(folder / "base", corpus=DEMO_CORPUS)
        train, held_out = write_digits(folder / "digits", seed=0, held_out=128 // questions)
        validate_data(str(train), str(held_out), folder / "dataset", folder / "rejects.jsonl", ValidationSettings())
        model, encoder = make_model("4.6", LANGUAGE_HEAVY).eval(), Encoder.from_checkpoint(base)
        model.config.image_token_id = encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        samples = [
            sample.model_copy(update={"turns": (Turn(role="user", parts=(0, "Which digit is this?" + "?" * number)),)})
            for sample in read_samples(folder / "dataset", "eval")
            for number in range(questions)
        ]
        # A model of random weights never ends an answer; with these stop tokens a few answers are long.
        model.generation_config.eos_token_id = list(range(0, LANGUAGE_HEAVY.vocabulary, 12))
        answer(model, encoder, samples[:2], max_new_tokens=2, batch_size=2)
        started = time.process_time()
        if path == "fixed batches":
            _answer_in_fixed_batches(model, encoder, samples)
        else:
            answer(model, encoder, samples, max_new_tokens=64, batch_size=1 if path == "alone" else 16)
        return Measured(time.process_time() - started, 0)


def _answer_in_fixed_batches(model: Any, encoder: Any, samples: Sequence[Any]) -> None:
    """Answer 16 prompts at a time with transformers' `generate`, each batch until its longest answer ends."""
    prompts = {number: encoder.encode_prompt(sample) for number, sample in enumerate(samples)}
    longest_first = sorted(prompts, key=lambda number: -len(prompts[number]))
    for start in range(0, len(samples), 16):
        inputs = [
            ModelInput("", prompts[number], [], encoder.cut_images(samples[number]))
            for number in longest_first[start : start + 16]
        ]
        batch = collate(inputs, encoder.pad_token_id, encoder.slicing.patch_size, "left", encoder.slicing.resampler)
        with torch.inference_mode():
            model.generate(**batch, max_new_tokens=64, do_sample=False, pad_token_id=encoder.pad_token_id)


def _step_flops(shape: Shape, images: Sequence[Path]) -> float:
    """Floating-point operations per second of a forward and backward pass of the plain path."""
    trained, _ = _make_trainable("4.6", shape)
    rows = [_make_input(image, n, "4.6", shape, _slicing("4.6")) for n, image in enumerate(images[:BATCH])]
    batch = collate(rows, 0, 14, "right")
    with FlopCounterMode(display=False) as counter:
        trained(**batch, use_cache=False).loss.backward()
    started = time.process_time()
    trained(**batch, use_cache=False).loss.backward()
    return float(counter.get_total_flops()) / (time.process_time() - started)


def _matmul_flops(shape: Shape) -> float:
    """Floating-point operations per second of matrix products as wide as the model's feed-forward layers."""
    width = max(shape.text, shape.vision)
    one, two = torch.randn(4096, width), torch.randn(width, 2 * width)
    _ = one @ two
    started, count = time.process_time(), 20
    for _ in range(count):
        _ = one @ two
    return 2 * 4096 * width * 2 * width * count / (time.process_time() - started)


def _time_shares(shape: Shape, images: Sequence[Path]) -> dict[str, float]:
    """The share of each kind of work in the time of a plain training step."""
    trained, _ = _make_trainable("4.6", shape)
    rows = [_make_input(image, n, "4.6", shape, _slicing("4.6")) for n, image in enumerate(images[:BATCH])]
    batch = collate(rows, 0, 14, "right")
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        trained(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    shares = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, signs in KINDS.items() if any(sign in event.key for sign in signs)), "the rest")
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: time_ / total for kind, time_ in shares.items()}


def _draw_shares(shares: dict[str, dict[str, float]]) -> None:
    """Draw a bar for each model, divided into the shares of each kind of work."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 2.4))
    names, left = list(shares), np.zeros(len(shares))
    for kind, color in zip(KINDS, ("#3653d8", "#0c9270", "#d6454f", "#e3a11c", "#8a63d2", "#b9b5aa"), strict=True):
        values = np.array([shares[name][kind] for name in names])
        axes.barh(names, values, left=left, color=color, label=kind)
        for row, value in enumerate(values):
            if value > 0.05:
                axes.text(left[row] + value / 2, row, f"{value:.0%}", ha="center", va="center", color="white")
        left += values
    axes.set(xlim=(0, 1), xticks=[])
    axes.spines[:].set_visible(False)
    axes.legend(ncols=len(KINDS), loc="upper center", bbox_to_anchor=(0.5, 1.3), frameon=False, fontsize=8)
    figure.savefig(PROFILE, dpi=150, bbox_inches="tight")


def _train_digits(processes: int) -> Measured:
    """Train one epoch of 400 digits by processes of one thread each, with a total batch size of 8; wall-clock time."""
    from minicpmv_finetune.components.train.arguments import as_flags
    from minicpmv_finetune.components.train.launch import launch
    from minicpmv_finetune.reports.training_record import read_record

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, shards = prepare_digits(folder, 400)
        flags = {
            "model_name_or_path": base,
            "data_path": shards,
            "output_dir": folder / "out",
            "use_cpu": True,
            "use_lora": True,
            "tune_llm": False,
            "per_device_train_batch_size": 8 // processes,
            "num_train_epochs": 1,
            "save_strategy": "no",
        }
        launch(as_flags(flags), processes)
        metrics = read_record(folder / "out").metrics
        return Measured(metrics["seconds"], int(metrics["peak_memory_mb"] * 1e6))


def _make_trainable(version: str, shape: Shape) -> tuple[Any, PreTrainedModel]:
    """A model with LoRA adapters, and the model inside it."""
    base = make_model(version, shape)
    generation = generation_named(version)
    inside = generation.language_model.replace(".", r"\.")
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=rf"{inside}\.layers\..*proj.*", modules_to_save=[generation.merger]
    )
    return get_peft_model(base, config).train(), base


def _make_input(path: Path, number: int, version: str, shape: Shape, slicing: SlicingConfig) -> ModelInput:
    """Decode and slice a photograph, followed by random tokens whose number depends on the photograph's number."""
    image = Image.open(path)
    plan = plan_slices(*image.size, slicing)
    tokens = [64 if version == "2.6" else rows * columns // 16 for rows, columns in plan.target_sizes]
    random = np.random.default_rng(number)
    question = random.integers(10, shape.vocabulary, 12).tolist()
    answer = random.integers(10, shape.vocabulary, int(random.integers(6, 180))).tolist()
    ids = [*([IMAGE_TOKEN] * sum(tokens)), *question, *answer]
    labels = [IGNORED_LABEL] * (len(ids) - len(answer)) + answer
    return ModelInput(str(number), ids, labels, cut_slices(image, plan, slicing))


def _slicing(version: str) -> SlicingConfig:
    if version == "2.6":
        return SlicingConfig(size_multiple=14, resampler="pillow", transparency="drop")
    return SlicingConfig(size_multiple=56)


def _compute_features(model: PreTrainedModel, row: ModelInput) -> tuple[torch.Tensor, torch.Tensor]:
    """The vision tower's output for the slices of a row, and the sizes of the slices."""
    pixels = collate([row], 0, 14, "right")
    encode: Any = model.encode_patches
    with torch.no_grad():
        return encode(pixels["pixel_values"], pixels["target_sizes"]), pixels["target_sizes"]


def _run_in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a forked process; returns its result."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sending.send(function(*arguments)))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments[:3]} ended without a result.") from None
    finally:
        process.join()


def _reset_peak() -> int:
    """Reset the peak memory of this process to its current memory; returns it in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the steps would reuse freed memory, which would not be counted
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    return _peak()


def _peak() -> int:
    """Peak memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _ratio(one: Sequence[Measured], two: Sequence[Measured], field: str) -> float:
    """The ratio of the medians of a field of two variants."""
    first, second = (statistics.median(getattr(run, field) for run in runs) for runs in (one, two))
    return float(first / max(second, 1e-9))


def _format_medians(runs: Sequence[Measured]) -> list[str]:
    seconds, memory = (statistics.median(getattr(run, name) for run in runs) for name in ("seconds", "memory"))
    return [f"{seconds:.2f}", f"{memory / 1e6:.0f}"]


def _show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
