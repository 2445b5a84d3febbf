"""The trainer's own changes of transformers' Trainer, which other files do not test."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer
from minicpmv_finetune.minicpmv.checkpoint import load_model


@pytest.mark.parametrize("supervised_logits_only", [True, False])
@pytest.mark.parametrize("version", ["2.6", "4.6", "4.7"])
def test_training_computes_no_key_value_cache(
    version: str,
    supervised_logits_only: bool,
    tiny: Callable[[str], Path],
    make_trainer: Callable[..., MiniCPMVTrainer],
) -> None:
    model, generation = load_model(tiny(version), torch.float32)
    assert model.config.get_text_config().use_cache
    trainer = make_trainer(model, supervised_logits_only=supervised_logits_only)
    caches = []
    model.get_submodule(generation.language_model).register_forward_hook(
        lambda _, inputs, output: caches.append(output.past_key_values)
    )
    ids = torch.arange(20, 28).unsqueeze(0)
    trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids}).backward()
    assert caches == [None]
