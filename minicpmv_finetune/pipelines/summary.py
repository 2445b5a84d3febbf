"""What a person reads when a run is over: how much better the model got, and where everything lies."""

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minicpmv_finetune.components.evaluate.metrics import METRICS
from minicpmv_finetune.tracking.promotion_record import read_promotion_record

from .local import LocalRun

_QUESTION = {"image": "IMAGE", "prompt": "QUESTION"}


def show_outcome(
    run: LocalRun,
    out: Path,
    further: Mapping[str, float] | None = None,
    compiled: Path | None = None,
    question: Mapping[str, str] | None = None,
) -> None:
    """Print the comparison on held-out data, and the places of the results.

    Args:
        run: the finished run.
        out: its folder.
        further: more rows of the table, by name, with their exact match.
        compiled: the pipeline's YAML file, if one was written.
        question: options of `predict` that show how the model is asked.
    """
    scores = run.metrics("evaluate")
    table = Table(title=f"{scores['samples']:,.0f} held-out samples, free generation", title_justify="left", box=None)
    table.add_column("")
    metrics = [name.removeprefix("tuned_") for name in scores if name.startswith("tuned_")]
    metrics = [metric for metric in metrics if metric in METRICS]
    for metric in metrics:
        table.add_column(metric, justify="right")
    for model in [name for name in ("base", "champion", "tuned") if f"{name}_{metrics[0]}" in scores]:
        table.add_row(model, *(f"{scores[f'{model}_{metric}']:.3f}" for metric in metrics))
    for model, exact_match in (further or {}).items():
        table.add_row(model, *(f"{exact_match:.3f}" if metric == "exact_match" else "" for metric in metrics))
    console = Console(highlight=False, soft_wrap=True)
    console.print()
    console.print(table)
    console.print()
    verdict = read_promotion_record(run.output("evaluate", "verdict"))
    registered = run.output("register", "summary")
    passed = registered.read_text().strip() if registered.exists() else f"passed, {verdict.reason}"
    console.print(f"  {'gate':<19}{passed if verdict.promote else f'stopped, {verdict.reason}'}")
    asked = " ".join(f"--{name} {shlex.quote(value)}" for name, value in (question or _QUESTION).items())
    places = {
        "report": shown(out / "report.html"),
        "merged model": shown(out / "model"),
        "pipeline": shown(compiled) if compiled else "",
        "logs of the steps": shown(out / "run.log"),
        "ask the model": f"{command('minicpmv-finetune')} predict --model {shown(out / 'model')} {asked}",
        "MLflow page": f"{command('mlflow')} server --backend-store-uri sqlite:///{shown(out / 'mlflow.db')}",
    }
    for name, place in places.items():
        if place:
            console.print(f"  {name:<19}{place}")


def command(name: str) -> str:
    """How to call a program of this environment from here, whether or not it is activated."""
    return name if shutil.which(name) else shown(Path(sys.executable).parent / name)


def shown(path: Path) -> str:
    """A path as short as it can be from here."""
    here = Path.cwd()
    absolute = path.absolute()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
