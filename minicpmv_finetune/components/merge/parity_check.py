"""The gate: a fresh process that loads the merged folder, asks it, and compares it with base and adapter.

    python -m minicpmv_finetune.components.merge.parity_check BASE ADAPTER MODEL SHARDS REPORT ROWS

It sees nothing but the folders, as a user would. Where the checkpoint stores 32 bits, merged and unmerged logits must
agree to float32's rounding. Where it stores 16, every changed weight is rounded once, and no tolerance could tell
that from a small mistake; so the reference is then rounded in the same places, and the rounding's own effect is
reported beside.
"""

import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import ADAPTER_CONFIG, load_model, load_with_adapter
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.progress import progress
from minicpmv_finetune.shards.format import Manifest, ShardReader

from .names import read_names
from .report import Generated, Parity, ParityReport
from .weights import cast, read_headers

_Model = PreTrainedModel | PeftModel

TOLERANCE = 1e-3
"""Of float32 logits: a hundred times what other orders of summation make, a thousandth of what an error makes."""

MAX_NEW_TOKENS = 32
MAX_TOKENS = 256
"""Compared per sample: a vocabulary's logits for thousands of tokens would need gigabytes."""


def main(argv: Sequence[str]) -> None:
    """Judge a folder and write the finding; exits 2 and leaves one sentence when something cannot be loaded."""
    base, adapter, model, shards, report = map(Path, argv[:5])
    try:
        report.write_text(judge(base, adapter, model, shards, int(argv[5])).model_dump_json())
    except UserError as error:
        # The merge step tells it, as its own.
        report.write_text(str(error))
        sys.exit(error.exit_code)


def judge(base: Path, adapter: Path, model: Path, shards: Path, rows: int) -> ParityReport:
    """Load, ask and compare.

    Args:
        base: checkpoint folder.
        adapter: PEFT adapter or full fine-tune.
        model: merged folder.
        shards: whose evaluation split (else training split) gives the samples.
        rows: number of samples.
    """
    samples, manifest = _pick(shards, rows)
    is_adapter = (adapter / ADAPTER_CONFIG).is_file()
    is_rounded = any(tensor.dtype != "F32" for file in read_headers(model) for tensor in file.tensors)
    with progress("gate", len(samples) * (4 if is_rounded else 3), " samples") as bar:
        merged = _place(load_model(model, torch.float32)[0])
        generated = []
        for sample in samples:
            generated.append(_ask(merged, Encoder.from_checkpoint(model), sample, manifest))
            bar.update()
        found = _logits(merged, samples, manifest, bar)
        del merged
        reference = _place(
            load_with_adapter(base, adapter, torch.float32) if is_adapter else load_model(adapter, torch.float32)[0]
        )
        expected = _logits(reference, samples, manifest, bar)
        rounding = None
        if is_rounded:
            rounding = _largest_difference(found, expected)
            expected = _logits(_rounded(reference, model), samples, manifest, bar)
    parity = Parity(
        rows=len(samples),
        logits=sum(logits.numel() for logits in found),
        largest_difference=_largest_difference(found, expected),
        tolerance=TOLERANCE,
        storage_rounding=rounding,
        same_first_choice=_same_first_choice(found, expected),
    )
    failure = None
    # Written so that a difference which is no number fails too.
    if not parity.largest_difference <= TOLERANCE:
        failure = (
            f"{base} + {adapter}: the merged model's logits differ by {parity.largest_difference:.2e} from those of "
            f"base and adapter, more than {TOLERANCE:.0e}, so it was not published; report it with adapter_config.json."
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ParityReport(parity=parity, generated=generated, peak_resident_bytes=peak, failure=failure)


def _place(model: _Model) -> _Model:
    """On the device that computes fastest."""
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model


def _pick(shards: Path, count: int) -> tuple[list[ModelInput], Manifest]:
    """Samples from all over the split."""
    reader = ShardReader(shards, "eval")
    if not len(reader):
        reader = ShardReader(shards, "train")
    places = np.linspace(0, len(reader) - 1, min(count, len(reader))).round().astype(int)
    return [reader[place] for place in places.tolist()], reader.manifest


@torch.inference_mode()
def _logits(model: _Model, samples: Sequence[ModelInput], manifest: Manifest, bar: Any) -> list[torch.Tensor]:
    """Of each sample, the logits that decide its answer's tokens, [tokens, vocabulary]."""
    model.eval()
    logits = []
    for sample in samples:
        batch = collate([sample], manifest.pad_token_id, manifest.patch_size, "right", manifest.slicing["resampler"])
        labels = batch.pop("labels")[0]
        places = (labels != IGNORED_LABEL).nonzero().flatten()[:MAX_TOKENS] - 1
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        logits.append(output.logits[0, places.to(model.device)].float().cpu())
        bar.update()
    return logits


@torch.inference_mode()
def _ask(model: _Model, encoder: Encoder, sample: ModelInput, manifest: Manifest) -> Generated:
    """Have a sample's first question answered."""
    model.eval()
    supervised = np.flatnonzero(np.asarray(sample.labels) != IGNORED_LABEL)
    end_of_turn = encoder.tokenizer.convert_tokens_to_ids(encoder.generation.end_of_turn)
    start = int(supervised[0])
    expected = [int(token) for token in sample.input_ids[start:]]
    if end_of_turn in expected:
        expected = expected[: expected.index(end_of_turn)]
    prompt = list(map(int, sample.input_ids[:start]))
    opening = {encoder.tokenizer.convert_tokens_to_ids(mark) for mark in ("<image>", "<slice>")}
    shown = sum(token in opening for token in prompt)
    row = replace(sample, input_ids=prompt, labels=[], slices=sample.slices[:shown])
    batch = collate([row], manifest.pad_token_id, manifest.patch_size, "left", manifest.slicing["resampler"])
    output = model.generate(  # type: ignore[operator]  # comes with GenerationMixin
        **{name: tensor.to(model.device) for name, tensor in batch.items()},
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=end_of_turn,
        pad_token_id=manifest.pad_token_id,
    )
    new = output[0, len(prompt) :].tolist()
    decode = encoder.tokenizer.decode
    return Generated(
        id=sample.id,
        expected=str(decode(expected, skip_special_tokens=True)).strip(),
        answer=str(decode(new, skip_special_tokens=True)).strip(),
    )


def _rounded(reference: _Model, model: Path) -> _Model:
    """The reference with each weight rounded as the merged folder stores it, by PEFT's own merge."""
    if isinstance(reference, PeftModel):
        _part_shared(reference)
        reference = reference.merge_and_unload()
    files = read_headers(model)
    names = read_names(model, files)
    stored = {names.modules[tensor.name]: tensor.dtype for file in files for tensor in file.tensors}
    with torch.no_grad():
        for name, parameter in reference.named_parameters(remove_duplicate=False):
            dtype = stored.get(name) or stored.get(names.ties.get(name, ""))
            if dtype is not None:
                parameter.copy_(cast(parameter, dtype))
    return reference


def _part_shared(model: nn.Module) -> None:
    """Give each module weights of its own; PEFT merges in place, so that shared ones would change twice."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def _largest_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(float((left - right).abs().max()) for left, right in zip(found, expected, strict=True))


def _same_first_choice(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    same = torch.cat([left.argmax(-1) == right.argmax(-1) for left, right in zip(found, expected, strict=True)])
    return float(same.float().mean())


if __name__ == "__main__":
    main(sys.argv[1:])
