"""A trial's file, checked when it is read, and the table of all results."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from lora_lab.ablation.grid import AUTOCAST, BASE_DTYPE, Trial
from lora_lab.history import History, is_number
from lora_lab.system.files import as_path, read_json
from lora_lab.system.schema import Number, check
from lora_lab.system.wording import counted, short_repr, shortened
from lora_lab.train import TrainConfig

SCHEMA = 1
# Columns of the table: losses, how a trial went, and where it ran; all others describe the trial.
LOSSES = ("train_loss", "validation_loss", "off_domain_loss", "gap", "test_loss")
OUTCOME = ("outcome", "reason", "step", *LOSSES, "seconds", "trainable_parameters")
STOPPED = "stopped"  # the outcome of a trial that halving has stopped
OUT_OF_MEMORY = "out of memory"  # begins the reason of a trial that did not fit; all other failed trials diverged
SCORE = "score_"  # how the columns of a judge's scores begin
PROVENANCE = ("engine", "device", "python", "torch", "lora_lab", "commit", "date")

# What a result of each outcome holds beside its trial. A trial that is done may have the reason that its judge failed.
_ENTRIES = {
    "done": {"reason": str | None, "history": dict, "test_loss": Number, "scores": dict | None},
    STOPPED: {"reason": str, "history": dict | None, "test_loss": None, "scores": None},
    "failed": {"reason": str, "history": None, "test_loss": None, "scores": None},
}
_OUTCOMES = {name: TypedDict(name, entries) for name, entries in _ENTRIES.items()}  # pyright: ignore
_Provenance = TypedDict("_Provenance", dict.fromkeys(PROVENANCE, str), total=False)  # pyright: ignore


class _Result(TypedDict):
    outcome: Literal["done", "failed", "stopped"]
    provenance: _Provenance


def load(folder: str | Path):
    """The table of all results in a folder, without running anything.

    Returns:
        A pandas DataFrame with one row for each trial and evaluation step, sorted by method, rank, learning rate,
        seed and step. Columns: ``key``; ``method``, ``rank``, ``alpha`` and the method's other settings; the trial's
        options; ``outcome`` ("done", "failed" or "stopped") and, if not done or not judged, the ``reason``; ``step``;
        ``train_loss``, ``validation_loss``, ``off_domain_loss`` and ``gap`` (see
        :meth:`lora_lab.history.History.curve`) at that step, and after the last one ``test_loss`` and the judge's
        scores; ``seconds``, the time of training up to that step; ``trainable_parameters``; and where and when it
        ran (``engine``, ``device``, versions, ``commit``, ``date``). A failed trial has one row, without step and
        losses. One that halving has stopped has the rows up to there, or such a row if it was not begun; it has no
        test loss. ``model`` and ``task`` are hashes of the weights and of the data; a warning
        names those that differ.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no result.
        ValueError: a file is damaged or no result, or the folder is no path.
    """
    folder = as_path(folder, "folder")
    # A killed write leaves a hidden file.
    paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(
            f"{shortened(str(folder))} holds no results (files <key>.json); run ablate with this folder first."
        )
    frame = table(_read(path) for path in paths)  # one at a time, because their histories may not fit into memory
    if several := [name for name in ("model", "task") if frame[name].nunique() > 1]:
        counts = " and of ".join(counted(frame[name].nunique(), name) for name in several)
        warnings.warn(
            f"{folder} holds results of {counts}; compare only rows with equal values in {' and in '.join(several)}.",
            stacklevel=2,
        )
    return frame


def stored_results(
    folder: Path | None, trials: Iterable[Trial], judged: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The results that the folder holds already, by key, and those that wait to be judged, with their weights.

    Args:
        judged: whether scores are needed; results that have neither scores nor weights are then left out, unless the
            trial has failed or was stopped.
    """
    if folder is None:
        return {}, {}
    paths = {trial.key: folder / f"{trial.key}.json" for trial in trials}
    results = {key: _read(path) for key, path in paths.items() if path.is_file()}
    if not judged:
        return results, {}
    complete = {
        key: result for key, result in results.items() if result["scores"] is not None or result["outcome"] != "done"
    }
    unjudged = {
        key: result for key, result in results.items() if key not in complete and weights_path(folder, key).is_file()
    }
    return complete, unjudged


def weights_path(folder: Path, key: str) -> Path:
    """Where what was trained is kept while it waits to be judged."""
    return folder / f"{key}.safetensors"


def _read(path: Path) -> dict[str, Any]:
    """One result.

    Raises:
        ValueError: the file is damaged, of another schema, or not the result of the trial that it is named after.
    """
    advice = "delete it to run its trial again, or move it away if it is no result of ablate"
    try:
        result = read_json(path)
    except ValueError:
        raise ValueError(f"{path} is damaged: it is not JSON; {advice}.") from None
    expected = {"schema", "key", "trial", "outcome", "reason", "history", "test_loss", "scores", "provenance"}
    if isinstance(result, dict):
        result.setdefault("scores", None)  # absent from the first versions' files
    if not isinstance(result, dict) or set(result) != expected or result["schema"] != SCHEMA:
        raise ValueError(f"{path} is not a result in this version's format (schema {SCHEMA}); {advice}.")
    try:
        trial = Trial.from_dict(result["trial"])
        key = trial.key
    except (ValueError, RecursionError) as error:  # RecursionError for deeply nested settings
        reason = str(error).removesuffix(".")
        raise ValueError(f"{path} cannot be read: {reason}; if that is no help, {advice}.") from None
    if not path.stem == result["key"] == key:
        raise ValueError(f"{path} holds trial {key}, which is not what its name and key say; {advice}.")
    try:
        _check(result, trial)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {str(error).removesuffix('.')}; {advice}.") from None
    return result


def _check(result: dict[str, Any], trial: Trial) -> None:
    """Check all of a result but its trial.

    Raises:
        ValueError: an entry is not of the kind that ablate writes.
    """
    check(result, _Result)
    outcome, scores = result["outcome"], result["scores"]
    check(result, _OUTCOMES[outcome], f"outcome {outcome!r}")
    if scores is not None and not all(map(_is_score, scores.values())):
        raise ValueError(f"scores are {short_repr(scores)}, but they must be numbers and texts by name")
    if result["history"] is None:
        return
    rows = History.from_dict(result["history"]).rows
    if outcome == STOPPED:
        if not 0 < len(rows) <= trial.steps:
            raise ValueError(f"the history has {len(rows)} rows, but it was stopped before step {trial.steps}")
    elif len(rows) != trial.steps + 1:
        raise ValueError(f"the history has {len(rows)} rows, but {trial.steps} steps make {trial.steps + 1}")
    elif rows[-1]["validation_loss"] is None:
        raise ValueError("the last row of the history has no validation_loss")


def _is_score(value: Any) -> bool:
    return value is None or isinstance(value, bool | float | str) or is_number(value)  # NaN too; no int beyond floats


def table(results: Iterable[dict[str, Any]]):
    """The table that :func:`load` describes."""
    import pandas

    rows = [row for result in results for row in _rows(result)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    scores = sorted(name for name in names if name.startswith(SCORE))
    first, last = ["key", "method", "rank", "alpha"], [*OUTCOME, *scores, *PROVENANCE]
    between = [name for name in names if name not in (*first, *last)]
    frame = pandas.DataFrame(rows, columns=[*first, *between, *last])
    numbers = ("rank", "alpha", "lr", "weight_decay", "clip", "eval_examples", *OUTCOME[2:])
    if "batches" in frame:  # a trial has it only if it is not the default
        frame["batches"] = frame["batches"].fillna(TrainConfig.batches)
    if BASE_DTYPE in frame:
        frame[BASE_DTYPE] = frame[BASE_DTYPE].fillna("as loaded")
    if AUTOCAST in frame:
        frame[AUTOCAST] = frame[AUTOCAST].fillna("none")
    frame = frame.astype(dict.fromkeys(numbers, float))  # whatever the trials are; missing values are NaN
    return frame.sort_values(["method", "rank", "lr", "seed", "key", "step"], ignore_index=True)


def _rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    trial = Trial.from_dict(result["trial"]).to_dict()  # in one order, whatever the file's
    method = dict(trial.pop("method"))
    method["method"] = method.pop("name")
    texts = {name: ", ".join(value) for name, value in method.items() if isinstance(value, list)}
    provenance = {name: result["provenance"].get(name) for name in PROVENANCE}
    fixed = {"key": result["key"], **method, **texts, **trial, **provenance}
    fixed |= {"outcome": result["outcome"], "reason": result["reason"] or ""}
    if result["history"] is None:
        yield fixed
        return
    history, seconds = History(**result["history"]), 0.0
    gaps = dict(zip(*history.curve("gap"), strict=True))
    last = {"test_loss": result["test_loss"]} | {f"{SCORE}{k}": v for k, v in (result["scores"] or {}).items()}
    for row in history.rows:
        seconds += row["seconds"]
        if row["validation_loss"] is not None:
            losses = {name: row[name] for name in LOSSES[:3]} | {"gap": gaps.get(row["step"])}
            at_end = last if row is history.rows[-1] else {}
            yield {**fixed, "step": row["step"], **losses, "seconds": seconds, **at_end} | {
                "trainable_parameters": history.trainable_parameters,
            }
