"""The KFP interface of preprocess: the step itself, and one part of it for pipelines that run several pods."""

from kfp import dsl

from minicpmv_finetune.container_images import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def preprocess(
    dataset: dsl.Input[dsl.Dataset],
    base_model_uri: str,
    max_slice_nums: int,
    model_max_length: int,
    max_reject_ratio: float,
    shards: dsl.Output[dsl.Dataset],
    shards_summary: dsl.Output[dsl.Markdown],
    shards_report: dsl.Output[dsl.HTML],
    picture_codec: str = "source",
    cache_uri: str = "",
    num_workers: int = 0,
    parts: list = [],  # noqa: B006 - kfp copies it into the compiled pipeline
) -> None:
    """Slice every image and tokenize every conversation once, so that no epoch does it again.

    Args:
        dataset: The accepted samples of validate_data.
        base_model_uri: Base checkpoint whose template, tokenizer and slicing are used; a path, s3:// URI or hub id.
        max_slice_nums: Most slices of an image beside its overview.
        model_max_length: Longest sample in tokens; a longer one is rejected with its length, never cut.
        max_reject_ratio: Share of rejected samples above which the step fails.
        shards: A manifest, and the Parquet files beside it or in the cache in object storage; beside it in the store,
            rejects.jsonl lists every rejected sample.
        shards_summary: Counts of samples, slices and tokens.
        shards_report: Rejected samples, histograms of tokens and slices, and slices of some samples with their tokens.
        picture_codec: Codec of the images: source, raw, webp-lossless or png, all with the same pixels.
        cache_uri: Folder or s3:// URI where finished shards are kept for later runs; empty: beside the run's folder.
        num_workers: Number of processes; 0 for as many as there are cores.
        parts: Keys that preprocess_part returned when several pods shared the work; their shards are in the cache.
    """
    from pathlib import Path

    from minicpmv_finetune import storage
    from minicpmv_finetune.attempts import run_step
    from minicpmv_finetune.components.preprocess.preprocess import (
        PreprocessSettings,
        check_parts,
        default_cache,
        markdown,
    )
    from minicpmv_finetune.components.preprocess.preprocess import preprocess as run
    from minicpmv_finetune.reports.markdown import write_summary
    from minicpmv_finetune.shards.codecs import check_codec
    from minicpmv_finetune.tracking.step_runs import link_to_run

    inputs = {
        "dataset": dataset.uri,
        "base_model_uri": base_model_uri,
        "settings": [max_slice_nums, model_max_length, max_reject_ratio, picture_codec],
    }

    def work() -> None:
        with storage.kept_beside(shards.uri, shards.path, "rejects.jsonl") as rejects:
            manifest = run(
                Path(dataset.path),
                base_model_uri,
                Path(shards.path),
                rejects,
                PreprocessSettings(
                    max_slice_nums=max_slice_nums,
                    model_max_length=model_max_length,
                    max_reject_ratio=max_reject_ratio,
                    codec=check_codec(picture_codec),
                ),
                cache_uri or default_cache(dataset.uri),
                num_workers,
                Path(shards_report.path),
            )
            check_parts(manifest, parts)
            shards.metadata.update(
                generation=manifest.generation,
                fingerprint=manifest.data_fingerprint,
                bytes=manifest.bytes,
                codec=manifest.codec,
                location=manifest.location,
            )
            write_summary(shards_summary.path, markdown(manifest) + link_to_run("preprocess"))

    run_step("preprocess", shards.uri, inputs, work)


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def preprocess_part(
    dataset: dsl.Input[dsl.Dataset],
    base_model_uri: str,
    max_slice_nums: int,
    model_max_length: int,
    part: int,
    num_parts: int,
    place: dsl.Output[dsl.Artifact],
    picture_codec: str = "source",
    cache_uri: str = "",
    num_workers: int = 0,
) -> str:
    """Write one pod's part of the shards into the cache, where preprocess finds them.

    Args:
        dataset: The accepted samples of validate_data.
        base_model_uri: Base checkpoint whose template, tokenizer and slicing are used; a path, s3:// URI or hub id.
        max_slice_nums: Most slices of an image beside its overview.
        model_max_length: Longest sample in tokens.
        part: Number of this part, from 0.
        num_parts: Number of parts.
        place: A text file with the URI of the folder of the shards.
        picture_codec: Codec of the images: source, raw, webp-lossless or png.
        cache_uri: Folder or s3:// URI that all pods can read and write; empty: beside the run's folder.
        num_workers: Number of processes; 0 for as many as there are cores.

    Returns:
        The key of the shards, the same for all parts.
    """
    from pathlib import Path

    from minicpmv_finetune.attempts import run_step
    from minicpmv_finetune.components.preprocess.preprocess import (
        PreprocessSettings,
        default_cache,
        preprocess_partition,
    )
    from minicpmv_finetune.shards.codecs import check_codec

    inputs = {
        "dataset": dataset.uri,
        "base_model_uri": base_model_uri,
        "settings": [max_slice_nums, model_max_length, picture_codec, part, num_parts],
    }

    def work() -> str:
        settings = PreprocessSettings(
            max_slice_nums=max_slice_nums, model_max_length=model_max_length, codec=check_codec(picture_codec)
        )
        cache = cache_uri or default_cache(dataset.uri, is_needed=True)
        key = preprocess_partition(Path(dataset.path), base_model_uri, settings, cache, part, num_parts, num_workers)
        Path(place.path).write_text(f"{cache}/{key}\n")
        return key

    return run_step(f"preprocess-part[{part}]", place.uri, inputs, work)
