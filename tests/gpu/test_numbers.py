"""Loss and gradients on a GPU: equal to the CPU's in float32, near them in bf16, and the same by every faster way."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from minicpmv_finetune.components.train.arguments import Arguments, parse
from minicpmv_finetune.components.train.fused_lora import fuse_adapters
from minicpmv_finetune.components.train.trainable import make_trainable
from minicpmv_finetune.minicpmv.batch import collate, collate_packed
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.delta_rule import gated_delta_rule
from minicpmv_finetune.minicpmv.generations import Generation
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.minicpmv.packed import enable_packing
from minicpmv_finetune.minicpmv.tiny_checkpoint import VERSIONS

PATCH = 14
MOST_SYNCHRONIZATIONS = 30
# Rows and columns of the slices of each sample; the last sample is text alone.
SLICES: tuple[tuple[tuple[int, int], ...], ...] = (((8, 8), (8, 4), (8, 4)), ((4, 8),), ())
LENGTHS = (90, 40, 61)


@pytest.fixture(autouse=True)
def exact_convolutions() -> Any:
    """By default cuDNN computes float32 convolutions in TF32, the patch embedding among them."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("version", VERSIONS)
def test_float32_loss_and_gradients_equal_the_cpus(
    version: str, tiny: Callable[[str], Path], device: torch.device, measured: Callable[..., None]
) -> None:
    model, generation = load_model(tiny(version), torch.float32)
    batch = make_batch(make_samples(model, generation), generation)
    expected, expected_gradients = step(model, batch)
    loss, gradients = step(model.to(device), to_device(batch, device))  # type: ignore[arg-type]
    difference = distance(gradients, expected_gradients)
    measured(version=version, loss=loss, loss_difference=abs(loss / expected - 1), gradient_difference=difference)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference < 1e-4


@pytest.mark.parametrize("version", VERSIONS)
def test_bf16_is_near_float32(
    version: str, tiny: Callable[[str], Path], device: torch.device, measured: Callable[..., None]
) -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, generation = load_model(tiny(version), dtype)
        model.to(device)  # type: ignore[arg-type]
        batch = to_device(make_batch(make_samples(model, generation), generation), device)
        results.append(step(model, batch, in_bf16=dtype == torch.bfloat16))
    (expected, expected_gradients), (loss, gradients) = results
    cosine = float(torch.cosine_similarity(flat(gradients), flat(expected_gradients), dim=0))
    measured(version=version, loss_difference=abs(loss / expected - 1), gradient_cosine=cosine)
    assert loss == pytest.approx(expected, rel=0.01)
    assert cosine > 0.98


@pytest.mark.parametrize("version", VERSIONS)
def test_packed_samples_have_the_loss_and_gradients_of_padded_ones(
    version: str, tiny: Callable[[str], Path], device: torch.device, measured: Callable[..., None]
) -> None:
    model, generation = load_model(tiny(version), torch.float32)
    model.to(device)  # type: ignore[arg-type]
    samples = make_samples(model, generation)
    expected, expected_gradients = step(model, to_device(make_batch(samples, generation), device))
    enable_packing(model, generation.language_model)
    packed = to_device(collate_packed(samples, PATCH, generation.resampler), device)
    loss, gradients = step(model, packed)
    difference = distance(gradients, expected_gradients)
    measured(version=version, loss_difference=abs(loss / expected - 1), gradient_difference=difference)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference < 1e-4


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_for_samples_of_various_lengths_have_the_loss_of_padded_ones(
    version: str, tiny: Callable[[str], Path], device: torch.device, measured: Callable[..., None]
) -> None:
    """In bf16 a packed row goes to torch's own kernel as it is."""
    model, generation = load_model(tiny(version), torch.bfloat16)
    model.to(device)  # type: ignore[arg-type]
    samples = make_samples(model, generation)
    padded = step(model, to_device(make_batch(samples, generation), device), in_bf16=True)
    enable_packing(model, generation.language_model)
    packed = step(model, to_device(collate_packed(samples, PATCH, generation.resampler), device), in_bf16=True)
    _require_near(version, packed, padded, measured)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_flash_attention_has_the_loss_of_torchs_own(
    is_packed: bool,
    version: str,
    tiny: Callable[[str], Path],
    device: torch.device,
    measured: Callable[..., None],
    cuda_only: None,
) -> None:
    pytest.importorskip("flash_attn")
    results = []
    for attention in ("sdpa", "flash_attention_2"):
        model, generation = load_model(tiny(version), torch.bfloat16, attn_implementation=attention)
        model.to(device)  # type: ignore[arg-type]
        samples = make_samples(model, generation)
        if is_packed:
            enable_packing(model, generation.language_model)
        batch = collate_packed(samples, PATCH, generation.resampler) if is_packed else make_batch(samples, generation)
        results.append(step(model, to_device(batch, device), in_bf16=True))
    _require_near(version, results[1], results[0], measured)


def _require_near(version: str, found: Any, expected: Any, measured: Callable[..., None]) -> None:
    """Losses within 1 %, gradients in the same direction: as near as two computations in bf16 are."""
    cosine = float(torch.cosine_similarity(flat(found[1]), flat(expected[1]), dim=0))
    measured(version=version, loss_difference=abs(found[0] / expected[0] - 1), gradient_cosine=cosine)
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    assert cosine > 0.98


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpointing_and_fused_adapters_change_no_gradient(
    version: str, tiny: Callable[[str], Path], device: torch.device, measured: Callable[..., None]
) -> None:
    results = []
    for checkpointing, fused in ((False, False), (True, False), (False, True)):
        model, generation, _ = adapted(tiny(version), torch.float32)
        batch = to_device(make_batch(make_samples(model, generation), generation), device)
        if fused:
            fuse_adapters(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.to(device)
        results.append(step(model, batch))
    expected, expected_gradients = results[0]
    differences = [distance(gradients, expected_gradients) for _, gradients in results[1:]]
    measured(version=version, checkpointing=differences[0], fused=differences[1])
    assert all(loss == pytest.approx(expected, rel=1e-5) for loss, _ in results)
    assert max(differences) < 1e-4


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_waits_for_the_gpu_a_named_number_of_times(
    version: str, tiny: Callable[[str], Path], device: torch.device, measured: Callable[..., None], cuda_only: None
) -> None:
    model, generation, _ = adapted(tiny(version), torch.bfloat16)
    fuse_adapters(model)
    model.to(device)
    batch = to_device(make_batch(make_samples(model, generation), generation), device)
    places: list[str] = []
    step(model, batch, in_bf16=True)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**batch, loss_only=True, use_cache=False).loss
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in found:
        if "synchroniz" in str(warning.message):
            places.append(f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}")
    measured(version=version, synchronizations=len(places), places=sorted(set(places)))
    assert len(places) <= MOST_SYNCHRONIZATIONS


@pytest.mark.parametrize("width", [16, 64, 128])
def test_linear_attention_follows_its_rule(width: int, device: torch.device, measured: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(width)
    queries, keys, values = (torch.randn(2, 150, 3, width, generator=generator, dtype=torch.float64) for _ in range(3))
    queries, keys = (torch.nn.functional.normalize(states, dim=-1) for states in (queries, keys))
    decay = -torch.rand(2, 150, 3, generator=generator, dtype=torch.float64)
    beta = torch.rand(2, 150, 3, generator=generator, dtype=torch.float64)
    expected = _token_by_token(queries, keys, values, decay, beta)
    inputs = [states.float().to(device) for states in (queries, keys, values, decay, beta)]
    output = gated_delta_rule(*inputs).double().cpu()
    difference = float((output - expected).norm() / expected.norm())
    measured(width=width, difference=difference)
    assert difference < 1e-5


def _token_by_token(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """The rule as the module of linear attention states it, in float64."""
    state = torch.zeros(*keys.shape[:1], *keys.shape[2:], values.shape[-1], dtype=torch.float64)
    outputs = []
    for token in range(keys.shape[1]):
        factor = decay[:, token].exp()[..., None, None]
        key, value = keys[:, token].unsqueeze(-1), values[:, token].unsqueeze(-1)
        state = factor * state
        update = value - state.transpose(-1, -2) @ key
        state = state + beta[:, token][..., None, None] * key @ update.transpose(-1, -2)
        outputs.append((state.transpose(-1, -2) @ queries[:, token].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1) * keys.shape[-1] ** -0.5


def make_samples(model: PreTrainedModel, generation: Generation) -> list[ModelInput]:
    """Samples of different lengths, with three slices, one and none."""
    random = np.random.default_rng(0)
    config: Any = model.config
    samples = []
    for number, (sizes, length) in enumerate(zip(SLICES, LENGTHS, strict=True)):
        ids = random.integers(20, 300, length)
        ids[ids == config.image_token_id] = 20
        place = 2
        for rows, columns in sizes:
            tokens = config.query_num if generation.fixed_tokens else rows * columns // 16
            kind = "image" if place == 2 else "slice"
            # 4.7 finds each slice by the tokens around it.
            ids[place] = getattr(config, f"{kind}_start_id", 20)
            ids[place + 1 : place + 1 + tokens] = config.image_token_id
            ids[place + 1 + tokens] = getattr(config, f"{kind}_end_id", 20)
            place += tokens + 2
        labels = np.full(length, IGNORED_LABEL)
        labels[-20:] = ids[-20:]
        slices = [
            random.integers(0, 256, (rows * PATCH, columns * PATCH, 3), dtype=np.uint8) for rows, columns in sizes
        ]
        samples.append(ModelInput(str(number), ids.tolist(), labels.tolist(), slices))
    return samples


def make_batch(samples: Sequence[ModelInput], generation: Generation) -> dict[str, Any]:
    return collate(samples, 0, PATCH, "right", generation.resampler)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def adapted(base: Path, dtype: torch.dtype) -> tuple[Any, Generation, Arguments]:
    """A model with adapters that change its output, and the merger and embeddings trained whole."""
    flags = "--use_lora true --tune_llm false --tune_vision false --lora_r 8 --lora_dropout 0"
    arguments = parse(["--data_path", "none", "--output_dir", "none", *flags.split()])
    model, generation = load_model(base, dtype)
    torch.manual_seed(0)
    wrapped: Any = make_trainable(model, generation, arguments)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped, generation, arguments


def step(model: Any, batch: dict[str, Any], in_bf16: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, as float32 on the CPU."""
    model.train()
    model.zero_grad()
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=in_bf16):
        loss = model(**batch, loss_only=True, use_cache=False).loss
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    # Copies, because a model that moves to another device takes its gradients along.
    return float(loss.detach()), {name: value.to("cpu", torch.float32, copy=True) for name, value in found.items()}


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all parameters."""
    assert found.keys() == expected.keys()
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())
