"""Answers that earlier runs have generated, so that an evaluation generates only those that are new.

Base model and champion stay the same from run to run, and so do most evaluation samples. Their answers are kept beside
the folders of the runs, one file for each model:

    <folder>/<digest of the model and of the longest answer>.json    {digest of a prompt and its images: Answer}

A digest contains everything that decides an answer, so an answer that is found is the one that would be generated. The
files may be deleted at any time. Two runs that write at the same time keep the answers of one of them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.data.samples import Sample
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.minicpmv.answer import Answer, make_prompt
from minicpmv_finetune.minicpmv.checkpoint import fingerprint
from minicpmv_finetune.minicpmv.conversation import Encoder

ANSWERS_FOLDER = "minicpmv-answers"
_VERSION = 1  # changes when the same model may give other answers
_ANSWERS = TypeAdapter(dict[str, Answer])


def answer_what_is_new(
    folder: str,
    checkpoint: Path,
    encoder: Encoder,
    samples: Sequence[Sample],
    max_new_tokens: int,
    generate: Callable[[Sequence[Sample]], Sequence[Answer]],
) -> tuple[list[Answer], int]:
    """Answers to samples, of which only those are generated that no earlier run has.

    Args:
        folder: Folder or s3:// URI of the kept answers.
        checkpoint: The model.
        encoder: Encoder of the model.
        samples: Samples to answer.
        max_new_tokens: Largest number of tokens of an answer.
        generate: Generates the answers to samples; not called if all are known.

    Returns:
        The answers in the order of the samples, and the number of those that were known.
    """
    file = f"{_model_digest(checkpoint, encoder, max_new_tokens)}.json"
    known = _read(folder, file)
    digests = [_sample_digest(sample, encoder) for sample in samples]
    new = {digest: sample for digest, sample in zip(digests, samples, strict=True) if digest not in known}
    if new:
        found = known | dict(zip(new, generate(list(new.values())), strict=True))
        _write(folder, file, found)
    else:
        found = known
    return [found[digest] for digest in digests], sum(digest in known for digest in digests)


def _model_digest(checkpoint: Path, encoder: Encoder, max_new_tokens: int) -> str:
    """A hash of the weights, and of the files and settings by which they become answers."""
    small = [path for path in sorted(checkpoint.iterdir()) if path.suffix in {".json", ".jinja", ".txt", ".model"}]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in small}
    slicing = [str(encoder.slicing), encoder.generation.version]
    content = [_VERSION, fingerprint(checkpoint), files, slicing, max_new_tokens]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _sample_digest(sample: Sample, encoder: Encoder) -> str:
    thinking = encoder.asks_for_reasoning(sample)
    prompt = make_prompt(sample, encoder, thinking)
    content = [list(prompt.ids), prompt.images, thinking]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _read(folder: str, file: str) -> dict[str, Answer]:
    """The kept answers; none if there is no such file, or nobody may read it."""
    try:
        if file not in storage.list_files(folder):
            return {}
        return _ANSWERS.validate_json(storage.read_bytes(storage.join(folder, file)))
    except (UserError, RetryableError, ValidationError):
        return {}


def _write(folder: str, file: str, answers: Mapping[str, Answer]) -> None:
    content = json.dumps({digest: asdict(answer) for digest, answer in answers.items()}, ensure_ascii=False)
    try:
        storage.write_bytes(storage.join(folder, file), content.encode())
    except (UserError, RetryableError) as error:
        print(f"Answers are not kept for later runs: {error}", flush=True)
