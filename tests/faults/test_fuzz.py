"""Whatever comes in is accepted correctly or refused with a sentence: no traceback, no hang.

`FUZZ_EXAMPLES` sets the number of inputs a property sees: 60 with the other tests, more in the long runs.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from minicpmv_finetune.components.errors import RetryableError, UserError
from minicpmv_finetune.components.minicpmv.generations import generation_of, slicing_of
from minicpmv_finetune.components.samples import SampleError, read_info
from minicpmv_finetune.components.shards import read_manifest
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.training_record import read_record
from minicpmv_finetune.components.validate_data.checking import inspect_picture
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    deadline=10_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
TEXT = st.text(max_size=60) | st.sampled_from(["<image>", "<image_00>", "<|im_end|>", "../../x", "\x00", "<script>"])
SAMPLE = st.fixed_dictionaries(
    {},
    optional={
        "id": TEXT | JSON,
        "image": TEXT | st.dictionaries(TEXT, TEXT, max_size=3) | JSON,
        "conversations": st.lists(
            st.fixed_dictionaries(
                {}, optional={"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": TEXT | JSON}
            ),
            max_size=4,
        )
        | JSON,
        "tags": JSON,
        "metric": JSON,
        "answers": JSON,
    },
)


@FUZZ
@given(samples=st.lists(SAMPLE | JSON, max_size=4))
def test_samples(samples: list[object], tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(samples, ensure_ascii=True))
    _refused_or_fine(tmp_path)


@FUZZ
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(lambda text: f"[{text}".encode(errors="replace")))
def test_files_that_are_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(content)
    _refused_or_fine(tmp_path)


@contextlib.contextmanager
def _refused_in_one_sentence() -> Iterator[None]:
    try:
        yield
    except (UserError, RetryableError, SampleError) as error:
        if not str(error) or "\n" in str(error):
            pytest.fail(f"not one sentence: {error}")


def _refused_or_fine(folder: Path) -> None:
    with _refused_in_one_sentence():
        info = validate_data(
            str(folder / "data.json"),
            str(folder / "data.json"),
            folder / "dataset",
            folder / "rejects.jsonl",
            ValidationSettings(max_reject_ratio=1.0),
        )
        assert info.rows["train"] > 0
        assert read_info(folder / "dataset") == info


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """A small picture in each format that Pillow writes without help."""
    files = []
    for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS"):
        file = io.BytesIO()
        Image.new("RGB", (24, 16), (200, 40, 90)).save(file, name)
        files.append(file.getvalue())
    return files


@FUZZ
@given(data=st.data())
def test_pictures_that_were_damaged(data: st.DataObject, pictures: list[bytes], tmp_path: Path) -> None:
    content = bytearray(data.draw(st.sampled_from(pictures)))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    path = tmp_path / "picture"
    path.write_bytes(bytes(content))
    with _refused_in_one_sentence():
        inspect_picture(str(path), None, False)


@FUZZ
@given(name=st.sampled_from(["manifest.json", "dataset.json", "training.json", "config.json"]), document=JSON)
def test_documents_of_ours(name: str, document: object, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(document))
    reader = {
        "manifest.json": read_manifest,
        "dataset.json": read_info,
        "training.json": read_record,
        "config.json": generation_of,
    }[name]
    with _refused_in_one_sentence():
        reader(tmp_path)


@FUZZ
@given(settings_=JSON)
def test_processor_settings(settings_: object, tiny_46: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_46 / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings_))
    with _refused_in_one_sentence():
        slicing_of(tmp_path)


@FUZZ
@given(
    flags=st.lists(st.sampled_from(["--lora_r", "--use_lora", "--learning_rate", "true", "-1", "x"]) | TEXT, max_size=6)
)
def test_flags(flags: list[str]) -> None:
    with _refused_in_one_sentence():
        parse(["--data_path", "d", "--output_dir", "o", *flags], announce=lambda sentence: None)
