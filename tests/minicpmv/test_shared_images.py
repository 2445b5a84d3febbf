"""Samples that share an image in one row have loss, gradients and logits of separate samples, in every generation."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpmv_finetune.minicpmv.batch import collate, collate_packed
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import GENERATIONS
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.minicpmv.packed import enable_packing, packed_samples, packing_arguments
from minicpmv_finetune.shards.encoding import prepare
from minicpmv_finetune.shards.sharing import shareable_tokens
from tests.minicpmv.test_generations import conversation, write_images


@pytest.fixture(scope="module", params=[generation.version for generation in GENERATIONS])
def folder(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.from_checkpoint(folder)


@pytest.fixture
def model(folder: Path) -> Any:
    return load_model(folder, torch.float32)[0].train()


@pytest.fixture(scope="module")
def inputs(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> list[ModelInput]:
    """Three questions about a sliced image, one without an image, two about two images, and one about another image."""
    images = write_images(tmp_path_factory.mktemp("images"))
    samples = [
        conversation((0, "\nWhat is this?"), images[1:2], name="a"),
        conversation((0, "\nWhich digit do you see here, if you see one at all?"), images[1:2], name="b"),
        conversation((0, "\nDigit?"), images[1:2], name="c"),
        conversation(("Hello, which digit?",), [], name="none"),
        conversation((0, "\n", 1, "\nCompare."), images[:2], name="d"),
        conversation((0, "\n", 1, "\nWhich is larger?"), images[:2], name="e"),
        conversation((0, "\nWhat is this?"), images[:1], name="f"),
    ]
    return [prepare(sample, encoder, 10**6) for sample in samples]


@pytest.fixture
def shared(model: Any, inputs: list[ModelInput]) -> list[int]:
    """Number of first tokens that each sample shares with the one before it."""
    tokens = [shareable_tokens(sample.input_ids, sample.labels, model.config.image_token_id) for sample in inputs]
    assert min(tokens[number] for number in (0, 1, 2, 4, 5, 6)) > 8
    assert tokens[3] == 0
    return [0, tokens[1], tokens[2], 0, 0, tokens[5], 0]


def _loss_and_gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, loss_only=True).loss
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **gradients}


def test_a_shared_image_gives_the_loss_and_gradients_of_separate_samples(
    model: Any, encoder: Encoder, inputs: list[ModelInput], shared: list[int]
) -> None:
    patch = encoder.slicing.patch_size
    separate = _loss_and_gradients(model, collate(inputs, encoder.pad_token_id, patch, "right"))
    enable_packing(model, encoder.generation.language_model)
    batch = collate_packed(inputs, patch, shared=shared)
    assert batch["input_ids"].shape[1] == sum(len(sample.input_ids) for sample in inputs) - sum(shared)
    found = _loss_and_gradients(model, batch)
    assert found.keys() == separate.keys()
    largest = max(float(value.abs().max()) for value in separate.values())
    for name, value in separate.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6 * largest, msg=partial("{}: {}".format, name)
        )


@torch.no_grad()
def test_a_conversation_does_not_see_the_others_about_its_image(
    model: Any, encoder: Encoder, inputs: list[ModelInput], shared: list[int]
) -> None:
    enable_packing(model, encoder.generation.language_model)
    batch = collate_packed(inputs, encoder.slicing.patch_size, shared=shared)
    before = model.eval()(**batch).logits[0]
    first = len(inputs[0].input_ids)
    batch["input_ids"][0, first - 3 : first] = encoder.tokenizer("digit")["input_ids"][-1]
    after = model(**batch).logits[0]
    assert not torch.equal(before[first - 3 : first], after[first - 3 : first])
    assert torch.equal(before[: first - 3], after[: first - 3])
    assert torch.equal(before[first:], after[first:])


def test_unpacking_repeats_what_samples_share() -> None:
    samples = packed_samples(packing_arguments([4, 5, 3, 2], [0, 2, 2, 0]))
    assert samples is not None
    row = torch.tensor([[[10.0], [11], [12], [13], [22], [23], [24], [32], [40], [41]]])
    rows = samples.unpack(row)
    assert rows[..., 0].tolist() == [[10, 11, 12, 13, 0], [10, 11, 22, 23, 24], [10, 11, 32, 0, 0], [40, 41, 0, 0, 0]]
    assert samples.attention_mask.sum(1).tolist() == [4, 5, 3, 2]
    assert torch.equal(samples.pack(rows), row)
