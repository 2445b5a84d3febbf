"""Tables, trees and examples of the documentation agree with the code that they describe."""

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.samples import read_samples
from minicpmv_finetune.environment import VARIABLES
from minicpmv_finetune.kubeflow.profile import Profile
from minicpmv_finetune.kubeflow.schedule import Schedule
from minicpmv_finetune.moved_modules import MOVED
from tests.docs.pages import PAGES, ROOT, blocks, name_of, spans
from tests.test_architecture import LAYERS

PACKAGE = ROOT / "minicpmv_finetune"


def read(page: str) -> str:
    return (ROOT / page).read_text()


def section(page: str, heading: str) -> str:
    """Return the text below a heading, up to the next heading."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", read(page), re.DOTALL | re.MULTILINE)
    assert found, f"{page}: no heading {heading}"
    return found.group(1)


def first_cells(text: str) -> list[str]:
    """Return the code spans in the first cell of each row of the tables in a text."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def tree() -> list[tuple[str, str]]:
    """Return the paths of the file tree in docs/architecture.md, each with its description."""
    (block,) = blocks(section("docs/architecture.md", "File tree"))
    found: list[tuple[str, str]] = []
    folders: list[str] = []
    for line in block.text.splitlines():
        name, description = line.strip().split(maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        found.append(("".join(folders), description))
    return found


def test_every_line_of_the_tree_exists_and_has_a_description() -> None:
    for path, description in tree():
        assert (ROOT / path).exists(), path
        assert (ROOT / path).is_dir() == path.endswith("/") or (ROOT / path).is_symlink(), path
        assert len(description) > 3, path


def test_every_module_and_top_level_folder_is_in_the_tree() -> None:
    listed = {path for path, _ in tree()}
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py") if path.name not in {"__init__.py"}}
    folders = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in PACKAGE.rglob("*.py")}
    assert modules | folders <= listed
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    top = {line.partition("/")[0] + "/" for line in tracked.splitlines() if "/" in line}
    assert top <= listed


def test_the_diagram_of_layers_is_the_tested_one() -> None:
    (block,) = blocks(section("docs/architecture.md", "Layers"))
    shown = [
        {room.removesuffix("/<step>") for room in line.split()} for line in block.text.splitlines() if line.strip()
    ]
    tested = [{room.partition("/")[0] for room in rooms} for rooms in reversed(LAYERS)]
    assert shown == tested


def test_profile_fields_are_those_of_the_schema() -> None:
    text = section("k8s/README.md", "Profiles")
    assert set(first_cells(text)) == set(Profile.model_fields)
    task = Profile.model_fields["default"].annotation
    assert task
    for field in task.model_fields:
        assert f"`{field}`" in text


def test_schedule_fields_are_those_of_the_schema() -> None:
    listed = first_cells(read("docs/kubeflow-schedule.md"))
    assert set(listed) == set(Schedule.model_fields) - {"name"}


def _reason_codes() -> set[str]:
    """Return the constant reason codes with which the package rejects samples."""
    codes = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "SampleError" and node.args and isinstance(node.args[0], ast.Constant):
                codes.add(str(node.args[0].value))
    return codes


def test_every_reason_code_is_listed() -> None:
    listed = first_cells(section("docs/data-format.md", "What is rejected"))
    assert len(set(listed)) == len(listed)
    assert _reason_codes() <= set(listed)
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for code in listed:
        assert f'"{code}"' in source, f"{code}: no longer in the code"


def test_the_example_of_the_data_format_is_accepted(tmp_path: Path) -> None:
    example = next(block for block in blocks(read("docs/data-format.md")) if block.language == "json")
    samples: list[dict[str, Any]] = json.loads(example.text)
    for sample in samples:
        images = sample.get("image", {})
        for key, address in images.items() if isinstance(images, dict) else [("", images)]:
            local = address.replace("s3://bucket/", "bucket/")
            path = tmp_path / local
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (40, 30)).save(path)
            if key:
                images[key] = local
    (tmp_path / "train.json").write_text(json.dumps(samples))
    settings = ValidationSettings(max_reject_ratio=0, eval_fraction=0)
    validate_data(str(tmp_path / "train.json"), "", tmp_path / "dataset", tmp_path / "rejects.jsonl", settings)
    assert len(list(read_samples(tmp_path / "dataset", "train"))) == len(samples)


def test_the_changelog_lists_every_name_that_stays_valid() -> None:
    listed = dict(re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", read("CHANGELOG.md"), re.MULTILINE))
    assert MOVED.items() <= listed.items()
    assert {variable.former: variable.name for variable in VARIABLES if variable.former}.items() <= listed.items()


def test_every_folder_of_tests_has_its_purpose_in_contributing() -> None:
    listed = set(first_cells(section("CONTRIBUTING.md", "Tests")))
    folders = {f"tests/{path.name}" for path in (ROOT / "tests").iterdir() if any(path.glob("**/*.*"))}
    assert {name for name in folders if not name.endswith((".py", "__pycache__"))} <= listed


def test_decisions_are_numbered_listed_and_complete() -> None:
    index = read("docs/decisions/index.md")
    records = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for number, path in enumerate(records, start=1):
        text = path.read_text()
        title = text.splitlines()[0].removeprefix(f"# {number}. ")
        date = re.search(r"^- Date: (\d{4}-\d{2}-\d{2})$", text, re.MULTILINE)
        assert date
        assert f"| {number} | [{title}]({path.name}) | {date.group(1)} |" in index
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["Context", "Decision", "Alternatives", "Consequences"]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_paths_in_the_text_exist(page: Path) -> None:
    tops = ("tests/", "docs/", "k8s/", "benchmarks/", "images/", "examples/", "minicpmv_finetune/", "components/")
    for span in spans(page.read_text()):
        if not re.fullmatch(r"[\w./*-]+", span) or not span.startswith(tops):
            continue
        places = [ROOT, page.parent, PACKAGE]
        assert any(any(place.glob(span.rstrip("/"))) for place in places), f"{span}: does not exist"


def test_python_examples_import_what_exists() -> None:
    for page in PAGES:
        for block in blocks(page.read_text()):
            if block.language == "python":
                body = ast.parse(block.text).body
                imports = ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], [])
                exec(compile(imports, str(page), "exec"), {})


def test_names_of_code_in_contributing_exist() -> None:
    names = {
        span for span in spans(read("CONTRIBUTING.md")) if re.fullmatch(r"_\w+|[A-Z]+(_[A-Z]+)+|[A-Z]\w+[a-z]", span)
    }
    assert len(names) > 8
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert {name for name in names if not re.search(rf"\b{name}\b", source)} <= {"MINICPMV_FINETUNE_"}


def test_every_departure_from_the_official_code_is_explained() -> None:
    source = (ROOT / "tests" / "parity" / "compare.py").read_text()
    listed = source.partition("# Intentional departures")[2].partition("NOT_COMPARED")[0]
    names = re.findall(r'^[A-Z_]+ = "([^:"]+)', listed, re.MULTILINE)
    assert len(names) > 15
    table = (ROOT / "docs" / "generations.md").read_text().partition("## Departures")[2]
    assert [name for name in names if f"| {name} |" not in table] == []
