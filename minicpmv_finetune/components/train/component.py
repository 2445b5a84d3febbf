"""The KFP interface of train."""

from typing import Any

from kfp import dsl

from minicpmv_finetune.container_images import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def train(
    shards: dsl.Input[dsl.Dataset],
    base_model_uri: str,
    use_lora: bool,
    tune_vision: bool,
    tune_llm: bool,
    lora_r: int,
    lora_alpha: int,
    learning_rate: float,
    num_train_epochs: float,
    per_device_train_batch_size: int,
    seed: int,
    training_flags: dict[str, Any],
    adapter: dsl.Output[dsl.Model],
    training_metrics: dsl.Output[dsl.Metrics],
    training_summary: dsl.Output[dsl.Markdown],
    training_report: dsl.Output[dsl.HTML],
) -> None:
    """Train with torchrun, one process per device; on several nodes by a TrainJob that this step follows.

    Args:
        shards: The prepared samples of preprocess.
        base_model_uri: Base checkpoint: a path, an s3:// URI or a hub id.
        use_lora: Train LoRA adapters on the language model.
        tune_vision: Train the vision tower too.
        tune_llm: Train the language model's own weights; needs use_lora false.
        lora_r: Rank of the adapters.
        lora_alpha: Scale of the adapters; their update is multiplied by lora_alpha / lora_r.
        learning_rate: Peak learning rate.
        num_train_epochs: Number of passes over the training data.
        per_device_train_batch_size: Samples that a device processes at once.
        seed: Seed for the initial adapters and the order of samples.
        training_flags: Any further flags of the training script by name, those of the published finetune.py and of
            transformers.TrainingArguments, such as {"gradient_accumulation_steps": 4}; and "num_nodes": above 1,
            Kubeflow Trainer trains on that many nodes.
        adapter: A PEFT adapter folder, or a whole checkpoint if use_lora is false.
        training_metrics: Loss at the end and on average, speed and memory.
        training_summary: The same as a table, with the number of trained parameters.
        training_report: Curves, hardware and the exact command as a page.
    """
    import shutil
    from pathlib import Path

    from minicpmv_finetune.attempts import run_step
    from minicpmv_finetune.components.train.checkpoint_place import checkpoints_of
    from minicpmv_finetune.components.train.flags import as_flags, pop_num_nodes
    from minicpmv_finetune.components.train.launch import launch
    from minicpmv_finetune.components.train.trainjob import train_on_nodes, uses_nodes
    from minicpmv_finetune.reports.markdown import write_summary
    from minicpmv_finetune.reports.training_record import read_record
    from minicpmv_finetune.tracking.step_runs import link_to_run

    flags = {
        "use_lora": use_lora,
        "tune_vision": tune_vision,
        "tune_llm": tune_llm,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "learning_rate": learning_rate,
        "num_train_epochs": num_train_epochs,
        "per_device_train_batch_size": per_device_train_batch_size,
        "seed": seed,
        **training_flags,
        "model_name_or_path": base_model_uri,
    }

    def work() -> None:
        # Any later attempt of the same training searches this folder for checkpoints, and continues from the newest.
        all_flags = {**flags, "checkpoint_uri": checkpoints_of(adapter.uri)}
        nodes = pop_num_nodes(all_flags)
        if uses_nodes(nodes):
            node_flags = as_flags({**all_flags, "data_path": shards.uri})
            train_on_nodes(node_flags, nodes, adapter.uri, Path(adapter.path))
        else:
            launch(as_flags({**all_flags, "data_path": shards.path, "output_dir": adapter.path}))
        record = read_record(Path(adapter.path))
        adapter.metadata.update(generation=record.generation, base_model=base_model_uri, use_lora=record.use_lora)
        for name, value in record.headline.items():
            training_metrics.log_metric(name, value)
        write_summary(training_summary.path, record.markdown() + link_to_run("train"))
        shutil.copyfile(Path(adapter.path) / "training.html", training_report.path)

    run_step("train", adapter.uri, {"shards": shards.uri, "flags": flags}, work)
