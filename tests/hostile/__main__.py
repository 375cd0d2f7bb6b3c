"""``python -m tests.hostile``: run cases, print what came of them, and fail if any ended as none should.

What is let through, although the package did not say it, is printed below the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.hostile.api import LET_THROUGH, RUN
from tests.hostile.core import BAD, OUTCOMES
from tests.hostile.targets import TARGETS
from tests.hostile.workers import Result, repeat, run


def table(results: Iterable[Result]) -> str:
    """How many cases of each target had each outcome."""
    counts = Counter((result.target, result.outcome.name) for result in results)
    names = [name for name in OUTCOMES if name in BAD or any(counts[target, name] for target in TARGETS)]
    rows = [["target", "cases", *names]]
    for target in dict.fromkeys(target for target, _ in counts):
        cells = [counts[target, name] for name in names]
        rows.append([target, *(f"{count:,}" for count in (sum(cells), *cells))])
    total = [sum(counts[target, name] for target in TARGETS) for name in names]
    rows.append(["all", *(f"{count:,}" for count in (sum(total), *total))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def causes(results: Iterable[Result], names: Iterable[str] = BAD) -> str:
    """What ended badly, by cause, most frequent first, each with an example and how to repeat it."""
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        if result.outcome.name in names:
            groups[result.signature].append(result)
    lines = []
    for (target, name, kind, where), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        first = members[0]
        lines.append(f"{len(members):>5} x {target}: {name} {kind} {where}")
        lines.append(f"        {first.outcome.message!r:.200}")
        lines += [f"        {each.what!r:.160}\n        {each.repeat}" for each in members[:2]]
    return "\n".join(lines)


def let_through() -> str:
    """What the table counts as "foreign" and "wrong type", in words."""
    lines = []
    for name, listed in {"foreign": RUN, "wrong type": LET_THROUGH}.items():
        arguments = [f"{call}({', '.join(sorted(names))})" for call, names in listed.items()]
        lines.append(f"{name}: {OUTCOMES[name]}, which are {'; '.join(arguments)}")
    return "\n".join(lines)


def changes(before: dict[str, float], folder: Path) -> list[str]:
    """The names in a folder that were added, removed or written to."""
    after = contents(folder)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def contents(folder: Path) -> dict[str, float]:
    """The names in a folder, and when each file was last written to."""
    return {path.name: 0.0 if path.is_dir() else path.lstat().st_mtime for path in folder.iterdir()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS), help="(default: all)")
    parser.add_argument("--cases", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: %(default)s)")
    parser.add_argument("--today", action="store_true", help="half of the cases with the seed, half with today's date")
    parser.add_argument("--case", type=int, metavar="NUMBER", help="run this case of the target again, with traceback")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--also", choices=OUTCOMES, nargs="+", default=[], help="list causes of these outcomes too")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="write each case and its outcome as a line of JSON"
    )
    options = parser.parse_args()
    targets = [TARGETS[name] for name in options.target]
    if options.case is not None:
        outcome = repeat(targets[0], options.seed, options.case)
        print(f"\n{outcome.name}: {outcome.error} {outcome.where}\n{outcome.message}")
        return outcome.name in BAD
    started, here = time.perf_counter(), contents(Path.cwd())
    seeds = [options.seed, int(f"{datetime.now(UTC):%Y%m%d}")] if options.today else [options.seed]
    results = [result for seed in seeds for result in run(targets, options.cases // len(seeds), seed, options.jobs)]
    changed = changes(here, Path.cwd())
    if options.results:
        options.results.write_text("".join(f"{json.dumps(asdict(result))}\n" for result in results), encoding="utf-8")
    print(causes(results, {*BAD, *options.also}))
    print(f"\n{table(results)}\n\n{let_through()}\n")
    slowest = max(results, key=lambda result: result.seconds if result.outcome.name not in BAD else 0)
    print(f"{len(results):,} cases of seed {' and '.join(map(str, seeds))} in {time.perf_counter() - started:.0f} s")
    print(f"slowest {slowest.seconds:.1f} s: {slowest.repeat}")
    if changed:
        print(f"The folder that this began in has changed: {', '.join(changed)}")
    return bool(changed) or any(result.outcome.name in BAD for result in results)


if __name__ == "__main__":
    sys.exit(main())
