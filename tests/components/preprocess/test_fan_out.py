import json
from pathlib import Path

import pytest
from kfp import dsl, local

from minicpmv_finetune.components.preprocess.component import preprocess, preprocess_part
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings
from minicpmv_finetune.components.preprocess.preprocess import preprocess as prepare
from minicpmv_finetune.components.validate_data.component import validate_data
from minicpmv_finetune.shards.format import read_manifest, verify_shards
from tests.warm_processes import warm_steps

PARTS = 2


# In subprocesses no container image is used, so its name need not name a Python version.
@pytest.mark.filterwarnings("ignore:You may be attemping to run a task")
def test_parts_in_a_pipeline_give_the_shards_of_one_task(
    digits: Path, tiny_46: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline with ParallelFor and Collected runs on this machine."""

    @dsl.pipeline(name="prepare")
    def pipeline(data_uri: str, base_model_uri: str) -> None:
        validated = validate_data(
            data_uri=data_uri,
            eval_data_uri="",
            max_reject_ratio=0.0,
            seed=0,
            data_options={"eval_fraction": 0.3},
            registered_model="",
        )
        with dsl.ParallelFor(list(range(PARTS))) as part:
            prepared = preprocess_part(
                dataset=validated.outputs["dataset"],
                base_model_uri=base_model_uri,
                max_slice_nums=9,
                model_max_length=2048,
                part=part,
                num_parts=PARTS,
                num_workers=1,
            )
        preprocess(
            dataset=validated.outputs["dataset"],
            base_model_uri=base_model_uri,
            max_slice_nums=9,
            model_max_length=2048,
            max_reject_ratio=0.0,
            num_workers=1,
            parts=dsl.Collected(prepared.outputs["Output"]),
        )

    samples = json.loads((digits / "train.json").read_text())[:50]
    for sample in samples:
        sample["image"] = str(digits / sample["image"])
    (tmp_path / "train.json").write_text(json.dumps(samples))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "artifacts"))
    # kfp.local replaces `print` in each task's thread, and the threads restore it in any order.
    monkeypatch.setattr("builtins.print", print)
    with warm_steps():
        pipeline(data_uri=str(tmp_path / "train.json"), base_model_uri=str(tiny_46))

    (run,) = (tmp_path / "artifacts").iterdir()
    shards = run / "preprocess" / "shards"
    manifest = read_manifest(shards)
    verify_shards(shards, manifest)
    rejects = tmp_path / "rejects.jsonl"
    prepare(run / "validate-data" / "dataset", str(tiny_46), tmp_path / "one", rejects, PreprocessSettings())
    assert manifest == read_manifest(tmp_path / "one")
    # The last task only added the manifest to the shards of the parts.
    (cache,) = (tmp_path / "shards-cache").glob("*/")
    for shard in manifest.files:
        assert (shards / shard.file).samefile(cache / shard.file)
    assert (run / "preprocess" / "shards_report").read_text().startswith("<!doctype html>")
    places = [path.read_text().strip() for path in run.glob("**/place")]
    assert places == [str(cache)] * PARTS
