"""One process per version, all of which promote at the same moment: SERVER NAME CHAMPION VERSION…

Prints the outcome of each process, as JSON.
"""

import json
import multiprocessing
import os
import sys

server, name, champion, *versions = sys.argv[1:]
os.environ["MLFLOW_TRACKING_URI"] = server

from minicpmv_finetune.tracking.registry import OvertakenError, open_registry  # noqa: E402

# Forked processes, so that MLflow is imported once and not in each.
processes = multiprocessing.get_context("fork")
start = processes.Barrier(len(versions), timeout=120)


def promote(version: str) -> None:
    """Wait until all processes are ready, then promote at the same moment as they do."""
    registry = open_registry(name)
    start.wait()
    try:
        registry.promote(version, champion, f"racer {version}")
        outcomes.put((version, "promoted"))
    except OvertakenError:
        outcomes.put((version, "overtaken"))


outcomes = processes.Queue()
racers = [processes.Process(target=promote, args=(version,)) for version in versions]
for racer in racers:
    racer.start()
for racer in racers:
    racer.join()
print(json.dumps([outcomes.get(timeout=1) for racer in racers if racer.exitcode == 0]))
