"""The connection to Kubeflow Pipelines: kfp's own client, with time limits, whole lists and errors a person can act on.

`kfp.Client` finds the server and the credentials; its generated services do the calls. What it lacks is added here: a
limit on every call (its convenience methods wait for ever), following page tokens to the end, and sentences instead of
HTTP bodies. Where the address and the token come from:

- the address: `KF_PIPELINES_ENDPOINT`, else the profile;
- the token: `KF_PIPELINES_TOKEN`, else the service account's, which Kubernetes mounts into pods that ask for it;
- links: `KF_PIPELINES_UI_ENDPOINT`, else the profile, else the address.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api
import urllib3
from kfp.client import Client, set_volume_credentials

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError, without_password

from .profile import Profile

TOKEN_FILE = "/var/run/secrets/kubeflow/pipelines/token"
SECONDS_A_CALL = (5, 30)  # to connect, and for each wait for an answer
_PAGE = 100


@dataclass(frozen=True)
class Cluster:
    """A Kubeflow Pipelines server that has answered.

    Attributes:
        client: kfp's client; its services are `client.runs`, `client.pipelines` and so on.
        profile: the cluster's settings.
        endpoint: the server's address.
        namespace: where runs live, or None where the server has one user only and refuses to be asked for it.
    """

    client: Client
    profile: Profile
    endpoint: str
    namespace: str | None

    def call(self, service: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call one of the client's services.

        Raises:
            UserError: the server refuses, and trying again would not help.
            RetryableError: the server does not answer, or answers that it cannot now.
        """
        with explained(self.endpoint):
            answer = service(*arguments, **options, _request_timeout=SECONDS_A_CALL)
        if not _is_json(service):
            raise _not_an_api(self.endpoint)
        return answer

    def every(self, service: Callable[..., Any], field: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        """All that a list service has, page after page.

        Args:
            service: one of the client's list services.
            field: of its answer that holds the items.
            arguments: of the service.
            options: of the service, such as `filter`.
        """
        token = ""
        while True:
            page = self.call(service, *arguments, page_size=_PAGE, page_token=token, **options)
            yield from getattr(page, field) or []
            token = page.next_page_token
            if not token:
                return

    def link(self, path: str) -> str:
        """Where a person sees it, such as `runs/details/…`."""
        base = environment.KFP_UI_ENDPOINT.read() or self.profile.kubeflow_pipelines.ui_endpoint or self.endpoint
        return f"{without_password(base).rstrip('/')}/#/{path}"

    def pipeline_id(self, name: str) -> str | None:
        """The id of the pipeline of that name, if there is one."""
        service = self.client.pipelines.pipeline_service_list_pipelines
        for pipeline in self.every(service, "pipelines", namespace=self.namespace, filter=equals(name)):
            return str(pipeline.pipeline_id)
        return None

    def experiment_id(self, name: str) -> str | None:
        """The id of the experiment of that name, if there is one."""
        service = self.client.experiments.experiment_service_list_experiments
        options = {"namespace": self.namespace} if self.namespace else {}
        for experiment in self.every(service, "experiments", filter=equals(name), **options):
            return str(experiment.experiment_id)
        return None

    def create_experiment(self, name: str) -> str:
        """Make an experiment, or find the one that somebody else made meanwhile."""
        body = kfp_server_api.V2beta1Experiment(display_name=name, namespace=self.namespace)
        try:
            made = self.call(self.client.experiments.experiment_service_create_experiment, body)
        except UserError:
            if found := self.experiment_id(name):
                return found
            raise
        return str(made.experiment_id)

    def runs(self, experiment_id: str | None = None, name: str | None = None) -> Iterator[kfp_server_api.V2beta1Run]:
        """Runs, newest first: of an experiment, or all of the namespace; only those of a name, if given."""
        options: dict[str, str] = {"sort_by": "created_at desc"}
        if experiment_id:
            options["experiment_id"] = experiment_id
        elif self.namespace:
            options["namespace"] = self.namespace
        if name:
            options["filter"] = equals(name)
        return self.every(self.client.runs.run_service_list_runs, "runs", **options)

    def run(self, run_id: str) -> kfp_server_api.V2beta1Run:
        """One run with its tasks."""
        return self.call(self.client.runs.run_service_get_run, run_id)


def equals(name: str) -> str:
    """The filter of a list service for what is shown under a name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def connect(profile: Profile) -> Cluster:
    """Find the server that a profile names, and ask it who it is.

    Raises:
        UserError: no address, or the server lets nobody in with these credentials.
        RetryableError: the server does not answer.
    """
    endpoint = environment.KFP_ENDPOINT.read() or profile.kubeflow_pipelines.endpoint
    if not endpoint:
        raise UserError(f"Kubeflow Pipelines: no address; set {environment.KFP_ENDPOINT} or the profile's endpoint.")
    token = environment.KFP_TOKEN.read()
    credentials = None
    if not token and Path(environment.KFP_TOKEN_FILE.read()).is_file():
        credentials = set_volume_credentials.ServiceAccountTokenVolumeCredentials()
    with explained(endpoint), _quiet():
        client = Client(host=endpoint, namespace=profile.namespace, existing_token=token, credentials=credentials)
        health = client.healthzs.healthz_service_get_healthz(_request_timeout=SECONDS_A_CALL)
    if not _is_json(client.healthzs.healthz_service_get_healthz):
        raise _not_an_api(endpoint)
    return Cluster(client, profile, endpoint, profile.namespace if health.multi_user else None)


@contextlib.contextmanager
def explained(endpoint: str) -> Iterator[None]:
    """Turn what the client raises into the project's two kinds of errors."""
    try:
        yield
    except kfp_server_api.ApiException as error:
        raise _explain(endpoint, error) from error
    except (urllib3.exceptions.LocationValueError, urllib3.exceptions.LocationParseError) as error:
        raise UserError(f"{endpoint}: no address of a server; write it as http://host:port.") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise RetryableError(
            f"{endpoint}: Kubeflow Pipelines does not answer ({type(error).__name__}); check the address, the network "
            f"and {environment.KFP_ENDPOINT}, and try again."
        ) from error
    except (AttributeError, TypeError) as error:
        # The generated client takes a web page for an answer, and stumbles over it only if a field's name is in it.
        raise _not_an_api(endpoint) from error


def _is_json(service: Callable[..., Any]) -> bool:
    """Whether what a service was just answered is JSON; the generated client does not look."""
    api = getattr(service, "__self__", None)
    response = getattr(getattr(api, "api_client", None), "last_response", None)
    return response is None or "json" in (response.getheader("Content-Type") or "")


def _not_an_api(endpoint: str) -> UserError:
    return UserError(
        f"{endpoint}: answers with something else than the API of Kubeflow Pipelines, probably a login page; set "
        f"{environment.KFP_TOKEN}, or give the API server's own address."
    )


def _explain(endpoint: str, error: kfp_server_api.ApiException) -> UserError | RetryableError:
    said = _message(error.body)
    status = error.status
    if status == 0:
        return UserError(f"{endpoint}: no trusted connection ({error.reason}); check the server's certificate.")
    if status == 401:
        return UserError(
            f"{endpoint}: the token is missing or has expired (401); set {environment.KFP_TOKEN} to a new one."
        )
    if status == 403:
        return UserError(f"{endpoint}: not allowed ({said or 403}); ask for the role minicpmv-finetune-submit.")
    if status == 404:
        return UserError(f"{endpoint}: not found ({said or 404}); check the name or id.")
    if status in (408, 429) or status >= 500:
        return RetryableError(f"{endpoint}: Kubeflow Pipelines answered {status} ({said or error.reason}); try again.")
    return UserError(f"{endpoint}: Kubeflow Pipelines refused ({said or status}); correct the request.")


def _message(body: Any) -> str:
    """The sentence in an answer; the server names it differently from service to service."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    with contextlib.suppress(ValueError, AttributeError):
        answer = json.loads(text)
        text = answer.get("error_message") or answer.get("message") or answer.get("error") or text
    return " ".join(str(text).split())[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The client announces what it was made for, and logs tracebacks of what is told as a sentence."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        yield
