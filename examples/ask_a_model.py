"""Load a merged model once and ask it one question about each of several images.

    python examples/ask_a_model.py build/mine/model "What is the total?" photo-1.jpg photo-2.jpg

For a single question `minicpmv-finetune predict` is enough. The model is a folder, an s3:// URI or a hub id.
"""

import sys

from minicpmv_finetune import answer, load
from minicpmv_finetune.errors import RetryableError, UserError, end_process


def main(model_uri: str, question: str, paths: list[str]) -> None:
    """Print one line per image: its path and the answer."""
    model = load(model_uri)
    for path in paths:
        print(f"{path}: {answer(model, question, path, max_new_tokens=64)}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python examples/ask_a_model.py MODEL QUESTION IMAGE...")
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except (UserError, RetryableError) as error:
        end_process(error)
