"""The texts of a data file, for a tokenizer that shall know them."""

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.terminal import print_sentence

from .checking import InspectedImage, check_record
from .reading import local_copy, read_records
from .samples import ImageRef, Reject, Sample


def read_texts(pattern: str) -> list[str]:
    """Every text of the conversations in data files, and every accepted answer; images are not looked at.

    Args:
        pattern: Path or URI of a data file, or a pattern of several.

    Raises:
        UserError: A file is missing or malformed, or none of its samples can be used.
        RetryableError: The store does not answer.
    """
    storage.require_allowed(pattern)
    texts: list[str] = []
    rejected: list[Reject] = []
    for uri in storage.expand(pattern):
        for record in read_records(uri, local_copy(uri)):
            outcome = check_record(record, _without_looking)
            if isinstance(outcome, Reject):
                if record.is_last:
                    raise UserError(f"{outcome.place}: {outcome.message}")
                rejected.append(outcome)
                continue
            sample = Sample.model_validate_json(outcome.line)
            texts += [turn.text for turn in sample.turns]
            texts += sample.answers
    if rejected:
        first = f"the first is {rejected[0].place}: {rejected[0].message}"
        if not texts:
            raise UserError(f"{pattern}: none of the {len(rejected):,} samples can be used; {first}")
        print_sentence(f"note: {len(rejected):,} samples cannot be used, and their texts are left out; {first}")
    return texts


def _without_looking(address: str) -> InspectedImage:
    return InspectedImage(ImageRef(uri=address, sha256="", width=1, height=1), b"", ())
