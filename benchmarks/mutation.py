"""Mutation tests: how many small faults in six files are found by the tests of these files.

    python benchmarks/mutation.py [--only shards] [--again]

A mutant is the file with one change: another comparison or operator, a constant plus or minus one, a negated condition,
a returned None, a removed statement. A mutant is killed if a test fails or takes far too long. Strings, annotations and
decorators are not changed. `--again` tests only the survivors of the last run.

Why not mutmut or cosmic-ray: mutmut 3 leaves out constants, flags of regular expressions and every decorated function;
cosmic-ray starts a process for each mutant, whose imports take longer than its tests. Here one process imports torch
and other large libraries and forks for each mutant. The child imports the project again, and the one file is changed
while it is loaded, so nothing is written into the source tree.
"""

import argparse
import ast
import copy
import gc
import importlib
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

RESULTS = Path("build/bench/mutation.json")
Node = TypeVar("Node", bound=ast.AST)
# The mutated files, and the tests that should find the faults, fast ones first.
TARGETS = {
    "minicpmv_finetune/minicpmv/slicing.py": ["tests/minicpmv/test_slicing.py"],
    "minicpmv_finetune/minicpmv/conversation.py": ["tests/minicpmv/test_conversation.py"],
    "minicpmv_finetune/shards/format.py": [
        "tests/shards/test_format.py",
        "tests/shards/test_cache.py::test_a_manifest_without_files_leads_to_its_location",
        "tests/shards/test_cache.py::test_damage_is_found_in_rows_read_from_the_store",
    ],
    "minicpmv_finetune/components/merge/weights.py": ["tests/components/merge/test_weights.py"],
    "minicpmv_finetune/components/merge/update.py": ["tests/components/merge/test_streaming.py"],
    "minicpmv_finetune/components/evaluate/metrics.py": ["tests/components/evaluate/test_metrics.py"],
}
# Modules that are imported once, before the first fork; none of them imports the project.
SHARED: tuple[str, ...] = (
    "torch",
    "torchvision.transforms.v2",
    "transformers",
    "peft",
    "accelerate",
    "pyarrow.parquet",
    "numba",
)
SHARED += ("pytest", "hypothesis", "PIL.Image", "safetensors.torch", "boto3", "pydantic", "rapidfuzz", "scipy.stats")
SHARED += ("transformers.models.minicpmv4_6", "transformers.models.auto.modeling_auto", "playwright.sync_api", "jinja2")

ORDERINGS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
}
COMPARISONS = {
    **ORDERINGS,
    **{ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)},
    **{ast.In: (ast.NotIn,), ast.NotIn: (ast.In,)},
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
OPERATORS |= {ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitOr}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "sorted": "list"}


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        node: Number of the changed syntax node, in the order of the walk.
        change: Number of the change among those of the node.
        line: Line of the node.
        before: Source of the node.
        after: Source of the changed node.
    """

    node: int
    change: int
    line: int
    before: str
    after: str


@dataclass
class Outcome:
    """The result for one target file.

    Attributes:
        mutants: Number of mutants.
        killed: Number of killed mutants, those that took too long included.
        timed_out: Number of mutants whose tests took too long.
        seconds: Duration of all tests.
        survivors: The mutants that no test killed.
    """

    mutants: int
    killed: int
    timed_out: int
    seconds: float
    survivors: list[Mutant]


def main() -> None:
    """Test the mutants, print the survivors and a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a target's path")
    parser.add_argument("--again", action="store_true", help="test only the survivors of the last run")
    options = parser.parse_args()
    for name in SHARED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # otherwise each child's garbage collector would touch, and so copy, all shared memory
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for target in (target for target in TARGETS if options.only in target):
        mutants = list(generate_mutants(Path(target).read_text()))
        total = len(mutants)
        if options.again:
            mutants = [mutant for mutant in mutants if asdict(mutant) in earlier[target]["survivors"]]
            if len(mutants) != len(earlier[target]["survivors"]):
                raise SystemExit(f"{target}: the file was changed since the last run; run without --again")
        outcome = test_mutants(target, mutants)
        if options.again:
            outcome.mutants, outcome.killed = total, total - len(outcome.survivors)
            outcome.timed_out += earlier[target]["timed_out"]
        earlier[target] = asdict(outcome)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(earlier, indent=1) + "\n")
    report({target: outcome for target, outcome in earlier.items() if options.only in target})


def test_mutants(target: str, mutants: list[Mutant]) -> Outcome:
    """Run a target's tests with each mutant."""
    started, before = time.monotonic(), child_seconds()
    if run_tests(target, None, 600) != "survived":
        raise SystemExit(f"{target}: the tests fail without a mutant; run pytest {' '.join(TARGETS[target])}")
    limit = 5 + 5 * math.ceil(child_seconds() - before)
    outcome = Outcome(len(mutants), 0, 0, 0.0, [])
    for number, mutant in enumerate(mutants, start=1):
        fate = run_tests(target, mutant, limit)
        outcome.killed += fate != "survived"
        outcome.timed_out += fate == "timed out"
        outcome.survivors += [mutant] if fate == "survived" else []
        print(f"{target}: {number}/{len(mutants)}, {len(outcome.survivors)} survived", end="\r", file=sys.stderr)
    outcome.seconds = time.monotonic() - started
    return outcome


def child_seconds() -> float:
    """Processor time of the child processes that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def run_tests(target: str, mutant: Mutant | None, limit: int) -> str:
    """Run a target's tests in a forked process.

    Args:
        target: Path of the file.
        mutant: The mutant of the file; None for the unchanged file.
        limit: Limit in seconds of processor time, so that other load on the machine kills no mutant.

    Returns:
        "survived", "killed" or "timed out".
    """
    child = os.fork()
    if child == 0:
        code = 70  # a mutant that ends the process counts as killed
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            code = run_in_child(target, mutant)
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "survived" if ended == 0 else "timed out" if ended in {-signal.SIGXCPU, -signal.SIGKILL} else "killed"


def run_in_child(target: str, mutant: Mutant | None) -> int:
    """Load the target with its change, and run its tests up to the first failure; returns pytest's exit code."""
    import hypothesis
    import pytest

    path, original = str(Path(target).resolve()), SourceFileLoader.get_code

    def get_code(loader: Any, fullname: str) -> CodeType | None:
        if mutant is None or os.path.realpath(loader.get_filename(fullname)) != path:
            return original(loader, fullname)
        code: CodeType = compile(apply_mutant(Path(path).read_text(), mutant), path, "exec")
        return code

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
    # Any failure is enough: hypothesis need not shrink or store the example.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutation")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    with tempfile.TemporaryDirectory() as folder:
        options = ["-x", "-q", "-p", "no:cacheprovider", "--disable-warnings", "--timeout", "120"]
        options += ["--basetemp", f"{folder}/tests"]
        return int(pytest.main([*options, *TARGETS[target]]))


def generate_mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a file."""
    for number, node in enumerate(find_mutable_nodes(ast.parse(source))):
        for change, changed in enumerate(change_node(node)):
            yield Mutant(number, change, node.lineno, ast.unparse(node), ast.unparse(changed))


def apply_mutant(source: str, mutant: Mutant) -> ast.Module:
    """The syntax tree of the file with the mutant's change."""
    tree = ast.parse(source)
    node = list(find_mutable_nodes(tree))[mutant.node]
    changed = list(change_node(node))[mutant.change]
    ast.copy_location(changed, node)

    class Replace(ast.NodeTransformer):
        def visit(self, other: ast.AST) -> ast.AST:
            return changed if other is node else self.generic_visit(other)

    Replace().visit(tree)
    return ast.fix_missing_locations(tree)


def find_mutable_nodes(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """The executed statements and expressions, in the order of the source."""
    for field, value in ast.iter_fields(tree):
        if field in {"annotation", "returns", "decorator_list"} or isinstance(tree, ast.JoinedStr):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.expr | ast.stmt):
                yield node
            if isinstance(node, ast.AST):
                yield from find_mutable_nodes(node)


def change_node(node: ast.expr | ast.stmt) -> Iterator[ast.expr | ast.stmt]:
    """The nodes that replace a node, one for each mutant."""
    match node:
        case ast.Compare(ops=operators):
            for number, operator in enumerate(operators):
                for other in COMPARISONS[type(operator)]:
                    yield with_fields(node, ops=[*operators[:number], other(), *operators[number + 1 :]])
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator):
            yield with_fields(node, op=OPERATORS[type(operator)]())
            if isinstance(node, ast.AugAssign):
                yield ast.Pass()
        case ast.BoolOp(op=operator):
            yield with_fields(node, op=ast.Or() if isinstance(operator, ast.And) else ast.And())
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Call(func=ast.Name(id=name) as function) if name in CALLS:
            yield with_fields(node, func=with_fields(function, id=CALLS[name]))
        case ast.Call(func=ast.Attribute(attr=name) as function) if name in CALLS:
            yield with_fields(node, func=with_fields(function, attr=CALLS[name]))
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield with_fields(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield with_fields(node, value=ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield ast.Pass()
        case ast.Continue():
            yield ast.Break()
        case ast.Break():
            yield ast.Continue()


def with_fields(node: Node, **fields: object) -> Node:
    """A copy of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def report(outcomes: dict[str, dict[str, Any]]) -> None:
    """Print the survivors, then the table."""
    table = Table("target", "mutants", "killed", "of these timed out", "killed %", "minutes")
    for target, outcome in outcomes.items():
        for mutant in outcome["survivors"]:
            before, after = (" ".join(mutant[side].split())[:110] for side in ("before", "after"))
            print(f"{target}:{mutant['line']}: {before}  →  {after}")
        share = f"{100 * outcome['killed'] / outcome['mutants']:.0f}"
        numbers = (outcome["mutants"], outcome["killed"], outcome["timed_out"], share, f"{outcome['seconds'] / 60:.1f}")
        table.add_row(target, *map(str, numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
