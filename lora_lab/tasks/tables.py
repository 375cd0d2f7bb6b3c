"""Tasks from tables of texts and from arrays of numbers, as files, pandas, datasets and scikit-learn have them."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field

from lora_lab.system.files import check_file
from lora_lab.system.schema import check
from lora_lab.system.wording import short_repr, shortened
from lora_lab.task import Examples, Task, check_tokenizer, cross_entropy, mean_squared_error
from lora_lab.tasks.instruction import PARTS, ChatTokenizer, Pair, PairTask, from_pairs

if TYPE_CHECKING:
    from pandas import DataFrame

TABLES = (".csv", ".tsv", ".parquet")  # files that from_table reads


def from_table(
    tokenizer: ChatTokenizer,
    table: Any,
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    group: str | None = None,
    part: str | None = None,
    **options: Any,
) -> PairTask:
    """A task of prompts and answers from two columns of a table.

    Args:
        tokenizer, **options: as for :func:`lora_lab.tasks.from_pairs`; the name defaults to that of the file.
        table: the path of a CSV, TSV or Parquet file (UTF-8; the first line names the columns), a pandas DataFrame, or
            a ``datasets.Dataset``.
        prompt, answer: names of the columns. Numbers in them become text.
        group: name of a column; rows with the same value go to the same part of the task.
        part: name of a column that decides the split: "train", "validation" or "test" in each row.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind or cannot be read, a column is missing, a cell is empty, or as for
            :func:`lora_lab.tasks.from_pairs`.
    """
    check_tokenizer(tokenizer, ChatTokenizer)
    frame, name = _frame(table)
    chosen = {"prompt": prompt, "answer": answer, "group": group, "part": part}
    columns = {role: column for role, column in chosen.items() if column is not None or role in ("prompt", "answer")}
    for role, column in columns.items():
        if not isinstance(column, Hashable) or column not in frame.columns:
            raise ValueError(
                f"{name} has no column {short_repr(column)}, but {shortened(str([*map(str, frame.columns)]))}; rename "
                f"the right one, or name it in Python: from_table(tokenizer, table, {role}=...)."
            )
    rows = [dict(zip(columns, values, strict=True)) for values in frame[list(columns.values())].itertuples(index=False)]
    split: dict[str, list[Pair]] = {name: [] for name in PARTS}
    for number, row in enumerate(rows, start=1):
        texts = {role: _cell(value) for role, value in row.items()}
        if missing := [columns[role] for role in ("prompt", "answer") if not texts[role].strip()]:
            raise ValueError(f"Row {number} of {name} has nothing in the column {missing[0]!r}; fill or remove it.")
        if part is not None and texts["part"] not in split:
            raise ValueError(
                f"Row {number} of {name} has the part {texts['part']!r:.60}, not one of {', '.join(PARTS)}."
            )
        for role in ("prompt", "answer"):
            tokenizer.check_text(texts[role], f"Row {number} of {name}")
        split[texts.get("part", "train")].append(Pair(texts["prompt"], texts["answer"], texts.get("group", "")))
    options = {"name": Path(name).stem, "about": f"from {name}", **options}
    return from_pairs(tokenizer, split["train"] if part is None else split, **options)


def _frame(table: Any) -> tuple[DataFrame, str]:
    """A DataFrame, and what to call it."""
    import pandas

    if isinstance(table, pandas.DataFrame):
        return table, "table"
    if hasattr(table, "to_pandas"):  # as a Dataset of the datasets library has
        return table.to_pandas(), "dataset"
    path = Path(table)
    if path.suffix not in TABLES:
        raise ValueError(
            f"{shortened(str(path))} is no table that can be read here; its name must end in one of "
            f"{', '.join(TABLES)}."
        )
    check_file(path, "a table")
    try:
        if path.suffix == ".parquet":
            return pandas.read_parquet(path), path.name
        separator = "," if path.suffix == ".csv" else "\t"
        return pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig"), path.name
    except ImportError:
        raise ValueError(f"{path} needs the library pyarrow; install it with pip install pyarrow.") from None
    except (ValueError, OSError) as error:  # pandas' and pyarrow's errors of format derive from these
        reason = shortened(str(error)).removesuffix(".")
        raise ValueError(
            f"{path} cannot be read as a table ({reason}); save it anew (CSV and TSV: as UTF-8, with as many cells in "
            "each row as there are columns)."
        ) from None


def _cell(value: Any) -> str:
    import pandas

    return "" if pandas.api.types.is_scalar(value) and pandas.isna(value) else str(value)


def from_arrays(
    X: Any,
    y: Any,
    *,
    kind: str = "auto",
    name: str = "arrays",
    off_domain: tuple[Any, Any] | None = None,
    seed: int = 0,
) -> Task:
    """A task for small nets from arrays, as scikit-learn takes them: classification or regression.

    Four fifths of the examples are for training, a tenth each for validation and test, drawn at random. The split is
    stratified by class if each class has ten examples or more.

    Args:
        X: features, (n, ...); they become float32. Scale them as the model needs.
        y: (n,) classes (whole numbers, texts or truth values; they are numbered in sorted order), or (n,) or
            (n, outputs) numbers to predict.
        kind: "classification", "regression", or "auto": regression if y has floating-point numbers that are not all
            whole.
        name: of the task.
        off_domain: another (X, y), to measure forgetting with; None takes the test part, so that the off-domain loss
            says nothing new.
        seed: of the split.

    Returns:
        A task whose model maps (batch, ...) to (batch, classes), with the cross-entropy; or to (batch, outputs), with
        the mean squared error.

    Raises:
        ValueError: the arrays do not fit each other, hold something that is not finite, have fewer than ten examples,
            or y does not fit the kind.
    """
    check(seed, Annotated[int, Field(ge=0, lt=2**32)], "seed")
    if kind not in ("auto", "classification", "regression"):
        raise ValueError(f"kind is {short_repr(kind)}, but it must be 'auto', 'classification' or 'regression'.")
    features, values = _numbers(X, "X"), _array(y)
    if features.ndim < 2 or values.ndim == 0 or len(features) != len(values) or len(features) < 10:
        raise ValueError(
            f"X has shape {features.shape} and y has {values.shape}, but they must be (n, features) and (n,) or "
            "(n, outputs), of the same n, at least 10."
        )
    if kind == "auto":
        whole = values.dtype.kind != "f" or np.all(values == np.round(values))
        kind = "classification" if whole else "regression"
    numbers, labels = _classes(y, values) if kind == "classification" else (None, None)
    parts = [(features[rows], values[rows]) for rows in _split(len(features), labels, seed)]
    about = f"{len(features)} examples of yours" + (f", {len(numbers)} classes" if numbers else "")
    if off_domain is None:
        parts.append(parts[2])
        about += "; off-domain: the test part"
    else:
        parts.append((_numbers(off_domain[0], "X"), _array(off_domain[1])))
    examples = [Examples(torch.from_numpy(X_part), _targets(y_part, numbers)) for X_part, y_part in parts]
    return Task(name, *examples, loss=cross_entropy if numbers else mean_squared_error, about=about)


def _array(values: Any, dtype: Any = None) -> np.ndarray:
    """An array of what holds numbers or texts, tensors that require gradients included."""
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype)


def _classes(y: Any, values: np.ndarray) -> tuple[dict[Hashable, int], np.ndarray]:
    """Return the number of each class, in sorted order, and the number of each example's class (n,).

    Args:
        y: as for :func:`from_arrays`; in a list of texts NaN is still a missing value, in ``values`` it is a text.
        values: the array of y, (n,).
    """
    import pandas

    if values.ndim != 1:
        raise ValueError(f"y has shape {values.shape}, but classes must be (n,).")
    objects = _array(y, object)  # (n,)
    if pandas.isna(objects).any():
        raise ValueError("y holds classes that are missing; fill or remove them.")
    try:
        classes, labels = np.unique(values, return_inverse=True)
    except TypeError:
        types = ", ".join(sorted({type(value).__name__ for value in objects}))
        raise ValueError(
            f"y holds classes of the types {types}, which have no common order; make all of them numbers or all texts."
        ) from None
    if len(classes) < 2:
        raise ValueError(f"y has only the class {classes.tolist()[0]!r}, but two or more are needed.")
    return {value: i for i, value in enumerate(classes.tolist())}, labels


def _numbers(values: Any, name: str) -> np.ndarray:
    """Return an array in float32, whose numbers are all finite."""
    from sklearn.utils import check_array

    try:
        return check_array(_array(values), dtype=np.float32, ensure_2d=False, allow_nd=True, input_name=name)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be an array of finite numbers, but: {shortened(str(error))}") from None


def _targets(values: np.ndarray, numbers: dict[Hashable, int] | None) -> torch.Tensor:
    """Class numbers (n,), or float32 targets (n, outputs)."""
    if numbers is not None:
        if unknown := sorted({*values.tolist()} - numbers.keys(), key=repr):
            raise ValueError(f"off_domain has the class {unknown[0]!r}, which y does not have.")
        return torch.tensor([numbers[value] for value in values.tolist()])  # (n,)
    targets = _numbers(values, "y")
    return torch.from_numpy(targets.reshape(len(targets), -1))  # (n, outputs)


def _split(count: int, stratum: np.ndarray | None, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows for training, validation and test."""
    from sklearn.model_selection import train_test_split

    if stratum is not None and np.bincount(stratum).min() < 10:
        stratum = None
    tenth = max(1, count // 10)
    rest, test = train_test_split(np.arange(count), test_size=tenth, random_state=seed, stratify=stratum)
    remaining = None if stratum is None else stratum[rest]
    train, validation = train_test_split(rest, test_size=tenth, random_state=seed, stratify=remaining)
    return np.asarray(train), np.asarray(validation), np.asarray(test)
