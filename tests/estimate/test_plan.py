import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from minicpmv_finetune import storage
from minicpmv_finetune.cli.main import app
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.estimate import cost
from minicpmv_finetune.estimate.cost import Recipe
from minicpmv_finetune.estimate.plan import Estimate, estimate_run
from minicpmv_finetune.estimate.published import published_model
from minicpmv_finetune.inputs.recipe_costs import estimate_hours
from minicpmv_finetune.shards.codecs import CODECS
from minicpmv_finetune.shards.format import read_manifest

ANSWER = {"role": "assistant", "content": "The digit is 7."}
SIZES = [(40, 56), (400, 250), (112, 112), (90, 700), (640, 480)]
ORIENTATION = 0x0112
RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("gpu-*.jsonl"))
ROWS: list[dict[str, Any]] = [json.loads(line) for path in RESULTS for line in path.read_text().splitlines()]
MEASURED = [row for row in ROWS if "peak_memory" in row]
"""Steps of the published sizes on a GPU, measured by `make bench-gpu`."""


def sample(number: int, text: str = "Which digit?") -> dict[str, Any]:
    return {
        "id": str(number),
        "image": f"{number}.jpg",
        "conversations": [{"role": "user", "content": f"<image>\n{text}"}, ANSWER],
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        exif = Image.Exif()
        exif[ORIENTATION] = 6 if number == 3 else 1
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg", exif=exif)
    samples = [sample(number, "word " * number) for number in range(len(SIZES))]
    samples.append(sample(0, "word " * 3000))  # too long
    samples.append(sample(0, "<|im_end|>"))
    (tmp_path / "train.json").write_text(json.dumps(samples))
    (tmp_path / "eval.json").write_text(json.dumps(samples[:2]))
    return tmp_path / "train.json"


def recipe_with(**changes: Any) -> Recipe:
    """The recipe of the pipelines' defaults, on one GPU, with changes."""
    plain = Recipe(
        devices=1,
        batch_size=4,
        epochs=3.0,
        use_lora=True,
        tune_vision=True,
        tune_llm=False,
        lora_r=64,
        accumulation_steps=1,
    )
    return replace(plain, **changes)


def estimate(data: Path, base: Path, eval_data: str = "", recipe: Recipe | None = None, **settings: Any) -> Estimate:
    settings = {
        "max_slice_nums": 9,
        "model_max_length": 2048,
        "eval_fraction": 0.0,
        "exif_transpose": False,
        **settings,
    }
    return estimate_run(str(data), eval_data, str(base), recipe=recipe or recipe_with(), **settings)


@pytest.mark.parametrize("exif_transpose", [False, True])
def test_counts_equal_those_of_preprocess(exif_transpose: bool, data: Path, tiny_46: Path, tmp_path: Path) -> None:
    found = estimate(data, tiny_46, str(tmp_path / "eval.json"), exif_transpose=exif_transpose)
    settings = ValidationSettings(max_reject_ratio=1.0, exif_transpose=exif_transpose)
    rejects = tmp_path / "rejects.jsonl"
    validate_data(str(data), str(tmp_path / "eval.json"), tmp_path / "dataset", rejects, settings)
    codecs = [codec for codec in CODECS if codec in ("raw", "source")]
    for codec in codecs:
        options = PreprocessSettings(max_reject_ratio=1.0, codec=codec)
        preprocess(
            tmp_path / "dataset", str(tiny_46), tmp_path / codec, tmp_path / "too-long.jsonl", options, num_workers=1
        )
    manifest = read_manifest(tmp_path / "raw")
    lengths = [*manifest.lengths["train"], *manifest.lengths["eval"]]
    assert found.tokens == sum(lengths)
    assert found.samples == len(lengths)
    assert found.eval_samples == manifest.rows("eval")
    assert found.slices == sum(manifest.slices.values())
    assert found.token_percentiles[100] == max(lengths)
    assert found.rejected == {"special_token": 1, "too_long": 1}
    assert found.longest[0].index == len(SIZES)
    for codec in codecs:
        assert found.estimated_shard_bytes[codec] == pytest.approx(read_manifest(tmp_path / codec).bytes, rel=0.1)


def test_only_headers_are_read(data: Path, tiny_46: Path) -> None:
    complete = estimate(data, tiny_46)
    for path in data.parent.glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:700])
    truncated = estimate(data, tiny_46)
    assert (truncated.tokens, truncated.slices) == (complete.tokens, complete.slices)


def test_samples_with_wrong_headers_are_counted_as_rejected(data: Path, tiny_46: Path) -> None:
    (data.parent / "0.jpg").unlink()
    (data.parent / "1.jpg").write_bytes(b"no image")
    Image.new("I;16", (50, 50)).save(data.parent / "2.jpg", "PNG")
    frames = [Image.new("L", (50, 50), level) for level in (0, 255)]
    frames[0].save(data.parent / "3.jpg", "GIF", save_all=True, append_images=frames[1:])
    found = estimate(data, tiny_46)
    assert found.samples == 1
    codes = {"image_missing": 3, "image_unreadable": 1, "image_depth": 1, "image_animated": 1}
    assert found.rejected == codes


def test_images_in_archives_and_in_a_store_are_measured(s3_uri: str, data: Path, tiny_46: Path) -> None:
    local = estimate(data, tiny_46)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for path in sorted(data.parent.glob("*.jpg")):
            archive.add(path, path.name)
            storage.write_bytes(f"{s3_uri}/data/{path.name}", path.read_bytes())
    storage.write_bytes(f"{s3_uri}/data/images.tar", file.getvalue())
    samples = json.loads(data.read_text())
    for number in (1, 3):
        samples[number]["image"] = f"images.tar!{samples[number]['image']}"
    storage.write_bytes(f"{s3_uri}/data/train.json", json.dumps(samples).encode())
    remote = estimate_run(f"{s3_uri}/data/train.json", "", str(tiny_46), 9, 2048, 0.0, False, recipe_with())
    assert remote.model_copy(update={"longest": local.longest}) == local


def test_samples_longer_than_model_max_length_are_counted(data: Path, tiny_46: Path) -> None:
    found = estimate(data, tiny_46, model_max_length=16384)
    assert (found.too_long, found.too_long_at) == (0, {1024: 1, 2048: 1, 4096: 1, 8192: 1})
    assert estimate(data, tiny_46).too_long == 1


def test_data_without_a_usable_sample_is_refused(data: Path, tiny_46: Path) -> None:
    with pytest.raises(UserError, match=r"no usable sample; the shortest has \d+ tokens"):
        estimate(data, tiny_46, model_max_length=5)


def test_steps_follow_from_batches_and_epochs(data: Path, tiny_46: Path) -> None:
    assert estimate(data, tiny_46, recipe=recipe_with(batch_size=2, epochs=2.0)).steps == 6
    recipe = recipe_with(batch_size=1, devices=2, accumulation_steps=3, epochs=3.0)
    assert estimate(data, tiny_46, recipe=recipe).steps == 3
    # The same file may be both, as in a first trial.
    same = estimate(data, tiny_46, str(data), recipe=recipe_with(batch_size=2, epochs=2.0))
    assert (same.steps, same.samples, same.eval_samples) == (6, 10, 5)


def test_parameters_are_counted_from_headers(tiny_46: Path) -> None:
    model = cost.read_model(tiny_46)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tiny_46)
    assert model.total == sum(parameter.numel() for parameter in loaded.parameters())
    assert model.parameters["vision"] == sum(p.numel() for p in loaded.model.vision_tower.parameters())
    assert model.parameters["merger"] == sum(p.numel() for p in loaded.model.merger.parameters())
    assert model.parameters["embeddings"] == loaded.get_input_embeddings().weight.numel()
    assert model.parameters["head"] == loaded.lm_head.weight.numel()
    assert (model.hidden_size, model.layers, model.vocab_size) == (128, 4, 512)


def test_trained_parameters_equal_those_of_training(tiny_46: Path, tmp_path: Path) -> None:
    from minicpmv_finetune.components.train.arguments import parse
    from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
    from minicpmv_finetune.minicpmv.checkpoint import load_model

    model = cost.read_model(tiny_46)
    for flags, recipe in (
        ("--use_lora true --tune_llm false --lora_r 8", recipe_with(lora_r=8)),
        ("--use_lora true --tune_llm false --tune_vision false --lora_r 8", recipe_with(lora_r=8, tune_vision=False)),
        ("--tune_llm true", recipe_with(use_lora=False, tune_llm=True)),
    ):
        common = f"--model_name_or_path {tiny_46} --data_path nowhere --output_dir {tmp_path} {flags}"
        arguments = parse(common.split(), announce=lambda sentence: None)
        trained = make_trainable(*load_model(tiny_46), arguments)
        assert model.trained(recipe) == count_parameters(trained)[0]


def large_model() -> cost.Model:
    parts = {"language": 7 * 10**9, "embeddings": 10**9, "head": 10**9, "vision": 4 * 10**8, "merger": 10**8}
    return cost.Model(parts, 10**6, 4096, 32, 150_000, 1152, 27, 12_288, 0, 0)


def test_strategies_save_the_memory_that_they_shard() -> None:
    full = recipe_with(use_lora=False, tune_llm=True, devices=8)
    found = cost.estimate_memory(large_model(), full, 4096, 10_000, checkpointing=True)
    assert found["DDP"] > found["single GPU"] > found["ZeRO-2"] > found["ZeRO-3"]
    trained = large_model().total
    assert found["single GPU"] - found["ZeRO-2"] == pytest.approx(14 * trained * 7 / 8)
    assert "QLoRA" not in found
    lora = cost.estimate_memory(large_model(), recipe_with(), 4096, 10_000, checkpointing=True)
    # QLoRA also leaves the embeddings frozen.
    assert lora["single GPU"] - lora["QLoRA"] == pytest.approx(7e9 * (2 - 4.127 / 8) + 16e9)
    # Unless they are named.
    named = recipe_with(whole_in_4_bits=("merger", "embeddings"))
    found = cost.estimate_memory(large_model(), named, 4096, 10_000, checkpointing=True)
    assert found["QLoRA"] - lora["QLoRA"] == pytest.approx(16e9)
    plain = cost.estimate_memory(large_model(), recipe_with(), 4096, 10_000, checkpointing=False)
    assert all(plain[name] > lora[name] for name in lora)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "{version}-{batch}-{checkpointing}".format(**row["case"]))
def test_memory_is_within_a_fifth_of_what_a_gpu_needed(row: dict[str, Any]) -> None:
    recipe = recipe_with(tune_vision=False, batch_size=row["case"]["batch"], lora_r=64)
    found = cost.estimate_memory(
        cost.Model(**row["model"]), recipe, row["tokens"], row["patches"], row["case"]["checkpointing"]
    )
    assert found["single GPU"] == pytest.approx(row["peak_memory"], rel=0.2)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "{version}-{batch}-{checkpointing}".format(**row["case"]))
def test_hours_are_within_a_third_of_what_a_gpu_needed(row: dict[str, Any]) -> None:
    case, model = row["case"], cost.Model(**row["model"])
    recipe = recipe_with(tune_vision=False, batch_size=case["batch"])
    lengths = [row["tokens"] // case["batch"]] * case["batch"]
    flops = cost.estimate_flops(model, recipe, lengths, row["patches"], case["checkpointing"])
    assert estimate_hours(model, 1, flops)["H100"] == pytest.approx(row["seconds"] / 3600, rel=0.34)


@pytest.mark.parametrize("version", ["2.6", "4.5", "4.6"])
def test_published_sizes_are_those_of_the_models_that_a_gpu_trained(version: str) -> None:
    measured = next(row["model"] for row in MEASURED if row["case"]["version"] == version)
    found = published_model(version)
    # When these rows were measured, it was not counted that the tower of 4.6 merges patches on the way, nor what DoRA
    # trains.
    counted_since = {"vision_passes": found.vision_passes, "lora_outputs": found.lora_outputs}
    assert found == cost.Model(**{**counted_since, **measured})
    assert (found.vision_passes < 1) == (version == "4.6")


def test_flops_grow_with_the_trained_parameters_and_with_checkpointing() -> None:
    lora, full = recipe_with(), recipe_with(use_lora=False, tune_llm=True)
    few = cost.estimate_flops(large_model(), lora, [1000], 1000, checkpointing=False)
    many = cost.estimate_flops(large_model(), full, [1000], 1000, checkpointing=False)
    assert many == pytest.approx(6 * (8e9 * 1000 + 5e8 * 1000), rel=0.05)
    assert few < many < cost.estimate_flops(large_model(), full, [1000], 1000, checkpointing=True)


def test_batches_by_tokens_are_counted(data: Path, tiny_46: Path) -> None:
    plain = estimate(data, tiny_46)
    found = estimate(data, tiny_46, recipe=recipe_with(tokens_per_batch=2048, epochs=2.0))
    assert (found.tokens_per_batch, found.padding_waste) == (2048, 0.0)
    assert found.tokens_in_a_batch == pytest.approx(found.tokens / found.batches)
    assert found.tokens_in_a_batch <= 2048
    assert found.steps == 2 * found.batches
    assert plain.batches == 0 < plain.padding_waste


def test_shared_images_are_counted(data: Path, tiny_46: Path) -> None:
    samples = json.loads(data.read_text())
    data.write_text(json.dumps([*samples, sample(1, "Is it a seven?"), sample(1, "What is it?")]))
    plain = estimate(data, tiny_46)
    found = estimate(data, tiny_46, recipe=recipe_with(share_images=True, batch_size=1))
    assert (plain.rows, plain.shared_tokens) == (0, 0)
    assert (found.samples, found.rows) == (plain.samples, plain.samples - 2)
    assert found.steps == 3 * found.rows
    assert found.shared_tokens > 0
    assert found.estimated_flops < plain.estimated_flops


def test_padding_of_packed_rows_is_counted() -> None:
    assert cost.packing_share([50, 50, 100], 100) == 0.0
    assert cost.packing_share([50, 100], 100) == pytest.approx(0.25)


def test_padding_is_counted_in_batches() -> None:
    assert cost.padding_share([10, 10, 10, 10], 2) == 0.0
    assert cost.padding_share([10, 5], 2) == pytest.approx(0.25)


def test_a_run_is_planned_where_it_cannot_train(data: Path, tiny_46: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = '{"attn_implementation": "flash_attention_2", "nproc_per_node": 8, "optim": "galore_adamw"}'
    monkeypatch.setattr("minicpmv_finetune.inputs.checks.find_missing_gpus", lambda processes: ["has 1 GPU"])
    words = ["--data", str(data), "--base-model", str(tiny_46), "--training-flags", flags]
    planned = CliRunner().invoke(app, ["plan", *words])
    assert planned.exit_code == 0, planned.output
    assert CliRunner().invoke(app, ["run", *words]).exit_code != 0


def test_fsdp2_needs_main_memory_for_what_each_process_has_itself(data: Path, tiny_46: Path) -> None:
    words = ["plan", "--data", str(data), "--base-model", str(tiny_46)]
    lora, full = ["--use-lora", "--no-tune-vision"], ["--no-use-lora", "--tune-llm"]

    def estimate(kind: list[str], **flags: Any) -> Estimate:
        given = json.dumps({"strategy": "fsdp2", "nproc_per_node": 8, "num_nodes": 2, **flags})
        done = CliRunner().invoke(app, [*words, *kind, "--training-flags", given, "--output", "json"])
        return Estimate.model_validate_json(done.stdout)

    file = 2 * estimate(full).parameters  # in bf16, of which all processes share the pages
    assert estimate(full).estimated_main_memory_bytes == file
    assert estimate(full, bf16=False).estimated_main_memory_bytes == file + 8 * 2 * file
    adapters = estimate(lora, lora_modules_to_save="none").trained_parameters
    copied = estimate(lora).trained_parameters - adapters
    assert estimate(lora).estimated_main_memory_bytes == file + 8 * (2 * copied + 4 * adapters)
    text = CliRunner().invoke(app, [*words, "--training-flags", '{"strategy": "fsdp2"}']).stdout
    assert "on each machine while FSDP2 starts" in text
    assert "main memory" not in CliRunner().invoke(app, words).stdout


def test_the_command_prints_tables_or_json(data: Path, tiny_46: Path) -> None:
    arguments = ["plan", "--data", str(data), "--base-model", str(tiny_46)]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0
    assert "QLoRA" in table.stdout
    found = Estimate.model_validate_json(CliRunner().invoke(app, [*arguments, "--output", "json"]).stdout)
    assert found.samples == len(SIZES)
