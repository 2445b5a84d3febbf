"""The digest of a training: which flags take part, and that checkpoints of earlier versions are found again."""

import dataclasses

import pytest
import transformers

from minicpmv_finetune.components.train.arguments import (
    IN_DIGEST,
    Arguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    parse,
)
from minicpmv_finetune.components.train.training_identity import (
    TRANSFORMERS_IN_DIGEST,
    TRANSFORMERS_NOT_IN_DIGEST,
    chosen_settings,
    effective_settings,
    training_digest,
)

REQUIRED = "--model_name_or_path m --data_path d --output_dir o --use_cpu true"
LORA = f"{REQUIRED} --use_lora true --tune_llm false"


def _parse(flags: str) -> Arguments:
    return parse(flags.split(), announce=lambda sentence: None)


def _digest(flags: str) -> str:
    return training_digest(_parse(flags), "data", "base")


def test_every_flag_is_classified() -> None:
    from_transformers = {item.name for item in dataclasses.fields(transformers.TrainingArguments)}
    own: set[str] = set()
    for group in (ModelArguments, DataArguments, TrainingArguments, LoraArguments):
        for item in dataclasses.fields(group):
            if IN_DIGEST in item.metadata:
                own.add(item.name)
            else:
                assert item.name in from_transformers, f"--{item.name}: state {IN_DIGEST} in its metadata"
    tables = TRANSFORMERS_IN_DIGEST | TRANSFORMERS_NOT_IN_DIGEST
    assert not TRANSFORMERS_IN_DIGEST & TRANSFORMERS_NOT_IN_DIGEST
    assert not from_transformers - own - tables, "add these flags to one of the two tables of training_identity.py"
    assert not tables - (from_transformers - own), "transformers no longer has these flags"


def test_every_flag_is_logged_with_its_effect_and_no_secret() -> None:
    arguments = _parse(f"{LORA} --hub_token hidden --learning_rate 1e-3")
    logged = {**chosen_settings(arguments), **effective_settings(arguments)}
    flags = {
        item.name
        for group in (ModelArguments, DataArguments, TrainingArguments, LoraArguments)
        for item in dataclasses.fields(group)
    }
    assert flags - set(logged) == {"hub_token", "local_rank", "resume_from_checkpoint"}
    assert (logged["learning_rate"], logged["adam_beta2"]) == (1e-3, 0.999)
    assert "hidden" not in str(logged)


@pytest.mark.parametrize(
    ("flags", "digest"),
    [
        (f"{LORA} --lora_r 4", "738d014d518c456184ea62b91f35c94ab58fe5d71ca4065f631f4a0255b6b94c"),
        (
            f"{REQUIRED} --bf16 false --max_steps 7 --learning_rate 1e-3 --save_strategy no --logging_steps 1 "
            "--ddp_timeout 15",
            "c34bad53489082b8c64d495040613cbc8fbb1de00f7645162200ab0113a3f14f",
        ),
        (
            f"{LORA} --packing true --num_train_epochs 2 --dataloader_num_workers 2 --save_steps 3 --checkpoint_uri /x "
            "--eval_strategy steps --eval_steps 1 --save_strategy steps --early_stopping_patience 2",
            "bc9f8a62c58a1d323bb2ff187b200f8188880406dd9b6b708325c2ffdcad16cd",
        ),
    ],
    ids=["lora", "full", "packing"],
)
def test_digests_are_those_of_0_1_0(flags: str, digest: str) -> None:
    """Otherwise a training that began with an earlier version would start from the beginning."""
    assert _digest(flags) == digest


@pytest.mark.parametrize(
    "more",
    ["--output_dir p", "--data_path e", "--logging_steps 1", "--save_steps 3", "--cache_dir c", "--checkpoint_uri u"],
)
def test_flags_that_change_no_weight_keep_the_digest(more: str) -> None:
    assert _digest(f"{LORA} {more}") == _digest(LORA)


@pytest.mark.parametrize(
    "more", ["--lora_r 8", "--learning_rate 1e-3", "--seed 7", "--strategy zero2", "--packing true"]
)
def test_other_flags_change_the_digest(more: str) -> None:
    assert _digest(f"{LORA} {more}") != _digest(LORA)


@pytest.mark.parametrize(
    ("more", "digest", "has_same_weights"),
    [
        ("", "6d26e7feea6c795decf35dddc7065ed0088ffa4c4cf194cfd2f25dc1b80fa5ff", False),
        (
            "--lora_modules_to_save resampler",
            "b929f720ab2df384fa948383d1aa09f70f11d0801ac7378af5315bc82ee521dd",
            False,
        ),
        (
            "--lora_modules_to_save embed_tokens",
            "d7fed173101eabea2013f18d16617fe444778f5ac46b7d58edf5b0bd5ebe5fa7",
            True,
        ),
        (
            "--lora_modules_to_save none,resampler",
            "cc31aa982e000fa494e02261663a4a98f8664b5d8a73052159c9ab6337ade0ac",
            True,
        ),
    ],
)
def test_qlora_continues_only_from_checkpoints_of_0_1_0_with_the_same_weights(
    more: str, digest: str, has_same_weights: bool
) -> None:
    """0.1.0 trained the embeddings whole in QLoRA too, unless none was asked for."""
    assert (_digest(f"{LORA} --q_lora true {more}") == digest) == has_same_weights


@pytest.mark.parametrize("value", ["true", "True", ""])
def test_the_default_is_the_same_however_it_is_written(value: str) -> None:
    flags = f"{LORA} --init_lora_weights={value}"
    assert _parse(flags).lora.init_lora_weights == "true", "else strategies that divide weights would refuse it"
    assert _digest(flags) == _digest(LORA)


def test_other_data_and_other_base_models_change_the_digest() -> None:
    arguments = _parse(LORA)
    digests = {training_digest(arguments, *fingerprints) for fingerprints in (("d", "b"), ("e", "b"), ("d", "c"))}
    assert len(digests) == 3
