"""The board of results: each study's verdicts, pictures and machines on one page, computed from the records alone."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas
import pictures
from markup import escaped, table

from lora_lab import claims, plots, records
from lora_lab.ablation import overfitting
from lora_lab.costs.memory import MIB
from lora_lab.studies.claims.compared import select_inner_rates
from lora_lab.studies.claims.deciding import DECIDERS, DEPENDS, FALLS, OPEN, STANDS, Result, judge_record
from lora_lab.studies.claims.measured import ALSO, time_interval
from lora_lab.studies.records import KINDS, Published, Record
from lora_lab.studies.steps import SMALL

COUNTED = (STANDS, FALLS, DEPENDS, OPEN)
QUANTITIES = {
    "loss": "validation loss (nats)",
    "forgotten": "rise of the off-domain loss (nats)",
    "memory": "peak memory of a step (MiB)",
    "time": "time of a step (s)",
}
PAIRS = (("memory", "loss"), ("time", "loss"), ("forgotten", "loss"), ("time", "memory"))


@dataclass(frozen=True)
class Board:
    """What the page is made of.

    Args:
        every: the records by name.
        published: what others measured, by the name of its file.
        entries: the ledger's, computed from these.
        folder: of the page, into which the pictures are written.
    """

    every: Mapping[str, Record]
    published: Mapping[str, Published]
    entries: Mapping[str, claims.Entry]
    folder: Path

    def of_kind(self, kind: str) -> dict[str, Record]:
        return {name: record for name, record in self.every.items() if record.what == kind}

    def decided(self, record: str = "", published: str = "") -> list[str]:
        """The ids of the claims that records of a kind decide, or a file of published numbers."""
        readers = {key: (decider.record, decider.published) for key, decider in DECIDERS.items()}
        return [key for key in self.entries if readers.get(key) == (record, published)]

    def verdicts(self, record: Record) -> dict[str, Result]:
        """id -> what this record alone shows of the claim."""
        return {key: judge_record(self.entries[key].claim, record) for key in self.decided(record=record.what)}

    def drawn(self, draw: Callable[[], list[pictures.Picture]], name: str) -> list[str]:
        """Pictures in Markdown; or why there is none, for a record may lack a setup that its picture needs."""
        try:
            drawn = draw()
        except (KeyError, TypeError, ValueError) as error:
            return [f"No picture: the record lacks what it needs ({escaped(f'{type(error).__name__}: {error}')})."]
        self.folder.mkdir(parents=True, exist_ok=True)
        for i, (figure, _) in enumerate(drawn):
            plots.save(figure, self.folder / f"{name}-{i}.png")
            plots.plt.close(figure)
        return [f"![{escaped(words)}]({name}-{i}.png)" for i, (_, words) in enumerate(drawn)]


def record_files(source: Path) -> list[Path]:
    """The records in a folder, and what others published; trials of studies that have not ended are no records."""
    return sorted([*source.glob("*.json"), *source.glob("published/*.json")])


def page(source: Path, entries: Mapping[str, claims.Entry], folder: Path) -> str:
    """The page in Markdown; its pictures are written.

    Args:
        source: folder of the records.
        entries: the ledger's, computed from these records.
        folder: of the page.
    """
    plots.use_style()
    published = {path.stem: records.published(path.stem, source) for path in sorted(source.glob("published/*.json"))}
    board = Board(records.load_all(folder=source), published, entries, folder)
    recorded = [kind for kind in KINDS if board.of_kind(kind)]
    missing = [kind for kind in KINDS if kind not in recorded]
    parts = [
        "# What has been measured, and what did it show?",
        f"{len(recorded)} of {len(KINDS)} studies are recorded. For each record the table counts the claims about LoRA "
        "that stand by it, fall, depend on something, or stay open. All verdicts are computed from the records when "
        "this page is built ([how](../docs/claims.md)). Select a heading to sort the table.",
        "Your machine is not here? [How to add its records](README.md).",
        overview(board, missing),
        "## What does a setup cost, and what does it gain?",
        *trade_offs(board),
        "## LoRA beside full fine-tuning, on CPUs and GPUs",
        *side_by_side(board),
        "## Study by study",
        *(part for kind in recorded for part in study(board, kind)),
        *["## Not recorded yet"] * bool(missing),
        *(unrecorded(board, kind) for kind in missing),
    ]
    return "\n\n".join(parts)


def overview(board: Board, missing: list[str]) -> str:
    """The table of all records, of what others published, and of the studies that have no record."""

    def counts(results: list[str]) -> list[object]:
        counter = Counter(results)
        return [counter[verdict] if results else "" for verdict in COUNTED]

    rows = []
    for name, record in sorted(board.every.items(), key=lambda item: list(KINDS).index(item[1].what)):
        results = [result.verdict for result in board.verdicts(record).values()]
        link = f"[{len(record.rows):,}]({name}.md)"
        rows.append([in_study(record.what), *counts(results), escaped(record.device), record.date, link])
    for name, source in board.published.items():
        results = [board.entries[key].result.verdict for key in board.decided(published=name)]
        cards = sorted({row["card"] for row in source.rows if "card" in row} or {source.settings["card"]})
        link = f"[{len(source.rows):,}](published/{name}.md)"
        rows.append([f"{name}, published", *counts(results), escaped(", ".join(cards)), source.date, link])
    for kind in missing:
        rows.append([in_study(kind), *counts([OPEN] * len(board.decided(record=kind))), "not recorded yet", "", ""])
    return table(["Study", *map(str.capitalize, COUNTED), "Machine", "Date", "Rows"], rows, sortable=True)


def in_study(kind: str) -> str:
    return f"[{kind}](#study-{kind})"


def study(board: Board, kind: str) -> list[str]:
    """A recorded study: its pictures, and its verdicts on each machine side by side."""
    of_kind = board.of_kind(kind)
    parts = [f"(study-{kind})=\n### {kind}: {KINDS[kind].question}"]
    parts += board.drawn(partial(pictures.of_study, kind, of_kind), kind)
    verdicts = [board.verdicts(record) for record in of_kind.values()]
    rows = [
        [
            f"[{escaped(board.entries[key].claim.sentence)}](../ledger.md#claim-{key})",
            *(escaped(str(results[key])) for results in verdicts),
        ]
        for key in board.decided(record=kind)
    ]
    if rows:
        parts.append(table(["Claim", *(escaped(record.device) for record in of_kind.values())], rows))
    else:
        parts.append("No claim of the ledger is decided by it.")
    for name, record in of_kind.items():
        parts.append(f"[The record of {escaped(record.device)}]({name}.md), {record.date}: `{record.command}`")
    return parts


def unrecorded(board: Board, kind: str) -> str:
    """A study that has no record: what makes one, and how many claims it will decide."""
    count = len(board.decided(record=kind))
    waits = {0: "no claim waits", 1: "one claim waits"}.get(count, f"{count} claims wait")
    command = f"`lora-lab record {kind}`, {KINDS[kind].hours} on two cores"
    return f"(study-{kind})=\n**{kind}**: {KINDS[kind].question} ({command}; {waits} for it)"


# What a setup costs, and what it gains


def trade_offs(board: Board) -> list[str]:
    """For each record of overfitting its setups, with the memory and the time of a step from the records of those."""
    parts = []
    for name in board.of_kind("overfitting"):
        trials, doubts, origins = quantities(board, name)
        means = trials.groupby("setup", sort=False)[[*QUANTITIES]].mean()
        lacks = {str(setup): ", ".join(means.columns[row.isna()]) for setup, row in means.iterrows()}
        if absent := [f"{setup} ({columns})" for setup, columns in lacks.items() if columns]:
            origins.append(f"Not in any record: {'; '.join(absent)}.")
        rows = [[setup, *map(rounded, values)] for setup, *values in means.itertuples(name=None)]
        parts += [
            "Lower is better on every axis. Small marks are seeds, large ones their means, and a grey line joins the "
            "means that no other beats in both quantities.",
            *[f"**The losses support no verdict**: {escaped('; '.join(doubts))}."] * bool(doubts),
            "\n\n".join([":::{container} pictures", *board.drawn(partial(pareto, trials), f"pareto-{name}"), ":::"]),
            table(["Setup", *map(capitalised, QUANTITIES.values())], rows, sortable=True),
            " ".join(origins),
        ]
    return parts or ["No record has the losses of these setups yet; `lora-lab record overfitting` makes one."]


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def rounded(value: float) -> str:
    """Three decimals, or a whole number; empty where nothing is known."""
    return "" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def quantities(board: Board, name: str) -> tuple[pandas.DataFrame, list[str], list[str]]:
    """A row for each setup and seed, NaN where no record has a quantity; doubts; and where the numbers are from."""
    record = board.every[name]
    curves, doubts = select_inner_rates(record)
    trials = overfitting.summarise_trials(curves).rename(columns={"best_loss": "loss"})
    size = trials["n_train"].max()
    trials = trials[trials["n_train"] == size].copy()
    origins = [
        f"Losses are of SmolLM2-135M after {size:g} examples of Python's manual, each setup at the best of the rates "
        f"tried and at its lowest validation loss, {trials['seed'].nunique()} seeds ({where(record)})."
    ]
    tokens = record.settings["batch_size"] * record.settings["seq_len"]
    for quantity, kind, column, unit in (("memory", "memory", "measured_bytes", MIB), ("time", "speed", "seconds", 1)):
        values, origin = of_a_step(board.of_kind(kind), column, record.device, tokens)
        trials[quantity] = [values.get(setup, math.nan) / unit for setup in trials["setup"]]
        origins.append(f"{quantity.capitalize()}: {origin or f'no record of {kind} yet'}.")
    return trials, [doubt for doubt in doubts.values() if doubt.startswith(f"{size:g} examples")], origins


def where(record: Record) -> str:
    return f"{escaped(record.device)}, {record.date}"


def of_a_step(of_kind: Mapping[str, Record], column: str, device: str, tokens: int) -> tuple[dict[str, float], str]:
    """setup -> a column of the case of SmolLM2 that is nearest in tokens, and where it is from.

    The record is that of the device if it has one, or else the newest.
    """
    if not of_kind:
        return {}, ""
    record = max(of_kind.values(), key=lambda record: (record.device == device, record.date))
    frame = record.frame()
    cases = dict(iter(frame[frame["model"] == pictures.SMOLLM2].groupby(["batch", "length"])))
    batch, length = min(cases, key=lambda case: (abs(math.log(case[0] * case[1] / tokens)), -len(cases[case])))
    values = dict(zip(cases[batch, length]["setup"], cases[batch, length][column], strict=True))
    return values, f"a step of {batch} x {length} tokens ({where(record)})"


def pareto(trials: pandas.DataFrame) -> list[pictures.Picture]:
    """A picture for each pair of quantities that two setups or more have."""
    drawn = []
    for x, y in PAIRS:
        points = pictures.by_seed(trials, x, y)
        if len(points) > 1:
            figure = pictures.trade_off(points, QUANTITIES[x], QUANTITIES[y]).figure
            drawn.append((figure, f"{capitalised(QUANTITIES[x])} and {QUANTITIES[y]}. {pictures.in_both(points)}"))
    return drawn


# CPU and GPU


def side_by_side(board: Board) -> list[str]:
    """LoRA's memory and time in units of full fine-tuning's, in records and in what others published."""
    ratios = ["Memory, LoRA / full", "Time, LoRA / full"]
    columns = ["Machine", "Kind", "Model", "Setup", "Batch", "Length", *ratios]
    rows = []
    for record in board.every.values():
        if record.what in ("memory", "speed"):
            kind = "CPU" if record.facts["device"] == "cpu" else "GPU"
            rows += [[escaped(record.device), kind, *cells] for cells in ratios_of(record)]
    missing = [kind for kind in ("CPU", "GPU") if kind not in {row[1] for row in rows}]
    for source in board.published.values():
        rows += [[escaped(card), "GPU, published", *cells] for card, *cells in published_ratios(source)]
    notes = [f"No record of a {kind} has been made yet; numbers of others are marked as published." for kind in missing]
    notes.append("Brackets hold the 95 % interval of a time, where enough rounds were timed.")
    return [" ".join(notes), table(columns, rows, sortable=True)]


def ratios_of(record: Record) -> list[list[object]]:
    """Model, setup, batch, length and the ratio in each case that has LoRA of rank 8 and full fine-tuning alike."""
    rows = []
    frame = record.frame()
    for (model, batch, length), case in frame[frame["model"] != SMALL].groupby(["model", "batch", "length"]):
        by_setup = {row["setup"]: row for row in case.to_dict("records")}
        for also in ALSO:
            full, lora = by_setup.get(f"full{also}"), by_setup.get(f"LoRA r=8{also}")
            if full and lora:
                ratios = [memory_ratio(lora, full), ""] if record.what == "memory" else ["", time_ratio(lora)]
                rows.append([model, f"LoRA r=8{also}", batch, length, *ratios])
    return rows


def memory_ratio(lora: Mapping[str, float], full: Mapping[str, float]) -> str:
    return f"{lora['measured_bytes'] / full['measured_bytes']:.2f}"


def time_ratio(row: dict) -> str:
    """The ratio to full's time with its 95 % interval, if enough rounds were timed."""
    interval = time_interval(row)
    return f"{row['ratio']:.2f} ({'{:.2f} to {:.2f}'.format(*interval) if interval else 'few rounds'})"


def published_ratios(source: Published) -> list[list[object]]:
    """Card, model, setup, batch and length (not stated), ratios, where a table has both methods with one technique."""
    cases: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in source.rows:
        if {"card", "model", "technique", "method"} <= row.keys():
            cases.setdefault((row["card"], row["model"], row["technique"]), {})[row["method"]] = row
    rows = []
    for (card, model, technique), methods in cases.items():
        if {"LoRA", "full"} <= methods.keys():
            lora, full = methods["LoRA"], methods["full"]
            memory = f"{lora['peak_bytes'] / full['peak_bytes']:.2f}"
            time = f"{full['tokens_per_second'] / lora['tokens_per_second']:.2f}"
            rows.append([card, model, f"LoRA, {technique}", "", "", memory, time])
    return rows
