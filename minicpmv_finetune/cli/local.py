"""The commands that run on this machine: the demonstration, both pipelines, the estimate, and a question to a model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv_finetune.pipelines.inputs import FINETUNE_INPUTS, RETRAIN_INPUTS

from .options import Inputs, NewTokens, Out, absolute, rows, with_inputs

PANEL = "Run here"
app = typer.Typer()


class RunnerChoice(StrEnum):
    """Where the steps run."""

    SUBPROCESS = "subprocess"
    DOCKER = "docker"


class PlanOutput(StrEnum):
    """How the estimate is printed."""

    TABLE = "table"
    JSON = "json"


Runner = Annotated[RunnerChoice, typer.Option(help="Run the steps in this environment or in their container images.")]


@app.command(rich_help_panel=PANEL)
def demo(
    out: Out = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Decides which digits are held out and how the training starts.")] = 42,
) -> None:
    """Train a tiny MiniCPM-V to read handwritten digits: the whole pipeline on real data, in minutes."""
    from minicpmv_finetune.pipelines.demo import run_demo

    run_demo(out, seed)


@app.command(rich_help_panel=PANEL)
@with_inputs(FINETUNE_INPUTS)
def run(inputs: Inputs, out: Out = Path("build/run"), runner: Runner = RunnerChoice.SUBPROCESS) -> None:
    """Run the whole pipeline on this machine, from data to an evaluated, merged model."""
    from minicpmv_finetune.pipelines.local import run_pipeline
    from minicpmv_finetune.pipelines.summary import show_outcome

    show_outcome(run_pipeline(out, _with_absolute_paths(inputs), runner.value), out)


@app.command(rich_help_panel=PANEL)
@with_inputs(RETRAIN_INPUTS)
def retrain(inputs: Inputs, out: Out = Path("build/retrain"), runner: Runner = RunnerChoice.SUBPROCESS) -> None:
    """Run the pipeline for schedules on this machine: nothing without new data, else train and promote if better."""
    from minicpmv_finetune.pipelines.local import run_pipeline
    from minicpmv_finetune.pipelines.retraining import RETRAIN

    run_pipeline(out, _with_absolute_paths(inputs), runner.value, RETRAIN)


@app.command(rich_help_panel=PANEL)
@with_inputs(
    rows(
        "data_uri base_model_uri eval_data_uri max_slice_nums model_max_length per_device_train_batch_size "
        "num_train_epochs use_lora tune_vision tune_llm lora_r"
    )
)
def plan(
    inputs: Inputs,
    eval_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images held out when there is no evaluation data.")
    ] = 0.1,
    exif_transpose: Annotated[bool, typer.Option(help="Rotate images as their EXIF orientation says.")] = False,
    devices: Annotated[int, typer.Option(min=1, help="GPUs to train on.")] = 1,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1, help="Batches of a step.")] = 1,
    output: Annotated[PlanOutput, typer.Option(help="Tables for a person, or JSON.")] = PlanOutput.TABLE,
) -> None:
    """Estimate what a run will take, before any GPU is requested: samples, tokens, shards, memory, steps."""
    from minicpmv_finetune.estimate.cost import Recipe
    from minicpmv_finetune.estimate.plan import plan as estimate
    from minicpmv_finetune.estimate.plan import show

    recipe = Recipe(
        devices=devices,
        batch=inputs["per_device_train_batch_size"],
        epochs=inputs["num_train_epochs"],
        use_lora=inputs["use_lora"],
        tune_vision=inputs["tune_vision"],
        tune_llm=inputs["tune_llm"],
        lora_r=inputs["lora_r"],
        accumulation=gradient_accumulation_steps,
    )
    planned = estimate(
        inputs["data_uri"],
        inputs["eval_data_uri"],
        inputs["base_model_uri"],
        inputs["max_slice_nums"],
        inputs["model_max_length"],
        eval_fraction,
        exif_transpose,
        recipe,
    )
    if output is PlanOutput.JSON:
        print(planned.model_dump_json(indent=1))
    else:
        show(planned)


@app.command(rich_help_panel=PANEL)
def predict(
    model: Annotated[
        str, typer.Option(help="Merged folder, or the base model of --adapter; a path, s3:// URI or hub id.")
    ],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Image, a path or s3:// URI; may be given several times.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="Adapter folder of the train step, put on top of --model.")] = "",
    max_new_tokens: NewTokens = 128,
) -> None:
    """Ask a tuned model about an image."""
    from minicpmv_finetune.components.evaluate.predict import predict as answer

    print(answer(model, image or [], prompt, adapter, max_new_tokens))


def _with_absolute_paths(inputs: Inputs) -> dict[str, Any]:
    return {name: absolute(value) if name.endswith("_uri") else value for name, value in inputs.items()}
