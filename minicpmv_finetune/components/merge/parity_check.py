"""The parity check: a new process loads the merged folder, generates answers, and compares it with base and adapter.

    python -m minicpmv_finetune.components.merge.parity_check BASE ADAPTER MODEL SHARDS REPORT ROWS

The process reads only the folders, as a user would. Where the checkpoint stores 32 bits, merged and unmerged logits
must agree within float32's rounding. Where it stores 16 bits, every changed weight is rounded once, and no tolerance
could distinguish that rounding from a small mistake; so the reference's weights are rounded in the same way, and the
effect of the rounding itself is reported as a separate number.
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
from minicpmv_finetune.minicpmv.adapters import ADAPTER_CONFIG, load_with_adapter
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.progress import progress
from minicpmv_finetune.shards.format import Manifest, ShardReader
from minicpmv_finetune.workers import end_with_parent

from .names import read_tensor_names
from .report import GeneratedAnswer, Parity, ParityReport
from .weights import cast, read_headers

_Model = PreTrainedModel | PeftModel

TOLERANCE = 1e-3
"""Largest difference of float32 logits: a hundred times the effect of another order of summation, a thousandth of the
effect of a mistake."""

MAX_NEW_TOKENS = 32
MAX_TOKENS = 256
"""Tokens compared per sample: the logits of a whole vocabulary for thousands of tokens would need gigabytes."""


def main(argv: Sequence[str]) -> None:
    """Check a folder and write the report; on a user error write its sentence instead and exit with code 2."""
    base, adapter, model, shards, report = map(Path, argv[:5])
    try:
        report.write_text(check_parity(base, adapter, model, shards, int(argv[5])).model_dump_json())
    except UserError as error:
        # The merge step reports the sentence as its own error.
        report.write_text(str(error))
        sys.exit(error.exit_code)


def check_parity(base: Path, adapter: Path, model: Path, shards: Path, rows: int) -> ParityReport:
    """Load the merged folder, generate answers and compare the logits with those of base and adapter.

    Args:
        base: Checkpoint folder of the base.
        adapter: Folder of a PEFT adapter or of a full fine-tune.
        model: Merged folder.
        shards: Prepared samples; the evaluation split is used, or the training split if there is no other.
        rows: Number of samples.
    """
    samples, manifest = _choose_samples(shards, rows)
    is_adapter = (adapter / ADAPTER_CONFIG).is_file()
    is_rounded = any(tensor.dtype != "F32" for file in read_headers(model) for tensor in file.tensors)
    with progress("parity check", len(samples) * (4 if is_rounded else 3), " samples") as bar:
        merged = _to_device(load_model(model, torch.float32)[0])
        generated = []
        for sample in samples:
            generated.append(_answer_first_question(merged, Encoder.from_checkpoint(model), sample, manifest))
            bar.update()
        found = _logits(merged, samples, manifest, bar)
        del merged
        reference = _to_device(
            load_with_adapter(base, adapter, torch.float32) if is_adapter else load_model(adapter, torch.float32)[0]
        )
        expected = _logits(reference, samples, manifest, bar)
        rounding = None
        if is_rounded:
            rounding = _largest_difference(found, expected)
            expected = _logits(_round_as_stored(reference, model), samples, manifest, bar)
    parity = Parity(
        rows=len(samples),
        logits=sum(logits.numel() for logits in found),
        largest_difference=_largest_difference(found, expected),
        tolerance=TOLERANCE,
        storage_rounding=rounding,
        same_first_choice=_share_of_same_predictions(found, expected),
    )
    failure = None
    # The comparison is written so that NaN fails too.
    if not parity.largest_difference <= TOLERANCE:
        failure = (
            f"{base} + {adapter}: the merged model's logits differ by {parity.largest_difference:.2e} from those of "
            f"base and adapter, more than {TOLERANCE:.0e}, so the model is not published; report this as a bug with "
            f"{ADAPTER_CONFIG}."
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ParityReport(parity=parity, generated=generated, peak_resident_bytes=peak, failure=failure)


def _to_device(model: _Model) -> _Model:
    """Move the model to the GPU if there is one."""
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model


def _choose_samples(shards: Path, count: int) -> tuple[list[ModelInput], Manifest]:
    """Choose samples at equal distances in the split."""
    reader = ShardReader(shards, "eval")
    if not len(reader):
        reader = ShardReader(shards, "train")
    positions = np.linspace(0, len(reader) - 1, min(count, len(reader))).round().astype(int)
    return [reader[position] for position in positions.tolist()], reader.manifest


@torch.inference_mode()
def _logits(model: _Model, samples: Sequence[ModelInput], manifest: Manifest, bar: Any) -> list[torch.Tensor]:
    """For each sample, the logits that predict the tokens of its answer, [tokens, vocabulary]."""
    model.eval()
    logits = []
    for sample in samples:
        batch = collate([sample], manifest.pad_token_id, manifest.patch_size, "right", manifest.slicing["resampler"])
        labels = batch.pop("labels")[0]
        positions = (labels != IGNORED_LABEL).nonzero().flatten()[:MAX_TOKENS] - 1
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        logits.append(output.logits[0, positions.to(model.device)].float().cpu())
        bar.update()
    return logits


@torch.inference_mode()
def _answer_first_question(model: _Model, encoder: Encoder, sample: ModelInput, manifest: Manifest) -> GeneratedAnswer:
    """Generate the answer to the sample's first question."""
    model.eval()
    supervised = np.flatnonzero(np.asarray(sample.labels) != IGNORED_LABEL)
    end_of_turn = encoder.tokenizer.convert_tokens_to_ids(encoder.generation.end_of_turn)
    start = int(supervised[0])
    expected = [int(token) for token in sample.input_ids[start:]]
    if end_of_turn in expected:
        expected = expected[: expected.index(end_of_turn)]
    prompt = list(map(int, sample.input_ids[:start]))
    opening_tokens = {encoder.tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<slice>")}
    slices_in_prompt = sum(token in opening_tokens for token in prompt)
    row = replace(sample, input_ids=prompt, labels=[], slices=sample.slices[:slices_in_prompt])
    batch = collate([row], manifest.pad_token_id, manifest.patch_size, "left", manifest.slicing["resampler"])
    output = model.generate(  # type: ignore[operator]  # a method of GenerationMixin
        **{name: tensor.to(model.device) for name, tensor in batch.items()},
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=end_of_turn,
        pad_token_id=manifest.pad_token_id,
    )
    new = output[0, len(prompt) :].tolist()
    if end_of_turn in new:
        new = new[: new.index(end_of_turn)]
    return GeneratedAnswer(id=sample.id, expected=encoder.decode(expected), answer=encoder.decode(new))


def _round_as_stored(reference: _Model, model: Path) -> _Model:
    """Merge the reference with PEFT, and round each weight as the merged folder stores it."""
    if isinstance(reference, PeftModel):
        _copy_shared_weights(reference)
        reference = reference.merge_and_unload()
    files = read_headers(model)
    names = read_tensor_names(model, files)
    stored = {names.modules[tensor.name]: tensor.dtype for file in files for tensor in file.tensors}
    with torch.no_grad():
        for name, parameter in reference.named_parameters(remove_duplicate=False):
            dtype = stored.get(name) or stored.get(names.ties.get(name, ""))
            if dtype is not None:
                parameter.copy_(cast(parameter, dtype))
    return reference


def _copy_shared_weights(model: nn.Module) -> None:
    """Give each module its own copy of shared weights; PEFT merges in place and would change shared weights twice."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def _largest_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(float((left - right).abs().max()) for left, right in zip(found, expected, strict=True))


def _share_of_same_predictions(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    same = torch.cat([left.argmax(-1) == right.argmax(-1) for left, right in zip(found, expected, strict=True)])
    return float(same.float().mean())


if __name__ == "__main__":
    # A merge that is killed, as for lack of memory, must not leave the model in memory. A fork is ended by its tree.
    end_with_parent()
    main(sys.argv[1:])
