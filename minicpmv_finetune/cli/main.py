"""The command line: the demonstration, the whole pipeline here, and every step on its own.

A user's mistake ends with one sentence and exit code 2, a fault worth retrying with 75. Nothing heavy is imported
before a command needs it, so that help and mistakes in arguments are instant.
"""

import json
import logging
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv_finetune.errors import RetryableError, UserError, end_process, explain_disk_errors

from . import kubeflow

app = typer.Typer(
    name="minicpmv-finetune",
    help="Fine-tune MiniCPM-V with LoRA: as a Kubeflow pipeline, or whole on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

HERE = "Run here"
STEP = "One step"
REGISTRY = "Models"


class RunnerChoice(StrEnum):
    """Where the steps run."""

    SUBPROCESS = "subprocess"
    DOCKER = "docker"


class OutputChoice(StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"


Data = Annotated[str, typer.Option("--data", help="Training data in MiniCPM-V's JSON format; a path or s3:// URI.")]
EvalData = Annotated[
    str,
    typer.Option("--eval-data", help="Evaluation data; without it a part of the training data's images is held out."),
]
BaseModel = Annotated[str, typer.Option("--base-model", help="Base checkpoint; a path, s3:// URI or hub id.")]
MaxSlices = Annotated[int, typer.Option(help="Most slices of an image beside its overview.")]
MaxLength = Annotated[int, typer.Option(help="Longest sample in tokens; longer ones are rejected, never cut.")]
MaxRejects = Annotated[float, typer.Option(help="Share of rejected samples above which a step fails.")]
EvalFraction = Annotated[float, typer.Option(help="Share of the images held out when there is no evaluation data.")]
DataOptions = Annotated[
    str,
    typer.Option(help='Options of validate-data as JSON, such as \'{"eval_fraction": 0.2, "exif_transpose": true}\'.'),
]
Seed = Annotated[int, typer.Option(help="Decides the held-out images, the initial adapters and the order of samples.")]
Metric = Annotated[str, typer.Option(help="How answers are scored, such as exact_match or anls.")]
NewTokens = Annotated[int, typer.Option(help="Longest answer in tokens.")]
EvalBatch = Annotated[int, typer.Option(help="Samples that are answered at once.")]
EvaluationOptions = Annotated[
    str,
    typer.Option(help='Options of evaluate as JSON, such as \'{"max_new_tokens": 64, "gate": {"min_metric": 0.8}}\'.'),
]
RegisteredModel = Annotated[
    str, typer.Option(help="Name in MLflow's registry for a model that passes the gate; empty registers none.")
]
Model = Annotated[str, typer.Option("--model", help="Name in MLflow's registry (MLFLOW_TRACKING_URI).")]
Reason = Annotated[str, typer.Option(help="Why; it is kept beside the move.")]
Out = Annotated[Path, typer.Option(help="Folder that receives the result.")]


app.add_typer(kubeflow.app)


def main() -> None:
    """Entry point of `minicpmv-finetune`."""
    _quiet()
    # Told to stop, a step puts away what it began, as on an error; by default it would end where it stands.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with explain_disk_errors():
            app()
    except (UserError, RetryableError) as error:
        end_process(error)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command(rich_help_panel=HERE)
def demo(
    out: Out = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Decides which digits are held out and how the training starts.")] = 42,
) -> None:
    """Teach a tiny MiniCPM-V to read handwritten digits: the whole pipeline on real data, in minutes."""
    from minicpmv_finetune.pipelines.demo import run_demo

    run_demo(out, seed)


@app.command(rich_help_panel=HERE)
def run(
    data: Data,
    base_model: BaseModel = "openbmb/MiniCPM-V-4.6",
    eval_data: EvalData = "",
    out: Out = Path("build/run"),
    runner: Annotated[RunnerChoice, typer.Option(help="Run the steps in this environment or in their images.")] = (
        RunnerChoice.SUBPROCESS
    ),
    max_slice_nums: MaxSlices = 9,
    model_max_length: MaxLength = 2048,
    max_reject_ratio: MaxRejects = 0.05,
    data_options: DataOptions = "{}",
    use_lora: Annotated[bool, typer.Option(help="Train LoRA adapters on the language model.")] = True,
    tune_vision: Annotated[bool, typer.Option(help="Train the vision tower too.")] = True,
    tune_llm: Annotated[
        bool, typer.Option(help="Train the language model's own weights; needs --no-use-lora.")
    ] = False,
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters.")] = 64,
    lora_alpha: Annotated[int, typer.Option(help="Scale of the adapters: the update is multiplied by alpha / r.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    num_train_epochs: Annotated[float, typer.Option(help="How often every sample is seen.")] = 3.0,
    per_device_train_batch_size: Annotated[int, typer.Option(help="Samples a device sees at once.")] = 4,
    training_flags: Annotated[
        str,
        typer.Option(help="Any further flag of `train` as JSON, such as '{\"gradient_accumulation_steps\": 4}'."),
    ] = "{}",
    seed: Seed = 42,
    metric: Metric = "exact_match",
    evaluation_options: EvaluationOptions = "{}",
    registered_model: RegisteredModel = "minicpmv-finetune",
) -> None:
    """Run the whole pipeline on this machine, from data to an evaluated, merged model."""
    from minicpmv_finetune.pipelines.local import run_pipeline
    from minicpmv_finetune.pipelines.summary import show_outcome

    inputs: dict[str, Any] = {
        "data_uri": absolute(data),
        "eval_data_uri": absolute(eval_data),
        "base_model_uri": absolute(base_model),
        "max_slice_nums": max_slice_nums,
        "model_max_length": model_max_length,
        "max_reject_ratio": max_reject_ratio,
        "data_options": read_flags(data_options, "--data-options"),
        "use_lora": use_lora,
        "tune_vision": tune_vision,
        "tune_llm": tune_llm,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "learning_rate": learning_rate,
        "num_train_epochs": num_train_epochs,
        "per_device_train_batch_size": per_device_train_batch_size,
        "training_flags": read_flags(training_flags),
        "seed": seed,
        "metric": metric,
        "evaluation_options": read_flags(evaluation_options, "--evaluation-options"),
        "registered_model": registered_model,
    }
    show_outcome(run_pipeline(out, inputs, runner.value), out)


@app.command(rich_help_panel=HERE)
def retrain(
    data: Data,
    base_model: BaseModel = "openbmb/MiniCPM-V-4.6",
    eval_data: EvalData = "",
    out: Out = Path("build/retrain"),
    runner: Annotated[RunnerChoice, typer.Option(help="Run the steps in this environment or in their images.")] = (
        RunnerChoice.SUBPROCESS
    ),
    registered_model: RegisteredModel = "minicpmv-finetune",
    start_from: Annotated[str, typer.Option(help="base, or champion to go on from its adapter.")] = "base",
    max_slice_nums: MaxSlices = 9,
    model_max_length: MaxLength = 2048,
    max_reject_ratio: MaxRejects = 0.05,
    data_options: DataOptions = "{}",
    training_flags: Annotated[
        str, typer.Option(help="Any flag of `train` as JSON, such as '{\"lora_r\": 16}'.")
    ] = "{}",
    seed: Seed = 42,
    metric: Metric = "exact_match",
    evaluation_options: EvaluationOptions = "{}",
) -> None:
    """Run the pipeline for schedules on this machine: nothing without new data, else train and promote if better."""
    from minicpmv_finetune.pipelines.local import run_pipeline
    from minicpmv_finetune.pipelines.retraining import retrain as pipeline

    inputs: dict[str, Any] = {
        "data_uri": absolute(data),
        "eval_data_uri": absolute(eval_data),
        "base_model_uri": absolute(base_model),
        "registered_model": registered_model,
        "start_from": start_from,
        "max_slice_nums": max_slice_nums,
        "model_max_length": model_max_length,
        "max_reject_ratio": max_reject_ratio,
        "data_options": read_flags(data_options, "--data-options"),
        "training_flags": read_flags(training_flags),
        "seed": seed,
        "metric": metric,
        "evaluation_options": read_flags(evaluation_options, "--evaluation-options"),
    }
    run_pipeline(out, inputs, runner.value, pipeline)


@app.command(rich_help_panel=HERE)
def plan(
    data: Data,
    base_model: BaseModel = "openbmb/MiniCPM-V-4.6",
    eval_data: EvalData = "",
    max_slice_nums: MaxSlices = 9,
    model_max_length: MaxLength = 2048,
    eval_fraction: EvalFraction = 0.1,
    exif_transpose: Annotated[bool, typer.Option(help="Turn images as their EXIF orientation says.")] = False,
    devices: Annotated[int, typer.Option(min=1, help="GPUs to train on.")] = 1,
    per_device_train_batch_size: Annotated[int, typer.Option(min=1, help="Samples a device sees at once.")] = 4,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1, help="Batches of a step.")] = 1,
    num_train_epochs: Annotated[float, typer.Option(help="How often every sample is seen.")] = 3.0,
    use_lora: Annotated[bool, typer.Option(help="Train LoRA adapters on the language model.")] = True,
    tune_vision: Annotated[bool, typer.Option(help="Train the vision tower too.")] = True,
    tune_llm: Annotated[
        bool, typer.Option(help="Train the language model's own weights; needs --no-use-lora.")
    ] = False,
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters.")] = 64,
    output: Annotated[OutputChoice, typer.Option(help="Tables for a person, or JSON.")] = OutputChoice.TABLE,
) -> None:
    """Say what a run will take, before any GPU is claimed: samples, tokens, shards, memory, steps."""
    from minicpmv_finetune.estimate.cost import Recipe
    from minicpmv_finetune.estimate.plan import plan as work_out
    from minicpmv_finetune.estimate.plan import show

    recipe = Recipe(
        devices=devices,
        batch=per_device_train_batch_size,
        epochs=num_train_epochs,
        use_lora=use_lora,
        tune_vision=tune_vision,
        tune_llm=tune_llm,
        lora_r=lora_r,
        accumulation=gradient_accumulation_steps,
    )
    planned = work_out(
        data, eval_data, base_model, max_slice_nums, model_max_length, eval_fraction, exif_transpose, recipe
    )
    if output is OutputChoice.JSON:
        print(planned.model_dump_json(indent=1))
    else:
        show(planned)


@app.command(rich_help_panel=HERE)
def predict(
    model: Annotated[
        str, typer.Option(help="Merged folder, or the base model of --adapter; a path, s3:// URI or hub id.")
    ],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Image, a path or s3:// URI; may be given several times.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="Adapter folder of the train step, put on top of --model.")] = "",
    max_new_tokens: NewTokens = 128,
) -> None:
    """Ask a tuned model about an image."""
    from minicpmv_finetune.components.evaluate.predict import predict as answer

    print(answer(model, image or [], prompt, adapter, max_new_tokens))


@app.command(rich_help_panel=kubeflow.PANEL)
def compile(
    output: Annotated[Path, typer.Argument(help="YAML file to write.")] = Path("build/minicpmv-finetune.yaml"),
    partitions: Annotated[
        int, typer.Option(min=1, help="Pods that share the work of preprocess; a profile has its own count.")
    ] = 1,
    profile: Annotated[
        Path | None, typer.Option(help="Cluster's settings to put on every task, such as k8s/profiles/dev.yaml.")
    ] = None,
    objects: Annotated[
        bool, typer.Option("--objects", help="Write Pipeline and PipelineVersion objects for kubectl apply.")
    ] = False,
    retrain: Annotated[bool, typer.Option("--retrain", help="Write the pipeline for schedules instead.")] = False,
) -> None:
    """Write the pipeline as YAML, to be uploaded in the Kubeflow UI or by the kfp SDK."""
    from minicpmv_finetune.kubeflow.profile import load_profile
    from minicpmv_finetune.pipelines.finetuning import compile_objects, compile_pipeline
    from minicpmv_finetune.pipelines.retraining import compile_retraining

    settings = load_profile(profile) if profile else None
    if settings and partitions > 1:
        raise UserError(f"--partitions: {profile} decides this; set preprocess_partitions there.")
    if objects:
        if settings is None:
            raise UserError("--objects: the namespace of the objects is not known; give a --profile too.")
        print(compile_objects(output, settings))
    elif retrain:
        print(compile_retraining(output, partitions, settings))
    else:
        print(compile_pipeline(output, partitions, settings))


@app.command(rich_help_panel=REGISTRY)
def promote(
    version: Annotated[str, typer.Argument(help="Number of the version that becomes champion.")],
    reason: Reason,
    model: Model = "minicpmv-finetune",
) -> None:
    """Make a registered version champion by hand, whatever the gate said of it."""
    from minicpmv_finetune.tracking.champion import promote as move

    print(move(model, version, reason))


@app.command(rich_help_panel=REGISTRY)
def rollback(reason: Reason, model: Model = "minicpmv-finetune") -> None:
    """Make the champion's predecessor champion again; repeated, the one before that."""
    from minicpmv_finetune.tracking.champion import rollback as move

    print(move(model, reason))


@app.command(rich_help_panel=STEP)
def import_data(
    source: Annotated[
        str,
        typer.Argument(
            help="LLaVA JSON, OpenAI messages as JSON Lines, or a folder of Hugging Face datasets; local or s3://."
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON Lines file that receives the samples; images may go beside it.")],
    images: Annotated[
        str,
        typer.Option(
            "--images", "--pictures", help="Folder that images' paths are relative to; the source's own by default."
        ),
    ] = "",
) -> None:
    """Before step 1: bring data of another program into this project's format."""
    from minicpmv_finetune.data.importers import import_data as convert

    convert(source, out, images)


@app.command(rich_help_panel=STEP)
def validate_data(
    data: Data,
    out: Out,
    eval_data: EvalData = "",
    max_reject_ratio: MaxRejects = 0.05,
    eval_fraction: EvalFraction = 0.1,
    seed: Seed = 42,
    exif_transpose: Annotated[
        bool, typer.Option(help="Turn images as EXIF says, for training and evaluation; serving must do the same.")
    ] = False,
) -> None:
    """Step 1: check every sample; rejects.jsonl and data-report.html beside OUT say what is wrong and what is there."""
    from minicpmv_finetune.components.validate_data.validate import ValidationSettings
    from minicpmv_finetune.components.validate_data.validate import validate_data as step

    settings = ValidationSettings(max_reject_ratio, eval_fraction, seed, exif_transpose)
    step(data, eval_data, out, out.parent / "rejects.jsonl", settings, out.parent / "data-report.html")


@app.command(rich_help_panel=STEP)
def preprocess(
    dataset: Annotated[Path, typer.Option(help="Folder that validate-data wrote.")],
    base_model: BaseModel,
    out: Out,
    max_slice_nums: MaxSlices = 9,
    model_max_length: MaxLength = 2048,
    max_reject_ratio: MaxRejects = 0.05,
    picture_codec: Annotated[
        str, typer.Option(help="How images are stored: source, raw, webp-lossless or png; all with the same pixels.")
    ] = "source",
    cache: Annotated[
        str, typer.Option(help="Where finished shards are kept for later runs; a folder or s3:// URI, else beside OUT.")
    ] = "",
    num_workers: Annotated[int, typer.Option(help="Processes; 0 for as many as there are cores.")] = 0,
) -> None:
    """Step 2: slice images and tokenize conversations once, into Parquet shards; a report lies beside OUT."""
    from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings
    from minicpmv_finetune.components.preprocess.preprocess import preprocess as step
    from minicpmv_finetune.shards.codecs import check_codec

    settings = PreprocessSettings(max_slice_nums, model_max_length, max_reject_ratio, check_codec(picture_codec))
    rejects, report = (out.parent / f"preprocess-{name}" for name in ("rejects.jsonl", "report.html"))
    step(dataset, base_model, out, rejects, settings, cache, num_workers, report)


@app.command(
    rich_help_panel=STEP,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def train(context: typer.Context) -> None:
    """Step 3: train with torchrun; takes every flag of the published finetune.py (see `train --help`).

    A YAML file of flags may come first. `--print-plan` only says what would be trained, frozen and saved.
    """
    if "--help" in context.args:
        from minicpmv_finetune.components.train.arguments import parser

        print(parser().format_help())
        return
    if "--print-plan" in context.args or "--print_plan" in context.args:
        from .training_plan import show_plan

        show_plan([flag for flag in context.args if flag not in ("--print-plan", "--print_plan")])
        return
    from minicpmv_finetune.components.train.launch import launch
    from minicpmv_finetune.pipelines.raw_data import with_prepared_data

    launch(with_prepared_data(context.args))


@app.command(rich_help_panel=STEP)
def merge(
    base_model: BaseModel,
    adapter: Annotated[Path, typer.Option(help="Folder that train wrote.")],
    shards: Annotated[Path, typer.Option(help="Folder that preprocess wrote; the proof runs on some of its samples.")],
    out: Annotated[
        str, typer.Option(help="Folder or s3:// URI that receives the result; an upload goes on if cut off.")
    ],
) -> None:
    """Step 4: merge the adapter into the base model, and prove on real samples that nothing was lost."""
    import tempfile

    from minicpmv_finetune import storage
    from minicpmv_finetune.components.merge.merge import MergeSettings
    from minicpmv_finetune.components.merge.merge import merge as step

    if not storage.is_object_uri(out):
        step(base_model, adapter, shards, Path(out), Path(out).parent / "merge-report.json", MergeSettings())
        return
    with tempfile.TemporaryDirectory() as folder:
        model, report = Path(folder) / "model", Path(folder) / "merge-report.json"
        step(base_model, adapter, shards, model, report, MergeSettings())
        storage.write_bytes(storage.join(storage.parent(out), report.name), report.read_bytes())
        print(f"{storage.upload_folder(model, out, last='config.json')} files sent to {out}")


@app.command(rich_help_panel=STEP)
def evaluate(
    model: Annotated[Path, typer.Option(help="Folder that merge wrote.")],
    dataset: Annotated[Path, typer.Option(help="Folder that validate-data wrote.")],
    out: Out,
    base_model: Annotated[str, typer.Option(help="Model to compare with; empty evaluates the merged one alone.")] = "",
    champion: Annotated[str, typer.Option(help="Model to be beaten; a path or s3:// URI.")] = "",
    metric: Metric = "exact_match",
    max_new_tokens: NewTokens = 128,
    batch_size: EvalBatch = 16,
    gate: Annotated[
        str, typer.Option(help="What is asked of the model as JSON, such as '{\"min_improvement\": 0.01}'.")
    ] = "{}",
) -> None:
    """Step 5: let base, champion and merged model answer the held-out samples; predictions and report go into OUT."""
    from minicpmv_finetune.components.evaluate.evaluate import evaluate as step
    from minicpmv_finetune.components.evaluate.evaluate import settings_from

    options = {"metric": metric, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    settings = settings_from({**options, "gate": read_flags(gate, "--gate")})
    found = step(model, base_model, dataset, out / "predictions.jsonl", out / "report.html", settings, champion)
    print(f"{'passes' if found.decision.promote else 'is stopped at'} the gate: {found.decision.reason}")


@app.command(rich_help_panel=STEP)
def register(
    verdict: Annotated[Path, typer.Option(help="Verdict file that evaluate wrote in a pipeline.")],
    model: Model = "minicpmv-finetune",
) -> None:
    """Step 6: register a model that passed the gate in MLflow, and make it champion if it has beaten that."""
    from minicpmv_finetune.components.register.register import register as step

    step(verdict, model)


def _quiet() -> None:
    """Say to the libraries, before any is imported, what this program shows itself or does on purpose."""
    # Bars of their own, and warnings that reference kernels run where there is no GPU.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # It recommends kernels for a CPU, which is for trying things out.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not Path("/dev/nvidiactl").exists():
        # DeepSpeed warns that it falls back to the CPU unless told to use it.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def absolute(uri: str) -> str:
    """A local path made absolute, since steps may run elsewhere; URIs and hub ids stay as they are."""
    return str(Path(uri).absolute()) if uri and "://" not in uri and Path(uri).exists() else uri


def read_flags(text: str, option: str = "--training-flags") -> dict[str, Any]:
    """A JSON object of flags by name, as `option` gives it.

    Raises:
        UserError: it is something else.
    """
    try:
        flags = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{option}: invalid JSON ({error}); write it like '{{\"name\": 1}}'.") from error
    if not isinstance(flags, dict):
        raise UserError(f"{option}: must be a JSON object of flags by name.")
    return flags
