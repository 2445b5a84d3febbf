"""The MLflow of a profile, as this process reaches it, and what an ended run has left open there.

The environment has priority: who names another server in `MLFLOW_TRACKING_URI` gives its credentials there too. Without
it, the address is the profile's, from outside the cluster through a port-forward, and the credentials are those of the
Secret that the profile names, read through the kubeconfig as for the object store.
"""

import os
from collections.abc import Mapping

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.terminal import print_sentence
from minicpmv_finetune.tracking.step_runs import end_abandoned_runs

from .forwarding import reachable, resolves
from .profile import Profile
from .store import read_variables

# How MLflow calls the end of a run that Kubeflow calls so.
_STATUSES = {"SUCCEEDED": "FINISHED", "SKIPPED": "FINISHED", "FAILED": "FAILED", "CANCELED": "KILLED"}


def use_tracking(profile: Profile) -> bool:
    """Make this process use the profile's MLflow, unless the environment names another one.

    Returns:
        Whether there is an MLflow.

    Raises:
        UserError: Kubernetes refuses the port-forward, or the Service has no running pod.
        RetryableError: Kubernetes does not answer.
    """
    if environment.TRACKING_URI.read():
        return True
    if profile.mlflow is None:
        return False
    credentials = profile.mlflow.credentials
    for name, value in (read_variables(profile, credentials) if credentials else {}).items():
        if not environment.Variable(name, "read by MLflow").read():
            os.environ[name] = value
    os.environ[environment.TRACKING_URI.name] = reachable(profile.mlflow.tracking_uri)
    return True


def end_tracked_runs(profile: Profile, states: Mapping[str, str]) -> None:
    """End in MLflow what runs that are over have left open there; where that fails, one line says so.

    Args:
        profile: Settings of the cluster.
        states: State of each run on the server, by its id; those that are not over are left out.
    """
    statuses = {run_id: _STATUSES[state] for run_id, state in states.items() if state in _STATUSES}
    try:
        if not statuses or not use_tracking(profile):
            return
        address = environment.TRACKING_URI.read()
        if not resolves(address):
            raise RetryableError(f"{address} is not known here")
        end_abandoned_runs(statuses)
    except (UserError, RetryableError) as error:
        print_sentence(
            f"warning: MLflow may still list runs as running that are over ({str(error).rstrip('.')}); repeat the "
            f"command where MLflow is reachable, or set {environment.TRACKING_URI}.",
        )
