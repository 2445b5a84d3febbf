"""Load a merged model once and ask it one question about each of several images.

    python examples/ask_a_model.py build/mine/model "What is the total?" photo-1.jpg photo-2.jpg

For a single question `minicpmv-finetune predict` is enough. The model is a folder, an s3:// URI or a hub id.
"""

import sys
from pathlib import Path

from minicpmv_finetune import storage
from minicpmv_finetune.data.checking import inspect_image
from minicpmv_finetune.data.samples import Sample, SampleError, Turn
from minicpmv_finetune.errors import RetryableError, UserError, end_process
from minicpmv_finetune.minicpmv.answer import answer, inference_device
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder


def question_about(path: Path, question: str) -> Sample:
    """Return a sample that shows an image and asks a question."""
    shown = inspect_image(str(path.absolute())).ref
    # A turn is a list of parts: a number stands for the image of that number.
    turn = Turn(role="user", parts=(0, "\n", question))
    return Sample(id=path.name, images=(shown,), turns=(turn,), source=str(path))


def main(model_uri: str, question: str, paths: list[Path]) -> None:
    """Print one line per image: its path and the answer."""
    checkpoint = storage.fetch(model_uri)
    encoder = Encoder.from_checkpoint(checkpoint)
    model, _ = load_model(checkpoint, device_map=inference_device())
    samples = [question_about(path, question) for path in paths]
    for path, found in zip(paths, answer(model, encoder, samples, max_new_tokens=64), strict=True):
        print(f"{path}: {found.text}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python examples/ask_a_model.py MODEL QUESTION IMAGE...")
    try:
        main(sys.argv[1], sys.argv[2], [Path(path) for path in sys.argv[3:]])
    except (UserError, RetryableError) as error:
        end_process(error)
    except SampleError as error:  # an image that cannot be used
        sys.exit(f"error: {error}")
