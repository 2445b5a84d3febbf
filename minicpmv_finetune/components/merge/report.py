"""What a merge did and how it was proven: one JSON file, and the same as a table for the Kubeflow UI."""

import html

from pydantic import BaseModel, ConfigDict, Field


class Moved(BaseModel):
    """How far one part of the model moved."""

    model_config = ConfigDict(frozen=True)

    tensors: int = Field(description="in this part")
    changed: int = Field(description="of them differ from the base")
    relative: float = Field(description="norm of the change over the norm of the base, both over the changed tensors")


class Parity(BaseModel):
    """Merged against unmerged logits, in float32."""

    model_config = ConfigDict(frozen=True)

    rows: int
    logits: int = Field(description="compared")
    largest_difference: float = Field(description="that only float32 rounding may explain")
    tolerance: float
    storage_rounding: float | None = Field(
        description="largest difference that storing the merged weights in 16 bits makes; none for a float32 base"
    )
    same_first_choice: float = Field(description="share of tokens whose likeliest successor is the same")


class Generated(BaseModel):
    """What the merged folder, loaded in a fresh process, said to a sample's question."""

    model_config = ConfigDict(frozen=True)

    id: str
    expected: str
    answer: str


class Memory(BaseModel):
    """Anonymous memory of the streaming phase, in bytes."""

    model_config = ConfigDict(frozen=True)

    baseline: int = Field(description="after the imports")
    peak: int
    largest_tensor: int
    bound: int = Field(description="baseline + 4 × largest tensor + 200 MB")


class ParityReport(BaseModel):
    """What the gate's own process found."""

    model_config = ConfigDict(frozen=True)

    parity: Parity
    generated: list[Generated]
    peak_resident_bytes: int
    failure: str | None = Field(default=None, description="one sentence; none when the merged model may be used")


class MergeReport(BaseModel):
    """The parity report."""

    model_config = ConfigDict(frozen=True)

    base_model: str
    generation: str
    base_fingerprint: str = ""
    data_fingerprint: str
    kind: str = Field(description="adapter, or full for a full fine-tune that is passed through")
    bytes: int = Field(description="of the merged weights")
    moved: dict[str, Moved] = Field(description="by part of the model")
    changed: dict[str, float] = Field(description="relative change of each tensor that differs from the base")
    untied: bool = Field(description="whether input and output embeddings, one in the base, are two now")
    memory: Memory | None = Field(description="none where the system does not tell")
    seconds: dict[str, float]
    gate: ParityReport | None = Field(default=None, description="none while it has not run")

    @property
    def metrics(self) -> dict[str, float]:
        """The figures worth a chart."""
        figures = {f"moved/{part}": moved.relative for part, moved in self.moved.items()}
        figures["changed_tensors"] = float(len(self.changed))
        if self.gate is not None:
            figures["largest_logit_difference"] = self.gate.parity.largest_difference
            figures["same_first_choice"] = self.gate.parity.same_first_choice
        return figures | {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}


def markdown(report: MergeReport) -> str:
    """The report as Markdown; what comes from data is escaped."""
    lines = [
        "# Merge",
        "",
        f"MiniCPM-V {report.generation}, {_cell(report.base_model)} + "
        + ("adapter" if report.kind == "adapter" else "full fine-tune")
        + f", {report.bytes / 1e9:.2f} GB in {report.seconds.get('streaming', 0):.1f} s.",
        "",
    ]
    if report.gate is not None:
        parity = report.gate.parity
        verdict = "passed" if report.gate.failure is None else f"**failed**: {_cell(report.gate.failure)}"
        lines += [
            f"Gate {verdict}",
            "",
            "| check | found |",
            "|---|---|",
            f"| largest difference of logits to the unmerged model, float32 | {parity.largest_difference:.2e} "
            f"(at most {parity.tolerance:.0e}) |",
            f"| samples, logits compared | {parity.rows}, {parity.logits:,} |",
            f"| same likeliest next token | {parity.same_first_choice:.2%} |",
        ]
        if parity.storage_rounding is not None:
            lines += [f"| difference made by storing in 16 bits | {parity.storage_rounding:.2e} |"]
        lines += [""]
    lines += ["| part of the model | tensors changed | relative change |", "|---|---|---|"]
    lines += [
        f"| {_cell(part)} | {moved.changed} of {moved.tensors} | {moved.relative:.2e} |"
        for part, moved in report.moved.items()
    ]
    if report.untied:
        lines += ["", "Input and output embeddings were one tensor in the base and are two now."]
    if report.gate is not None and report.gate.generated:
        lines += ["", "| sample | expected | the merged folder, freshly loaded |", "|---|---|---|"]
        lines += [
            f"| {_cell(item.id)} | {_cell(item.expected)} | {_cell(item.answer)} |" for item in report.gate.generated
        ]
    if report.memory is not None:
        memory = report.memory
        lines += [
            "",
            f"Streaming took {memory.peak / 1e6:.0f} MB of anonymous memory at most (bound "
            f"{memory.bound / 1e6:.0f} MB, after imports {memory.baseline / 1e6:.0f} MB)"
            + (f"; the gate's process {report.gate.peak_resident_bytes / 1e6:.0f} MB in all." if report.gate else "."),
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text from data within a table's cell."""
    flat = " ".join(html.escape(text).split())
    for mark in "\\`*_[]|~":
        flat = flat.replace(mark, f"\\{mark}")
    return flat
