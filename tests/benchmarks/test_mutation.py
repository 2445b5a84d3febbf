"""The mutation benchmark names files and tests, which must exist."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_its_targets_and_their_tests_exist() -> None:
    source = ast.parse((ROOT / "benchmarks" / "mutation.py").read_text())
    (targets,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TARGETS"
    )
    for target, tests in targets.items():
        assert (ROOT / target).is_file(), target
        for test in tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file(), file
            assert not name or f"def {name}(" in (ROOT / file).read_text(), test
