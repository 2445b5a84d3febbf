"""One sample after the other: its tokens, its slices, and the row that a shard holds of it."""

from collections.abc import Sequence

from minicpmv_finetune.data.samples import Sample, SampleError, decode_image, open_image
from minicpmv_finetune.minicpmv.conversation import EncodedConversation, Encoder
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.minicpmv.slicing import cut_slices

from .codecs import Codec, store_slices, store_sources
from .format import StoredRow


def tokenize(sample: Sample, encoder: Encoder, model_max_length: int) -> EncodedConversation:
    """The token ids and labels of a sample; its images' sizes are enough for that.

    Raises:
        SampleError: it would not fit, holds a special token, or nothing in it is learnt.
    """
    encoded = encoder.encode(sample)
    if len(encoded.input_ids) > model_max_length:
        raise SampleError(
            "too_long",
            f"{len(encoded.input_ids)} tokens do not fit model_max_length {model_max_length}; raise it, lower "
            "max_slice_nums or shorten the text.",
        )
    if all(label == IGNORED_LABEL for label in encoded.labels):
        raise SampleError("nothing_supervised", "no token of an answer is left to learn from; give it an answer.")
    return encoded


def prepare(sample: Sample, encoder: Encoder, model_max_length: int) -> ModelInput:
    """Tokenize and slice a sample on the fly, without a shard; what shards give back is tested equal to it.

    Raises:
        SampleError: as `tokenize`.
        UserError: an image changed since it was validated.
    """
    encoded = tokenize(sample, encoder, model_max_length)
    plans = encoder.plan(sample)
    slices = [
        pixels
        for number in shown(sample)
        for pixels in cut_slices(open_image(sample.images[number]), plans[number], encoder.slicing)
    ]
    return ModelInput(sample.id, encoded.input_ids, encoded.labels, slices)


def store(
    sample: Sample, encoded: EncodedConversation, files: Sequence[bytes], encoder: Encoder, codec: Codec
) -> StoredRow:
    """What a shard holds of a sample.

    Args:
        sample: it.
        encoded: its tokens.
        files: the bytes of its images, in the order in which the sample lists them.
        encoder: of the base model.
        codec: of the images.
    """
    plans, order = encoder.plan(sample), shown(sample)
    if codec == "source":
        turned = [sample.images[number].turned for number in order]
        images = store_sources([files[number] for number in order], [plans[number] for number in order], turned)
    else:
        images = store_slices(
            [
                pixels
                for number in order
                for pixels in cut_slices(
                    decode_image(files[number], sample.images[number].turned), plans[number], encoder.slicing
                )
            ],
            codec,
        )
    return StoredRow(sample.id, encoded.input_ids, encoded.labels, images)


def count_slices(sample: Sample, encoder: Encoder) -> int:
    """How many slices a sample's images make."""
    plans = encoder.plan(sample)
    return sum(len(plans[number].target_sizes) for number in shown(sample))


def shown(sample: Sample) -> list[int]:
    """The numbers of a sample's images in the order in which its text shows them."""
    return [part for turn in sample.turns for part in turn.parts if isinstance(part, int)]
