"""How many small faults in the code the tests notice: mutants of six files, each met by the tests that mirror it.

    python benchmarks/mutation.py [--only shards] [--again]

A mutant is the file with one thing changed: a comparison, an operator, a constant by one, a condition or a returned
value, a statement left out. It is killed if a test fails or runs far too long. Texts are not changed, nor annotations
and decorators. `--again` meets only the survivors of the last run.

Why not mutmut or cosmic-ray: mutmut 3 looks for `components.shards` in a copy of the tree, while the tests import
`minicpmv_finetune.shards.format`, to which setuptools maps the folder, and leaves out constants, regular
expressions' flags and everything decorated; cosmic-ray starts a process for each mutant, whose imports take longer
than its tests. Here a process that has imported torch and the like forks for each mutant, and the child imports the
project anew, with the one file changed on its way from the disk: nothing is written into the tree.
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

from rich.console import Console
from rich.table import Table

RESULTS = Path("build/bench/mutation.json")
# What is mutated, and the tests that should notice, quick ones first.
TARGETS = {
    "minicpmv_finetune/minicpmv/slicing.py": ["tests/minicpmv/test_slicing.py"],
    "minicpmv_finetune/minicpmv/conversation.py": ["tests/minicpmv/test_conversation.py"],
    "minicpmv_finetune/shards/format.py": [
        "tests/shards/test_format.py",
        "tests/shards/test_cache.py::test_a_manifest_leads_to_where_its_shards_are",
        "tests/shards/test_cache.py::test_damage_is_found_in_rows_from_the_store",
    ],
    "minicpmv_finetune/components/merge/weights.py": ["tests/components/merge/test_weights.py"],
    "minicpmv_finetune/components/merge/update.py": ["tests/components/merge/test_streaming.py"],
    "minicpmv_finetune/components/evaluate/metrics.py": ["tests/components/evaluate/test_metrics.py"],
}
# Imported once, before the first fork; none of it imports the project.
SHARED = ("torch", "torchvision.transforms.v2", "transformers", "peft", "accelerate", "pyarrow.parquet", "numba")
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
    """One change, by the number of its node in the order of the walk and of the change to that node."""

    node: int
    change: int
    line: int
    before: str
    after: str


@dataclass
class Outcome:
    """What became of a target's mutants."""

    mutants: int
    killed: int
    timed_out: int
    seconds: float
    survivors: list[Mutant]


def main() -> None:
    """Run, print a table and the survivors, and write both down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a target's path")
    parser.add_argument("--again", action="store_true", help="only what survived the last time")
    options = parser.parse_args()
    for name in SHARED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each child's collector would look at, and so copy, all that they share
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for target in (target for target in TARGETS if options.only in target):
        mutants = list(mutants_of(Path(target).read_text()))
        total = len(mutants)
        if options.again:
            mutants = [mutant for mutant in mutants if asdict(mutant) in earlier[target]["survivors"]]
            if len(mutants) != len(earlier[target]["survivors"]):
                raise SystemExit(f"{target}: it was changed since; run without --again")
        outcome = meet(target, mutants)
        if options.again:
            outcome.mutants, outcome.killed = total, total - len(outcome.survivors)
            outcome.timed_out += earlier[target]["timed_out"]
        earlier[target] = asdict(outcome)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(earlier, indent=1) + "\n")
    report({target: outcome for target, outcome in earlier.items() if options.only in target})


def meet(target: str, mutants: list[Mutant]) -> Outcome:
    """Let a target's tests meet each mutant."""
    began, before = time.monotonic(), time_of_children()
    if run_tests(target, None, 600) != "survived":
        raise SystemExit(f"{target}: its tests fail as it is; run pytest {' '.join(TARGETS[target])}")
    limit = 5 + 5 * math.ceil(time_of_children() - before)
    outcome = Outcome(len(mutants), 0, 0, 0.0, [])
    for number, mutant in enumerate(mutants, start=1):
        fate = run_tests(target, mutant, limit)
        outcome.killed += fate != "survived"
        outcome.timed_out += fate == "timed out"
        outcome.survivors += [mutant] if fate == "survived" else []
        print(f"{target}: {number}/{len(mutants)}, {len(outcome.survivors)} survived", end="\r", file=sys.stderr)
    outcome.seconds = time.monotonic() - began
    return outcome


def time_of_children() -> float:
    """Seconds of a processor's time that the children so far have taken."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def run_tests(target: str, mutant: Mutant | None, limit: int) -> str:
    """Fork, and say what became of the mutant.

    Args:
        target: whose tests.
        mutant: None for the file as it is.
        limit: seconds of a processor's time, so that what else the machine does kills no mutant.
    """
    child = os.fork()
    if child == 0:
        code = 70  # a mutant that ends the process is noticed
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            code = tests_of(target, mutant)
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "survived" if ended == 0 else "timed out" if ended in {-signal.SIGXCPU, -signal.SIGKILL} else "killed"


def tests_of(target: str, mutant: Mutant | None) -> int:
    """In the child: read the target changed, and run its tests to the first failure."""
    import hypothesis
    import pytest

    path, plain = str(Path(target).resolve()), SourceFileLoader.get_code
    SourceFileLoader.get_code = lambda loader, name: (  # type: ignore[method-assign]
        compile(mutate(Path(path).read_text(), mutant), path, "exec")
        if mutant is not None and os.path.realpath(loader.path) == path
        else plain(loader, name)
    )
    # A failure is enough: it need neither be made smaller nor kept.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutation")
    silent = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(silent, number)
    with tempfile.TemporaryDirectory() as folder:
        options = ["-x", "-q", "-p", "no:cacheprovider", "--disable-warnings", "--timeout", "120"]
        options += ["--basetemp", f"{folder}/tests"]
        return int(pytest.main([*options, *TARGETS[target]]))


def mutants_of(source: str) -> Iterator[Mutant]:
    """All mutants of a file."""
    for number, node in enumerate(mutable(ast.parse(source))):
        for change, changed in enumerate(changes(node)):
            yield Mutant(number, change, node.lineno, ast.unparse(node), ast.unparse(changed))


def mutate(source: str, mutant: Mutant) -> ast.Module:
    """The file's tree with the mutant's change."""
    tree = ast.parse(source)
    node = list(mutable(tree))[mutant.node]
    changed = list(changes(node))[mutant.change]
    ast.copy_location(changed, node)

    class Exchange(ast.NodeTransformer):
        def visit(self, other: ast.AST) -> ast.AST:
            return changed if other is node else self.generic_visit(other)

    return ast.fix_missing_locations(Exchange().visit(tree))


def mutable(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Statements and expressions that run, from the first to the last."""
    for field, value in ast.iter_fields(tree):
        if field in {"annotation", "returns", "decorator_list"} or isinstance(tree, ast.JoinedStr):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.expr | ast.stmt):
                yield node
            if isinstance(node, ast.AST):
                yield from mutable(node)


def changes(node: ast.expr | ast.stmt) -> Iterator[ast.expr | ast.stmt]:
    """What a node is changed to, one after the other."""
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


def with_fields(node: ast.AST, **fields: object) -> ast.AST:
    """A copy of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def report(outcomes: dict) -> None:
    """Print the survivors, then the table."""
    table = Table("target", "mutants", "killed", "of these too slow", "killed %", "minutes")
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
