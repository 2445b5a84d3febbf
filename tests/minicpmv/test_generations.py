"""Properties of every generation, with tiny random checkpoints: batches, padding, text without images, serving."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from minicpmv_finetune.data.samples import ImageRef, Sample, SampleError, Turn
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import GENERATIONS, detect_generation, write_max_slices
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.shards.encoding import prepare

VERSIONS = [generation.version for generation in GENERATIONS]
SIZES = [(112, 112), (300, 200), (40, 230), (20, 20)]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, its model and samples: images of different sizes, two images, earlier turns, text alone."""

    folder: Path
    model: Any
    encoder: Encoder
    samples: list[Sample]
    inputs: list[ModelInput]

    def collate(self, inputs: list[ModelInput], side: Literal["left", "right"] = "right") -> dict[str, torch.Tensor]:
        return collate(inputs, self.encoder.pad_token_id, self.encoder.slicing.patch_size, side)

    @property
    def merger(self) -> torch.nn.Module:
        module: torch.nn.Module = self.model.get_submodule(self.encoder.generation.merger)
        return module


@pytest.fixture(scope="module", params=VERSIONS)
def loaded(
    request: pytest.FixtureRequest, tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Loaded:
    folder = tiny(request.param)
    model = load_model(folder, torch.float32)[0].eval()
    encoder = Encoder.from_checkpoint(folder)
    images = write_images(tmp_path_factory.mktemp("images"))
    samples = [conversation((0, "\nWhat is this?"), [image], name=str(n)) for n, image in enumerate(images)]
    samples.append(conversation((0, "\n", 1, "\nCompare."), images[:2], name="two"))
    samples.append(conversation(("Hello",), [], name="words"))
    earlier = (Turn(role="user", parts=(0, "\nWhat?")), Turn(role="assistant", parts=("A digit.",)))
    samples.append(conversation(("And now?",), images[1:2], earlier, name="turns"))
    return Loaded(folder, model, encoder, samples, [prepare(sample, encoder, 10**6) for sample in samples])


def write_images(folder: Path) -> list[ImageRef]:
    images = []
    for width, height in SIZES:
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = folder / f"{width}x{height}.png"
        Image.fromarray(pixels).save(path)
        digest = sha256(path.read_bytes()).hexdigest()
        images.append(ImageRef(uri=str(path), sha256=digest, width=width, height=height))
    return images


def conversation(
    question: tuple[str | int, ...], images: list[ImageRef], earlier: tuple[Turn, ...] = (), name: str = ""
) -> Sample:
    asked, answered = Turn(role="user", parts=question), Turn(role="assistant", parts=(f"The digit is {len(name)}.",))
    return Sample(id=name, images=tuple(images), turns=(*earlier, asked, answered), source="test")


@torch.no_grad()
def test_a_padded_batch_equals_single_samples(loaded: Loaded) -> None:
    batched = loaded.model(**loaded.collate(loaded.inputs)).logits
    for sample, logits in zip(loaded.inputs, batched, strict=True):
        single = loaded.model(**loaded.collate([sample])).logits[0]
        torch.testing.assert_close(logits[: len(sample.input_ids)], single, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_loss_of_a_padded_batch_is_the_mean_over_its_supervised_tokens(loaded: Loaded) -> None:
    counts = [sum(label != IGNORED_LABEL for label in sample.labels) for sample in loaded.inputs]
    single = [loaded.model(**loaded.collate([sample])).loss.item() for sample in loaded.inputs]
    batched = loaded.model(**loaded.collate(loaded.inputs)).loss.item()
    assert batched == pytest.approx(np.average(single, weights=counts), abs=1e-5)
    # The Trainer divides by the tokens of all processes and accumulation steps.
    scaled = loaded.model(**loaded.collate(loaded.inputs), num_items_in_batch=torch.tensor(2 * sum(counts))).loss.item()
    assert scaled == pytest.approx(batched / 2, abs=1e-5)


@torch.no_grad()
def test_left_padded_generation_equals_single_generation(loaded: Loaded) -> None:
    prompts = [
        ModelInput(sample.id, loaded.encoder.encode_prompt(sample), [], model_input.slices)
        for sample, model_input in zip(loaded.samples, loaded.inputs, strict=True)
    ]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def new_tokens(inputs: list[ModelInput]) -> list[list[int]]:
        batch = loaded.collate(inputs, "left")
        generated: list[list[int]] = loaded.model.generate(**batch, **options)[
            :, batch["input_ids"].shape[1] :
        ].tolist()
        return generated

    assert new_tokens(prompts) == [new_tokens([prompt])[0] for prompt in prompts]


@torch.no_grad()
def test_generation_with_a_cache_equals_plain_forward_passes(loaded: Loaded) -> None:
    ids, slices = loaded.encoder.encode_prompt(loaded.samples[1]), loaded.inputs[1].slices
    batch = loaded.collate([ModelInput("", ids, [], slices)])
    generated = loaded.model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(4):
        logits = loaded.model(**loaded.collate([ModelInput("", ids, [], slices)])).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    assert generated[0].tolist() == ids


@torch.no_grad()
def test_generation_computes_the_logits_of_a_prompts_last_token_alone(loaded: Loaded) -> None:
    computed: list[int] = []
    hook = loaded.model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: computed.append(logits.shape[1])
    )
    loaded.model.generate(**loaded.collate(loaded.inputs), max_new_tokens=3, do_sample=False, eos_token_id=None)
    hook.remove()
    assert computed == [1, 1, 1]


def test_a_batch_without_images_gives_the_vision_modules_zero_gradients(loaded: Loaded) -> None:
    # Otherwise the other processes would wait forever for a process whose batch has no image.
    text_only = next(sample for sample in loaded.inputs if not sample.slices)
    parts = [loaded.model.get_submodule(loaded.encoder.generation.vision_tower), loaded.merger]
    loaded.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        plain = loaded.model(**loaded.collate([text_only])).loss
    loaded.model.train()
    loss = loaded.model(**loaded.collate([text_only])).loss
    loss.backward()
    loaded.model.eval()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-6)
    for part in parts:
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())
    loaded.model.zero_grad(set_to_none=True)


def test_gradient_checkpointing_changes_no_gradient(loaded: Loaded) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        loaded.model.zero_grad(set_to_none=True)
        loaded.model.train()
        loaded.model(**loaded.collate(loaded.inputs[:2]), use_cache=False).loss.backward()
        loaded.model.eval()
        return {name: p.grad.clone() for name, p in loaded.model.named_parameters() if p.grad is not None}

    plain = gradients()
    loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    loaded.model.gradient_checkpointing_disable()
    loaded.model.zero_grad(set_to_none=True)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_training_sample_begins_with_the_serving_prompt(loaded: Loaded) -> None:
    for sample, trained in zip(loaded.samples, loaded.inputs, strict=True):
        prompt = loaded.encoder.encode_prompt(sample)
        assert list(trained.input_ids[: len(prompt)]) == prompt
        supervised = [at for at, label in enumerate(trained.labels) if label != IGNORED_LABEL and at >= len(prompt)]
        assert supervised == list(range(len(prompt), supervised[-1] + 1))
        answer = loaded.encoder.tokenizer.decode([trained.input_ids[at] for at in supervised])
        assert answer == f"The digit is {len(sample.id)}.<|im_end|>"


def test_the_error_for_too_many_image_tokens_contains_both_counts(loaded: Loaded) -> None:
    image_token = loaded.encoder.generation.image_token
    image_token_id = loaded.encoder.tokenizer.get_vocab()[image_token]
    count = sum(token == image_token_id for token in loaded.inputs[0].input_ids)
    sample = ModelInput("", [*loaded.inputs[0].input_ids, image_token_id], [], loaded.inputs[0].slices)
    with pytest.raises((ValueError, RuntimeError), match=rf"{count + 1}.*{count}"):
        loaded.model(**loaded.collate([sample]))


def test_every_buffer_equals_that_of_a_newly_built_model(loaded: Loaded) -> None:
    # Loading builds the model on the meta device, where buffers that are not in the file are never computed.
    fresh = dict(type(loaded.model)(loaded.model.config).named_buffers())
    for name, buffer in loaded.model.named_buffers():
        assert not buffer.is_meta
        torch.testing.assert_close(buffer, fresh[name].to(buffer.dtype))


def test_a_saved_model_has_the_tensors_of_its_checkpoint(loaded: Loaded, tmp_path: Path) -> None:
    model, _ = load_model(loaded.folder)
    model.save_pretrained(tmp_path)
    for path in loaded.folder.iterdir():
        if not (tmp_path / path.name).exists():
            shutil.copy(path, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (loaded.folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    reloaded, _ = load_model(tmp_path, torch.float32)
    batch = loaded.collate(loaded.inputs[:1])
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, loaded.model(**batch).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_can_be_chosen(loaded: Loaded, attention: str) -> None:
    model, _ = load_model(loaded.folder, torch.float32, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    batch = loaded.collate(loaded.inputs)
    logits = model.eval()(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], loaded.model(**batch).logits[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("version", ["4.6", "4.7"])
def test_ids_and_pixels_equal_the_processors(version: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny(version)
    processor, encoder = AutoProcessor.from_pretrained(folder), Encoder.from_checkpoint(folder)
    images = write_images(tmp_path)
    answered = Turn(role="assistant", parts=("A digit.",))
    questions: dict[str, list[tuple[tuple[str | int, ...], list[ImageRef]]]] = {
        "one": [((0, "\nWhat?"), images[:1])],
        "sliced": [((0, "\nWhat?"), images[1:2])],
        "many": [((0, "\n", 1, "\n", 2, "\n", 3, "\nCompare."), images)],
        "turns": [((0, "\nWhat?"), images[2:3]), (("And?",), [])],
        "words": [(("Hello",), [])],
    }
    for case in questions.values():
        turns = [turn for parts, _ in case for turn in (Turn(role="user", parts=parts), answered)]
        case_images = tuple(image for _, group in case for image in group)
        sample = Sample(id="", images=case_images, turns=tuple(turns), source="test")
        messages = [
            {
                "role": turn.role,
                "content": [
                    {"type": "image", "image": Image.open(case_images[part].uri)}
                    if isinstance(part, int)
                    else {"type": "text", "text": part.strip("\n")}
                    for part in turn.parts
                    if part != "\n"
                ],
            }
            for turn in turns[:-1]
        ]
        theirs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        assert encoder.encode_prompt(sample) == theirs["input_ids"][0].tolist()
        if case_images:
            ours = prepare(sample, encoder, 10**6)
            batch = collate([ours], 0, encoder.slicing.patch_size, "right")
            assert torch.equal(batch["pixel_values"], theirs["pixel_values"])
            assert torch.equal(batch["target_sizes"], theirs["target_sizes"])


@torch.no_grad()
def test_canvas_positions_equal_those_of_the_processors_token_types(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny("4.7")
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = load_model(folder, torch.float32)[0].eval()
    image = Image.open(write_images(tmp_path)[1].uri)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    with_types = dict(theirs)
    without_types = {name: value for name, value in with_types.items() if name != "mm_token_type_ids"}
    assert "mm_token_type_ids" in with_types
    assert torch.equal(model(**without_types).logits, model(**with_types).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**without_types, **options), model.generate(**with_types, **options))
    plain = torch.arange(with_types["input_ids"].shape[1]).unsqueeze(0)
    logits = model(**without_types, position_ids=plain).logits
    assert not torch.allclose(model(**without_types).logits, logits, atol=1e-3)


# Damaged or unsupported checkpoints


@pytest.fixture
def copied(loaded: Loaded, tmp_path: Path) -> Path:
    return shutil.copytree(loaded.folder, tmp_path / "checkpoint")


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_one_sentence(error: pytest.ExceptionInfo[UserError]) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")


def test_the_error_names_missing_unexpected_and_mismatched_tensors(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = sorted(name for name in tensors if name.endswith("q_proj.weight"))[0]
    for damaged in (
        {other: tensor for other, tensor in tensors.items() if other != name},
        tensors | {"surplus.weight": torch.zeros(2)},
        tensors | {name: torch.zeros(3, 5)},
    ):
        save_file(damaged, file, {"format": "pt"})
        with pytest.raises(UserError, match=f"{name}|surplus.weight") as error:
            load_model(copied)
        assert_one_sentence(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_error_names_weights_with_nan_or_infinity(copied: Path, value: float) -> None:
    tensors = load_file(copied / "model.safetensors")
    name = sorted(name for name in tensors if name.endswith("k_proj.weight"))[0]
    tensors[name][0, 0] = value
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=name) as error:
        load_model(copied)
    assert_one_sentence(error)


def test_a_tokenizer_without_the_special_tokens_is_refused(copied: Path) -> None:
    tokenizer = copied / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<slice>", "<slyce>"))
    for name in ("tokenizer_config.json", "processor_config.json"):
        if (copied / name).exists():
            (copied / name).write_text((copied / name).read_text().replace("<slice>", "<slyce>"))
    with pytest.raises(UserError, match="<slice>") as error:
        Encoder.from_checkpoint(copied)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"version": 2.5}, "2.5"),
        ({"version": "2.0"}, "2.0"),
        ({"version": None}, "None"),
        ({"model_type": "llava", "version": None}, "llava"),
    ],
)
def test_other_generations_are_refused(
    tiny: Callable[[str], Path], tmp_path: Path, fields: dict[str, Any], value: str
) -> None:
    folder = shutil.copytree(tiny("2.6"), tmp_path / "checkpoint")
    edit(folder / "config.json", **fields)
    readers: tuple[Callable[[Path], object], ...] = (detect_generation, load_model, Encoder.from_checkpoint)
    for read in readers:
        with pytest.raises(UserError, match=value) as error:
            read(folder)
        assert_one_sentence(error)
        assert "2.6, 4.0, 4.5, 4.6, 4.7" in str(error.value)


@pytest.mark.parametrize("claimed", [2.6, 4.0, 4.5])
@pytest.mark.parametrize("version", ["2.6", "4.0", "4.5"])
def test_a_checkpoint_that_claims_to_be_another_generation_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path, version: str, claimed: float
) -> None:
    if float(version) == claimed:
        return
    folder = shutil.copytree(tiny(version), tmp_path / "checkpoint")
    edit(folder / "config.json", version=claimed)
    with pytest.raises(UserError, match="tensors") as error:
        load_model(folder)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("file", "fields", "value"),
    [
        ("config.json", {"hidden_size": 130}, "hidden_size 130"),
        ("config.json", {"patch_size": 16}, "patch_size 16"),
        ("config.json", {"query_num": 32}, "32"),
        ("preprocessor_config.json", {"patch_size": 16}, "16 pixels"),
        ("preprocessor_config.json", {"norm_mean": [0.4, 0.5, 0.5]}, "norm_mean"),
    ],
)
def test_the_error_names_contradictory_fields(
    tiny: Callable[[str], Path], tmp_path: Path, file: str, fields: dict[str, Any], value: str
) -> None:
    folder = shutil.copytree(tiny("2.6"), tmp_path / "checkpoint")
    edit(folder / file, **fields)
    read: Callable[[Path], object] = (
        load_model
        if fields.keys() <= {"hidden_size", "patch_size"} and file == "config.json"
        else Encoder.from_checkpoint
    )
    with pytest.raises(UserError, match=value) as error:
        read(folder)
    assert_one_sentence(error)


def test_text_with_an_image_mark_is_refused(loaded: Loaded) -> None:
    sample = conversation(("Look at (<image>./</image>)!",), [])
    with pytest.raises(SampleError, match="<image>"):
        loaded.encoder.encode(sample)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_checkpoint_contains_the_number_of_slices_of_its_training(
    version: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny(version), tmp_path / "checkpoint")
    write_max_slices(folder, 3)
    assert Encoder.from_checkpoint(folder).slicing.max_slice_nums == 3
    config = json.loads((folder / "config.json").read_text())
    assert config.get("slice_config", {"max_slice_nums": 3})["max_slice_nums"] == 3
    original = json.loads((tiny(version) / "config.json").read_text())
    assert config.keys() == original.keys()
