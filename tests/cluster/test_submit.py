"""Submitting, following, reading logs and stopping, against a server that keeps state."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import kfp
import kfp_server_api
import pytest

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.estimate.published import published_sizes
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, defaults
from minicpmv_finetune.kubeflow import client, runs
from minicpmv_finetune.pipelines import finetune
from tests.cluster.commands import BASE_MODEL, INPUTS, ROOT, Command
from tests.cluster.fake_kubeflow import FakeKubeflow
from tests.cluster.fake_kubernetes import FakeKubernetes

NAMESPACE = "minicpmv-finetune"


def test_submit_uploads_the_pipeline_starts_a_run_and_prints_its_link(kubeflow: FakeKubeflow, command: Command) -> None:
    done = command("submit", *INPUTS)
    assert done.code == 0, done.err
    (run,) = kubeflow.runs.values()
    (version,) = kubeflow.versions.values()
    assert f"{kubeflow.url}/#/runs/details/{run['run_id']}" in done.out
    assert f"{version['display_name']}: uploaded" in done.out
    # The defaults too, so that Compare runs shows them.
    assert run["runtime_config"]["parameters"] == {
        **defaults(FINETUNE_INPUTS),
        "data_uri": "s3://bucket/train.json",
        "base_model_uri": BASE_MODEL,
    }
    assert run["service_account"] == "minicpmv-finetune"
    assert version["pipeline_spec"]["platform_spec"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-p", "registered_model=receipts"], "registered_model: the profile names no MLflow to register it in"),
        (["--pipeline", "retrain"], "minicpmv-retrain: needs the champion in MLflow's registry"),
    ],
    ids=["registered-model", "retrain"],
)
def test_without_mlflow_what_needs_the_registry_is_refused(
    words: list[str], sentence: str, kubeflow: FakeKubeflow, command: Command
) -> None:
    done = command("submit", *INPUTS, "--profile", "kubeflow", *words)
    assert done.code == 2
    assert sentence in done.err
    assert not kubeflow.runs


def test_without_mlflow_nothing_is_registered(kubeflow: FakeKubeflow, command: Command) -> None:
    assert command("submit", *INPUTS, "--profile", "kubeflow").code == 0
    (run,) = kubeflow.runs.values()
    assert run["runtime_config"]["parameters"]["registered_model"] == ""
    assert run["service_account"] == "pipeline-runner"


def test_data_on_a_volume_of_the_profile_is_accepted(
    kubeflow: FakeKubeflow, command: Command, profile: Callable[..., Path]
) -> None:
    words = ["-p", "data_uri=/data/receipts/train.json", "-p", f"base_model_uri={BASE_MODEL}"]
    assert command("submit", *words).code == 2
    mounted = profile(volumes=[{"claim": "datasets", "mount": "/data"}])
    assert command("submit", *words, "--profile", mounted).code == 0
    (run,) = kubeflow.runs.values()
    assert run["runtime_config"]["parameters"]["data_uri"] == "/data/receipts/train.json"


def test_an_unchanged_pipeline_is_not_uploaded_again(
    kubeflow: FakeKubeflow, command: Command, profile: Callable[..., Path]
) -> None:
    assert command("submit", *INPUTS).code == 0
    again = command("submit", *INPUTS)
    assert "already uploaded" in again.out
    assert (len(kubeflow.versions), len(kubeflow.runs), len(kubeflow.experiments)) == (1, 2, 1)
    changed = command("submit", *INPUTS, "--profile", profile(labels={"environment": "other"}))
    assert changed.code == 0
    assert (len(kubeflow.pipelines), len(kubeflow.versions)) == (1, 2)


def test_a_named_run_is_started_once(kubeflow: FakeKubeflow, command: Command) -> None:
    first = command("submit", *INPUTS, "--name", "monday", "--output", "json").json
    second = command("submit", *INPUTS, "--name", "monday", "--output", "json").json
    assert (first["started"], second["started"]) == (True, False)
    assert first["run_id"] == second["run_id"]
    other = command("submit", *INPUTS, "--name", "monday", "-p", "seed=7")
    assert other.code == 2
    assert "other parameters" in other.err
    assert len(kubeflow.runs) == 1


def test_a_named_run_that_failed_is_started_again(kubeflow: FakeKubeflow, command: Command) -> None:
    kubeflow.outcomes["train"] = "FAILED"
    assert command("submit", *INPUTS, "--name", "monday", "--wait", "--poll", "0").code == 1
    assert command("submit", *INPUTS, "--name", "monday").code == 0
    assert len(kubeflow.runs) == 2


def test_dry_run_changes_nothing(kubeflow: FakeKubeflow, command: Command) -> None:
    done = command("submit", *INPUTS, "--dry-run", "--output", "json")
    assert done.code == 0
    assert done.json | {"name": "", "pipeline_version": ""} == {
        "pipeline_version": "",
        "uploaded": True,
        "name": "",
        "started": True,
        "run_id": "",
        "link": "",
        "parameters": {
            **defaults(FINETUNE_INPUTS),
            "data_uri": "s3://bucket/train.json",
            "base_model_uri": BASE_MODEL,
        },
        "dry_run": True,
        "state": None,
        "outcome": None,
        "result": None,
    }
    assert not [line for line in kubeflow.requests if not line.startswith("GET")]


def test_wait_follows_the_run_to_its_end(kubeflow: FakeKubeflow, command: Command) -> None:
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert done.code == 0
    assert "succeeded" in done.out
    for step in ("validate-data", "preprocess", "train", "merge", "evaluate"):
        assert f"{step}: RUNNING\n" in done.err
        assert re.search(f"^{step}: SUCCEEDED, [0-9]+ s$", done.err, re.MULTILINE)
    assert "driver" not in done.err


def test_wait_has_attempts_and_reason_on_the_line_of_a_step(kubeflow: FakeKubeflow, command: Command) -> None:
    kubeflow.outcomes.update(preprocess=["FAILED", "SUCCEEDED"], train="FAILED")
    reason = f"--lora_r: 0 is below 1, {'which is a long story, ' * 10}so correct it."
    kubeflow.logs["train"] = f"error: {reason}\n"
    lines = command("submit", *INPUTS, "--wait", "--poll", "0").err.splitlines()
    assert "preprocess: RUNNING, attempt 2" in lines
    assert [line for line in lines if re.fullmatch(r"preprocess: SUCCEEDED, 2 attempts, \d+ s", line)]
    assert [line for line in lines if re.match(r"train: FAILED, \d+ s: ", line) and line.endswith(reason)]


def test_wait_prints_the_error_of_the_failed_step(kubeflow: FakeKubeflow, command: Command) -> None:
    kubeflow.outcomes["validate-data"] = "FAILED"
    kubeflow.logs["validate-data"] = "some\nerror: s3://bucket/train.json: not found; check it.\nI0101 launcher\n"
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert done.code == 1
    assert "failed in validate-data: s3://bucket/train.json: not found; check it.;" in done.out


def test_wait_shows_a_table_on_a_terminal(
    kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    kubeflow.outcomes["merge"] = "FAILED"
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    last = re.sub("\x1b[^A-Za-z]*[A-Za-z]", "", done.err).rpartition(": FAILED")[2]
    rows = [line.split() for line in last.splitlines()]
    assert ["step", "state", "attempts", "seconds"] in rows
    states = {row[0]: row[1] for row in rows if len(row) > 1}
    assert (states["train"], states["merge"]) == ("SUCCEEDED", "FAILED")
    assert "merge: Kubeflow does not say why" in done.err


def test_wait_prints_lines_on_a_dumb_terminal(
    kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert "train: RUNNING\n" in done.err
    assert "\x1b" not in done.err


def test_wait_prints_one_json_document(kubeflow: FakeKubeflow, command: Command) -> None:
    done = command("submit", *INPUTS, "--wait", "--poll", "0", "--output", "json")
    assert done.json["state"] == "SUCCEEDED"
    assert ": succeeded; " in done.json["outcome"]


def test_wait_continues_after_temporary_faults_of_the_server(kubeflow: FakeKubeflow, command: Command) -> None:
    kubeflow.answer_next(r"GET /apis/v2beta1/runs/", 503, 500, 502)
    assert command("submit", *INPUTS, "--wait", "--poll", "0").code == 0


def test_wait_ends_when_the_server_does_not_come_back(
    kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_MAX_FAILURES", 3)
    kubeflow.answer_next(r"GET /apis/v2beta1/runs/", 503, 503, 503)
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert done.code == 75
    assert len(kubeflow.runs) == 1


def test_wait_ends_at_once_when_the_token_expires(kubeflow: FakeKubeflow, command: Command) -> None:
    kubeflow.answer_next(r"GET /apis/v2beta1/runs/", 401)
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert done.code == 2
    assert "KF_PIPELINES_TOKEN" in done.err


def test_wait_ends_at_its_timeout_and_the_run_continues(kubeflow: FakeKubeflow, command: Command) -> None:
    done = command("submit", *INPUTS, "--wait", "--poll", "0", "--timeout", "0")
    assert done.code == 75
    assert "continues" in done.err
    (run,) = kubeflow.runs.values()
    assert run["state"] == "RUNNING"


def test_wait_says_at_an_interrupt_that_the_run_continues(
    kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.time, "sleep", stop)
    done = command("submit", *INPUTS, "--wait")
    assert (done.code, "The run continues; see http" in done.err) == (130, True)


def test_the_mlflow_experiment_is_passed_to_the_servers_plugin(kubeflow: FakeKubeflow, command: Command) -> None:
    command("submit", *INPUTS, "--mlflow-experiment", "receipts")
    (run,) = kubeflow.runs.values()
    assert run["plugins_input"] == {"mlflow": {"experiment_name": "receipts"}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "data_urri=s3://b/x"], "did you mean data_uri"),
        (["-p", "seed=1"], "data_uri: missing"),
        (["-p", "data_uri=s3://b/x", "-p", "seed=one"], "seed: 'one' is not a whole number"),
        (["-p", "data_uri=s3://b/x", "-p", "seed=1.5"], "seed: 1.5 is not a whole number"),
        (["-p", "data_uri=s3://b/x", "-p", "use_lora=maybe"], "use_lora: 'maybe' is not true or false"),
        (["-p", "data_uri=train.json"], "train.json is a path on this machine"),
        (["-p", "data_uri=s3://b/x", "-p", "base_model_uri=/home/me/model"], "is a path on this machine"),
        (["-p", "data_uri"], "write it as name=value"),
        (["--parameters", "missing.yaml"], "missing.yaml: cannot be read"),
        (["--recipe", "4.5-8x80gb"], "nproc_per_node is 8, but the profile gives train 1 GPU; give --gpus 8"),
    ],
)
def test_mistakes_in_inputs_are_reported_before_any_request(
    words: list[str], message: str, kubeflow: FakeKubeflow, command: Command
) -> None:
    done = command("submit", *words)
    assert done.code == 2
    assert message in done.err
    assert kubeflow.requests == []


def test_fsdp2_that_writes_more_main_memory_than_the_pod_may_have_is_refused(
    kubeflow: FakeKubeflow, command: Command, tiny_46: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, _, commit = BASE_MODEL.partition("@")
    snapshot = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tiny = json.loads((tiny_46 / "config.json").read_text())
    published = {**tiny, "text_config": {**tiny["text_config"], **published_sizes("4.6")["text"]}}
    words = ["submit", *INPUTS, "--gpus", "8", "--dry-run"]
    in_bf16, in_float32 = '{"strategy": "fsdp2"}', '{"strategy": "fsdp2", "bf16": false}'
    refused = "8 processes write 76 GB of main memory, but the profile limits train to 64Gi"
    for config, flags, sentence in ((published, in_float32, refused), (published, in_bf16, ""), (tiny, in_float32, "")):
        (snapshot / "config.json").write_text(json.dumps(config))
        done = command(*words, "-p", f"training_flags={flags}")
        assert (done.code, sentence in done.err) == (2 if sentence else 0, True), done.err


def test_options_have_priority_over_the_file_of_inputs(
    kubeflow: FakeKubeflow, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "inputs.yaml"
    file.write_text(
        "data_uri: s3://b/x\nbase_model_uri: /models/m\nseed: 1\nuse_lora: true\n"
        "training_flags: {max_steps: 1, logging_steps: 5}\n"
    )
    command(
        "submit", "--parameters", file, "-p", "seed=2", "-p", 'training_flags={"max_steps": 3}', "-p", "use_lora=False"
    )
    (run,) = kubeflow.runs.values()
    assert run["runtime_config"]["parameters"] == {
        **defaults(FINETUNE_INPUTS),
        "data_uri": "s3://b/x",
        "base_model_uri": "/models/m",
        "seed": 2,
        "use_lora": False,
        "training_flags": {"max_steps": 3, "logging_steps": 5},
    }


def test_a_base_model_without_a_revision_is_not_used(kubeflow: FakeKubeflow, command: Command) -> None:
    done = command("submit", "-p", "data_uri=s3://b/x")
    assert done.code == 75
    assert "openbmb/MiniCPM-V-4.6@COMMIT" in done.err
    assert kubeflow.runs == {}


def test_the_commit_comes_from_the_profiles_mirror(
    command: Command, profile: Callable[..., Path], kubeflow: FakeKubeflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    class Hub:
        def __init__(self, endpoint: str | None) -> None:
            asked.append(endpoint)

        def model_info(self, name: str, timeout: float) -> SimpleNamespace:
            return SimpleNamespace(sha=f"commit-of-{name}")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    settings = profile(hub={"endpoint": "https://hub.example.com"})
    words = ("submit", "-p", "data_uri=s3://b/x", "-p", "base_model_uri=owner/name", "--dry-run", "--output", "json")
    parameters = command(*words, "--profile", settings).json["parameters"]
    assert parameters["base_model_uri"] == "owner/name@commit-of-owner/name"
    monkeypatch.setenv("HF_ENDPOINT", "https://other.example.com")
    command(*words, "--profile", settings)
    assert asked == ["https://hub.example.com", None]


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (401, 2, "KF_PIPELINES_TOKEN to a new one, with the command that `minicpmv-finetune setup` prints"),
        (403, 2, "contributor of the namespace's Profile, or request the role minicpmv-finetune-submit"),
        (500, 75, "answered 500"),
        (503, 75, "answered 503"),
        (429, 75, "answered 429"),
        ("<html>Log in</html>", 2, "login page"),
    ],
)
@pytest.mark.parametrize("place", [r"GET .*/healthz", r"GET .*/pipelines", r"POST .*/runs"])
def test_errors_of_the_server_are_reported_in_one_sentence(
    answer: int | str, code: int, message: str, place: str, kubeflow: FakeKubeflow, command: Command
) -> None:
    kubeflow.answer_next(place, answer)
    done = command("submit", *INPUTS)
    assert done.code == code
    assert message in done.err
    assert done.err.count("\n") == 1


def test_the_recorded_refusal_of_an_upload_names_the_missing_right() -> None:
    (file,) = (ROOT / "tests/cluster/recordings/multi-user").glob("POST_v2beta1.pipelines.upload_400*.json")
    error = kfp_server_api.ApiException(400)
    error.body = json.dumps(json.loads(file.read_text())["response"])
    with (
        pytest.raises(UserError, match="contributor of the namespace's Profile"),
        client.explain_api_errors("http://x"),
    ):
        raise error


def test_a_call_to_a_server_that_hangs_ends_with_a_timeout(
    kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.answer_next(r"POST .*/runs", "hang")
    with monkeypatch.context() as patch:
        patch.setattr(client, "TIMEOUT_SECONDS", (2, 2))
        done = command("submit", *INPUTS, "--name", "monday")
    assert done.code == 75
    assert command("submit", *INPUTS, "--name", "monday").code == 0
    assert len(kubeflow.runs) == 1


def test_an_unreachable_server_is_a_temporary_fault(
    command: Command, unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", unreachable)
    done = command("submit", *INPUTS)
    assert done.code == 75
    assert unreachable in done.err


@pytest.fixture
def forwarded_server(
    kubeflow: FakeKubeflow, kubernetes_server: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> FakeKubernetes:
    """Kubernetes, by which alone the server of Kubeflow Pipelines can be reached."""
    address = urlsplit(kubeflow.url)
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    kubernetes_server.add_service("kubeflow", "ml-pipeline", 8888, (str(address.hostname), int(address.port or 0)))
    return kubernetes_server


@pytest.mark.usefixtures("forwarded_server")
def test_from_outside_the_server_is_reached_through_a_port_forward(kubeflow: FakeKubeflow, command: Command) -> None:
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert done.code == 0, done.err
    assert len(kubeflow.runs) == 1


def test_a_port_forward_finds_the_pod_that_replaced_its_own(command: Command, forwarded_server: FakeKubernetes) -> None:
    assert command("runs").code == 0
    (pod,) = forwarded_server.objects["/api/v1/namespaces/kubeflow/pods"]["items"]
    pod["metadata"]["name"] = "ml-pipeline-1"
    forwarded_server.ports = {("ml-pipeline-1", 8333): forwarded_server.ports["ml-pipeline-0", 8333]}
    assert command("runs").code == 0
    forwarded_server.ports.clear()
    assert command("runs").code == 75


def test_a_missing_address_is_a_mistake(
    command: Command, profile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    done = command("submit", *INPUTS, "--profile", profile(kubeflow_pipelines={}))
    assert done.code == 2
    assert "KF_PIPELINES_ENDPOINT" in done.err


def test_a_user_without_access_to_the_namespace_is_refused(
    kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.tokens.update({"mine": {NAMESPACE}, "other": {"elsewhere"}})
    assert command("submit", *INPUTS).code == 2
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "other")
    assert "minicpmv-finetune-submit" in command("submit", *INPUTS).err
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "mine")
    assert command("submit", *INPUTS).code == 0
    (pipeline,), (experiment,) = kubeflow.pipelines.values(), kubeflow.experiments.values()
    assert (pipeline["namespace"], experiment["namespace"]) == (NAMESPACE, NAMESPACE)
    assert len(command("runs", "--output", "json").json) == 1


def test_a_pods_own_token_is_used(
    kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kubeflow.tokens["mounted"] = {NAMESPACE}
    (tmp_path / "token").write_text("mounted")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert command("submit", *INPUTS).code == 0


def test_a_version_that_another_process_uploaded_first_is_used(kubeflow: FakeKubeflow, command: Command) -> None:
    assert command("submit", *INPUTS).code == 0
    # The lists do not contain the version yet.
    (version_id,) = kubeflow.versions
    kubeflow.answer_next(r"GET .*/versions", json.dumps({}), json.dumps({}))
    done = command("submit", *INPUTS)
    assert done.code == 0, done.err
    assert list(kubeflow.versions) == [version_id]


def test_all_pages_of_a_list_are_read(
    kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PAGE_SIZE", 2)
    for number in range(5):
        command("submit", *INPUTS, "--name", f"run-{number}")
    listed = command("runs", "--output", "json").json
    assert [row["name"] for row in listed] == [f"run-{number}" for number in reversed(range(5))]
    assert len(command("runs", "--most", "3", "--output", "json").json) == 3
    assert command("runs", "--experiment", "nothing", "--output", "json").json == []


def test_runs_lists_the_steps_of_one_run(kubeflow: FakeKubeflow, command: Command) -> None:
    command("submit", *INPUTS, "--name", "monday", "--wait", "--poll", "0")
    rows = command("runs", "monday", "--output", "json").json
    steps = ["validate-data", "preprocess", "train", "merge", "evaluate", "register", "notify"]
    assert [row["step"] for row in rows] == steps
    assert "SUCCEEDED" in command("runs").out
    nothing = command("runs", "tuesday")
    assert nothing.code == 2
    assert "tuesday" in nothing.err


def test_logs_prints_the_log_of_the_failed_step(kubeflow: FakeKubeflow, command: Command) -> None:
    kubeflow.outcomes["preprocess"] = "FAILED"
    kubeflow.logs.update({"preprocess": "it broke\n", "validate-data": "all well\n"})
    run_id = command("submit", *INPUTS, "--wait", "--poll", "0", "--output", "json").json["run_id"]
    assert command("logs", run_id).out == "it broke\n"
    assert command("logs", run_id, "--step", "validate-data").out == "all well\n"
    missing = command("logs", run_id, "--step", "train")
    assert missing.code == 2
    assert "validate-data, preprocess" in missing.err


def test_cancel_stops_a_run_once(kubeflow: FakeKubeflow, command: Command) -> None:
    run_id = command("submit", *INPUTS, "--output", "json").json["run_id"]
    assert command("cancel", run_id, "--dry-run", "--output", "json").json["changed"] is True
    assert kubeflow.runs[run_id]["state"] == "RUNNING"
    assert command("cancel", run_id, "--output", "json").json["changed"] is True
    assert command("cancel", run_id, "--output", "json").json["changed"] is False
    assert kubeflow.runs[run_id]["state"] == "FAILED"  # as the real server lists it


def test_a_run_that_is_being_stopped_is_listed(kubeflow: FakeKubeflow, command: Command) -> None:
    command("submit", *INPUTS, "--name", "monday")
    (run,) = kubeflow.runs.values()
    run["state"] = "CANCELING"
    rows = command("runs", "--output", "json").json
    assert rows[0]["state"] == "CANCELING"
    assert command("runs", "monday").code == 0
    assert run["state"] == "FAILED"


@pytest.mark.filterwarnings("ignore:This client only works")
def test_the_sdk_starts_the_pipeline_without_changes(kubeflow: FakeKubeflow) -> None:
    kubeflow.tokens["mine"] = {NAMESPACE}
    client = kfp.Client(host=kubeflow.url, namespace=NAMESPACE, existing_token="mine")
    result = client.create_run_from_pipeline_func(finetune, arguments={"data_uri": "s3://b/x"})
    spec = kubeflow.runs[result.run_id]["pipeline_spec"]["pipeline_spec"]
    assert spec["pipelineInfo"]["name"] == "minicpmv-finetune"
    assert client.wait_for_run_completion(result.run_id, timeout=60, sleep_duration=0).state == "SUCCEEDED"


def test_all_mistakes_are_named_before_anything_is_sent(kubeflow: FakeKubeflow, command: Command) -> None:
    wrong = ["lora_r=0", "data_uri=train.json", 'training_flags={"lr_sheduler_type": "cosine"}', "metric=accuracy"]
    answer = command("submit", *INPUTS, *(word for value in wrong for word in ("-p", value)))
    assert answer.code == 2
    assert "4 inputs are wrong" in answer.err
    for sentence in (
        "data_uri: train.json is a path on this machine",
        "lora_r: 0 is not accepted",
        "did you mean --lr_scheduler_type?",
        "did you mean vqa_accuracy?",
    ):
        assert sentence in answer.err
    assert not kubeflow.runs
