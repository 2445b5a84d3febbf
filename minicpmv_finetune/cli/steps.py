"""Every step as a separate command, so that it can be run and debugged without Kubeflow."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv_finetune import environment
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, defaults, rows
from minicpmv_finetune.terminal import print_sentence

from .help import Command
from .options import (
    DEFAULT_MODEL,
    Inputs,
    Model,
    NewTokens,
    Out,
    not_empty,
    path_option,
    read_json_object,
    reported,
    with_inputs,
)

PANEL = "One step"
app = typer.Typer()


@app.command(rich_help_panel=PANEL)
@reported
def import_data(
    source: Annotated[
        str,
        typer.Argument(
            parser=not_empty("SOURCE", str),
            metavar="SOURCE",
            help="JSON or JSON Lines of LLaVA, LLaMA-Factory, ms-swift, TRL or OpenAI, or a folder of Hugging Face "
            "datasets; local or s3://.",
        ),
    ],
    out: Annotated[
        Path,
        path_option("--out", "JSON Lines file that receives the samples; extracted images are written beside it."),
    ],
    images: Annotated[
        str,
        typer.Option(
            "--images", "--pictures", help="Folder at which the images' relative paths start; by default the source's."
        ),
    ] = "",
) -> dict[str, Any]:
    """Before step 1: convert another program's data into this project's format."""
    from minicpmv_finetune.data.importers import import_data as convert

    return {"data": str(out), **convert(source, out, images)}


@app.command(rich_help_panel=PANEL)
@with_inputs(rows("data_uri eval_data_uri max_reject_ratio seed"))
@reported
def validate_data(
    inputs: Inputs,
    out: Out,
    eval_fraction: Annotated[
        float, typer.Option(help="Share of the images held out when there is no evaluation data.")
    ] = 0.1,
    exif_transpose: Annotated[
        bool,
        typer.Option(
            help="Rotate images by their EXIF orientation in training and evaluation; serving must do it too."
        ),
    ] = False,
) -> dict[str, Any]:
    """Step 1: check every sample; rejects.jsonl and data-report.html beside OUT contain the findings."""
    from minicpmv_finetune.outputs import check_folder, folder_beside

    check_folder(out, "validate-data", {"--data": inputs["data_uri"], "--eval-data": inputs["eval_data_uri"]})
    from minicpmv_finetune.components.validate_data.validate import ValidationSettings
    from minicpmv_finetune.components.validate_data.validate import validate_data as step

    settings = ValidationSettings(inputs["max_reject_ratio"], eval_fraction, inputs["seed"], exif_transpose)
    beside = folder_beside(out)
    rejects, report = beside / "rejects.jsonl", beside / "data-report.html"
    info = step(inputs["data_uri"], inputs["eval_data_uri"], out, rejects, settings, report)
    return {"dataset": str(out), "rejects": str(rejects), "report": str(report), **info.model_dump()}


@app.command(rich_help_panel=PANEL)
@with_inputs(rows("base_model_uri max_slice_nums model_max_length max_reject_ratio"), required=["base_model_uri"])
@reported
def preprocess(
    inputs: Inputs,
    dataset: Annotated[Path, path_option("--dataset", "Folder that validate-data wrote.")],
    out: Out,
    picture_codec: Annotated[
        str, typer.Option(help="Format of stored images: source, raw, webp-lossless or png; all keep every pixel.")
    ] = "source",
    cache: Annotated[
        str, typer.Option(help="Folder or s3:// URI that keeps finished shards for later runs; by default beside OUT.")
    ] = "",
    num_workers: Annotated[int, typer.Option(min=0, help="Number of processes; 0 means one per core.")] = 0,
) -> dict[str, Any]:
    """Step 2: slice images and tokenize conversations once, into Parquet shards; a report is written beside OUT."""
    from minicpmv_finetune.outputs import check_cache, check_folder, folder_beside

    read = {"--dataset": str(dataset), "--base-model": inputs["base_model_uri"]}
    check_folder(out, "preprocess", read)
    check_cache(cache, read)
    from minicpmv_finetune.data.samples import read_info
    from minicpmv_finetune.inputs.checks import check_base_model
    from minicpmv_finetune.shards.codecs import check_codec

    codec = check_codec(picture_codec)
    read_info(dataset)
    check_base_model("--base-model", inputs["base_model_uri"])
    from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings
    from minicpmv_finetune.components.preprocess.preprocess import preprocess as step

    settings = PreprocessSettings(
        inputs["max_slice_nums"], inputs["model_max_length"], inputs["max_reject_ratio"], codec
    )
    rejects, report = (folder_beside(out) / f"preprocess-{name}" for name in ("rejects.jsonl", "report.html"))
    manifest = step(dataset, inputs["base_model_uri"], out, rejects, settings, cache, num_workers, report)
    places = {"shards": str(out), "rejects": str(rejects), "report": str(report)}
    tokens = {split: sum(lengths) for split, lengths in manifest.lengths.items()}
    samples = {split: len(lengths) for split, lengths in manifest.lengths.items()}
    return {**places, "samples": samples, "slices": manifest.slices, "tokens": tokens, "bytes": manifest.bytes}


class _Train(Command):
    """The command whose options are the flags of the training script."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The flags that begin with the incomplete word."""
        from typer.core import CompletionItem

        from minicpmv_finetune.components.train.flags import table

        flags = {**{f"--{flag.name}": flag.help for flag in table().values()}, "--print-plan": "", "--help": ""}
        dashed = incomplete[:2] + incomplete[2:].replace("-", "_")
        names = [name for name in flags if incomplete and name.startswith((incomplete, dashed))]
        return [CompletionItem(name, help=flags[name]) for name in names]


@app.command(
    cls=_Train,
    rich_help_panel=PANEL,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def train(context: typer.Context) -> None:
    """Step 3: train with torchrun; accepts every flag of the published finetune.py (see `train --help`).

    A YAML file of flags may come first. `--print-plan` only prints what would be trained, frozen and saved; `--quiet`
    shows only warnings and mistakes.
    """
    if "--quiet" in context.args:
        context.args.remove("--quiet")
        # The launcher's processes inherit it.
        os.environ[environment.QUIET.name] = "1"
    if "--help" in context.args:
        from minicpmv_finetune.components.train.flags_help import help_text

        print(help_text(defaults(FINETUNE_INPUTS)))
        return
    if "--print-plan" in context.args or "--print_plan" in context.args:
        from minicpmv_finetune.components.train.flags import check_flags

        flags = check_flags([flag for flag in context.args if flag not in ("--print-plan", "--print_plan")])
        from minicpmv_finetune.components.train.print_plan import print_plan

        print_plan(flags)
        return
    from minicpmv_finetune.inputs.checks import check_training

    check_training(context.args)
    from minicpmv_finetune.components.train.launch import launch
    from minicpmv_finetune.pipelines.raw_data import with_prepared_data

    launch(with_prepared_data(context.args))


@app.command(rich_help_panel=PANEL)
@with_inputs(rows("base_model_uri"), required=["base_model_uri"])
@reported
def merge(
    inputs: Inputs,
    adapter: Annotated[Path, path_option("--adapter", "Folder that train wrote.")],
    shards: Annotated[
        Path, path_option("--shards", "Folder that preprocess wrote; the parity check uses some of its samples.")
    ],
    out: Annotated[
        str,
        path_option(
            "--out", "Folder or s3:// URI that receives the result; a repeated command continues an upload.", kind=str
        ),
    ],
) -> dict[str, Any]:
    """Step 4: merge the adapter into the base model, and check on real samples that the logits agree."""
    import tempfile

    from minicpmv_finetune import storage
    from minicpmv_finetune.outputs import MARK, check_folder, check_object_folder, folder_beside

    base = inputs["base_model_uri"]
    is_remote = storage.is_object_uri(out)
    report_uri = f"{out.rstrip('/')}.merge-report.json"
    if not is_remote:
        check_folder(out, "merge", {"--base-model": base, "--adapter": str(adapter), "--shards": str(shards)})
    else:
        check_object_folder(out, {"--base-model": base})
        storage.check_upload(out, report_uri)
    from minicpmv_finetune.inputs.checks import check_base_model
    from minicpmv_finetune.reports.training_record import read_record
    from minicpmv_finetune.shards.format import read_manifest

    check_base_model("--base-model", base)
    read_record(adapter)
    read_manifest(shards)
    from minicpmv_finetune.components.merge.merge import MergeSettings, describe_replaced
    from minicpmv_finetune.components.merge.merge import merge as step

    if not is_remote:
        place = folder_beside(Path(out)) / "merge-report.json"
        merged = step(base, adapter, shards, Path(out), place, MergeSettings())
        return {"model": out, "report": str(place), **merged.model_dump(mode="json")}
    with tempfile.TemporaryDirectory() as folder:
        model, report = Path(folder) / "model", Path(folder) / "merge-report.json"
        merged = step(base, adapter, shards, model, report, MergeSettings())
        if replaced := describe_replaced(report_uri, merged):
            print_sentence(f"{out}: the result of {replaced} is replaced.")
        (model / MARK).unlink()  # is for a local folder; with the time of each file it would be sent at each repetition
        sent = storage.upload_folder(model, out, last="config.json")
        # After the folder, whose record shows a repeated command that this report is its own.
        storage.write_bytes(report_uri, report.read_bytes())
        print(f"{sent} files uploaded to {out}")
        return {"model": out, "report": report_uri, **merged.model_dump(mode="json")}


@app.command(rich_help_panel=PANEL)
@with_inputs(rows("metric"))
@reported
def evaluate(
    inputs: Inputs,
    model: Annotated[Path, path_option("--model", "Folder that merge wrote.")],
    dataset: Annotated[Path, path_option("--dataset", "Folder that validate-data wrote.")],
    out: Out,
    base_model: Annotated[
        str, typer.Option("--base-model", help="Model to compare with; empty evaluates the merged model alone.")
    ] = "",
    champion: Annotated[str, typer.Option(help="Champion to compare with; a path or an s3:// URI.")] = "",
    max_new_tokens: NewTokens = 128,
    batch_size: Annotated[int, typer.Option(help="Number of samples that are answered at once.")] = 16,
    gate: Annotated[
        str, typer.Option(help="Conditions for the model, as JSON such as '{\"min_improvement\": 0.01}'.")
    ] = "{}",
) -> dict[str, Any]:
    """Step 5: answer the held-out samples with base, champion and merged model; OUT receives answers and report."""
    from minicpmv_finetune.outputs import check_folder, claimed_folder

    compared = {"--model": str(model), "--dataset": str(dataset), "--base-model": base_model, "--champion": champion}
    check_folder(out, "evaluate", compared)
    from minicpmv_finetune.components.evaluate.settings import settings_from

    options = {"metric": inputs["metric"], "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    settings = settings_from({**options, "gate": read_json_object(gate, "--gate")})
    from minicpmv_finetune.data.samples import read_info
    from minicpmv_finetune.inputs.checks import check_base_model

    read_info(dataset)
    for option, uri in (("--model", str(model)), ("--base-model", base_model), ("--champion", champion)):
        if uri:
            check_base_model(option, uri)
    from minicpmv_finetune.components.evaluate.evaluate import evaluate as step

    with claimed_folder(out, "evaluate", compared) as output, output.assembled() as folder:
        evaluation = step(
            model, base_model, dataset, folder / "predictions.jsonl", folder / "report.html", settings, champion
        )
    decision = evaluation.decision
    print(f"{'passed' if decision.promote else 'failed'} the gate: {decision.reason}")
    return {
        "answers": str(out / "predictions.jsonl"),
        "report": str(out / "report.html"),
        "gate": {"promote": decision.promote, "reason": decision.reason},
        "metrics": evaluation.metrics,
    }


@app.command(rich_help_panel=PANEL)
@reported
def register(
    promotion_record: Annotated[
        Path,
        path_option("--promotion-record", "Promotion record that evaluate wrote in a pipeline.", "--verdict"),
    ],
    model: Model = DEFAULT_MODEL,
) -> dict[str, Any]:
    """Step 6: register a model that passed the gate in MLflow, and make it the champion if it beat the champion."""
    from minicpmv_finetune.components.register.register import register as step

    return {"model": model, "outcome": step(promotion_record, model)}
