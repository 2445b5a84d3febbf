"""Every input is accepted correctly or refused with a sentence: no traceback, no hang.

`FUZZ_EXAMPLES` sets the number of inputs of each test: 60 by default, more in the long runs.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save

from minicpmv_finetune import storage
from minicpmv_finetune.components.merge.update import read_adapter
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.checking import inspect_image
from minicpmv_finetune.data.samples import SampleError, read_info
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.kubeflow.profile import Profile, load_profile
from minicpmv_finetune.minicpmv.generations import detect_generation, read_slicing_config
from minicpmv_finetune.reports.training_record import read_record
from minicpmv_finetune.shards.cache import open_shards
from minicpmv_finetune.shards.format import ShardReader, read_manifest

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
    _validate(tmp_path)


@FUZZ
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(lambda text: f"[{text}".encode(errors="replace")))
def test_files_that_are_not_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(content)
    _validate(tmp_path)


@contextlib.contextmanager
def _accepted_or_refused_in_one_sentence() -> Iterator[None]:
    try:
        yield
    except (UserError, RetryableError, SampleError) as error:
        if not str(error) or "\n" in str(error):
            pytest.fail(f"not one sentence: {error}")


def _validate(folder: Path) -> None:
    """Validate `data.json`, which must be accepted or refused in one sentence."""
    with _accepted_or_refused_in_one_sentence():
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
def images() -> list[bytes]:
    """A small image in each format that Pillow writes by itself, and files of two formats at once."""
    Image.init()
    files: dict[str, bytes] = {}
    for name in sorted(set(Image.SAVE) & set(Image.OPEN)):
        for mode in ("RGB", "L", "1"):
            file = io.BytesIO()
            with contextlib.suppress(Exception):
                Image.new(mode, (24, 16), 1).save(file, name)
                files[name] = file.getvalue()
                break
    polyglots = [
        files[name] + other for name in ("PNG", "JPEG", "GIF") for other in (b"PK\x03\x04", b"<script>x</script>")
    ]
    return [*files.values(), *polyglots, b"%PDF-1.4\n" + files["PNG"], b"GIF89a/*" + files["JPEG"]]


def _damage(content: bytes, data: st.DataObject) -> bytes:
    """The content with some bytes changed and, in most cases, the end cut off."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 6))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    del changed[data.draw(st.integers(1, len(changed))) :]
    return bytes(changed)


@FUZZ
@given(data=st.data())
def test_damaged_images(data: st.DataObject, images: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(_damage(data.draw(st.sampled_from(images)), data))
    with _accepted_or_refused_in_one_sentence():
        inspect_image(str(path), None, False)


@FUZZ
@given(data=st.data())
def test_damaged_shards(data: st.DataObject, prepared: Path, tmp_path: Path) -> None:
    manifest = read_manifest(prepared / "shards")
    intact = {shard.file: (prepared / "shards" / shard.file).read_bytes() for shard in manifest.files}
    (tmp_path / "manifest.json").write_text((prepared / "shards" / "manifest.json").read_text())
    damaged = {name: _damage(content, data) for name, content in intact.items()}
    for name, content in damaged.items():
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).write_bytes(content)
    with _accepted_or_refused_in_one_sentence():
        open_shards(str(tmp_path), tmp_path / "cache")
        assert damaged == intact
    with _accepted_or_refused_in_one_sentence():  # reading without comparing digests is safe too
        for row in ShardReader(tmp_path, "train"):
            assert len(row.input_ids)


@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(sorted(LoraConfig().to_dict())) | st.text(max_size=8), JSON, max_size=3),
    part=st.sampled_from(["lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "weight", "x"]),
    data=st.data(),
)
def test_adapters(changes: dict[str, object], part: str, data: st.DataObject, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"]).to_dict() | {"target_modules": ["q_proj"]} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, default=str))
    names = ["base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"]
    content = save({name: torch.ones(2, 2) for name in (*names, f"base_model.model.q_proj.{part}")})
    if data.draw(st.booleans()):
        content = _damage(content, data)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with _accepted_or_refused_in_one_sentence():
        read_adapter(tmp_path)


@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(sorted(Profile.model_fields)) | st.text(max_size=8), JSON, max_size=4),
    lines=st.none() | st.text(max_size=80),
)
def test_profiles(changes: dict[str, object], lines: str | None, tmp_path: Path) -> None:
    text = yaml.safe_dump(changes) if lines is None else lines
    (tmp_path / "profile.yaml").write_bytes(text.encode(errors="replace"))
    with _accepted_or_refused_in_one_sentence():
        load_profile(tmp_path / "profile.yaml")


@FUZZ
@given(
    scheme=st.sampled_from(["", "s3://", "S3://", "file://", "http://", "hf:", "x://", "//"]),
    rest=st.text(max_size=40)
    | st.sampled_from(["../..", "/etc", "a/../b", "bucket", "bucket/", "%2e%2e/", "\0", "\n"]),
)
def test_uris(scheme: str, rest: str, s3_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (storage.size, storage.list_files, storage.require_allowed):
        with _accepted_or_refused_in_one_sentence():
            read(scheme + rest)


@FUZZ
@given(name=st.sampled_from(["manifest.json", "dataset.json", "training.json", "config.json"]), document=JSON)
def test_own_json_documents(name: str, document: object, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(document))
    reader = {
        "manifest.json": read_manifest,
        "dataset.json": read_info,
        "training.json": read_record,
        "config.json": detect_generation,
    }[name]
    with _accepted_or_refused_in_one_sentence():
        reader(tmp_path)


@FUZZ
@given(settings_=JSON)
def test_processor_settings(settings_: object, tiny_46: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_46 / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings_))
    with _accepted_or_refused_in_one_sentence():
        read_slicing_config(tmp_path)


@FUZZ
@given(
    flags=st.lists(st.sampled_from(["--lora_r", "--use_lora", "--learning_rate", "true", "-1", "x"]) | TEXT, max_size=6)
)
def test_flags(flags: list[str]) -> None:
    with _accepted_or_refused_in_one_sentence():
        parse(["--data_path", "d", "--output_dir", "o", *flags], announce=lambda sentence: None)
