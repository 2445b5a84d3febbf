"""Start a pipeline run with the kfp SDK and a cluster's profile, and wait until it ends.

    export KF_PIPELINES_ENDPOINT=http://localhost:8888
    python examples/submit_with_sdk.py k8s/profiles/dev.yaml s3://receipts/train.json --base-model /models/MiniCPM-V-4.6

`minicpmv-finetune submit` does the same and more: it checks the inputs, pins the base model to a commit, and uploads
nothing twice. Start from this file if your own program submits runs.
"""

import argparse
from pathlib import Path

import kfp

from minicpmv_finetune.kubeflow.compiling import pipeline_for
from minicpmv_finetune.kubeflow.profile import load_profile
from minicpmv_finetune.pipelines.finetuning import FINETUNE


def main() -> None:
    """Submit a run, print its id, and exit with 1 if it does not succeed."""
    parser = argparse.ArgumentParser(description="Start a pipeline run with the kfp SDK.")
    parser.add_argument("profile", type=Path, help="Settings of the cluster.")
    parser.add_argument("data", help="Training data, at an address that the cluster can reach.")
    parser.add_argument("--base-model", default="openbmb/MiniCPM-V-4.6", help="Base checkpoint.")
    parser.add_argument("--timeout", type=int, default=86400, help="Seconds to wait for the run.")
    parser.add_argument("--poll", type=int, default=10, help="Seconds between two requests for the run's state.")
    arguments = parser.parse_args()

    profile = load_profile(arguments.profile)
    client = kfp.Client()  # reads KF_PIPELINES_ENDPOINT
    run = client.create_run_from_pipeline_func(
        pipeline_for(FINETUNE, profile),
        arguments={"data_uri": arguments.data, "base_model_uri": arguments.base_model},
        run_name=f"finetune {arguments.data}",
        experiment_name="minicpmv-finetune",
        service_account=profile.service_account,
    )
    print(f"run {run.run_id}: started")
    ended = client.wait_for_run_completion(run.run_id, timeout=arguments.timeout, sleep_duration=arguments.poll)
    state = str(ended.state)
    print(f"run {run.run_id}: {state}")
    if state != "SUCCEEDED":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
