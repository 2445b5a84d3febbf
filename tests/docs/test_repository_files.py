"""The configuration of GitHub and pre-commit: it parses, and it runs what the Makefile runs."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def commands(workflow: Any) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job.get("steps", []) if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_triggers_rights_and_commands_that_exist(path: Path) -> None:
    workflow = load(path)
    assert workflow[True]  # YAML 1.1 reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    for command in commands(workflow):
        program, *words = command.removeprefix("sudo ").removeprefix('env "PATH=$PATH" ').split()
        if program == "make":
            assert re.search(rf"^{words[0]}:", MAKEFILE, re.MULTILINE), command
        elif program == "python":
            assert (ROOT / words[0]).is_file(), command
        else:
            assert program in ("gh", "apt-get", "podman") or (ROOT / program).is_file(), command
    for job in workflow["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()


def test_ci_runs_what_developers_run() -> None:
    assert ".ci/run" in commands(load(ROOT / ".github" / "workflows" / "ci.yml"))
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"


def test_a_release_is_tested_checked_built_and_then_published() -> None:
    workflow = load(ROOT / ".github" / "workflows" / "release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    assert workflow["jobs"]["release"]["needs"] == "test"
    programs = [" ".join(step["run"].split()[:2]) for step in workflow["jobs"]["release"]["steps"] if "run" in step]
    assert programs == ["python docs/release_notes.py", "make dist", "gh release"]


def test_a_release_publishes_images_for_each_architecture() -> None:
    jobs = load(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    assert (jobs["images"]["needs"], jobs["image-index"]["needs"]) == ("test", "images")
    built = {entry["architecture"] for entry in jobs["images"]["strategy"]["matrix"]["include"]}
    joined = re.search(r"^ARCHITECTURES \?= (.*)$", MAKEFILE, re.MULTILINE)
    assert joined
    assert built == set(joined[1].split())
    assert jobs["images"]["steps"][-1]["run"].startswith('sudo env "PATH=$PATH" make images push REGISTRY=')
    assert jobs["image-index"]["steps"][-1]["run"].startswith("sudo make image-index REGISTRY=")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_what_github_requires(path: Path) -> None:
    form = load(path)
    assert form["name"]
    assert form["description"]
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    for field in form["body"]:
        assert field["type"] in {"textarea", "input", "dropdown"}
        assert field["attributes"]["label"]


def test_pre_commit_runs_what_make_check_runs() -> None:
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert re.search(r"^check: install lint types ", MAKEFILE, re.MULTILINE)
    lines = "".join(re.findall(r"^(?:lint|types):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)).splitlines()
    checks = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in lines]
    assert [hook["entry"] for hook in repository["hooks"]] == checks


def test_every_target_is_phony_or_a_file() -> None:
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)
    assert phony
    named = set(phony.group(1).replace("\\\n", " ").split())
    targets = set(re.findall(r"^([\w-]+):(?!=)", MAKEFILE, re.MULTILINE))
    assert targets == named


def test_manifests_name_the_images_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tags = {
        f"{path.relative_to(ROOT)}: {tag}"
        for path in (ROOT / "k8s").rglob("*.yaml")
        for tag in re.findall(r"(?:minicpmv-finetune/(?:data|trainer):|newTag: )([\w.-]+)", path.read_text())
        if tag != version
    }
    assert not tags
