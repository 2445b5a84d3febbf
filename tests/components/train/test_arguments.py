import socket

import pytest

from minicpmv_finetune.components.train.arguments import (
    PUBLISHED_LORA_TARGETS,
    Arguments,
    TrainingArguments,
    as_flags,
    parse,
)
from minicpmv_finetune.components.train.flags import find_flags_without_gpu, find_mistakes
from minicpmv_finetune.components.train.worker import needs_deepspeed
from minicpmv_finetune.errors import UserError

# The flags of the published finetune_lora.sh, as users have them in their launch scripts.
PUBLISHED_LORA_SCRIPT = """
    --model_name_or_path openbmb/MiniCPM-V-2_6 --llm_type qwen --data_path train.json --eval_data_path eval.json
    --remove_unused_columns false --label_names labels --prediction_loss_only false --bf16 false --bf16_full_eval false
    --fp16 false --fp16_full_eval false --do_train --do_eval --tune_vision true --tune_llm false --use_lora true
    --lora_target_modules llm\\..*layers\\.\\d+\\.self_attn\\.(q_proj|k_proj|v_proj) --model_max_length 2048
    --max_slice_nums 9 --max_steps 10000 --eval_steps 1000 --output_dir output/lora --logging_dir output/lora
    --logging_strategy steps --per_device_train_batch_size 1 --per_device_eval_batch_size 1
    --gradient_accumulation_steps 1 --evaluation_strategy steps --save_strategy steps --save_steps 1000
    --save_total_limit 10 --learning_rate 1e-6 --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01
    --lr_scheduler_type cosine --logging_steps 1 --gradient_checkpointing true --report_to tensorboard
""".split()


def _parse(*flags: str) -> Arguments:
    return parse(["--output_dir", "out", "--data_path", "data", *flags], announce=lambda sentence: None)


def test_a_published_launch_script_is_accepted() -> None:
    announced: list[str] = []
    arguments = parse(PUBLISHED_LORA_SCRIPT, announce=announced.append)
    training = arguments.training
    assert training.use_lora
    assert training.tune_vision
    assert not training.tune_llm
    assert training.eval_strategy == "steps"
    assert training.warmup_steps == 0.01
    assert training.llm_type == "qwen"
    assert training.activation_checkpointing
    assert arguments.lora.lora_target_modules == PUBLISHED_LORA_TARGETS
    assert [sentence for sentence in announced if "logging_dir" in sentence]


def test_defaults_are_the_published_ones() -> None:
    arguments = _parse("--use_lora", "true", "--tune_llm", "false")
    lora, training = arguments.lora, arguments.training
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (64, 64, 0.05)
    assert (training.model_max_length, training.max_slice_nums, training.optim) == (2048, 9, "adamw_torch")
    assert training.tune_vision
    assert not training.remove_unused_columns


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--use_lora true --tune_llm true",
            "simultaneously adjust LLM parameters and apply LoRA; set tune_llm",
        ),
        ("--q_lora true", "--q_lora trains adapters on a 4-bit model and needs --use_lora true."),
        ("--no_such_flag 1", "--no_such_flag: no such flag"),
        ("--learning_rate fast", "--learning_rate"),
        ("--save_safetensors false", "pickled weights are not written"),
    ],
)
def test_mistakes_are_one_sentence(flags: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("(", r"\(").replace(".", r"\.")) as error:
        _parse(*flags.split())
    assert "\n" not in str(error.value)


def test_a_removed_flag_is_mapped_to_its_successor() -> None:
    arguments = _parse("--group_by_length", "true")
    assert arguments.training.train_sampling_strategy == "group_by_length"


def test_settings_become_flags() -> None:
    assert as_flags({"lora_r": 16.0, "use_lora": True, "cache_dir": None, "label_names": ["labels", "more"]}) == [
        *("--lora_r", "16", "--use_lora", "True"),
        *("--label_names", "labels", "more"),
    ]
    # Numbers as Kubeflow passes those of a JSON object.
    assert as_flags({"max_steps": 2.0, "warmup_steps": 0.5, "fsdp_config": {"version": 2.0}}) == [
        *("--max_steps", "2", "--warmup_steps", "0.5"),
        *("--fsdp_config", '{"version": 2}'),
    ]


def test_data_is_required() -> None:
    with pytest.raises(UserError, match="--data_path: missing"):
        parse(["--output_dir", "out"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--do_train false", "this command trains"),
        ("--push_to_hub true", "publishing is a step of its own"),
        ("--save_only_model true", "cannot be continued"),
        ("--batch_eval_metrics true", "over the whole evaluation"),
        ("--auto_find_batch_size true", "plan"),
        ("--enable_jit_checkpoint true", "SIGTERM"),
        ("--metric_for_best_model accuracy", "give loss or token_accuracy"),
        ("--save_strategy best", "--metric_for_best_model"),
        ("--lora_weight_path old", "give --use_lora true"),
        ("--optim galore_adamw", "--optim"),
        ("--optim apollo_adamw", "--optim"),
        ("--optim_args nonsense", "give NAME=VALUE"),
        ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_kwargs"),
        (
            '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":"x"}',
            "warmup_stable_decay: ",
        ),
        ("--ddp_backend mpi", "--ddp_backend: torch has no such backend"),
        ("--torch_compile_mode typo", "max-autotune"),
        ("--train_sampling_strategy batch_rebalance", "group_by_length"),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"typo":1}', "--lr_scheduler_kwargs"),
        ("--report_to wandb", "the package wandb is not installed"),
        ("--lora_target_modules (", "is no regular expression"),
        ("--report_to typo", "report_to typo: unknown; leave"),
        ("--accelerator_config nowhere.json", "nowhere.json"),
        ("--dataloader_multiprocessing_context fork", "--dataloader_num_workers"),
        ("--dataloader_prefetch_factor 2", "dataloader_num_workers"),
        ("--deepspeed nowhere.json", "nowhere.json"),
    ],
)
def test_a_value_that_cannot_be_honored_is_one_sentence(flags: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        _parse(*flags.split())
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_fsdp_is_turned_on_by_true_as_training_flags_write_it() -> None:
    config = {"version": 2, "reshard_after_forward": False}
    training = TrainingArguments(output_dir="out", use_cpu=True, fsdp="true", fsdp_config=config)
    assert training.fsdp_plugin_args is not None
    assert training.fsdp_plugin_args["reshard_after_forward"] is False


def test_fsdp_is_turned_off_by_false_as_training_flags_write_it() -> None:
    values, mistakes = find_mistakes(["--fsdp", "False", "--strategy", "zero2"])
    assert not mistakes
    assert needs_deepspeed(values)  # which a training with FSDP leaves out
    assert find_flags_without_gpu({**values, "use_cpu": True}) == []
    assert not TrainingArguments(output_dir="out", use_cpu=True, fsdp="False").fsdp


def test_what_batches_by_tokens_replace_is_announced() -> None:
    announced: list[str] = []
    flags = "--output_dir out --data_path data --tokens_per_batch 512 --packing true --per_device_train_batch_size 4"
    parse(flags.split(), announce=announced.append)
    replaced = [sentence.partition(" ")[0] for sentence in announced if "has no effect: --tokens_per_batch" in sentence]
    assert replaced == ["--per_device_train_batch_size", "--packing"]


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="--fp16: needs a GPU"):
        _parse("--fp16", "true", "--use_cpu", "true")


def test_tensorboard_which_the_published_scripts_name_is_left_out_where_it_is_not_installed() -> None:
    sentences: list[str] = []
    flags = [*"--model_name_or_path base --data_path data --output_dir out --report_to tensorboard".split()]
    assert parse(flags, sentences.append).training.report_to == []
    assert any("tensorboard" in sentence for sentence in sentences)


@pytest.mark.parametrize("answers", [True, False])
def test_progress_is_reported_to_kubeflow_trainer_only_if_its_controller_answers(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not answers:
            server.close()
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"https://127.0.0.1:{port}/status")
        sentences: list[str] = []
        flags = "--model_name_or_path base --data_path data --output_dir out".split()
        assert ("kubeflow" in (parse(flags, sentences.append).training.report_to or ())) == answers
    assert any("so it gets no progress" in sentence for sentence in sentences) != answers


@pytest.mark.parametrize(
    "flags",
    [
        "--optim adafactor",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.1}',
        "--lr_scheduler_type constant_with_warmup --warmup_steps 2",
        "--save_strategy best --metric_for_best_model loss --eval_strategy epoch",
        "--do_train true --do_eval true",
    ],
)
def test_a_value_that_can_be_honored_is_accepted(flags: str) -> None:
    assert _parse(*flags.split())
