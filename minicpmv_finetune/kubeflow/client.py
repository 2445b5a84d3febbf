"""The connection to Kubeflow Pipelines: kfp's own client with time limits, complete lists and readable errors.

`kfp.Client` finds the server and the credentials, and its generated services make the calls. It lacks three things,
which are added here: a time limit for every call (its convenience methods wait forever), lists that are read to their
last page, and errors that are sentences instead of HTTP bodies. Address and token come from these places:

- the address: `KF_PIPELINES_ENDPOINT`, else the profile, from outside the cluster through a port-forward;
- the token: `KF_PIPELINES_TOKEN`, else the service account's token, which Kubernetes mounts into pods that request it;
- links: `KF_PIPELINES_UI_ENDPOINT`, else the profile, else the address, unless only pods can reach it.
"""

import contextlib
import io
import json
import logging
import re
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
from minicpmv_finetune.kubernetes_terms import service_of

from .forwarding import reachable
from .kubernetes_access import is_inside_cluster
from .profile import Profile

HOW_TO_LINK = f"for links, set {environment.KFP_UI_ENDPOINT} to the address at which you open Kubeflow's UI"
_UPLOAD_WITHOUT_RIGHTS = re.compile(r"Failed to create a pipeline( version)?")
_ACCESS = "become a contributor of the namespace's Profile, or request the role minicpmv-finetune-submit there"
TIMEOUT_SECONDS = (5, 30)  # to connect, and for each wait for data
_PAGE_SIZE = 100


@dataclass(frozen=True)
class Cluster:
    """A Kubeflow Pipelines server that has answered.

    Attributes:
        client: kfp's client; its services are `client.runs`, `client.pipelines` and so on.
        profile: Settings of the cluster.
        endpoint: Address of the server.
        namespace: Namespace of the runs; None where the server has a single user, because it then refuses a namespace.
        ui: Address at which a browser opens the UI; empty if it is not known.
    """

    client: Client
    profile: Profile
    endpoint: str
    namespace: str | None
    ui: str

    def call(self, service: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call one of the client's services.

        Raises:
            UserError: The server refuses the call, and another attempt would not help.
            RetryableError: The server does not answer, or reports a temporary fault.
        """
        with explain_api_errors(self.endpoint):
            answer = service(*arguments, **options, _request_timeout=TIMEOUT_SECONDS)
        if not _is_json(service):
            raise _not_an_api(self.endpoint)
        return answer

    def list_all(self, service: Callable[..., Any], field: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        """All items of a list, from all its pages.

        Args:
            service: One of the client's list services.
            field: Field of the answer that contains the items.
            arguments: Arguments of the service.
            options: Keyword arguments of the service, such as `filter`.
        """
        token = ""
        while True:
            page = self.call(service, *arguments, page_size=_PAGE_SIZE, page_token=token, **options)
            yield from getattr(page, field) or []
            token = page.next_page_token
            if not token:
                return

    def find(self, service: Callable[..., Any], field: str, name: str, *arguments: Any, **options: Any) -> Any:
        """The first item with this name in a list, or None; the arguments are those of `list_all`."""
        return next(self.list_all(service, field, *arguments, filter=name_filter(name), **options), None)

    def run_link(self, run_id: str) -> str:
        """The address of a run in the Kubeflow UI; empty if it is not known."""
        return f"{self.ui.rstrip('/')}/#/runs/details/{run_id}" if self.ui else ""

    def where(self, run_id: str) -> str:
        """Where to see a run: its link, else its id and what to set for a link."""
        return self.run_link(run_id) or f"run {run_id} ({HOW_TO_LINK})"

    def pipeline_id(self, name: str) -> str | None:
        """The id of the pipeline with this name, if there is one."""
        service = self.client.pipelines.pipeline_service_list_pipelines
        found = self.find(service, "pipelines", name, namespace=self.namespace)
        return str(found.pipeline_id) if found else None

    def version_id(self, pipeline_id: str | None, name: str) -> str | None:
        """The id of a pipeline's version with this name, if there is one."""
        if pipeline_id is None:
            return None
        service = self.client.pipelines.pipeline_service_list_pipeline_versions
        found = self.find(service, "pipeline_versions", name, pipeline_id)
        return str(found.pipeline_version_id) if found else None

    def version_inputs(self, pipeline_id: str, version_id: str | None = None) -> set[str]:
        """Names of the inputs of a pipeline's version, or of its newest one; none if it has no version."""
        pipelines = self.client.pipelines
        if version_id:
            found = [self.call(pipelines.pipeline_service_get_pipeline_version, pipeline_id, version_id)]
        else:
            newest = {"sort_by": "created_at desc", "page_size": 1}
            listed = self.call(pipelines.pipeline_service_list_pipeline_versions, pipeline_id, **newest)
            found = listed.pipeline_versions or []
        # The file has the pipeline alone, or beside its settings for Kubernetes.
        specs = [version.pipeline_spec.get("pipeline_spec", version.pipeline_spec) for version in found]
        return {name for spec in specs for name in spec["root"].get("inputDefinitions", {}).get("parameters", {})}

    def experiment_id(self, name: str) -> str | None:
        """The id of the experiment with this name, if there is one."""
        service = self.client.experiments.experiment_service_list_experiments
        options = {"namespace": self.namespace} if self.namespace else {}
        found = self.find(service, "experiments", name, **options)
        return str(found.experiment_id) if found else None

    def ensure_experiment(self, name: str) -> str:
        """The id of the experiment with this name, which is created if necessary."""
        if found := self.experiment_id(name):
            return found
        body = kfp_server_api.V2beta1Experiment(display_name=name, namespace=self.namespace)
        try:
            created = self.call(self.client.experiments.experiment_service_create_experiment, body)
        except UserError:
            # Another process may have created it since the look-up.
            if found := self.experiment_id(name):
                return found
            raise
        return str(created.experiment_id)

    def runs(self, experiment_id: str | None = None, name: str | None = None) -> Iterator[kfp_server_api.V2beta1Run]:
        """Runs, newest first: those of an experiment or of the namespace, and with a name only those of this name."""
        options: dict[str, str] = {"sort_by": "created_at desc"}
        if experiment_id:
            options["experiment_id"] = experiment_id
        elif self.namespace:
            options["namespace"] = self.namespace
        if name:
            options["filter"] = name_filter(name)
        return self.list_all(self.client.runs.run_service_list_runs, "runs", **options)

    def run(self, run_id: str) -> kfp_server_api.V2beta1Run:
        """One run with its tasks."""
        return self.call(self.client.runs.run_service_get_run, run_id)


def name_filter(name: str) -> str:
    """The filter of a list service for items with this display name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def connect(profile: Profile) -> Cluster:
    """Connect to the server that the environment or the profile names.

    Args:
        profile: Settings of the cluster.

    Returns:
        The server, which has answered.

    Raises:
        UserError: No address is given, or the server rejects the credentials.
        RetryableError: The server does not answer.
    """
    endpoint = environment.KFP_ENDPOINT.read() or profile.kubeflow_pipelines.endpoint
    if not endpoint:
        raise UserError(
            f"Kubeflow Pipelines: no address is given; set {environment.KFP_ENDPOINT} or the profile's "
            "kubeflow_pipelines.endpoint; `minicpmv-finetune setup` prints it."
        )
    token = environment.KFP_TOKEN.read()
    credentials = None
    if not token and Path(environment.KFP_TOKEN_FILE.read()).is_file():
        credentials = set_volume_credentials.ServiceAccountTokenVolumeCredentials()
    address = reachable(endpoint)
    with explain_api_errors(endpoint), _without_client_output():
        client = Client(host=address, namespace=profile.namespace, existing_token=token, credentials=credentials)
        health = client.healthzs.healthz_service_get_healthz(_request_timeout=TIMEOUT_SECONDS)
    if not _is_json(client.healthzs.healthz_service_get_healthz):
        raise _not_an_api(endpoint)
    ui = profile.kubeflow_pipelines.ui_address()
    if not ui and address == endpoint and not (is_inside_cluster() and service_of(endpoint)):
        # Neither a port-forward of this process nor the name of a Service leads a browser anywhere.
        ui = without_password(endpoint)
    return Cluster(client, profile, endpoint, profile.namespace if health.multi_user else None, ui)


@contextlib.contextmanager
def explain_api_errors(endpoint: str) -> Iterator[None]:
    """Turn exceptions of the client into the project's two kinds of errors."""
    try:
        yield
    except kfp_server_api.ApiException as error:
        raise _explain(endpoint, error) from error
    except (urllib3.exceptions.LocationValueError, urllib3.exceptions.LocationParseError) as error:
        raise UserError(f"{endpoint}: not an address of a server; write it as http://host:port.") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise RetryableError(
            f"{endpoint}: Kubeflow Pipelines does not answer ({type(error).__name__}); check the address, the network "
            f"and {environment.KFP_ENDPOINT}, and try again."
        ) from error
    except (AttributeError, TypeError) as error:
        # The generated client parses a web page as an answer, and fails only if the page contains a field's name.
        raise _not_an_api(endpoint) from error


def _is_json(service: Callable[..., Any]) -> bool:
    """Whether the last answer of a service was JSON, which the generated client does not check."""
    api = getattr(service, "__self__", None)
    response = getattr(getattr(api, "api_client", None), "last_response", None)
    return response is None or "json" in (response.getheader("Content-Type") or "")


def _not_an_api(endpoint: str) -> UserError:
    return UserError(
        f"{endpoint}: this is not the API of Kubeflow Pipelines, probably a login page; set {environment.KFP_TOKEN}, "
        "or give the API server's own address."
    )


def _explain(endpoint: str, error: kfp_server_api.ApiException) -> UserError | RetryableError:
    message = _message(error.body)
    status = error.status
    if status == 0:
        return UserError(f"{endpoint}: no trusted connection ({error.reason}); check the server's certificate.")
    if status == 401:
        return UserError(
            f"{endpoint}: the token is missing or has expired (401); set {environment.KFP_TOKEN} to a new one, with "
            "the command that `minicpmv-finetune setup` prints."
        )
    if status == 403:
        return UserError(f"{endpoint}: access denied ({message or 403}); {_ACCESS}.")
    if status == 400 and _UPLOAD_WITHOUT_RIGHTS.fullmatch(message):
        # So a server with several users answers who may not upload, and names no other reason.
        return UserError(f"{endpoint}: Kubeflow Pipelines does not say why ({message}); {_ACCESS}.")
    if status == 404:
        return UserError(f"{endpoint}: not found ({message or 404}); check the name or id.")
    if status in (408, 429) or status >= 500:
        return RetryableError(
            f"{endpoint}: Kubeflow Pipelines answered {status} ({message or error.reason}); try again."
        )
    return UserError(f"{endpoint}: Kubeflow Pipelines refused the request ({message or status}); correct it.")


def _message(body: Any) -> str:
    """The message in an error's body; its key differs between services."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    with contextlib.suppress(ValueError, AttributeError):
        answer = json.loads(text)
        text = answer.get("error_message") or answer.get("message") or answer.get("error") or text
    return " ".join(str(text).split())[:300]


@contextlib.contextmanager
def _without_client_output() -> Iterator[None]:
    """Suppress the client's announcements, and its tracebacks of failures that are reported in a sentence."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        yield
