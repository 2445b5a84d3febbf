"""The optimizations of training do not change loss, gradients and logits, in every generation."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.minicpmv4_6 import MiniCPMV4_6ForConditionalGeneration as Transformers46

from minicpmv_finetune.minicpmv import loss as loss_module
from minicpmv_finetune.minicpmv.batch import collate, collate_packed
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import GENERATIONS
from minicpmv_finetune.minicpmv.loss import drop_redundant_mask, supervised_loss
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.minicpmv.packed import enable_packing
from minicpmv_finetune.shards.encoding import prepare
from tests.minicpmv.test_generations import conversation, write_images

VERSIONS = [generation.version for generation in GENERATIONS]


@pytest.fixture(scope="module", params=VERSIONS)
def folder(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.from_checkpoint(folder)


@pytest.fixture(scope="module")
def inputs(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> list[ModelInput]:
    """One sample with a sliced image, one without an image, one with two images."""
    images = write_images(tmp_path_factory.mktemp("images"))
    samples = [
        conversation((0, "\nWhat is this?"), images[1:2], name="one"),
        conversation(("Hello, which digit?",), [], name="none"),
        conversation((0, "\n", 1, "\nCompare."), images[:2], name="two"),
    ]
    return [prepare(sample, encoder, 10**6) for sample in samples]


@pytest.fixture
def model(folder: Path) -> Any:
    return load_model(folder, torch.float32)[0].train()


def _padded(inputs: list[ModelInput], encoder: Encoder) -> dict[str, torch.Tensor]:
    return collate(inputs, encoder.pad_token_id, encoder.slicing.patch_size, "right")


def _packed(inputs: list[ModelInput], encoder: Encoder) -> dict[str, torch.Tensor]:
    return collate_packed(inputs, encoder.slicing.patch_size)


def _loss_and_gradients(model: Any, batch: dict[str, torch.Tensor], **options: object) -> dict[str, torch.Tensor]:
    """Return the loss, and the gradient of every parameter by its name."""
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **gradients}


def _assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    largest = max(float(value.abs().max()) for value in one.values())
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=1e-4, atol=1e-6 * largest, msg=partial("{}: {}".format, name)
        )


def test_patches_are_contiguous_in_the_tower(model: Any, encoder: Encoder, inputs: list[ModelInput]) -> None:
    """A convolution's output is not, and every sum of the layers would inherit its strides."""
    tower = model.model.vision_tower if hasattr(model.model, "vision_tower") else model.vpm
    contiguous = []
    tower.encoder.layers[0].register_forward_pre_hook(
        lambda layer, arguments: contiguous.append(arguments[0].is_contiguous())
    )
    batch, patch = _padded(inputs[:1], encoder), encoder.slicing.patch_size
    sizes = batch["target_sizes"][:1]  # one slice, because padding copies anyway
    model.encode_images(batch["pixel_values"][..., : int(sizes.prod()) * patch], sizes)
    assert contiguous == [True]


@pytest.mark.parametrize("count", [None, 7])
@pytest.mark.parametrize("max_logits", [None, 5 * 512])
def test_loss_only_gives_the_plain_loss_and_gradients(
    model: Any,
    encoder: Encoder,
    inputs: list[ModelInput],
    count: int | None,
    max_logits: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if max_logits:
        monkeypatch.setattr(loss_module, "MAX_LOGITS", max_logits)
    batch = _padded(inputs, encoder)
    options = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
    _assert_same(
        _loss_and_gradients(model, batch, **options), _loss_and_gradients(model, batch, **options, loss_only=True)
    )


@pytest.mark.parametrize("head", ["with adapters", "fully trained"])
def test_loss_only_gives_the_same_gradients_for_a_trained_head(
    model: Any, encoder: Encoder, inputs: list[ModelInput], head: str
) -> None:
    targets = ["q_proj", "lm_head"] if head == "with adapters" else ["q_proj"]
    fully_trained = None if head == "with adapters" else ["lm_head"]
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, modules_to_save=fully_trained, init_lora_weights=False)
    )
    batch = _padded(inputs, encoder)
    plain = _loss_and_gradients(adapted, batch)
    assert any("lm_head" in name for name in plain)
    _assert_same(plain, _loss_and_gradients(adapted, batch, loss_only=True))


@torch.no_grad()
def test_evaluation_returns_predicted_tokens_and_no_logits(
    model: Any, encoder: Encoder, inputs: list[ModelInput]
) -> None:
    batch = _padded(inputs, encoder)
    plain, loss_only = model.eval()(**batch), model(**batch, loss_only=True)
    supervised = batch["labels"][:, 1:] != IGNORED_LABEL
    assert "logits" not in loss_only
    predicted = loss_only.predicted_ids[:, :-1]
    assert torch.equal(predicted[supervised], plain.logits.argmax(-1)[:, :-1][supervised])
    assert bool((predicted[~supervised] == IGNORED_LABEL).all())


def test_a_batch_without_supervised_tokens_still_uses_the_head() -> None:
    head = torch.nn.Linear(4, 8)
    output = supervised_loss(head, torch.randn(2, 3, 4), torch.full((2, 3), IGNORED_LABEL), 8, 5)
    assert output.loss is not None
    output.loss.backward()
    assert output.loss.item() == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_no_chunk_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "MAX_LOGITS", 16)
    head = torch.nn.Linear(4, 8)
    chunks: list[int] = []
    head.register_forward_hook(lambda _module, _inputs, logits: chunks.append(len(logits)))
    loss = supervised_loss(head, torch.randn(2, 9, 4), torch.ones(2, 9, dtype=torch.long), 8).loss
    assert loss is not None
    loss.backward()
    assert max(chunks) == 2
    assert sum(chunks) == 2 * 16  # once in the forward pass and once in the backward pass


class _LargestExponentials(TorchDispatchMode):
    """Records the size of the largest tensor that is exponentiated in place, as logits are."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.exp_.default:
            self.largest = max(self.largest, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("allowed", "largest"), [(64, 64), (2**20, 16 * 5)])
def test_no_tile_of_a_frozen_head_is_larger_than_allowed(
    allowed: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "MAX_LOGITS", allowed)
    monkeypatch.setattr(loss_module, "MAX_TILE_WIDTH", 5)
    head = torch.nn.Linear(4, 12, bias=False).requires_grad_(False)
    states, labels = torch.randn(2, 9, 4, requires_grad=True), torch.ones(2, 9, dtype=torch.long)
    with _LargestExponentials() as recorded:
        supervised_loss(head, states, labels, 12)
    assert recorded.largest == largest


@pytest.mark.parametrize("encodes_by_merger", [False, True], ids=["the tower's output", "the merger's output"])
def test_stored_features_give_the_loss_and_gradients_of_pixels(
    model: Any, encoder: Encoder, inputs: list[ModelInput], encodes_by_merger: bool
) -> None:
    frozen = [encoder.generation.vision_tower, *([encoder.generation.merger] if encodes_by_merger else [])]
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    batch = _padded(inputs, encoder)
    plain = _loss_and_gradients(model, batch)
    encode = model.encode_images if encodes_by_merger else model.encode_patches
    with torch.no_grad():
        features = encode(batch.pop("pixel_values"), batch["target_sizes"])
    last, runs = model.get_submodule(frozen[-1]), []
    last.register_forward_hook(lambda *_: runs.append(1))
    given = {"vision_features" if encodes_by_merger else "patch_features": features}
    _assert_same(plain, _loss_and_gradients(model, {**batch, **given}))
    assert not runs


def test_packed_rows_give_the_loss_and_gradients_of_padded_rows(
    model: Any, encoder: Encoder, inputs: list[ModelInput]
) -> None:
    plain = _loss_and_gradients(model, _padded(inputs, encoder))
    enable_packing(model, encoder.generation.language_model)
    _assert_same(plain, _loss_and_gradients(model, _packed(inputs, encoder)))
    # Rows that are not packed are computed as before.
    _assert_same(plain, _loss_and_gradients(model, _padded(inputs, encoder)))


@torch.no_grad()
def test_a_packed_sample_does_not_depend_on_its_neighbors(
    model: Any, encoder: Encoder, inputs: list[ModelInput]
) -> None:
    enable_packing(model, encoder.generation.language_model)
    batch = _packed(inputs, encoder)
    before = model.eval()(**batch).logits[0]
    first, last = len(inputs[0].input_ids), len(inputs[0].input_ids) + len(inputs[1].input_ids)
    token = encoder.tokenizer("digit")["input_ids"][-1]
    batch["input_ids"][0, first - 3 : first] = token
    batch["pixel_values"][..., :14] += 1
    after = model(**batch).logits[0]
    assert not torch.equal(before[:first], after[:first])
    assert torch.equal(before[first:], after[first:])
    # A change of the last sample does not change the samples before it.
    batch["input_ids"][0, last + 1] = token
    assert torch.equal(after[:last], model(**batch).logits[0, :last])


def test_vision_features_and_gradients_equal_transformers(tiny: Callable[[str], Path]) -> None:
    models: list[Any] = [load_model(tiny("4.6"), torch.float32)[0], Transformers46.from_pretrained(tiny("4.6"))]
    sizes = torch.tensor([[8, 8], [4, 12], [12, 4], [8, 8]], dtype=torch.int32)
    pixels = torch.randn(1, 3, 14, 14 * int(sizes.prod(1).sum()))
    results = []
    for model in models:
        features = torch.cat(model.get_image_features(pixels, sizes).pooler_output)
        features.square().sum().backward()
        results.append(
            {"features": features.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
    _assert_same(*results)
    with pytest.raises(ValueError, match="cannot be merged by 2 × 2"):
        models[0].get_image_features(pixels[..., : 14 * 9], torch.tensor([[3, 3]]))


def test_a_mask_is_dropped_only_where_causal_attention_hides_the_padding() -> None:
    right, left = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    assert drop_redundant_mask(right, "sdpa") is None
    assert drop_redundant_mask(left, "sdpa") is left
    assert drop_redundant_mask(right, "flash_attention_2") is right
    four_dimensional = torch.zeros(2, 1, 3, 3)
    assert drop_redundant_mask(four_dimensional, "sdpa") is four_dimensional
    assert drop_redundant_mask(None, "sdpa") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_frozen_head_equals_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(loss_module, "MAX_TILE_WIDTH", 16)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=dtype).requires_grad_(False)
    labels = torch.randint(0, 50, (2, 9))
    labels[0, :4] = IGNORED_LABEL
    states, plain = (torch.randn(2, 9, 16, dtype=dtype, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    loss = supervised_loss(head, states.requires_grad_(), labels, 50, 7).loss
    expected = (
        F.cross_entropy(
            head(plain.requires_grad_())[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        / 7
    )
    assert loss is not None
    (2 * loss).backward()
    (2 * expected).backward()
    assert states.grad is not None
    assert plain.grad is not None
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2e-2, 2e-3)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states.grad, plain.grad, rtol=rtol, atol=atol)
