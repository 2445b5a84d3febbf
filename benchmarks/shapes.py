"""Models and data of the speed benchmarks: small models of the published architectures, photographs of many sizes.

The photographs are the two of scikit-learn, scaled to sides between 200 and 1,500 pixels. The weights are random: speed
and memory do not depend on their values.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import PreTrainedModel
from transformers.models.minicpmv4_6 import MiniCPMV4_6Config

from minicpmv_finetune.minicpmv.configuration import MiniCPMVConfig, find_token_id
from minicpmv_finetune.minicpmv.generations import generation_named
from minicpmv_finetune.minicpmv.modeling import MiniCPMVForConditionalGeneration
from minicpmv_finetune.minicpmv.modeling_qwen3_5 import MiniCPMV4_6ForConditionalGeneration
from minicpmv_finetune.shards.codecs import DEFAULT_CODEC, Codec

IMAGE_TOKEN = 3
QUESTION = "describe the photograph"
ANSWER = "describe the photograph in detail "


@dataclass(frozen=True)
class Shape:
    """The sizes of a model's parts.

    Attributes:
        text: Hidden size of the language model.
        layers: Number of layers of the language model.
        vocabulary: Size of the vocabulary.
        vision: Hidden size of the vision tower.
        vision_layers: Number of layers of the vision tower.
    """

    text: int
    layers: int
    vocabulary: int
    vision: int
    vision_layers: int


VISION_HEAVY = Shape(text=128, layers=4, vocabulary=512, vision=256, vision_layers=6)
LANGUAGE_HEAVY = Shape(text=256, layers=6, vocabulary=150_000, vision=64, vision_layers=3)


def make_model(version: str, shape: Shape, attention: str = "sdpa") -> PreTrainedModel:
    """A model of generation 4.6 or 2.6 with random weights."""
    torch.manual_seed(0)
    text: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.text,
        "intermediate_size": 2 * shape.text,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
    }
    vision: dict[str, Any] = {
        "hidden_size": shape.vision,
        "intermediate_size": 2 * shape.vision,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": 4,
        "patch_size": 14,
    }
    if version == "2.6":
        config_2_6 = MiniCPMVConfig(
            version=2.6,
            query_num=64,
            image_token_id=IMAGE_TOKEN,
            vision_config={**vision, "image_size": 980, "model_type": "siglip"},
            **(text | {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}),
        )
        return MiniCPMVForConditionalGeneration(config_2_6)
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * shape.layers
    further: dict[str, Any] = {"attn_implementation": attention}  # not among the arguments that the class declares
    config = MiniCPMV4_6Config(
        image_size=448,
        insert_layer_id=1,
        tie_word_embeddings=False,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        text_config={
            **text,
            "model_type": "qwen3_5_text",
            "head_dim": shape.text // 4,
            "linear_key_head_dim": shape.text // 8,
            "linear_value_head_dim": shape.text // 8,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "layer_types": kinds[: shape.layers],
        },
        vision_config={**vision, "image_size": 448, "insert_layer_id": 1},
        **further,
    )
    return MiniCPMV4_6ForConditionalGeneration(config)


def write_photographs(folder: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Write JPEG photographs with questions and answers; returns the samples in MiniCPM-V's JSON format.

    The samples are also written to `photographs.json` and, as chat messages, to `photographs.jsonl`.
    """
    images = folder / "photographs"
    images.mkdir(parents=True, exist_ok=True)
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    random = np.random.RandomState(seed)
    samples: list[dict[str, Any]] = []
    for number in range(count):
        size = (int(random.randint(200, 1500)), int(random.randint(200, 1500)))
        name = f"photographs/{number:03d}.jpg"
        sources[number % 2].resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=90)
        turns = [
            {"role": "user", "content": f"<image>\n{QUESTION}"},
            {"role": "assistant", "content": ANSWER * int(random.randint(1, 30))},
        ]
        samples.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "photographs.json").write_text(json.dumps(samples))
    lines = [
        json.dumps({"messages": sample["conversations"], "images": [str((folder / sample["image"]).absolute())]})
        for sample in samples
    ]
    (folder / "photographs.jsonl").write_text("\n".join(lines) + "\n")
    return samples


def write_checkpoint(folder: Path) -> Path:
    """Write a tiny 4.6, with tokenizer and processor, that slices images as the published model does."""
    from transformers.models.minicpmv4_6 import MiniCPMV4_6ImageProcessor, MiniCPMV4_6Processor

    from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
    from minicpmv_finetune.pipelines.demo import DEMO_CORPUS

    write_tiny_checkpoint(folder, corpus=(*DEMO_CORPUS, ANSWER))
    config: Any = MiniCPMV4_6Config.from_pretrained(folder)
    config.image_size = config.vision_config.image_size = 448
    torch.manual_seed(0)
    MiniCPMV4_6ForConditionalGeneration(config).save_pretrained(folder)
    processor: Any = MiniCPMV4_6Processor.from_pretrained(folder)
    processor.image_processor = MiniCPMV4_6ImageProcessor()
    processor.save_pretrained(folder)
    return folder


def prepare_digits(folder: Path, count: int | None = None) -> tuple[Path, Path]:
    """Write the demo's base checkpoint and shards of its digits: all of them, or the first `count`.

    Returns:
        The folders of the checkpoint and of the shards.
    """
    from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
    from minicpmv_finetune.pipelines.demo import DEMO_CORPUS, write_digits

    base = write_tiny_checkpoint(folder / "base", corpus=DEMO_CORPUS)
    data, _ = write_digits(folder / "digits", seed=0)
    data.write_text(json.dumps(json.loads(data.read_text())[:count]))
    return base, write_shards(folder, data, base)


def write_shards(folder: Path, data: Path, base: Path, codec: Codec = DEFAULT_CODEC) -> Path:
    """Validate data and write it to shards for a base checkpoint, as the first two steps do; returns their folder."""
    from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
    from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data

    settings = PreprocessSettings(codec=codec)
    validate_data(str(data), "", folder / "dataset", folder / "rejects.jsonl", ValidationSettings(eval_fraction=0))
    preprocess(folder / "dataset", str(base), folder / "shards", folder / "too-long.jsonl", settings)
    return folder / "shards"


def write_base(folder: Path, version: str, shape: Shape, texts: Iterable[str]) -> Path:
    """Write a model of a shape as a checkpoint that slices as the published one, and whose tokenizer knows the texts.

    Args:
        folder: Folder that receives it.
        version: Generation, 4.6 or 2.6.
        shape: Sizes of the model.
        texts: Texts of the data.
    """
    from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint

    write_tiny_checkpoint(folder, version, corpus=texts)
    model: Any = make_model(version, shape)
    model.config.image_token_id = find_token_id(folder, generation_named(version).image_token)
    model.save_pretrained(folder)
    for path in folder.glob("*processor_config.json"):
        content = path.read_text().replace('"scale_resolution": 112', '"scale_resolution": 448')
        path.write_text(content.replace('"image_feature_size": 16', '"image_feature_size": 64'))
    return folder


def write_questions(data: Path, most: int, path: Path) -> Path:
    """Write the samples of a file again, of each image only the first `most`."""
    asked: dict[str, int] = {}
    with data.open() as lines, path.open("w") as file:
        for sample in map(json.loads, lines):
            image = sample["image"]
            asked[image] = asked.get(image, 0) + 1
            if asked[image] <= most:
                file.write(f"{json.dumps(sample | {'image': f'{data.parent.absolute()}/{image}'})}\n")
    return path
