"""How many one-line faults do the tests miss? Random mutants of some modules, each against the tests of these modules.

    make mutants

A mutant is a copy of the repository with one operator, number, condition or call changed. It is killed when a test
fails or runs out of time.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 400
SUBJECTS: dict[str, tuple[list[str], list[str]]] = {  # modules that are changed, tests that ought to notice
    "mixers": (
        ["hypenet_megatron/mixers/*.py"],
        ["tests/hypenet_megatron/*.py", "tests/tools/test_hf_*.py", "tests/tools/test_remote_code.py"],
    ),
    "selection": (["halo_evaluation/selection/*.py"], ["tests/halo_evaluation/test_selection_*.py"]),
    "halo_training": (
        [f"halo_training/{name}.py" for name in ("trainer", "schedule", "guard", "batches", "objectives")],
        ["tests/halo_training", "tests/halo_jobs/test_recipe.py", "tests/halo_jobs/test_parallel_training.py"],
    ),
    "tokenized_data": (["tokenized_data/*.py"], ["tests/tokenized_data"]),
}
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip


def _faulty(node: ast.AST) -> ast.AST | None:
    """The node with a fault in it, if it is of a kind that can have one."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(new.ops[0])]()
    elif isinstance(new, ast.BinOp | ast.BoolOp) and type(new.op) in SWAPS:
        new.op = SWAPS[type(new.op)]()
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool | int | float):
        new.value = not new.value if isinstance(new.value, bool) else new.value + 1
    elif isinstance(new, ast.If | ast.IfExp | ast.While):
        new.test = ast.UnaryOp(ast.Not(), new.test)
    else:
        return ast.Pass() if isinstance(new, ast.Expr) and isinstance(new.value, ast.Call) else None
    return new


def mutants(path: Path) -> Iterator[tuple[str, str]]:
    """(description, text of the whole file) of every mutant. Annotations, messages and errors are left alone."""
    tree = ast.parse(path.read_text())

    def places(parent: ast.AST) -> Iterator[tuple[list[ast.AST] | ast.AST, int | str, ast.AST]]:
        for name, value in ast.iter_fields(parent):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for key, node in enumerate(value) if isinstance(value, list) else [(name, value)]:
                if isinstance(node, ast.AST) and not isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
                    yield (value if isinstance(value, list) else parent), key, node
                    yield from places(node)

    for holder, key, node in list(places(tree)):
        if (new := _faulty(node)) is None:
            continue
        put = holder.__setitem__ if isinstance(holder, list) else holder.__setattr__
        put(key, new)
        text = ast.unparse(ast.fix_missing_locations(tree))
        put(key, node)
        change = [ast.unparse(each).splitlines()[0] for each in (node, ast.fix_missing_locations(new))]
        yield f"{path.relative_to(ROOT)}:{node.lineno}: {' -> '.join(change)}", text


def survives(checkout: Path, tests: list[str]) -> bool:
    """Whether all tests pass in a checkout."""
    rooms = [str(checkout / room) for room in (".", "kernels", "cluster", "tools")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(rooms), "OMP_NUM_THREADS": "1"}
    found = [str(path) for pattern in tests for path in sorted(checkout.glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *found]
    try:
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, timeout=LIMIT_SECONDS)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--each", type=int, default=20, help="mutants of each subject")
    parser.add_argument("--only", choices=SUBJECTS, nargs="+", default=[*SUBJECTS], help="some subjects")
    wish = parser.parse_args()
    content: dict[str, list] = {"rows": [], "survivors": []}
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "--detach", str(checkout)], cwd=ROOT, check=True, capture_output=True)
        try:
            for subject in wish.only:
                patterns, tests = SUBJECTS[subject]
                found = [mutant for each in patterns for path in sorted(ROOT.glob(each)) for mutant in mutants(path)]
                chosen = random.Random(f"15 {subject}").sample(found, min(wish.each, len(found)))
                assert survives(checkout, tests), f"the tests of {subject} fail without a mutant"
                alive = []
                for what, text in chosen:
                    path = what.partition(":")[0]
                    (checkout / path).write_text(text)
                    lives = survives(checkout, tests)
                    alive += [what] if lives else []
                    print("SURVIVED" if lives else "killed  ", what, flush=True)
                    shutil.copy(ROOT / path, checkout / path)
                what = f"{subject}: surviving, of {len(chosen)} of {len(found)} mutants"
                share = round(len(alive) / len(chosen), 3)
                content["rows"].append({"what": what, "value": share, "unit": "share", "must": "<= 0.2"})
                content["survivors"] += alive
                wish.json.write_text(json.dumps(content, indent=1) + "\n")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
