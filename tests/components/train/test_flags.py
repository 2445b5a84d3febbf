"""The checks of training flags that need no torch, for every flag of the table."""

import subprocess
import sys
from pathlib import Path

import pytest

from minicpmv_finetune.components.train.flags import (
    RANGES,
    RENAMED,
    Flag,
    check_flags,
    expand_file,
    find_contradictions,
    find_flags_without_gpu,
    find_mistakes,
    table,
)
from minicpmv_finetune.errors import UserError

NUMBERS = [name for name, flag in table().items() if flag.type in ("int", "float")]
GOOD = {"int": "3", "float": "0.5", "bool": "true", "str": "text", "json": '{"a": 1}', "json_or_file": "file.json"}


def _bad_words(flag: Flag) -> list[str]:
    """Values that a flag must not accept."""
    bad = [] if flag.type in ("str", "json_or_file") else ["wrong_type", "[1]"]
    bad += ["no_such_choice"] if flag.choices else []
    bad += ["{"] if flag.type == "json_or_file" else []
    accepted = RANGES.get(flag.name)
    if accepted:
        bad += ["nan", "-7", "inf"]
        bad += ["0"] if accepted.above is not None or (accepted.at_least or 0) > 0 else []
        bad += [str(int(accepted.at_most) + 1)] if accepted.at_most is not None else []
    return bad


CASES = [(name, word) for name, flag in table().items() for word in _bad_words(flag)]


@pytest.mark.parametrize(("name", "word"), CASES)
def test_a_bad_value_is_one_sentence_that_names_the_flag(name: str, word: str) -> None:
    with pytest.raises(UserError) as caught:
        check_flags(["--data_path", "data", f"--{name}", word])
    sentence = str(caught.value)
    assert sentence.startswith(f"--{RENAMED.get(name, name)}: ")
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence


@pytest.mark.parametrize("name", table())
def test_a_good_value_is_accepted(name: str) -> None:
    flag = table()[name]
    word = flag.choices[0] if flag.choices else "1" if flag.type == "int" else GOOD[flag.type]
    word = "16" if name == "loraplus_lr_ratio" else word  # which is at least 1
    _, mistakes = find_mistakes([f"--{name}", *([] if flag.values == "none" else [word])])
    assert not mistakes


@pytest.mark.parametrize("name", sorted(table().keys() - {"local_rank"}))
def test_a_typing_error_in_a_name_gets_the_nearest_name(name: str) -> None:
    _, mistakes = find_mistakes([f"--{name}x"])
    assert "no such flag; did you mean --" in mistakes[0]


def test_the_rank_of_other_programs_gets_the_flag_for_it() -> None:
    assert "did you mean --lora_r?" in find_mistakes(["--lora_rank"])[1][0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"lora_r: 8\nlora_r: 16\n", "has the key 'lora_r' twice"),
        (b"lr_scheduler_kwargs: {a: 1, a: 2}\n", "has the key 'a' twice"),
        (b"# caf\xe9\nlora_r: 8\n", "not valid YAML"),
        (b"lora_r: 2026-02-30\n", "not valid YAML"),
        (b"lora_r: 8\n---\nlora_r: 9\n", "not valid YAML"),
        (b"[" * 1500, "not valid YAML"),
        (b"- lora_r: 8\n", "not a YAML mapping of flags by name; write one flag per line, such as `lora_r: 16`"),
        (b"", "not a YAML mapping of flags"),
    ],
)
def test_a_yaml_file_that_cannot_be_used_is_one_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "training.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        check_flags([str(file), "--data_path", "data"])
    assert str(caught.value).startswith(f"{file}: ")
    assert sentence in str(caught.value)


def test_yaml_may_have_dates_and_merge_a_mapping_into_another(tmp_path: Path) -> None:
    file = tmp_path / "training.yaml"
    file.write_text("lr_scheduler_kwargs: &shared {since: 2026-02-03, a: 1}\naccelerator_config: {<<: *shared, a: 2}\n")
    assert expand_file([str(file), "--seed", "1"]) == [
        *("--lr_scheduler_kwargs", '{"since": "2026-02-03", "a": 1}'),
        *("--accelerator_config", '{"since": "2026-02-03", "a": 2}', "--seed", "1"),
    ]


def test_every_number_has_a_range() -> None:
    assert set(NUMBERS) == set(RANGES)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--lora_r", "--lora_r: no value; write one behind it."),
        ("--lora_r 8 16", "--lora_r: '16' is one value too many; remove it, or quote the value."),
        ("stray --lora_r 8", "stray: not a flag; flags begin with two dashes"),
        ("--warmup-ratio 0.1 --lora-r 0", "--lora_r: 0 is not accepted; give at least 1."),
        ("--max_steps 0", "--max_steps: 0 is not accepted; give at least 1, or -1."),
        ("--lr_scheduler_type cosin", "--lr_scheduler_type: cosin is not accepted; did you mean cosine?"),
        ("--optim adamw", "--optim: adamw is not accepted; did you mean adamw_"),
        ('--lr_scheduler_kwargs={"a":1,"a":2}', "--lr_scheduler_kwargs: has 'a' twice; keep one."),
        ("--lora_r 0 --seed -1 --sede 3", "3 inputs are wrong. --lora_r: 0"),
    ],
)
def test_mistakes_in_words_are_named(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check_flags(["--data_path", "data", *words.split()] if not words.startswith("stray") else words.split())
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"use_lora": True}, "set tune_llm to false to train adapters, or use_lora to false"),
        ({"q_lora": True}, "needs --use_lora true"),
        ({"packing": True, "train_sampling_strategy": "group_by_length"}, "leave --group_by_length out"),
        ({"packing": True, "attn_implementation": "eager"}, "leave --attn_implementation out"),
        ({"tokens_per_batch": 4096, "train_sampling_strategy": "group_by_length"}, "leave --group_by_length out"),
        ({"tokens_per_batch": 4096, "attn_implementation": "eager"}, "--tokens_per_batch: eager attention"),
        ({"share_images": True, "attn_implementation": "flash_attention_2"}, "--share_images: flash attention"),
        ({"attn_implementation": "flash_attention_3"}, "the package flash_attn_interface is not installed"),
        ({"early_stopping_patience": 2}, "nothing is evaluated"),
        ({"eval_strategy": "steps", "data_path": "train.json"}, "--eval_strategy steps: nothing is held out of raw"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16: choose one"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "--bf16_full_eval and --fp16_full_eval: choose one"),
        ({"load_best_model_at_end": True}, "--eval_strategy is no and --save_strategy steps"),
        (
            {"early_stopping_patience": 2, "eval_strategy": "epoch"},
            "--eval_strategy is epoch and --save_strategy steps",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3.0},
            "--save_steps 500 is no multiple",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau: nothing is evaluated"),
        ({"logging_steps": 1.5}, "--logging_steps 1.5: above 1"),
        ({"dataloader_num_workers": 0, "dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor: there are no"),
        ({"q_lora": True, "use_lora": True, "tune_llm": False, "strategy": "zero3"}, "impossible for 4-bit weights"),
    ],
)
def test_contradictions_have_a_remedy(values: dict[str, object], sentence: str) -> None:
    assert sentence in find_contradictions(values)[0]


@pytest.mark.parametrize(
    "values",
    [
        {"early_stopping_patience": 2, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 250.0},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.3},
        {"logging_steps": 0.5},
    ],
)
def test_what_fits_together_is_accepted(values: dict[str, object]) -> None:
    assert find_contradictions(values) == []


@pytest.mark.parametrize(
    "flags",
    [
        {"fp16": True},
        {"strategy": "fsdp2"},
        {"fsdp": "full_shard"},
        {"use_liger_kernel": True},
        {"ddp_backend": "nccl"},
        {"attn_implementation": "flash_attention_2"},
    ],
)
def test_what_needs_a_gpu_is_found_where_there_is_none(
    flags: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("minicpmv_finetune.components.train.flags._GPU_DEVICES", ("/dev/null",))
    assert find_flags_without_gpu(flags) == []
    (sentence,) = find_flags_without_gpu({**flags, "use_cpu": True})
    monkeypatch.setattr("minicpmv_finetune.components.train.flags._GPU_DEVICES", ())
    assert find_flags_without_gpu(flags) == [sentence]
    assert find_flags_without_gpu(dict.fromkeys(flags, False)) == []


def test_a_negation_is_the_flag_set_to_false() -> None:
    assert find_mistakes(["--no_tune_llm"]) == ({"tune_llm": False}, [])
    assert find_mistakes(["--use_lora", "--do_train", "no"])[0] == {"use_lora": True, "do_train": False}


def test_the_check_imports_no_torch() -> None:
    code = (
        "import sys; from minicpmv_finetune.components.train.flags import check_flags\n"
        "check_flags(['--data_path', 'data']); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
