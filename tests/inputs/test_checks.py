"""The checks of a whole run before its first step."""

import base64
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from minicpmv_finetune import storage
from minicpmv_finetune.components.evaluate.metrics import METRICS
from minicpmv_finetune.components.evaluate.settings import EvaluationSettings
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings
from minicpmv_finetune.components.train.flags import RANGES
from minicpmv_finetune.components.validate_data.validate import ValidationSettings
from minicpmv_finetune.errors import AccessError, MistakesError, RetryableError, UserError
from minicpmv_finetune.inputs import checks
from minicpmv_finetune.inputs.checks import check_in_first_step, check_run, check_training, inputs_among
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, INPUTS, RETRAIN_INPUTS, Input
from minicpmv_finetune.options import Accepted, _fields
from minicpmv_finetune.shards.format import MANIFEST_FILE, read_manifest
from tests.shards.example_shards import write_example_shards


def _sample(answer: str = "cat", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]
    return {"conversations": turns, **more}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Inputs of a run without mistakes."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "minicpmv4_6"}')
    (tmp_path / "train.json").write_text(json.dumps([_sample()] * 3))
    return {"data_uri": str(tmp_path / "train.json"), "base_model_uri": str(tmp_path / "base")}


def _mistakes(given: dict[str, Any], inputs: tuple[Input, ...] = FINETUNE_INPUTS, **more: Any) -> tuple[str, ...]:
    with pytest.raises(MistakesError) as caught:
        check_run(inputs, {**given, **more})
    assert all("\n" not in sentence for sentence in caught.value.sentences)
    return caught.value.sentences


def _bad_values(item: Input) -> list[Any]:
    """Values that an input must not accept."""
    bad: list[Any] = [3] if item.type is str and item.default != "" else [] if item.type is str else ["wrong type", [1]]
    bad += ["no such choice"] if item.choices else []
    bad += [-7, 0] if item.above is not None or (item.at_least or 0) > 0 else [-7] if item.at_least is not None else []
    bad += [item.at_most + 1] if item.at_most is not None else []
    return bad


@pytest.mark.parametrize(
    ("item", "value"), [(item, value) for item in INPUTS.values() for value in _bad_values(item)], ids=str
)
def test_a_bad_value_of_an_input_is_one_sentence_that_names_it(item: Input, value: Any, given: dict[str, Any]) -> None:
    inputs = FINETUNE_INPUTS if item in FINETUNE_INPUTS else RETRAIN_INPUTS
    mistakes = _mistakes(given, inputs, **{item.name: value})
    assert len(mistakes) == 1
    assert mistakes[0].startswith(f"{item.name}: ")


def test_a_run_without_mistakes_is_accepted(given: dict[str, Any]) -> None:
    assert check_run(FINETUNE_INPUTS, given) == given
    assert check_run(RETRAIN_INPUTS, given) == given


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"training_flags": {"lr_sheduler_type": "cosine"}}, "training_flags: lr_sheduler_type: no such flag; did you"),
        ({"training_flags": {"warmup_steps": -3.0}}, "training_flags: warmup_steps: -3 is not accepted; give at least"),
        ({"training_flags": {"lora_r": {"a": 1}}}, "is not a whole number"),
        ({"training_flags": {"num_nodes": 0}}, "training_flags: num_nodes is 0"),
        ({"training_flags": {"nproc_per_node": "x"}}, "training_flags: nproc_per_node is x"),
        ({"registered_model": "team/model"}, "registered_model: 'team/model' cannot name a model in MLflow"),
        ({"registered_model": " "}, "registered_model: ' ' cannot name a model in MLflow"),
        ({"training_flags": {"data_path": "x"}}, "the pipeline sets this flag itself; give the input data_uri instead"),
        ({"training_flags": {"save_safetensors": False}}, "training_flags: --save_safetensors false"),
        ({"tune_llm": True}, "set tune_llm to false to train adapters"),
        ({"training_flags": {"tune_llm": True}}, "set tune_llm to false to train adapters"),
        ({"training_flags": {"use_lora": False, "q_lora": True}}, "needs --use_lora true"),
        ({"data_options": {"eval_fractoin": 0.2}}, "data_options: eval_fractoin: unknown; did you mean eval_fraction?"),
        ({"data_options": {"eval_fraction": 1}}, "data_options: eval_fraction: 1.0 is not accepted; give less than 1."),
        ({"data_options": {"eval_fraction": 0}}, "leaves nothing to evaluate"),
        ({"evaluation_options": {"batch_size": True}}, "evaluation_options: batch_size: True is not a whole number"),
        ({"evaluation_options": {"max_tokens": 3}}, "did you mean max_new_tokens?"),
        ({"evaluation_options": {"max_new_tokens": 0}}, "max_new_tokens: 0 is not accepted; give at least 1."),
        ({"evaluation_options": {"gate": {"min_metrik": 1}}}, "gate.min_metrik: unknown; did you mean min_metric?"),
        ({"evaluation_options": {"gate": {"min_metric": 80}}}, "scores by exact_match are from 0 to 1"),
        ({"evaluation_options": {"gate": 1}}, "evaluation_options: gate: 1 is not a JSON object"),
        ({"evaluation_options": {"metric": "exactmatch"}}, "did you mean exact_match?"),
        ({"metric": "accuracy"}, "metric: 'accuracy' is not accepted; did you mean vqa_accuracy?"),
        ({"data_uri": "nowhere.json"}, "data_uri: nowhere.json: not found"),
        ({"eval_data_uri": "nowhere.json"}, "eval_data_uri: nowhere.json: not found"),
        ({"base_model_uri": "/nowhere"}, "base_model_uri: /nowhere: not found"),
        ({"base_model_uri": ""}, "base_model_uri: empty; give a checkpoint's folder"),
        ({"training_flags": {"deepspeed": "nowhere.json"}}, "training_flags: deepspeed: nowhere.json: not found"),
        ({"training_flags": {"fsdp_config": "no.json"}}, "training_flags: fsdp_config: no.json: not found"),
        ({"training_flags": {"lora_weight_path": "/no"}}, "lora_weight_path: /no/adapter_config.json: not found"),
        ({"training_flags": {"resume_from_checkpoint": "/no"}}, "resume_from_checkpoint: /no: there is no such local"),
        ({"training_flags": {"llm_type": "minicpm"}}, "contradicts the checkpoint: MiniCPM-V 4.6 uses qwen"),
        ({"training_flags": {"lora_layer_replication": "0:2,1:3"}}, "mixes linear and full attention"),
        ({"training_flags": {"lora_layers_to_transform": "first"}}, "give layer numbers such as 0,1,5"),
        ({"training_flags": {"report_to": "wandbb"}}, "--report_to wandbb: unknown; did you mean wandb?"),
    ],
)
def test_a_mistake_is_found_before_the_run(given: dict[str, Any], more: dict[str, Any], sentence: str) -> None:
    mistakes = _mistakes(given, **more)
    assert len(mistakes) == 1
    assert sentence in mistakes[0]


def test_files_and_folders_that_training_flags_name_are_accepted_if_they_are_there(
    given: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "adapter_config.json").write_text("{}")
    flags = {"deepspeed": str(tmp_path / "zero.json"), "lora_weight_path": str(tmp_path)}
    check_run(FINETUNE_INPUTS, {**given, "training_flags": {**flags, "resume_from_checkpoint": "True"}})
    as_text = base64.b64encode(b'{"zero_optimization": {"stage": 2}}').decode()
    check_run(FINETUNE_INPUTS, {**given, "training_flags": {"deepspeed": as_text}})
    (tmp_path / "zero.json").write_text("{")
    assert "zero.json: not valid JSON" in _mistakes(given, training_flags=flags)[0]


def test_the_mistakes_of_every_source_are_named_at_once(given: dict[str, Any]) -> None:
    mistakes = _mistakes(
        given,
        lora_r=0,
        training_flags={"optim": "adamw"},
        evaluation_options={"gate": {"a": 1}},
        data_options={"b": 1},
        base_model_uri="/nowhere",
        eval_data_uri="nowhere.json",
    )
    places = ["lora_r", "training_flags", "data_options", "evaluation_options", "base_model_uri", "eval_data_uri"]
    assert [mistake.partition(":")[0] for mistake in mistakes] == places


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ('{"model_type": "qwen2_vl"}', "model_type 'qwen2_vl' (version None) is none of the supported MiniCPM-V"),
        ('{"model_type": "minicpmv", "version": 2.0}', "version 2.0) is none of"),
        ("{", "not valid JSON"),
    ],
)
def test_a_base_model_of_another_kind_is_refused(given: dict[str, Any], config: str, sentence: str) -> None:
    (Path(given["base_model_uri"]) / "config.json").write_text(config)
    assert sentence in _mistakes(given)[0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "empty_file"),
        ("[{]", "invalid JSON at line 1"),
        ('"text"', "contains text, not an array of samples"),
        (json.dumps([{"id": 1}]), "none of the first 1 samples can be used. schema: "),
        (json.dumps([_sample(image="no.png")]), "image_missing: "),
        (json.dumps([_sample(metric="anlss")]), "sample 0: metric: 'anlss' is none of exact_match"),
        (json.dumps([_sample(metric="json_fields")]), "json_fields cannot read the expected answer"),
        (json.dumps([_sample(metric="cer"), _sample()]), "mix error rates with scores"),
    ],
)
def test_unusable_data_is_found_before_the_run(given: dict[str, Any], content: str, sentence: str) -> None:
    Path(given["data_uri"]).write_text(content)
    mistakes = _mistakes(given)
    assert mistakes[0].startswith("data_uri: ")
    assert sentence in mistakes[0]


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (base64.b64encode(b"an image" * 100).decode(), "longer than a path can be"),
        ("null\0character.png", r"'/.*null\\x00character.png': a path cannot contain a null character"),
        ("missing.png", "missing.png: not found"),
    ],
)
def test_an_image_that_is_no_path_is_a_reject(given: dict[str, Any], image: str, sentence: str) -> None:
    Path(given["data_uri"]).write_text(json.dumps([_sample(image=image)]))
    [mistake] = _mistakes(given)
    assert re.search(sentence, mistake)


def test_metrics_of_training_data_do_not_matter_beside_evaluation_data(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps([_sample()]))
    Path(given["data_uri"]).write_text(json.dumps([_sample(metric="anlss")]))
    check_run(FINETUNE_INPUTS, {**given, "eval_data_uri": str(tmp_path / "eval.json")})


def test_reasoning_is_not_checked_by_the_metric(given: dict[str, Any]) -> None:
    Path(given["data_uri"]).write_text(json.dumps([_sample("<think>a</think>\n[1]", metric="json_fields")]))
    check_run(FINETUNE_INPUTS, given)


def test_only_the_beginning_of_the_data_is_read(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ROWS", 2)
    Path(given["data_uri"]).write_text(json.dumps([_sample(), _sample(), _sample(metric="anlss")]))
    check_run(FINETUNE_INPUTS, given)


@pytest.mark.parametrize("key", ["", "/data", "/data/"])
def test_a_folder_in_a_store_is_no_data(given: dict[str, Any], key: str, s3_uri: str) -> None:
    storage.write_bytes(f"{s3_uri}/data/a.jsonl", b"{}")
    (mistake,) = _mistakes(given, data_uri=f"{s3_uri}{key}")
    assert f"data_uri: {s3_uri}{key}: is a folder; name its data files, such as" in mistake


def test_what_a_store_does_not_answer_is_only_a_warning(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(uri: str, name: str) -> bytes:
        raise RetryableError(f"{uri}: the hub does not answer; try again.")

    monkeypatch.setattr(storage, "read_model_file", fail)
    check_run(FINETUNE_INPUTS, {**given, "base_model_uri": "owner/name"})
    assert "warning: base_model_uri: not checked before the run: owner/name: the hub" in capsys.readouterr().err


def test_look_ups_have_a_time_limit_together(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "_LOOK_UP_SECONDS", 0.01)
    for name in ("is_folder", "read_model_file"):
        monkeypatch.setattr(storage, name, lambda *arguments: threading.Event().wait())
    there = {"data_uri": "s3://bucket/train.json", "base_model_uri": "owner/name"}
    assert check_run(FINETUNE_INPUTS, there) == there
    said = " ".join(capsys.readouterr().err.split())
    assert "data_uri: not checked before the run: s3://bucket/train.json: no answer within 0.01 seconds." in said
    # A newcomer without access to the hub learns how to go on.
    assert (
        "owner/name: no answer within 0.01 seconds; to try without the hub, let `minicpmv-finetune tiny-base`" in said
    )


def test_for_a_cluster_only_stores_and_the_hub_are_looked_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"data_uri": "/data/train.json", "base_model_uri": "/models/base"}
    assert check_run(FINETUNE_INPUTS, there, runs_here=False) == there

    def refuse(uri: str) -> int:
        raise AccessError(f"{uri}: access denied") if "closed" in uri else UserError(f"{uri}: not found")

    monkeypatch.setattr(storage, "is_folder", refuse)
    with pytest.raises(MistakesError) as caught:
        check_run(
            FINETUNE_INPUTS,
            {**there, "data_uri": "s3://closed/a.json", "eval_data_uri": "s3://b/b.json"},
            runs_here=False,
        )
    assert caught.value.sentences == ("eval_data_uri: s3://b/b.json: not found",)
    assert "warning: data_uri: not checked before the run: s3://closed/a.json: access" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--data_path nowhere.json", "--data_path: nowhere.json: not found"),
        ("--data_path nowhere", "--data_path: nowhere: no such folder; give the shards folder"),
        ("--data_path {data} --model_name_or_path /nowhere", "--model_name_or_path: /nowhere: not found"),
        ("--data_path {data} --eval_data_path nowhere.json", "--eval_data_path: nowhere.json: not found"),
        ("--data_path {data} --lora_r 0", "--lora_r: 0 is not accepted"),
        ("--data_path {data} --deepspeed nowhere.json", "--deepspeed: nowhere.json: not found"),
        ("--data_path {data} --llm_type llama3", "--llm_type llama3 contradicts the checkpoint"),
        ("--data_path {data} --output_dir {data}", "--output_dir: {data}: is also the input --data_path"),
        ("--data_path {data} --output_dir ", "--output_dir: empty; give a path."),
        ("--data_path {data}", "--output_dir: missing; give the folder"),
        (
            "--data_path {data} --output_dir {base}-2 --checkpoint_uri {base}",
            "--checkpoint_uri: {base}: is also the input --model_name_or_path",
        ),
        (
            "--data_path {data} --output_dir {base}-2 --checkpoint_uri {base}-2/kept",
            "--checkpoint_uri: {base}-2/kept: is, contains or lies in --output_dir",
        ),
        (
            "--data_path {data} --model_name_or_path {base}/config.json",
            "is a file, but a folder is needed; give '{base}'",
        ),
    ],
)
def test_a_training_is_checked_before_it_starts(given: dict[str, Any], words: str, sentence: str) -> None:
    places = {"data": given["data_uri"], "base": given["base_model_uri"]}
    argv = ["--model_name_or_path", given["base_model_uri"], *words.format(**places).split(" ")]
    with pytest.raises(UserError) as caught:
        check_training(argv)
    assert sentence.format(**places) in str(caught.value)


def test_shards_without_samples_to_evaluate_are_found_before_a_training_that_needs_some(
    given: dict[str, Any], tmp_path: Path
) -> None:
    shards = write_example_shards(tmp_path / "shards")
    places = {"model_name_or_path": given["base_model_uri"], "data_path": shards, "output_dir": tmp_path / "out"}
    flags = [f"--{name}={value}" for name, value in places.items()]
    check_training(flags)
    with pytest.raises(UserError, match="has no samples to evaluate, which --eval_strategy epoch needs"):
        check_training([*flags, "--eval_strategy", "epoch"])
    manifest = read_manifest(shards)
    complete = manifest.model_copy(update={"lengths": {**manifest.lengths, "eval": [5]}})
    (shards / MANIFEST_FILE).write_text(complete.model_dump_json())
    check_training([*flags, "--eval_strategy", "epoch"])


def test_the_choices_of_the_metric_are_the_metrics() -> None:
    assert INPUTS["metric"].choices == tuple(METRICS)


def test_steps_and_flags_accept_what_the_table_accepts() -> None:
    for kind in (EvaluationSettings, PreprocessSettings, ValidationSettings):
        for name, hint in _fields(kind).items():
            if name in INPUTS:
                accepted = next((extra for extra in getattr(hint, "__metadata__", ()) if extra), Accepted())
                assert accepted == INPUTS[name].accepted, name
    for name, accepted in RANGES.items():
        if name in INPUTS:
            assert accepted == INPUTS[name].accepted, name


@pytest.mark.parametrize("settings", [PreprocessSettings, ValidationSettings])
def test_a_step_refuses_a_value_out_of_range(settings: Any) -> None:
    with pytest.raises(UserError, match=r"max_reject_ratio: 5\.0 is not accepted; give at most 1"):
        settings(max_reject_ratio=5)


def test_the_checks_import_neither_torch_nor_kfp() -> None:
    code = "import sys, minicpmv_finetune.inputs.checks; print({'torch', 'kfp', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_first_step_names_all_mistakes_that_later_steps_would_find(tmp_path: Path) -> None:
    given = {
        "data_uri": str(tmp_path / "train.json"),
        "base_model_uri": "/models/on-a-volume-of-other-pods",
        "start_from": "",
        "lora_r": 0,
        "metric": "exactmatch",
        "training_flags": {"learning_rat": 1e-3, "output_dir": "here"},
        "evaluation_options": {"gate": {"min_metrc": 0.5}},
    }
    with pytest.raises(MistakesError) as raised:
        check_in_first_step(inputs_among({**given, "dataset": "an artifact"}))
    assert [sentence.split(":")[0] for sentence in raised.value.sentences] == [
        "lora_r",
        "metric",
        "training_flags",
        "training_flags",
        "evaluation_options",
    ]


@pytest.mark.parametrize("extra", [{}, {"base_model_uri": ""}, {"start_from": "champion", "registered_model": "m"}])
def test_the_first_step_accepts_what_it_cannot_look_up(extra: dict[str, Any], tmp_path: Path) -> None:
    check_in_first_step({"data_uri": str(tmp_path / "train.json"), "base_model_uri": "/models/m", **extra})


@pytest.mark.parametrize(
    ("optim", "package"),
    [("galore_adamw", "galore_torch"), ("adamw_torch_8bit", "torchao"), ("adamw_anyprecision", "torchdistx")],
)
def test_packages_of_the_training_are_not_needed_where_the_data_is_checked(
    optim: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicpmv_finetune.components.train.flags.find_spec", lambda name: None)
    flags = {"optim": optim}
    given = {"data_uri": str(tmp_path / "train.json"), "base_model_uri": "/models/m", "training_flags": flags}
    check_in_first_step(given)
    with pytest.raises(UserError, match=f"{package} is not installed"):
        check_run(FINETUNE_INPUTS, given)


def test_retraining_without_a_name_is_refused_by_the_first_step(tmp_path: Path) -> None:
    given = {"data_uri": str(tmp_path / "train.json"), "start_from": "base", "registered_model": ""}
    with pytest.raises(UserError, match="registered_model: empty"):
        check_in_first_step(given)
