"""Close in MLflow the run that the environment names: `python -m minicpmv_finetune.pipelines.end_tracking STATUS`."""

import sys

from minicpmv_finetune.tracking.step_runs import finish_pipeline_run

if __name__ == "__main__":
    finish_pipeline_run(sys.argv[1])
