"""A trial's file, checked when it is read, and the table of all results."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from lora_lab.ablation.grid import AUTOCAST, BASE_DTYPE, Trial, hash_content
from lora_lab.history import History
from lora_lab.system.files import as_path, read_json
from lora_lab.system.schema import Number, check
from lora_lab.system.wording import shortened
from lora_lab.train import TrainConfig

if TYPE_CHECKING:
    from pandas import DataFrame

# Columns of the table: losses, how a trial went, and where it ran; all others describe the trial.
LOSSES = ("train_loss", "validation_loss", "off_domain_loss", "gap", "test_loss")
OUTCOME = ("outcome", "reason", "step", *LOSSES, "seconds", "trainable_parameters")
STOPPED = "stopped"  # the outcome of a trial that halving has stopped
# Begins the reason of a trial that did not fit; all other failed trials diverged.
OUT_OF_MEMORY = "out of memory"
SCORE = "score_"  # how the columns of a judge's scores begin
PROVENANCE = ("engine", "device", "python", "torch", "lora_lab", "commit", "date")

# Of reason, history, test_loss and scores: what a file of each outcome must hold, and what it may hold.
_HOLDS = {
    "done": ({"history", "test_loss"}, {"scores"}),
    STOPPED: ({"reason"}, {"history"}),
    "failed": ({"reason"}, set()),
}
Scores = dict[str, bool | int | float | str | None]


class _File(TypedDict):
    key: str
    trial: dict[str, Any]
    outcome: Literal["done", "failed", "stopped"]
    reason: str | None
    history: dict[str, Any] | None
    test_loss: Number | None
    scores: Scores | None
    provenance: dict[str, str]


def load(folder: str | Path):
    """Return the table of all results in a folder, without running anything.

    Returns:
        A pandas DataFrame with one row for each trial and evaluation step, sorted by method, rank, learning rate,
        seed and step. Columns: ``key``; ``method``, ``rank``, ``alpha``; the method's other settings and the trial's
        options, by name; ``outcome`` ("done", "failed" or "stopped") and, if not done or not judged, the ``reason``;
        ``step``; ``train_loss``, ``validation_loss``, ``off_domain_loss`` and ``gap`` (see
        :meth:`lora_lab.history.History.curve`) at that step, and after the last one ``test_loss`` and the judge's
        scores; ``seconds``, the time of training up to that step; ``trainable_parameters``; and where and when it
        ran (``engine``, ``device``, versions, ``commit``, ``date``). A failed trial has one row, without step and
        losses. One that halving has stopped has the rows up to there, or such a row if it was not begun; it has no
        test loss. ``model`` and ``task`` are hashes of the weights and of the data; a warning names those that differ.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no result.
        ValueError: a file is damaged or no result, or the folder is no path.
    """
    folder = as_path(folder, "folder")
    paths = sorted(folder.glob("[!.]*.json"))  # a killed write leaves a hidden file
    if not paths:
        raise FileNotFoundError(
            f"{shortened(str(folder))} holds no results (files <key>.json); run ablate with this folder first."
        )
    # One at a time, because their histories may not fit into memory.
    frame = table(_read(path) for path in paths)
    for name in ("model", "task"):
        if (count := frame[name].nunique()) > 1:
            says = f"{folder} holds results of {count} {name}s; compare only rows with equal values in {name}."
            warnings.warn(says, stacklevel=2)
    return frame


def read_results(folder: Path | None, trials: Iterable[Trial], judged: bool) -> dict[str, dict[str, Any]]:
    """Return the results that the folder holds already, by key.

    Args:
        judged: whether scores are needed; a trial that is done without them is then left out.
    """
    if folder is None:
        return {}
    paths = {trial.key: folder / f"{trial.key}.json" for trial in trials}
    results = {key: _read(path) for key, path in paths.items() if path.is_file()}
    return {k: one for k, one in results.items() if not judged or one["scores"] is not None or one["outcome"] != "done"}


def _read(path: Path) -> dict[str, Any]:
    """Read one result.

    Raises:
        ValueError: the file is damaged, or not the result of the trial that it is named after.
    """
    try:
        result = check(read_json(path), _File)
        if not path.stem == result["key"] == hash_content(result["trial"]):
            raise ValueError("its name, its key and its trial do not belong together")
        _check(result)
    except (ValueError, RecursionError) as error:  # RecursionError for deeply nested settings
        reason = shortened(str(error)).removesuffix(".")
        raise ValueError(
            f"{path} is no result of ablate, or damaged ({reason}); delete it to run its trial again, or move it away."
        ) from None
    return result


def _check(result: dict[str, Any]) -> None:
    """Raise ValueError if the entries of a result do not go together."""
    outcome = result["outcome"]
    must, may = _HOLDS[outcome]
    held = {name for name in ("reason", "history", "test_loss", "scores") if result[name] is not None}
    if not must <= held <= must | may:
        raise ValueError(f"outcome is {outcome!r}, with {sorted(must)}, but this one has {sorted(held)}")
    if result["history"] is None:
        return
    rows, steps = History.from_dict(result["history"]).rows, result["trial"]["steps"]
    if not (0 < len(rows) <= steps if outcome == STOPPED else len(rows) == steps + 1):
        raise ValueError(f"the history has {len(rows)} rows, but {steps} steps make {steps + 1}")
    if outcome != STOPPED and rows[-1]["validation_loss"] is None:
        raise ValueError("the last row of the history has no validation_loss")


def table(results: Iterable[dict[str, Any]]):
    """Return the table that :func:`load` describes."""
    import pandas

    rows = [row for result in results for row in _rows(result)]
    names = {name for row in rows for name in row}
    scores = sorted(name for name in names if name.startswith(SCORE))
    first, last = ["key", "method", "rank", "alpha"], [*OUTCOME, *scores, *PROVENANCE]
    between = sorted(names - {*first, *last})  # a file's entries are in this order, too
    frame = pandas.DataFrame(rows, columns=[*first, *between, *last])
    numbers = ("rank", "alpha", "lr", "weight_decay", "clip", "eval_examples", *OUTCOME[2:])
    # A trial has these only if they are not the default.
    for name, default in {"batches": TrainConfig.batches, BASE_DTYPE: "as loaded", AUTOCAST: "none"}.items():
        if name in frame:
            frame[name] = frame[name].fillna(default)
    frame = frame.astype(dict.fromkeys(numbers, float))  # whatever the trials are; missing values are NaN
    return frame.sort_values(["method", "rank", "lr", "seed", "key", "step"], ignore_index=True)


def _rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    trial = dict(result["trial"])
    method = {k: ", ".join(v) if isinstance(v, list) else v for k, v in trial.pop("method").items()}
    provenance = {name: result["provenance"].get(name) for name in PROVENANCE}
    fixed = {"key": result["key"], "method": method.pop("name"), **method, **trial, **provenance}
    fixed |= {"outcome": result["outcome"], "reason": result["reason"] or ""}
    if result["history"] is None:
        yield fixed
        return
    history, seconds = History(**result["history"]), 0.0
    fixed["trainable_parameters"] = history.trainable_parameters
    gaps = dict(zip(*history.curve("gap"), strict=True))
    last = {"test_loss": result["test_loss"]} | {f"{SCORE}{k}": v for k, v in (result["scores"] or {}).items()}
    for row in history.rows:
        seconds += row["seconds"]
        if row["validation_loss"] is not None:
            losses = {name: row[name] for name in LOSSES[:3]} | {"gap": gaps.get(row["step"])}
            at_end = last if row is history.rows[-1] else {}
            yield {**fixed, "step": row["step"], **losses, "seconds": seconds, **at_end}


def last_rows(frame: DataFrame) -> DataFrame:
    """Return one row for each trial: its last evaluation, its failure, or its first row if it was stopped."""
    first = (frame["outcome"] == STOPPED) & ~(frame["step"] > 0)  # of a stopped trial its settings count, no loss
    return frame[(frame["outcome"] == "failed") | first | (frame["step"] == frame["steps"])]
