"""Encode a sample: tokenize its conversation, slice its images, and form the row that a shard stores.

`ENCODING_VERSION` is part of the key under which finished shards are cached, so that shards of another version are not
used. `tests/shards/test_encoding.py` compares encoded samples with a golden file of the version.
"""

from collections.abc import Sequence

from minicpmv_finetune.data.samples import Sample, SampleError, decode_image
from minicpmv_finetune.minicpmv.conversation import EncodedConversation, Encoder
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.minicpmv.slicing import cut_slices

from .codecs import Codec, store_slices, store_sources
from .format import StoredRow

# Raise it with every change after which some sample gets another row from the same base model and the same settings:
# other token ids, labels, slices or stored bytes, or another decision about rejecting the sample. Changes of versions
# of libraries need no new number, because the versions of the libraries are part of the key too.
ENCODING_VERSION = 3


def tokenize(sample: Sample, encoder: Encoder, model_max_length: int) -> EncodedConversation:
    """Tokenize a sample; no image is read, because the sizes of the images determine their tokens.

    Raises:
        SampleError: The sample is too long, contains a token of the format itself, has an answer that cannot be
            separated from its prompt, or has no supervised token.
    """
    encoded = encoder.encode(sample)
    if len(encoded.input_ids) > model_max_length:
        raise SampleError(
            "too_long",
            f"{len(encoded.input_ids)} tokens do not fit model_max_length {model_max_length}; raise it, lower "
            "max_slice_nums or shorten the text.",
        )
    if all(label == IGNORED_LABEL for label in encoded.labels):
        raise SampleError("nothing_supervised", "no token of an answer is left to train on; give the sample an answer.")
    return encoded


def prepare(sample: Sample, encoder: Encoder, model_max_length: int) -> ModelInput:
    """Tokenize and slice a sample on the fly, without a shard; tests compare the rows of shards with this result.

    Raises:
        SampleError: As in `tokenize`.
        UserError: An image changed since it was validated.
    """
    encoded = tokenize(sample, encoder, model_max_length)
    return ModelInput(sample.id, encoded.input_ids, encoded.labels, encoder.cut_images(sample))


def store(
    sample: Sample, encoded: EncodedConversation, files: Sequence[bytes], encoder: Encoder, codec: Codec
) -> StoredRow:
    """Form the row that a shard stores for a sample.

    Args:
        sample: The sample.
        encoded: The tokens of the sample.
        files: The bytes of the image files, in the order in which the sample lists them.
        encoder: The encoder of the base model.
        codec: The codec of the images.
    """
    plans, order = encoder.plan(sample), sample.image_order
    if codec == "source":
        rotated = [sample.images[number].rotated for number in order]
        images = store_sources([files[number] for number in order], [plans[number] for number in order], rotated)
    else:
        images = store_slices(
            [
                pixels
                for number in order
                for pixels in cut_slices(
                    decode_image(files[number], sample.images[number].rotated), plans[number], encoder.slicing
                )
            ],
            codec,
        )
    return StoredRow(sample.id, encoded.input_ids, encoded.labels, images)


def count_slices(sample: Sample, encoder: Encoder) -> int:
    """The number of slices of all images of a sample."""
    plans = encoder.plan(sample)
    return sum(len(plans[number].target_sizes) for number in sample.image_order)
