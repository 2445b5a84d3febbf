"""Trained parameters are float32 while the model computes in bf16, and a frozen tower records nothing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minicpmv_finetune.components.train import finetune, masters
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.masters import require_memory, train_in_float32
from minicpmv_finetune.components.train.trainable import make_trainable
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv import checkpoint
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import Generation
from minicpmv_finetune.minicpmv.model_input import ModelInput

LORA = "--use_lora true --tune_llm false --lora_r 4 --lora_dropout 0"


def _prepared(base: Path, flags: str, dtype: torch.dtype) -> tuple[Any, Any, Generation]:
    model, generation = load_model(base, dtype)
    torch.manual_seed(0)
    trained = make_trainable(model, generation, parse(["--output_dir", "o", "--data_path", "d", *flags.split()]))
    train_in_float32(trained, generation)
    return trained, model, generation


def _batch(model: Any, generation: Generation) -> dict[str, Any]:
    random = np.random.default_rng(0)
    slices = [random.integers(0, 256, (112, 112, 3), dtype=np.uint8)]
    tokens = model.config.query_num if generation.fixed_tokens else 4
    ids = [20, 21, *[model.config.image_token_id] * tokens, *random.integers(30, 200, 24).tolist()]
    return collate([ModelInput("", ids, ids, slices)], 0, 14, "right", generation.resampler, normalized=False)


@pytest.mark.parametrize("flags", [f"{LORA} --tune_vision true", ""])
@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_bf16_moves_as_many_weights_as_float32(version: str, flags: str, tiny: Callable[[str], Path]) -> None:
    shares = []
    for dtype in (torch.bfloat16, torch.float32):
        trained, model, generation = _prepared(tiny(version), flags, dtype)
        batch = _batch(model, generation)
        weights = [weight for weight in trained.parameters() if weight.requires_grad]
        assert {weight.dtype for weight in weights} == {torch.float32}
        before = [weight.detach().clone() for weight in weights]
        # In bf16 an update of this size would change about one weight in a hundred.
        optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0)
        widths: set[torch.dtype] = set()
        layer = model.get_submodule(generation.language_model).layers[1]
        layer.register_forward_pre_hook(lambda _, states, widths=widths: widths.add(states[0].dtype))
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = trained(**batch, loss_only=True, use_cache=False).loss
            loss.backward()
            optimizer.step()
        moved = sum(int((one != two).sum()) for one, two in zip(before, weights, strict=True))
        shares.append(moved / sum(weight.numel() for weight in weights))
        assert widths == {dtype}, "the residual stream has the type of the computation"
    assert shares[0] >= 0.95 * shares[1]


@pytest.mark.faults_only
@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_a_full_fine_tune_in_bf16_ends_where_float32_ends(version: str, tiny: Callable[[str], Path]) -> None:
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        trained, model, generation = _prepared(tiny(version), "", dtype)
        batch = _batch(model, generation)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, weight_decay=0)
        for _ in range(30):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = trained(**batch, loss_only=True, use_cache=False).loss
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.05)


def test_a_full_fine_tune_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Training:
        device = torch.device("cuda")
        fsdp = fsdp_config = None
        optim = "adamw_torch"

    class _Card:
        total_memory = 80e9

    monkeypatch.setattr(masters.torch.cuda, "get_device_properties", lambda device: _Card)
    with torch.device("meta"):
        small, large = torch.nn.Linear(10_000, 100_000), torch.nn.Linear(80_000, 100_000)
    training: Any = _Training()
    require_memory(small, training)
    with pytest.raises(UserError, match=r"128 GB on each GPU, which has 80 GB; train adapters .* zero3 or fsdp2"):
        require_memory(large, training)
    # ZeRO-2 divides all but the weights in 16 bits.
    training.hf_deepspeed_config = SimpleNamespace(
        is_zero2=lambda: True, is_zero3=lambda: False, is_offload=lambda: False
    )
    training.world_size = 2
    require_memory(large, training)
    training.world_size = 1
    with pytest.raises(UserError, match=r"128 GB on each GPU, which has 80 GB"):
        require_memory(large, training)
    training.hf_deepspeed_config.is_offload = lambda: True
    require_memory(large, training)
    del training.hf_deepspeed_config
    # FSDP, like ZeRO-3, divides everything.
    training.fsdp, training.fsdp_config = True, {}
    with pytest.raises(UserError, match=r"128 GB on each GPU, which has 80 GB; train adapters .*, or take more GPUs"):
        require_memory(large, training)
    training.world_size = 2
    require_memory(large, training)
    training.world_size, training.fsdp_config = 1, {"cpu_offload": True}
    require_memory(large, training)
    training.fsdp = None
    large.requires_grad_(False)
    require_memory(large, training)


def test_weights_are_loaded_onto_the_gpu_that_needs_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    card = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    def placement(device: str, fsdp: str = "") -> dict[str, Any]:
        training: Any = SimpleNamespace(device=torch.device(device), fsdp=fsdp)
        return finetune._placement(tmp_path, training)

    assert placement("cuda:1") == {"device_map": {"": 1}}
    assert placement("cpu") == placement("cuda:1", "full_shard") == {}
    card.total_memory = 999
    assert placement("cuda:1") == {}, "the check of the memory refuses it later, with a sentence"


def test_weights_without_room_on_the_gpu_are_one_sentence(tiny_46: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", fail)
    with pytest.raises(UserError, match="the GPU has too little free memory for the weights; end what else uses it"):
        load_model(tiny_46)


def test_processes_share_the_search_for_numbers_that_are_not_finite(tmp_path: Path) -> None:
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(4))).half()
    model[0].weight.data.fill_(6e4)  # finite, though its sum is not
    for part in range(2):
        checkpoint._require_finite_weights(tmp_path, model, part, 2)
    model[2].weight.data[1, 1] = float("-inf")
    checkpoint._require_finite_weights(tmp_path, model, 1, 2)
    with pytest.raises(UserError, match=r"2.weight contains NaN or infinity"):
        checkpoint._require_finite_weights(tmp_path, model, 0, 2)


@pytest.mark.parametrize("version", ["2.6", "4.6", "4.7"])
def test_checkpointing_records_nothing_in_a_frozen_tower(version: str, tiny: Callable[[str], Path]) -> None:
    trained, model, generation = _prepared(tiny(version), f"{LORA} --tune_vision false", torch.float32)
    trained.enable_input_require_grads()
    trained.train()
    seen: list[bool] = []
    tower = model.get_submodule(generation.vision_tower)
    tower.encoder.layers[0].register_forward_hook(
        lambda _, __, output: seen.append((output[0] if isinstance(output, tuple) else output).requires_grad)
    )
    batch = _batch(model, generation)
    if version == "4.7":
        batch["mm_token_type_ids"] = torch.zeros_like(batch["input_ids"])
    model.get_submodule(generation.vision_tower)
    model.encode_patches(batch["pixel_values"], batch["target_sizes"])
    if version != "4.7":
        trained(**batch, loss_only=True, use_cache=False).loss.backward()
    assert set(seen) == {False}
