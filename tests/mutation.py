"""Do the tests notice? Small faults are planted in the core one at a time, and the tests of that module must fail.

    make mutation                                  a sample of 200, in about 45 minutes on two cores
    make mutation ARGS="--seed 7 --sample 40 --only rank --only lean/loss"

A *mutant* is the package with one such fault: ``<`` for ``<=``, an argument left out, a condition turned round. It is
*killed* if a test fails or never ends, and *survives* otherwise. Then either a test is missing, or the mutant computes
what the original computes; mutants of the latter kind are listed in ``mutation_equivalent.toml``, each with its reason,
and are left out of the score, which is killed / (all - equivalent).

The operators are those of mutmut, and four of our own for whole statements. mutmut's own runner would leave out
whatever has a decorator: every ``torch.autograd.Function``, property and context manager. Docstrings, annotations and
the text of errors are not mutated. The sample takes equally many mutants of each module; within a module an operator is
drawn with a weight of the square root of its number of places, so that no operator swamps the others.

Results are appended to ``runs/mutation/<commit>-<seed>.jsonl`` as they come, and a stopped run goes on from there.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import libcst as cst
from mutmut.mutation.mutators import mutation_operators
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
EQUIVALENT = Path(__file__).with_name("mutation_equivalent.toml")
TIME_LIMIT = 400  # seconds for one mutant's tests; the slowest module's take 140
GOAL, MOST_EQUIVALENT = 0.95, 0.08

# Each module and its tests, the quick ones first: the first failure ends a run.
TARGETS = {
    "lora": ["test_lora", "test_inject", "test_layers", "test_methods"],
    "layers": ["test_layers", "test_inject", "test_lora", "adapters/test_edit", "adapters/test_peft_format"],
    "variants": ["test_variants", "test_methods", "adapters/test_edit", "adapters/test_peft_format"],
    "inject": ["test_lora", "test_inject", "test_layers", "test_methods"],
    "methods": ["test_methods", "test_variants", "test_train"],
    "rank": ["test_rank", "analysis/test_spectra", "adapters/test_edit"],
    "history": ["test_history", "test_train", "test_checkpoint"],
    "checkpoint": ["test_train", "test_checkpoint", "test_methods", "lean/test_lean"],
    "train": ["test_train", "test_checkpoint", "test_methods"],
    "adapters/peft_format": ["adapters/test_peft_format", "adapters/test_edit", "test_layers"],
    "adapters/edit": ["adapters/test_edit", "adapters/test_peft_format", "test_layers"],
    "lean/linear": ["lean/test_lean"],
    "lean/blocks": ["lean/test_lean"],
    "lean/loss": ["lean/test_lean"],
    "lean/optim": ["lean/test_lean"],
    "lean/step": ["lean/test_lean"],
    "costs/memory": ["costs/test_fake", "costs/test_setup", "costs/test_trace", "costs/test_memory"],
    "ablation/packed_layer": ["ablation/test_packed", "ablation/test_run"],
    "ablation/packed": ["ablation/test_packed", "ablation/test_run"],
    "ablation/verdict": ["ablation/test_verdict", "studies/test_ablation"],
}


@dataclass(frozen=True)
class Mutant:
    """One fault: the module, what was done where, the changed lines, and the module's new text."""

    module: str
    operator: str
    function: str
    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """The same for the same fault, wherever in the file it stands."""
        return hashlib.sha256("\0".join(self.identity).encode()).hexdigest()[:12]

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What tells one fault from another, and does not change when lines are added above it."""
        return self.module, self.function, self.before, self.after


# Four operators for whole statements, which mutmut leaves alone


def drop_statement(node: cst.Expr) -> Iterator[cst.CSTNode]:
    """``f(x)`` becomes ``pass``, unless it is a docstring or a yield."""
    if not isinstance(node.value, cst.BaseString | cst.Yield):
        yield cst.Pass()


def drop_raise(node: cst.Raise) -> Iterator[cst.CSTNode]:
    """``raise error`` becomes ``pass``."""
    yield cst.Pass()


def turn_condition(node: cst.If) -> Iterator[cst.CSTNode]:
    """``if a:`` becomes ``if not (a):``."""
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def return_nothing(node: cst.Return) -> Iterator[cst.CSTNode]:
    """``return x`` becomes ``return None``."""
    if node.value is not None and not (isinstance(node.value, cst.Name) and node.value.value == "None"):
        yield node.with_changes(value=cst.Name("None"))


OPERATORS = [
    *mutation_operators,
    (cst.Expr, drop_statement),
    (cst.Raise, drop_raise),
    (cst.If, turn_condition),
    (cst.Return, return_nothing),
]


class _Finder(cst.CSTVisitor):
    """Collects (operator's name, function, node, its replacement) for every place that may be mutated."""

    def __init__(self) -> None:
        self.scope: list[str] = []
        self.found: list[tuple[str, str, cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Import | cst.ImportFrom | cst.Decorator):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.scope.append(node.name.value)
        for kind, operator in OPERATORS:
            if isinstance(node, kind) and self.scope:  # a module's constants are settings
                self.found += [(operator.__name__, ".".join(self.scope), node, other) for other in operator(node)]
        return not isinstance(node, cst.Raise)  # the text of an error

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.scope.pop()


def sample(module: str, count: int, seed: int) -> list[Mutant]:
    """``count`` mutants of a module, or all that it has; the same seed and source give the same."""
    tree = cst.parse_module(_path(ROOT, module).read_text(encoding="utf-8"))
    finder = _Finder()
    tree.visit(finder)
    draw = random.Random(f"{seed} {module}")
    places = defaultdict(list)
    for name, *place in finder.found:
        places[name].append(place)
    for group in places.values():
        draw.shuffle(group)
    chosen: dict[str, Mutant] = {}
    while len(chosen) < count and any(places.values()):
        live = [name for name, group in places.items() if group]
        (name,) = draw.choices(live, [math.sqrt(len(places[name])) for name in live])
        if mutant := _made(module, tree, name, *places[name].pop()):
            chosen.setdefault(mutant.key, mutant)
    return list(chosen.values())


def _made(
    module: str, tree: cst.Module, operator: str, function: str, node: cst.CSTNode, other: cst.CSTNode
) -> Mutant | None:
    """The mutant, or None if Python cannot read it or the text is the same."""
    before, after = tree.code, tree.deep_replace(node, other).code
    try:
        compile(after, module, "exec")
    except SyntaxError:
        return None
    changes = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    lost, new = ("\n".join(row[1:].strip() for row in changes if row[0] == sign) for sign in "-+")
    if not changes:
        return None
    line = int(changes[0].split()[1].removeprefix("-").partition(",")[0])  # "@@ -12,2 +12 @@"
    return Mutant(module, operator, function, line, lost, new, after)


def equivalent() -> dict[tuple[str, str, str, str], str]:
    """The mutants that compute the same as the original, by identity, and why."""
    rows = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("mutant", [])
    return {(row["module"], row["function"], row["before"], row["after"]): row["reason"] for row in rows}


# Running tests


def _path(root: Path, module: str) -> Path:
    return root / "lora_lab" / f"{module}.py"


def tests_of(module: str) -> list[str]:
    """The files that test a module, the quick ones first."""
    return [f"tests/{name}.py" for name in TARGETS[module]]


def _pytest(folder: str, files: list[str], log: str) -> None:
    """In a process of its own: exits with pytest's code."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import pytest
    import torch

    torch.set_num_threads(1)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])
    os._exit(int(code))


def outcome(folder: Path, module: str, source: str | None) -> tuple[str, str]:
    """What the tests say of a module's text (None: as it is): "killed", "too long" or "survived", and by which test."""
    path, log = _path(folder, module), folder / "pytest.log"
    original = path.read_text(encoding="utf-8")
    if source is not None:
        path.write_text(source, encoding="utf-8")
    process = multiprocessing.get_context("forkserver").Process(
        target=_pytest, args=(str(folder), tests_of(module), str(log))
    )
    try:
        process.start()
        process.join(TIME_LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            return "too long", ""
    finally:
        path.write_text(original, encoding="utf-8")
    if process.exitcode == 0:
        return "survived", ""
    failed = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "killed", failed[0].split(" - ")[0] if failed else f"exit code {process.exitcode}"


def _copy(folder: Path) -> Path:
    """The tree that git knows, with what is not committed yet, so that no mutant ever stands in the working tree."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(chosen: list[Mutant], results: Path, workers: int) -> list[dict]:
    """Test each mutant, appending to ``results``, and return all its rows; what stands there already is not run again.

    Raises:
        RuntimeError: the tests of a module fail without any fault.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {row["key"] for row in rows}
    waiting = [mutant for mutant in chosen if mutant.key not in known]
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["torch", "pytest", "numpy", "pandas", "safetensors.torch"])
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    free: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutation-") as top, ThreadPoolExecutor(workers) as pool:
        for number in range(workers):
            free.put(_copy(Path(top) / f"{number}"))

        def one(module: str, source: str | None) -> tuple[str, str]:
            folder = free.get()
            try:
                return outcome(folder, module, source)
            finally:
                free.put(folder)

        sets = {tuple(TARGETS[mutant.module]): mutant.module for mutant in waiting}  # some modules share their tests
        modules = sorted(sets.values())
        start = time.perf_counter()
        for module, (found, test) in zip(modules, pool.map(one, modules, [None] * len(modules)), strict=True):
            if found != "survived":
                raise RuntimeError(f"The tests of {module} do not pass as it is: {found} {test}; mend them first.")
        seconds = (time.perf_counter() - start) / max(1, len(modules))
        minutes = seconds * len(waiting) / 60
        print(f"The tests pass without a fault. {len(waiting)} mutants will take at most about {minutes:.0f} minutes.")
        found = pool.map(one, [mutant.module for mutant in waiting], [mutant.source for mutant in waiting])
        with open(results, "a", encoding="utf-8") as out:
            for mutant, (what, test) in tqdm(zip(waiting, found, strict=True), total=len(waiting), unit="mutant"):
                row = {
                    name: getattr(mutant, name) for name in (*Mutant.__dataclass_fields__, "key") if name != "source"
                }
                rows.append(row | {"outcome": what, "test": test})
                out.write(json.dumps(rows[-1]) + "\n")
                out.flush()
    keys = {mutant.key for mutant in chosen}
    return [row for row in rows if row["key"] in keys]


def report(rows: list[dict]) -> tuple[str, bool]:
    """A table by module and the survivors, as text; and whether the goals are met."""
    reasons = equivalent()
    for row in rows:
        if row["outcome"] == "survived" and (row["module"], row["function"], row["before"], row["after"]) in reasons:
            row["outcome"] = "equivalent"
    lines = [f"{'module':<24}{'mutants':>9}{'killed':>9}{'equivalent':>12}{'survived':>10}{'score':>8}"]
    for module in (*TARGETS, "all"):
        own = Counter(row["outcome"] for row in rows if module in ("all", row["module"]))
        killed, counted = own["killed"] + own["too long"], own.total() - own["equivalent"]
        if own:
            numbers = f"{own.total():>9}{killed:>9}{own['equivalent']:>12}{own['survived']:>10}"
            lines.append(f"{module:<24}{numbers}{killed / max(1, counted):>8.1%}")
    for row in rows:
        if row["outcome"] in ("survived", "equivalent"):
            reason = reasons.get((row["module"], row["function"], row["before"], row["after"]), "")
            lines.append(
                f"\n{row['outcome']}: {row['module']}.py:{row['line']}, {row['function']} ({row['operator']}) {reason}"
            )
            lines += [f"  - {text}" for text in row["before"].splitlines()]
            lines += [f"  + {text}" for text in row["after"].splitlines()]
    good = killed >= GOAL * counted and own["equivalent"] <= MOST_EQUIVALENT * own.total()
    return "\n".join(lines), good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--sample", type=int, default=200, help="mutants in all (default: 200)")
    parser.add_argument("--only", action="append", choices=TARGETS, help="a module; may be repeated (default: all)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)"
    )
    options = parser.parse_args()
    modules = options.only or list(TARGETS)
    base, more = divmod(options.sample, len(modules))
    chosen = [m for i, module in enumerate(modules) for m in sample(module, base + (i < more), options.seed)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    results = ROOT / "runs" / "mutation" / f"{commit.stdout.strip()}-{options.seed}.jsonl"
    text, good = report(run(chosen, results, options.workers))
    print(text)
    print(f"\nSeed {options.seed}; all results: {results}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
