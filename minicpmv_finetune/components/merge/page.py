"""The report of a merge as a page like those of the other steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minicpmv_finetune.reports.pages import write_page

from .report import MergeReport


@contextmanager
def page_written(report_file: Path, page: Path) -> Iterator[None]:
    """Write the page from the JSON report of a merge in the block; also after a failed parity check."""
    try:
        yield
    finally:
        if report_file.is_file():
            report = MergeReport.model_validate_json(report_file.read_text())
            write_page(page, Path(__file__).parent, {"report": report, "facts": _facts(report)})


def _facts(report: MergeReport) -> dict[str, str]:
    kind = "adapter" if report.kind == "adapter" else "full fine-tune"
    facts = {
        "Base model": report.base_model,
        "Merged": f"{kind}, {report.bytes / 1e9:.2f} GB",
        "Data fingerprint": report.data_fingerprint,
        **{f"Seconds, {phase}": f"{seconds:.1f}" for phase, seconds in report.seconds.items()},
    }
    if report.untied:
        facts["Embeddings"] = "input and output are one tensor in the base, and two in the merged model"
    if report.memory is not None:
        facts["Memory of the streaming"] = (
            f"{report.memory.peak / 1e6:.0f} MB, bound {report.memory.bound / 1e6:.0f} MB"
        )
    return facts
