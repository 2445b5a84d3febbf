"""The report of a merge and its parity check: one JSON file, and the same as a table for the Kubeflow UI."""

from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune.reports.markdown import escape


class PartChange(BaseModel):
    """How far the merge changed one part of the model."""

    model_config = ConfigDict(frozen=True)

    tensors: int = Field(description="Number of tensors in this part.")
    changed: int = Field(description="Number of tensors in this part that differ from the base.")
    relative: float = Field(
        description="Norm of the change over the norm of the base, both over the changed tensors of this part."
    )

    @property
    def percent(self) -> str:
        """The relative change for a table; that of adapters can be far below one percent."""
        return f"{self.relative * 100:.3g} %"


class Parity(BaseModel):
    """The comparison of merged and unmerged logits, in float32."""

    model_config = ConfigDict(frozen=True)

    rows: int = Field(description="Number of samples.")
    logits: int = Field(description="Number of logits that were compared.")
    largest_difference: float = Field(
        description="Largest absolute difference of two logits; only float32 rounding may cause it."
    )
    tolerance: float = Field(description="Largest difference that passes the parity check.")
    storage_rounding: float | None = Field(
        description="Largest difference caused by storing the merged weights in 16 bits; None for a float32 base."
    )
    same_first_choice: float = Field(description="Share of tokens for which both models predict the same next token.")


class GeneratedAnswer(BaseModel):
    """The answer of the merged folder, loaded in a new process, to a sample's question."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(description="Id of the sample.")
    expected: str = Field(description="Answer in the data.")
    answer: str = Field(description="Answer that the merged model generated.")


class StreamingMemory(BaseModel):
    """Anonymous memory of the streaming phase, in bytes."""

    model_config = ConfigDict(frozen=True)

    baseline: int = Field(description="Memory after the imports.")
    peak: int = Field(description="Largest memory that was measured.")
    largest_tensor: int = Field(description="Size of the largest tensor.")
    bound: int = Field(description="Largest memory allowed: baseline + 4 × largest tensor + 200 MB.")


class ParityReport(BaseModel):
    """The result of the parity check's own process."""

    model_config = ConfigDict(frozen=True)

    parity: Parity
    generated: list[GeneratedAnswer]
    peak_resident_bytes: int
    failure: str | None = Field(default=None, description="One sentence; None when the merged model may be used.")


class MergeReport(BaseModel):
    """The content of the merge step's report; its keys are those of 0.1.0."""

    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    base_model: str = Field(description="Base checkpoint, as the user gave it.")
    generation: str = Field(description="Generation of the model, such as 4.6.")
    base_fingerprint: str = Field(default="", description="Fingerprint of the base's weights.")
    data_fingerprint: str = Field(description="Fingerprint of the training data.")
    kind: str = Field(description='"adapter", or "full" for a full fine-tune that is passed through.')
    bytes: int = Field(description="Size of the merged weights.")
    moved: dict[str, PartChange] = Field(description="Change of each part of the model, by the part's name.")
    changed: dict[str, float] = Field(description="Relative change of each tensor that differs from the base.")
    untied: bool = Field(
        description="Whether input and output embeddings, one tensor in the base, are two in the merged model."
    )
    memory: StreamingMemory | None = Field(description="None where the operating system does not report it.")
    seconds: dict[str, float] = Field(description="Duration of each phase, by the phase's name.")
    parity_check: ParityReport | None = Field(
        default=None, alias="gate", description="Result of the parity check; None before it has run."
    )

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers that are worth a chart, by name."""
        figures = {f"moved/{part}": change.relative for part, change in self.moved.items()}
        figures["changed_tensors"] = float(len(self.changed))
        if self.parity_check is not None:
            figures["largest_logit_difference"] = self.parity_check.parity.largest_difference
            figures["same_first_choice"] = self.parity_check.parity.same_first_choice
        return figures | {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}


def markdown(report: MergeReport) -> str:
    """The report as Markdown, with text from the data escaped."""
    lines = [
        "# Merge",
        "",
        f"MiniCPM-V {report.generation}, {escape(report.base_model)} + "
        + ("adapter" if report.kind == "adapter" else "full fine-tune")
        + f", {report.bytes / 1e9:.2f} GB in {report.seconds.get('streaming', 0):.1f} s.",
        "",
    ]
    if report.parity_check is not None:
        lines += _parity_table(report.parity_check)
    lines += ["| part of the model | tensors changed | relative change |", "|:---|:---|---:|"]
    lines += [
        f"| {escape(part)} | {change.changed} of {change.tensors} | {change.percent} |"
        for part, change in report.moved.items()
    ]
    if report.untied:
        lines += ["", "Input and output embeddings are one tensor in the base and two in the merged model."]
    if report.parity_check is not None and report.parity_check.generated:
        lines += [
            "",
            "| sample | expected | answer of the merged folder, loaded in a new process |",
            "|:---|:---|:---|",
        ]
        lines += [
            f"| {escape(item.id)} | {escape(item.expected)} | {escape(item.answer)} |"
            for item in report.parity_check.generated
        ]
    if report.memory is not None:
        lines += ["", _memory_sentence(report.memory, report.parity_check)]
    return "\n".join(lines) + "\n"


def _parity_table(report: ParityReport) -> list[str]:
    parity = report.parity
    rounding = parity.storage_rounding
    return [
        "Parity check passed" if report.failure is None else f"Parity check **failed**: {escape(report.failure)}",
        "",
        "| check | found |",
        "|:---|:---|",
        f"| largest difference of logits to the unmerged model, float32 | {parity.largest_difference:.2e} "
        f"(at most {parity.tolerance:.0e}) |",
        f"| samples compared | {parity.rows} |",
        f"| logits compared | {parity.logits:,} |",
        f"| same predicted next token | {parity.same_first_choice:.2%} |",
        *([] if rounding is None else [f"| difference caused by storing in 16 bits | {rounding:.2e} |"]),
        "",
    ]


def _memory_sentence(memory: StreamingMemory, check: ParityReport | None) -> str:
    streaming = (
        f"Streaming used at most {memory.peak / 1e6:.0f} MB of anonymous memory (bound {memory.bound / 1e6:.0f} MB, "
        f"after imports {memory.baseline / 1e6:.0f} MB)"
    )
    if check is None:
        return f"{streaming}."
    return f"{streaming}; the parity check's process used {check.peak_resident_bytes / 1e6:.0f} MB in total."
