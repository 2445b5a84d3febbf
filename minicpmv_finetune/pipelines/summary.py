"""The summary of a finished run: how much the model improved, and where the results are stored."""

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from minicpmv_finetune import environment
from minicpmv_finetune.components.evaluate.metrics import METRICS
from minicpmv_finetune.errors import without_password
from minicpmv_finetune.terminal import console
from minicpmv_finetune.tracking.promotion_record import read_promotion_record

from .local import LocalRun

_REPORTS = {
    "report": "report.html",
    "training report": "training-report.html",
    "merge report": "merge-report.html",
    "shards report": "preprocess-report.html",
    "data report": "data-report.html",
    "rejected samples": "rejects.jsonl",
}
_NAME = 21  # columns of a result's name
_QUESTION = {"image": "IMAGE", "prompt": "QUESTION"}


def print_summary(
    run: LocalRun,
    out: Path,
    more_rows: Mapping[str, float] | None = None,
    compiled: Path | None = None,
    question: Mapping[str, str] | None = None,
) -> None:
    """Print the comparison on held-out data, if there was new data to train on, and the paths of the results.

    Args:
        run: The finished run.
        out: Folder of the run.
        more_rows: Further models and their exact match, as rows of the table.
        compiled: The pipeline's YAML file, if one was written.
        question: Options of `predict` for the printed example.
    """
    to = console(soft_wrap=True)
    record_file = run.output("evaluate", "promotion_record")
    if record_file.exists():
        to.print()
        to.print(_score_table(run.scores(), more_rows or {}))
    to.print()
    model = short_path(out / "model") if (out / "model").exists() else ""
    options = " ".join(f"--{name} {shlex.quote(value)}" for name, value in (question or _QUESTION).items())
    lines = {
        "gate": _gate(run, record_file) if record_file.exists() else "",
        **_reports(out),
        "merged model": model,
        "pipeline": short_path(compiled) if compiled else "",
        "logs of the steps": short_path(out / "run.log"),
        "ask the model": f"{_program('minicpmv-finetune')} predict --model {model} {options}" if model else "",
        "MLflow page": _mlflow_page(out / "mlflow.db"),
    }
    for name, text in lines.items():
        if name == "gate" and text and to.is_terminal:
            # A sentence, so its lines end between words; commands and paths stay as they are, to be copied.
            row = Table.grid()
            row.add_column(width=_NAME)
            row.add_row(f"  {name}", text)
            to.print(row, soft_wrap=False)
        elif text:
            to.print(f"  {name}".ljust(_NAME) + text)


def summary_of(run: LocalRun, out: Path) -> dict[str, Any]:
    """What a program wants to know of a finished run.

    Args:
        run: The finished run.
        out: Folder of the run.
    """
    record_file = run.output("evaluate", "promotion_record")
    registration = run.output("register", "registration")
    record = read_promotion_record(record_file) if record_file.exists() else None
    return {
        "run": run.folder.name,
        "out": str(out),
        "seconds": dict(run.seconds),
        "gate": {"promote": record.promote, "reason": record.reason} if record else None,
        "metrics": dict(record.metrics) if record else None,
        "registered": registration.read_text().strip() if registration.exists() else None,
        "model": str(out / "model") if record else None,
        "reports": _reports(out),
        "log": str(out / "run.log"),
    }


def _gate(run: LocalRun, record_file: Path) -> str:
    """What the gate decided, and if it passed what register made of it."""
    record = read_promotion_record(record_file)
    if not record.promote:
        return f"failed, {record.reason}"
    registered = run.output("register", "registration")
    return registered.read_text().strip() if registered.exists() else f"passed, {record.reason}"


def _reports(out: Path) -> dict[str, str]:
    """The path of every report that the last run wrote, by its name."""
    files = {name: out / file for name, file in _REPORTS.items()}
    return {name: short_path(file) for name, file in files.items() if file.exists() and file.stat().st_size}


def _mlflow_page(database: Path) -> str:
    """Where the runs can be seen: the address of the user's server, or of one that a printed command starts."""
    if uri := environment.TRACKING_URI.read():
        return without_password(uri)
    # MLflow names its address only among its log lines; without them the command prints nothing.
    quiet = "--workers 1 --uvicorn-opts '--log-level warning'"
    command = f"{_program('mlflow')} server --backend-store-uri sqlite:///{short_path(database)} --port 5000 {quiet}"
    return f"http://127.0.0.1:5000 after MLFLOW_LOGGING_LEVEL=ERROR {command}"


def _score_table(scores: Mapping[str, float], more_rows: Mapping[str, float]) -> Table:
    """One row per model and one column per metric."""
    table = Table(title=f"{scores['samples']:,.0f} held-out samples, free generation", title_justify="left", box=None)
    table.add_column("")
    metrics = [name.removeprefix("tuned_") for name in scores if name.startswith("tuned_")]
    metrics = [metric for metric in metrics if metric in METRICS]
    for metric in metrics:
        table.add_column(metric, justify="right")
    for model in [name for name in ("base", "champion", "tuned") if f"{name}_{metrics[0]}" in scores]:
        table.add_row(model, *(f"{scores[f'{model}_{metric}']:.3f}" for metric in metrics))
    for model, exact_match in more_rows.items():
        table.add_row(model, *(f"{exact_match:.3f}" if metric == "exact_match" else "" for metric in metrics))
    return table


def _program(name: str) -> str:
    """A command that starts a program of this Python environment, whether or not the environment is activated."""
    return name if shutil.which(name) else short_path(Path(sys.executable).parent / name)


def short_path(path: Path) -> str:
    """The path relative to the current folder if it is inside, else the absolute path."""
    here = Path.cwd()
    absolute = path.absolute()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
