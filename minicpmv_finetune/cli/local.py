"""The commands that run on this machine: the demonstration, both pipelines, the estimate, and a question to a model."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, RETRAIN_INPUTS
from minicpmv_finetune.minicpmv.tiny_checkpoint import Version
from minicpmv_finetune.terminal import print_sentence

from .options import (
    First,
    Inputs,
    NewTokens,
    Out,
    OutputFormat,
    absolute,
    check_whole_run,
    recipe_names,
    reported,
    text_table,
    with_inputs,
)

PANEL = "Run here"
TINY_BASE_OPTIONS = "--learning-rate 3e-3 --num-train-epochs 30"
"""Options of `run` with which a few dozen samples are enough: random weights need larger steps than published ones."""
_MANY = 2**16  # GPUs, or batches of a step
app = typer.Typer()


RunnerName = Annotated[
    Literal["subprocess", "docker"],
    typer.Option("--runner", help="Run the steps in this environment or in their container images."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; by default the last unfinished run of the same inputs goes on.")
]


@app.command(rich_help_panel=PANEL)
@reported
def demo(
    out: Out = Path("build/demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed for the split of the digits and for the training.")
    ] = 42,
    fresh: Fresh = False,
) -> dict[str, Any]:
    """Train a tiny MiniCPM-V to read handwritten digits: the whole pipeline on real data, in minutes."""
    from minicpmv_finetune.outputs import claim_workspace
    from minicpmv_finetune.pipelines.run_folder import LINKS

    claim_workspace(out, "demo", {}, tuple(LINKS), known_by=("artifacts/minicpmv-*-*", "run.log", "digits"))
    from minicpmv_finetune.pipelines.demo import run_demo

    return run_demo(out, seed, fresh)


@app.command(rich_help_panel=PANEL)
@reported
def tiny_base(
    out: Out,
    generation: Annotated[Version, typer.Option(help="Generation of MiniCPM-V.")] = "4.6",
    corpus: Annotated[
        str,
        typer.Option(
            help="Data whose texts the tokenizer learns, a path, pattern or s3:// URI as for --data of run; any other "
            "text is one token per byte.",
        ),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the random weights.")] = 42,
) -> dict[str, Any]:
    """Write a base model of about a million random weights, to try your data without a download or a GPU.

    It has the files of the published generation, and knows nothing until it is trained.
    """
    from minicpmv_finetune.outputs import claimed_folder

    with claimed_folder(out, "tiny-base", {"--corpus": corpus}) as output, output.assembled() as folder:
        from minicpmv_finetune.data.texts import read_texts

        texts = read_texts(corpus) if corpus else []
        from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint

        write_tiny_checkpoint(folder, generation, seed, texts)
    known = f", which knows the {len(texts):,} texts of {corpus}" if corpus else ""
    print_sentence(f"a tiny untrained MiniCPM-V {generation} in {out}{known}", sys.stdout)
    command = ["minicpmv-finetune", "run", "--data", corpus or "train.json", "--base-model", str(out)]
    print(f"to train it: {shlex.join(command)} {TINY_BASE_OPTIONS}")
    return {"model": str(out), "generation": generation, "texts": len(texts)}


def _check_place(step: str) -> First:
    """A function that refuses OUT before the checks of the inputs, which take longer."""

    def check(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        from minicpmv_finetune.outputs import check_workspace
        from minicpmv_finetune.pipelines.run_folder import LINKS

        check_workspace(options["out"], step, _places(inputs), tuple(LINKS))

    return check


@app.command(rich_help_panel=PANEL)
@with_inputs(FINETUNE_INPUTS, check=check_whole_run, first=_check_place("run"), recipe=True)
@reported
def run(
    inputs: Inputs, out: Out = Path("build/run"), runner: RunnerName = "subprocess", fresh: Fresh = False
) -> dict[str, Any]:
    """Run the whole pipeline on this machine, from data to an evaluated, merged model.

    The defaults train LoRA adapters, as in a pipeline on Kubeflow; `train` alone has those of the published script.
    """
    given = _with_absolute_paths(inputs)
    _claim(out, "run", given)
    from minicpmv_finetune.pipelines.local import run_pipeline
    from minicpmv_finetune.pipelines.summary import print_summary, summary_of

    done = run_pipeline(out, given, runner, fresh=fresh)
    print_summary(done, out)
    return summary_of(done, out)


@app.command(rich_help_panel=PANEL)
@with_inputs(RETRAIN_INPUTS, check=check_whole_run, first=_check_place("retrain"), recipe=True)
@reported
def retrain(
    inputs: Inputs, out: Out = Path("build/retrain"), runner: RunnerName = "subprocess", fresh: Fresh = False
) -> dict[str, Any]:
    """Run the pipeline for schedules on this machine: train if there is new data, and promote a better model."""
    given = _with_absolute_paths(inputs)
    _claim(out, "retrain", given)
    from minicpmv_finetune.pipelines.local import run_pipeline
    from minicpmv_finetune.pipelines.retraining import RETRAIN
    from minicpmv_finetune.pipelines.summary import print_summary, summary_of

    done = run_pipeline(out, given, runner, RETRAIN, fresh)
    print_summary(done, out)
    return summary_of(done, out)


def _check_fraction(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check the share of held-out images as validate-data does."""
    from minicpmv_finetune.components.validate_data.validate import ValidationSettings

    if options["eval_fraction"] is not None:
        ValidationSettings(eval_fraction=options["eval_fraction"])


@app.command(rich_help_panel=PANEL)
@with_inputs(FINETUNE_INPUTS, check=partial(check_whole_run, trains_here=False), first=_check_fraction, recipe=True)
def plan(
    inputs: Inputs,
    eval_fraction: Annotated[
        float | None, typer.Option(help="Share of the images held out when there is no evaluation data.")
    ] = None,
    exif_transpose: Annotated[bool, typer.Option(help="Rotate images by their EXIF orientation.")] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, max=_MANY, help="Number of GPUs to train on; by default those of the inputs.")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(min=1, max=_MANY, help="Batches per optimizer step; by default those of the inputs.")
    ] = None,
    output: Annotated[
        Literal["text", "table", "json"],
        typer.Option(help="Text, or one JSON document for a program; table is the same as text."),
    ] = "text",
) -> None:
    """Estimate the cost of a run before a GPU is requested: samples, tokens, shards, memory, steps.

    It takes the inputs of `run`, also a recipe. Nothing is trained, and of the base model only headers are read.
    """
    from minicpmv_finetune.components.validate_data.validate import settings_from
    from minicpmv_finetune.estimate.plan import estimate_run, print_estimate
    from minicpmv_finetune.inputs.planned import planned

    flags = {"nproc_per_node": devices, "gradient_accumulation_steps": gradient_accumulation_steps}
    given = {name: value for name, value in flags.items() if value is not None}
    if devices is not None:
        given["num_nodes"] = 1
    settings = planned({**inputs, "training_flags": {**inputs["training_flags"], **given}})
    data = settings_from(inputs["data_options"])
    estimate = estimate_run(
        inputs["data_uri"],
        inputs["eval_data_uri"],
        inputs["base_model_uri"],
        inputs["max_slice_nums"],
        inputs["model_max_length"],
        data.eval_fraction if eval_fraction is None else eval_fraction,
        exif_transpose or data.exif_transpose,
        settings.recipe,
        settings.targets,
        settings.checkpointing,
        settings.strategy,
        settings.loading,
    )
    if output == "json":
        print(estimate.model_dump_json(indent=1))
    else:
        print_estimate(estimate)


@app.command(rich_help_panel=PANEL)
def recipes(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]", help="Recipe to print, as a start for one of your own.", autocompletion=recipe_names
        ),
    ] = "",
    output: OutputFormat = "text",
) -> None:
    """List the recipes of `--recipe` with the memory and hours that `plan` estimates, or print one."""
    from minicpmv_finetune.inputs.recipe import read_recipe, recipe_path
    from minicpmv_finetune.inputs.recipe_costs import CARDS, SAMPLES, recipe_costs

    if name:
        print(json.dumps(read_recipe(name), indent=1) if output == "json" else recipe_path(name).read_text().rstrip())
        return
    costs = recipe_costs()
    if output == "json":
        print(json.dumps([asdict(cost) for cost in costs], indent=1))
        return
    rows = [
        {
            "recipe": cost.name,
            "trains": cost.trains,
            "GPUs": f"{cost.devices} x {cost.memory_gb} GB",
            "needs": f"{cost.needed_gb:.1f} GB",
            **{f"hours on {card}": cost.hours.get(card) for card in CARDS},
        }
        for cost in costs
    ]
    print(text_table(rows))
    print()
    yours = "`minicpmv-finetune plan --recipe NAME --data …` knows yours."
    print_sentence(f"Hours are for {SAMPLES:,} samples, and rough; {yours}", sys.stdout)


@app.command(rich_help_panel=PANEL)
def predict(
    model: Annotated[
        str, typer.Option(help="Merged model, or the base model of --adapter; a path, an s3:// URI or a hub id.")
    ],
    prompt: Annotated[
        str,
        typer.Option(
            help="The question; <image>, or <image_00>, <image_01>, … for several, mark where images belong, otherwise "
            "they come first."
        ),
    ],
    image: Annotated[
        list[str] | None, typer.Option(help="Image, a path, an s3:// or data: URI; may be repeated.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="Adapter folder that train wrote, to apply to --model.")] = "",
    max_new_tokens: NewTokens = 128,
    thinking: Annotated[bool, typer.Option("--thinking", help="Request reasoning first (MiniCPM-V 4.5).")] = False,
    output: OutputFormat = "text",
) -> None:
    """Ask a tuned model a question about an image."""
    if not prompt.strip():
        raise UserError("--prompt: empty; write a question.")
    from minicpmv_finetune.inputs.checks import check_base_model

    check_base_model("--model", model)
    from minicpmv_finetune.components.evaluate.predict import predict as answer

    text = answer(model, image or [], prompt, adapter, max_new_tokens, thinking)
    print(json.dumps({"answer": text}, indent=1, ensure_ascii=False) if output == "json" else text)


def _with_absolute_paths(inputs: Inputs) -> dict[str, Any]:
    return {name: absolute(value) if name.endswith("_uri") else value for name, value in inputs.items()}


def _claim(out: Path, command: str, inputs: Inputs) -> None:
    from minicpmv_finetune.outputs import claim_workspace
    from minicpmv_finetune.pipelines.run_folder import LINKS

    claim_workspace(out, command, _places(inputs), tuple(LINKS))


def _places(inputs: Inputs) -> dict[str, str]:
    """The paths and URIs among the inputs, by the names of their options."""
    # What a recipe contains may be of another type; the checks of the run say so.
    return {row.option: str(inputs[row.name] or "") for row in FINETUNE_INPUTS if row.name.endswith("_uri")}
