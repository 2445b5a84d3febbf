"""The rest, at most 60 minutes on two cores: lost pods, several nodes, faults, retries, schedules, webhook and gc."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

from minicpmv_finetune import storage
from minicpmv_finetune.inputs.table import RETRAIN_INPUTS
from minicpmv_finetune.kubernetes_terms import RUN_LABEL
from minicpmv_finetune.pipelines.pipeline import WEBHOOK_SECRET
from tests.cluster_real.conftest import SMALL, RealCluster, eventually

INPUTS_OF_RETRAIN = {item.name for item in RETRAIN_INPUTS}
SCREENSHOTS = Path(__file__).parents[2] / "build" / "ui"
K8S = Path(__file__).parents[2] / "k8s"
GROUP = "trainer.kubeflow.org"


def test_an_uploaded_file_runs_with_the_forms_defaults(
    cluster: RealCluster, digits_in_store: dict[str, str], tmp_path: Path
) -> None:
    """What a person does in the UI: upload a file, fill in what has no default."""
    import kfp_server_api

    from minicpmv_finetune.kubeflow.client import connect
    from minicpmv_finetune.kubeflow.profile import chosen_profile

    file = tmp_path / "pipeline.yaml"
    assert cluster.command("compile", file, "--gpus", "0").code == 0
    connected, profile = connect(chosen_profile()), chosen_profile()
    uploaded = connected.client.upload_pipeline(str(file), f"uploaded-{cluster.word}", namespace=connected.namespace)
    try:
        parameters = {name: digits_in_store[name] for name in ("data_uri", "base_model_uri")}
        body = kfp_server_api.V2beta1Run(
            display_name=f"uploaded-{cluster.word}",
            experiment_id=connected.ensure_experiment(cluster.experiment),
            pipeline_version_reference={"pipeline_id": uploaded.pipeline_id},
            runtime_config={"parameters": parameters},
            service_account=profile.service_account,
        )
        run = connected.call(connected.client.runs.run_service_create_run, body).run_id
        cluster.runs.append(run)
        # The defaults train for three epochs; that they are accepted and the training begins is what counts here.
        eventually(lambda: cluster.steps(run).get("train", {}).get("state") == "RUNNING", 900)
        assert cluster.command("cancel", run).code == 0
        eventually(lambda: cluster.state(run) in {"CANCELED", "FAILED"}, 300)
    finally:
        versions = connected.client.list_pipeline_versions(uploaded.pipeline_id).pipeline_versions or []
        for version in versions:
            connected.client.delete_pipeline_version(uploaded.pipeline_id, version.pipeline_version_id)
        connected.client.delete_pipeline(uploaded.pipeline_id)


def test_a_deleted_pod_is_replaced_and_goes_on(cluster: RealCluster, digits_in_store: dict[str, str]) -> None:
    from minicpmv_finetune.components.train.checkpoint_place import CHECKPOINTS
    from minicpmv_finetune.kubeflow.profile import chosen_profile
    from minicpmv_finetune.kubeflow.store import pipeline_root

    folder = storage.join(pipeline_root(chosen_profile()), CHECKPOINTS)
    before = storage.walk(folder).keys()
    # A seed of its own: the checkpoints of an earlier suite would be found by their content.
    inputs = {**digits_in_store, **SMALL, "seed": int(cluster.word, 16), "num_train_epochs": 8.0}
    cluster.submit("lost", inputs, wait=False)
    run = cluster.runs[-1]

    def has_checkpoint() -> bool:
        return any(re.search(r"/checkpoint-\d+\.json$", name) for name in storage.walk(folder).keys() - before)

    eventually(has_checkpoint, 900)
    assert "loss" in cluster.command("logs", run, "--step", "train").out
    first = cluster.pods(run, "train")[0]["metadata"]["name"]
    cluster.kubectl("delete", "pod", first)
    eventually(lambda: cluster.state(run) == "SUCCEEDED", 1200, every=10)
    assert "continuing from checkpoint-" in cluster.command("logs", run, "--step", "train").out


@pytest.fixture(scope="module")
def runtime(cluster: RealCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a TrainingRuntime without GPUs: that of k8s/overlays/kubeflow-nodes, under a name of the suite."""
    from minicpmv_finetune.kubeflow.profile import chosen_profile

    if "trainjobs" not in cluster.kubectl("api-resources", "--api-group", GROUP, "-o", "name"):
        pytest.skip("the cluster has no Kubeflow Trainer")
    account = f"system:serviceaccount:{cluster.namespace}:{chosen_profile().service_account}"
    if not cluster.may("create", f"trainjobs.{GROUP}", account):
        pytest.skip(f"{account} may not create TrainJobs; see k8s/README.md (Several nodes)")
    name, folder = f"acceptance-{cluster.word}", tmp_path_factory.mktemp("runtime")
    manifest = yaml.safe_load(cluster.kubectl("kustomize", str(K8S / "overlays" / "kubeflow-nodes")))
    manifest["metadata"]["name"] = name
    (job,) = manifest["spec"]["template"]["spec"]["replicatedJobs"]
    (node,) = job["template"]["spec"]["template"]["spec"]["containers"]
    node["resources"] = {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"cpu": "2", "memory": "6Gi"}}
    spec = {"runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": name}, "suspend": True}
    meta = {"metadata": {"name": name}}
    probe = {"apiVersion": manifest["apiVersion"], "kind": "TrainJob", **meta, "spec": spec}
    for item in (manifest, probe):
        (folder / f"{item['kind']}.yaml").write_text(yaml.safe_dump(item))
    try:
        cluster.kubectl("apply", "-f", str(folder / "TrainingRuntime.yaml"))
        cluster.kubectl("apply", "-f", str(folder / "TrainJob.yaml"))
        try:
            # The kinds may be there without a controller.
            eventually(lambda: "Suspended" in cluster.kubectl("get", "trainjobs", name, "-o", "yaml"), 60)
        except AssertionError:
            pytest.skip("Kubeflow Trainer's controller does not answer")
        finally:
            cluster.kubectl("delete", "trainjobs", name, "--ignore-not-found", "--wait=false")
        yield name
    finally:
        cluster.kubectl("delete", "trainingruntimes", name, "--ignore-not-found")


def test_two_nodes_train_though_the_steps_pod_is_deleted(
    cluster: RealCluster, digits_in_store: dict[str, str], runtime: str, changed_profile: Callable[..., Path]
) -> None:
    flags = {**SMALL["training_flags"], "num_nodes": 2}
    inputs = {**digits_in_store, **SMALL, "seed": int(cluster.word, 16) + 1, "training_flags": flags}
    # Enough steps to be deleted in the middle of them.
    inputs["num_train_epochs"] = 4.0
    cluster.submit("nodes", inputs, "--profile", str(changed_profile(runtime=runtime)), wait=False)
    run = cluster.runs[-1]

    def log() -> str:
        return cluster.command("logs", run, "--step", "train").out

    eventually(lambda: "samples/s" in log(), 1800)
    assert "2 of 2 nodes run" in log()
    (job,) = json.loads(cluster.kubectl("get", "trainjobs", "-l", f"{RUN_LABEL}={run}", "-o", "json"))["items"]
    nodes = f"jobset.sigs.k8s.io/jobset-name={job['metadata']['name']}"
    assert len(cluster.kubectl("get", "pods", "-l", nodes, "-o", "name").split()) == 2
    newest = max(cluster.pods(run, "train"), key=lambda pod: pod["metadata"]["creationTimestamp"])
    cluster.kubectl("delete", "pod", newest["metadata"]["name"])
    eventually(lambda: cluster.steps(run)["train"]["state"] == "SUCCEEDED", 1800, every=10)
    # What comes after is the same as after any training.
    assert cluster.command("cancel", run).code == 0
    # SIGTERM deletes the TrainJob if it comes in time; otherwise the next attempt follows the same one.
    assert "is created, 2 nodes" in log() or "this attempt follows it" in log()


def test_nodes_without_a_runtime_end_with_a_sentence(
    cluster: RealCluster, digits_in_store: dict[str, str], runtime: str, changed_profile: Callable[..., Path]
) -> None:
    missing = changed_profile(runtime=f"not-{runtime}")
    flags = {**SMALL["training_flags"], "num_nodes": 2}
    done = cluster.submit("runtime", {**digits_in_store, **SMALL, "training_flags": flags}, "--profile", str(missing))
    assert done.code != 0
    assert f"has no TrainingRuntime not-{runtime}" in done.out + done.err


def test_a_fault_is_repeated_by_the_step_itself(
    cluster: RealCluster, digits_in_store: dict[str, str], changed_profile: Callable[..., Path]
) -> None:
    from minicpmv_finetune.kubeflow.profile import chosen_profile

    # A store that does not answer is a fault (exit code 75); nothing listens at this port of the pod itself.
    settings = chosen_profile().s3.model_dump(exclude_none=True) | {"endpoint": "http://localhost:9"}
    profile = changed_profile(s3=settings, retry={"attempts": 2, "backoff": "5s"})
    done = cluster.submit("fault", {**digits_in_store, **SMALL}, "--profile", str(profile))
    assert done.code != 0
    log = cluster.command("logs", cluster.runs[-1], "--step", "validate-data").out
    assert "attempt 1 of 3: " in log, log
    assert "attempt 2 of 3: " in log, log


def test_a_persons_retry_after_the_fix_goes_through(cluster: RealCluster, digits_in_store: dict[str, str]) -> None:
    # Beside the data whose images it names, which thousands of requests would have to copy.
    late = f"{digits_in_store['data_uri'].rpartition('/')[0]}/late.json"
    run = cluster.start_unchecked("late", {**digits_in_store, **SMALL, "seed": 5, "data_uri": late})
    eventually(lambda: cluster.state(run) == "FAILED", 600)
    storage.write_bytes(late, storage.read_bytes(digits_in_store["data_uri"]))
    assert cluster.command("runs", "--retry", run).code == 0
    eventually(lambda: cluster.state(run) == "SUCCEEDED", 1200, every=10)


def test_a_schedule_ticks_and_finds_nothing_new(
    cluster: RealCluster, digits_in_store: dict[str, str], tmp_path: Path
) -> None:
    name = f"tick-{cluster.word}"
    # What is no input of the retraining pipeline is a flag of the training.
    flags: dict[str, Any] = {name: value for name, value in SMALL.items() if name not in INPUTS_OF_RETRAIN}
    inputs = {
        **digits_in_store,
        "training_flags": {**SMALL["training_flags"], **flags},
        "evaluation_options": SMALL["evaluation_options"],
        "registered_model": cluster.experiment,
    }
    schedule = {"name": name, "cron": "* * * * *", "experiment": cluster.experiment, "parameters": inputs}
    file = tmp_path / "schedules.yaml"
    file.write_text(yaml.safe_dump({"schedules": [schedule]}))
    applied = cluster.command("schedule", "apply", "-f", file, "--gpus", "0")
    if applied.code != 0 and "mlflow" in applied.err.lower():
        pytest.skip("the profile has no MLflow, which a schedule of the retrain pipeline needs")
    assert applied.code == 0, applied.err
    cluster.schedules.append(name)

    def ticks() -> list[dict[str, Any]]:
        rows = cluster.command("runs", "--experiment", cluster.experiment, "--output", "json").json
        return [row for row in rows if name in row["name"] and row["state"] == "SUCCEEDED"]

    newest = eventually(lambda: ticks()[:1] if len(ticks()) > 1 else [], 1800, every=15)[0]
    assert cluster.command("schedule", "pause", name).code == 0
    assert "train" not in cluster.steps(newest["run_id"])


def test_logs_are_read_after_the_pod_is_gone(cluster: RealCluster, trained: str) -> None:
    for pod in cluster.pods(trained, "train"):
        cluster.kubectl("delete", "pod", pod["metadata"]["name"])
    done = cluster.command("logs", trained, "--step", "train")
    assert done.code == 0, done.err
    assert "loss" in done.out


def test_the_webhook_hears_how_a_run_ended(cluster: RealCluster, digits_in_store: dict[str, str]) -> None:
    host = os.environ.get("CLUSTER_WEBHOOK_HOST", "")
    if not host:
        pytest.skip("CLUSTER_WEBHOOK_HOST, this machine as pods reach it, with a port, is not set")
    if cluster.kubectl("get", "secret", WEBHOOK_SECRET, "--ignore-not-found", "-o", "name").strip():
        pytest.skip(f"the namespace has a Secret {WEBHOOK_SECRET} already")
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

    with ThreadingHTTPServer(("", int(host.rpartition(":")[2])), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        missing = {**digits_in_store, **SMALL, "data_uri": f"{cluster.store}/data/none.json"}
        cluster.kubectl("create", "secret", "generic", WEBHOOK_SECRET, f"--from-literal=url=http://{host}/")
        try:
            cluster.start_unchecked("webhook", missing)
            eventually(lambda: received, 600)
        finally:
            cluster.kubectl("delete", "secret", WEBHOOK_SECRET)
            server.shutdown()
    assert b"none.json" in received[-1]


def test_the_ui_shows_form_and_graph(cluster: RealCluster, trained: str) -> None:
    """Takes the screenshots of docs/kubeflow-ui.md, into build/ui."""
    from playwright.sync_api import sync_playwright

    from minicpmv_finetune.kubeflow.client import connect
    from minicpmv_finetune.kubeflow.profile import chosen_profile

    address = os.environ.get("KF_PIPELINES_UI_ENDPOINT", "").rstrip("/")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not address or cluster.has_several_users or chromium is None:
        pytest.skip("needs KF_PIPELINES_UI_ENDPOINT, a UI without a login, and Chromium")
    version = connect(chosen_profile()).run(trained).pipeline_version_reference
    ids = version.pipeline_id, version.pipeline_version_id
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(120_000)

        def show(path: str, text: str) -> None:
            page.goto("about:blank")  # another fragment alone loads nothing
            page.goto(f"{address}/#/{path}", wait_until="domcontentloaded")
            page.get_by_text(text, exact=True).first.wait_for()

        def take(name: str) -> None:
            page.wait_for_timeout(2000)  # until what moves has come to rest
            page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

        show(f"pipelines/details/{ids[0]}/version/{ids[1]}", "Show Summary")
        page.get_by_text("Show Summary", exact=True).click()
        page.get_by_text("data_uri", exact=True).wait_for()
        take("description")
        show(f"runs/new?pipelineId={ids[0]}&pipelineVersionId={ids[1]}", "Run parameters")
        take("form")
        show(f"runs/details/{trained}", "notify")
        for box, text in (("run_summary", "Succeeded"), ("finetune", "")):
            page.locator(".react-flow__node", has_text=re.compile(f"^{box}$")).click(force=True)
            if text:
                page.get_by_role("button", name="Visualization", exact=True).click()
                page.get_by_text(text).first.wait_for()
                take(box)
                page.get_by_label("close").first.click()
        page.get_by_text("Open sub-DAG").click()
        page.get_by_text("validate-data", exact=True).first.wait_for()
        page.locator(".react-flow__controls-fitview").click()
        take("graph")
        page.locator(".react-flow__node", has_text=re.compile("^evaluation_report$")).click(force=True)
        page.get_by_role("button", name="Visualization", exact=True).click()
        page.frame_locator("iframe").get_by_text("exact match").first.wait_for()
        take("report")
        browser.close()


def test_gc_lists_only_what_nothing_refers_to(cluster: RealCluster, trained: str) -> None:
    done = cluster.command("gc", "--min-age-days", "0", "--output", "json")
    assert done.code == 0, done.err
    assert not [row for row in done.json if f"/{trained}" in row["uri"] and "checkpoint" not in row["uri"]]


def test_another_user_is_refused(cluster: RealCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cluster.has_several_users:
        pytest.skip("the server has a single user")
    other = os.environ.get("CLUSTER_OTHER_TOKEN", "")
    if not other:
        pytest.skip("CLUSTER_OTHER_TOKEN, the token of a user without rights in the namespace, is not set")
    monkeypatch.setenv("KF_PIPELINES_TOKEN", other)
    done = cluster.command("runs")
    assert done.code == 2
    assert cluster.namespace in done.err


def test_the_fake_server_knows_what_this_server_answers(cluster: RealCluster) -> None:
    """A field that is new here is missing in `tests/cluster/recordings`: time to record again."""
    from tests.cluster.test_recordings import recorded, shape

    token = os.environ.get("KF_PIPELINES_TOKEN", "")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    address = f"{os.environ['KF_PIPELINES_ENDPOINT']}/apis/v2beta1/healthz"
    answer = urllib3.request("GET", address, headers=headers, timeout=30)
    expected = recorded("single-user/GET_v2beta1.healthz_200.json")["response"]
    assert set(shape(expected)) <= set(shape(answer.json()))
