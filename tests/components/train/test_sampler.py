"""Batches of samples with similar lengths contain little padding."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import Trainer

from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.sampler import LengthGroupedSampler, ShuffledSampler
from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.reports.training_record import read_record
from tests.components.train.conftest import Train


def _lengths(count: int, longest: int = 100) -> list[int]:
    random.seed(0)
    return [random.randint(1, longest) for _ in range(count)]


def test_batches_of_similar_lengths_change_only_with_the_epoch() -> None:
    lengths = _lengths(404)
    sampler, other = LengthGroupedSampler(lengths, 8, seed=0), LengthGroupedSampler(lengths, 8, seed=0)
    first = list(sampler)
    assert first == list(other)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(404))
    batches, later = ([order[start : start + 8] for start in range(0, 404, 8)] for order in (first, second))
    assert not {frozenset(batch) for batch in batches} <= {frozenset(batch) for batch in later}
    longest = [max(lengths[number] for number in batch) for batch in batches]
    padding = 1 - sum(lengths) / sum(most * len(batch) for most, batch in zip(longest, batches, strict=True))
    assert padding < 0.05  # 0.43 in random order
    assert longest[0] > 0.9 * max(lengths)
    assert longest[1:] != sorted(longest[1:], reverse=True)


def test_random_order_is_that_of_earlier_versions() -> None:
    sampler = ShuffledSampler(10_000, seed=5)
    before = SeedableRandomSampler(range(10_000), data_seed=5)
    assert list(sampler) == list(before)
    for each in (sampler, before):
        each.set_epoch(3)
    assert list(sampler) == list(before) != sorted(before)


@pytest.mark.parametrize("kind", ["random", "group_by_length"])
def test_processes_that_continue_within_an_epoch_have_its_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = MiniCPMVTrainer.__new__(MiniCPMVTrainer)
    trainer.args = SimpleNamespace(
        train_sampling_strategy=kind,
        data_seed=None,
        seed=5,
        train_batch_size=2,
        gradient_accumulation_steps=1,
        world_size=2,
    )
    trainer.train_dataset, trainer._lengths = range(40), _lengths(40)
    trainer.state = SimpleNamespace(global_step=12, max_steps=30)
    sampler = trainer._get_train_sampler()
    loader = DataLoader(trainer.train_dataset, batch_size=2, sampler=sampler)
    prepared = prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
    continued = skip_first_batches(prepared, 2)  # of the second epoch
    found: list[list[int]] = []

    def run_epoch(_: Trainer, epoch: int) -> None:
        continued.set_epoch(epoch)
        found.extend(batch.tolist() for batch in continued)

    monkeypatch.setattr(Trainer, "_run_epoch", run_epoch)
    trainer._run_epoch(epoch=1)
    prepared.set_epoch(1)
    assert found == [batch.tolist() for batch in prepared][2:]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_fewer_samples_than_a_batch_are_all_included(count: int) -> None:
    assert sorted(LengthGroupedSampler([5] * count, 8, seed=0)) == list(range(count))


def test_packing_and_grouping_by_length_together_are_refused() -> None:
    flags = "--data_path x --output_dir y --use_cpu true --packing true --group_by_length"
    with pytest.raises(UserError, match="leave --group_by_length out"):
        parse(flags.split(), announce=lambda _: None)


def test_training_with_grouped_lengths_has_less_padding(uneven_shards: Path, train: Train) -> None:
    flags = "--use_lora true --tune_llm false --lora_r 4 --lora_dropout 0 --learning_rate 3e-3 --save_strategy no"
    flags = f"{flags} --max_steps 10 --per_device_train_batch_size 4 --eval_strategy steps --eval_steps 10"
    trainings = [train(uneven_shards, f"{flags} --group_by_length {grouped}") for grouped in ("false", "true")]
    padding = [read_record(training.folder).metrics["padding"] for training in trainings]
    assert padding[1] < padding[0]
    assert [len(training.eval_losses) for training in trainings] == [1, 1]
