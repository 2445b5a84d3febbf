"""The table of inputs, and everything that is made from it."""

import inspect
from typing import Any

import docstring_parser
import pytest

from minicpmv_finetune.components.evaluate.component import evaluate
from minicpmv_finetune.components.merge.component import merge
from minicpmv_finetune.components.plan_retraining.component import plan_retraining
from minicpmv_finetune.components.preprocess.component import preprocess, preprocess_part
from minicpmv_finetune.components.register.component import register
from minicpmv_finetune.components.train.component import train
from minicpmv_finetune.components.validate_data.component import validate_data
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.inputs.table import (
    FINETUNE_INPUTS,
    INPUTS,
    REQUIRED,
    RETRAIN_INPUTS,
    Input,
    check_inputs,
    defaults,
)
from minicpmv_finetune.pipelines import pipeline_of
from minicpmv_finetune.pipelines.finetuning import FINETUNE
from minicpmv_finetune.pipelines.pipeline import Pipeline
from minicpmv_finetune.pipelines.retraining import RETRAIN

COMPONENTS = (validate_data, preprocess, preprocess_part, train, merge, evaluate, register, plan_retraining)
GIVEN = {"data_uri": "s3://bucket/train.json"}
KFP_TYPES = {str: "String", int: "Integer", float: "Float", bool: "Boolean", dict: "Dict"}


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_components_declare_inputs_like_the_table(component: Any) -> None:
    declared = component.component_spec.inputs
    shared = [name for name in declared if name in INPUTS]
    assert shared
    documented = docstring_parser.parse(inspect.getdoc(component.python_func) or "")
    described = {item.arg_name for item in documented.params}
    for name in shared:
        assert declared[name].type.partition("[")[0] == KFP_TYPES[INPUTS[name].type], name
        assert name in described
        if component is not validate_data:
            assert declared[name].default is None, "the table contains the default"


def test_the_first_step_checks_every_input_of_both_pipelines() -> None:
    declared = validate_data.component_spec.inputs
    assert set(INPUTS) <= set(declared)
    optional = {name: declared[name].default for name in INPUTS if declared[name].optional}
    of_table = {name: INPUTS[name].default for name in optional}
    assert optional == {**of_table, "base_model_uri": "", "start_from": ""}


@pytest.mark.parametrize("pipeline", [FINETUNE, RETRAIN], ids=lambda pipeline: pipeline.name)
def test_a_pipeline_has_the_defaults_and_help_texts_of_the_table(pipeline: Pipeline) -> None:
    offered = pipeline.build().component_spec.inputs
    assert list(offered) == [item.name for item in pipeline.inputs]
    for item in pipeline.inputs:
        assert offered[item.name].type == KFP_TYPES[item.type]
        assert offered[item.name].description == item.help
        assert offered[item.name].default == (None if item.default is REQUIRED else item.default)


@pytest.mark.parametrize("pipeline", [FINETUNE, RETRAIN], ids=lambda pipeline: pipeline.name)
def test_every_input_is_passed_to_a_step(pipeline: Pipeline) -> None:
    taken = {name for component in COMPONENTS for name in component.component_spec.inputs}
    assert {item.name for item in pipeline.inputs} <= taken


def test_inputs_are_few_and_have_help_in_a_sentence() -> None:
    for inputs in (FINETUNE_INPUTS, RETRAIN_INPUTS):
        assert len(inputs) <= 20
        assert [item.name for item in inputs if item.default is REQUIRED] == ["data_uri"]
        assert all(len(item.help) > 15 and item.help.endswith(".") for item in inputs)


@pytest.mark.parametrize("item", [item for item in INPUTS.values() if item.default is not REQUIRED], ids=str)
def test_a_default_is_accepted(item: Input) -> None:
    assert item.parse(item.default) == item.default


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("lora_r", 0, "lora_r: 0 is not accepted; give at least 1."),
        ("lora_r", "many", "lora_r: 'many' is not a whole number; correct it."),
        ("lora_r", True, "lora_r: True is not a whole number; correct it."),
        ("lora_alpha", 0, "give at least 1"),
        ("per_device_train_batch_size", 0, "give at least 1"),
        ("max_slice_nums", 0, "give at least 1"),
        ("model_max_length", -5, "give at least 1"),
        ("seed", -1, "give at least 0"),
        ("seed", 2**32, "give at most"),
        ("learning_rate", 0, "give more than 0"),
        ("learning_rate", float("nan"), "give more than 0"),
        ("num_train_epochs", -3, "give more than 0"),
        ("max_reject_ratio", 5, "give at most 1"),
        ("use_lora", 1, "use_lora: 1 is not true or false"),
        ("training_flags", "[1]", "training_flags: [1] is not a JSON object"),
        ("metric", 3, "metric: 3 is not a text"),
    ],
)
def test_an_invalid_value_is_refused(name: str, value: object, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check_inputs(FINETUNE_INPUTS, {**GIVEN, name: value})
    assert sentence in str(caught.value)


def test_the_message_about_a_wrong_choice_suggests_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean champion"):
        check_inputs(RETRAIN_INPUTS, {**GIVEN, "start_from": "champoin"})


def test_the_message_about_an_unknown_name_suggests_the_nearest_one() -> None:
    with pytest.raises(UserError, match="lora_rr: the pipeline has no such input; did you mean lora_r"):
        check_inputs(FINETUNE_INPUTS, {**GIVEN, "lora_rr": 8})


def test_one_message_names_all_mistakes() -> None:
    with pytest.raises(UserError, match=r"3 inputs are wrong\. lora_r: .* seed: .* data_uri: missing"):
        check_inputs(FINETUNE_INPUTS, {"lora_r": 0, "seed": -1})


def test_text_is_parsed_as_the_inputs_type() -> None:
    given = {**GIVEN, "lora_r": "8", "learning_rate": "1e-3", "use_lora": "False", "training_flags": '{"a": 1}'}
    assert check_inputs(FINETUNE_INPUTS, given) == {
        **GIVEN,
        "lora_r": 8,
        "learning_rate": 1e-3,
        "use_lora": False,
        "training_flags": {"a": 1},
    }


def test_inputs_that_are_not_given_are_left_to_their_defaults() -> None:
    assert check_inputs(FINETUNE_INPUTS, GIVEN) == GIVEN
    assert set(defaults(FINETUNE_INPUTS)) == {item.name for item in FINETUNE_INPUTS} - {"data_uri"}


def test_a_pipeline_is_chosen_by_its_short_name() -> None:
    assert pipeline_of("finetune") is FINETUNE
    assert pipeline_of("retrain") is RETRAIN
