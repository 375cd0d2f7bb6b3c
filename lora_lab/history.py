"""The record of a training run, step by step, and the error that ends a run whose loss diverges."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, with_config
from torch import nn
from typing_extensions import TypedDict  # typing's own suits pydantic from Python 3.12 on

from lora_lab.system.files import read_json, write_json
from lora_lab.system.schema import Count, NotNegative, Number, check, check_fields
from lora_lab.system.wording import short_repr

if TYPE_CHECKING:
    from pandas import DataFrame


@with_config(ConfigDict(extra="forbid"))
class Row(TypedDict):
    """One step. None: a loss that was not evaluated; and in row 0, before training, what only a step has."""

    step: Count
    train_loss: Number | None
    validation_loss: Number | None
    off_domain_loss: Number | None
    lr: Number | None
    grad_norm: Annotated[float, Field(ge=0)] | None  # infinite where the sum of squares overflows
    seconds: NotNegative
    tokens: Count  # the size of the batch in the task's unit: of a task without tokens, its examples


COLUMNS = tuple(Row.__annotations__)
_Total = Annotated[int, Field(ge=0, lt=2**63)]


class DivergedError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass
class History:
    """The settings of a run and what it did, step by step.

    ``rows`` has one dict per step with the keys of ``COLUMNS``; row 0 is the model before training. Losses are in nats
    (or the unit of the task's loss), ``seconds`` is the time of the step without evaluation, and ``tokens`` is the
    size of the batch in the task's unit. A loss that was not evaluated at a step is None.
    """

    task: dict[str, str]
    method: dict[str, Any]
    settings: dict[str, Any]
    trainable_parameters: _Total = 0
    total_parameters: _Total = 0
    optimizer_bytes: _Total = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self)

    def count(self, model: nn.Module) -> None:
        """Count the parameters of the prepared model."""
        self.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.total_parameters = count_parameters(model)

    def add(self, step: int, **values: float) -> None:
        """Append the row of a step; row 0 is the model before training.

        Raises:
            DivergedError: the training loss is NaN or infinite.
        """
        row = {**dict.fromkeys(COLUMNS), "step": step, **values}
        if step > 0:
            stop_if_diverged("loss", row["train_loss"], row)
        self.rows.append(row)

    def add_evaluation(self, part: str, loss: float) -> None:
        """Set ``<part>_loss`` of the last row.

        Raises:
            DivergedError: the loss is NaN or infinite.
        """
        stop_if_diverged(f"{part} loss", loss, self.rows[-1])
        self.rows[-1][f"{part}_loss"] = loss

    def frame(self) -> DataFrame:
        """Return a pandas DataFrame with one row per step and the columns ``COLUMNS``."""
        import pandas

        decimals = [name for name in COLUMNS if name not in ("step", "tokens")]
        return pandas.DataFrame(self.rows, columns=list(COLUMNS)).astype(dict.fromkeys(decimals, float))

    def curve(self, column: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a column where it is not None; or of "gap", the generalisation gap.

        The gap is the validation loss minus the mean training loss over the steps since the previous evaluation. The
        training losses are those of earlier, worse weights, so the gap is too small; 0 does not mean no overfitting.
        """
        if column == "gap":
            return self._gaps()
        rows = [row for row in self.rows if row[column] is not None]
        return [row["step"] for row in rows], [row[column] for row in rows]

    def _gaps(self) -> tuple[list[int], list[float]]:
        """Return the steps at which the validation loss was evaluated, and the gap at each of them."""
        steps, gaps, losses = [], [], []
        for row in self.rows[1:]:
            losses.append(row["train_loss"])
            if row["validation_loss"] is not None:
                steps.append(row["step"])
                gaps.append(row["validation_loss"] - statistics.fmean(losses))
                losses = []
        return steps, gaps

    @property
    def best_step(self) -> int:
        """The step with the lowest validation loss, whose weights early stopping would have kept."""
        steps, losses = self.curve("validation_loss")
        return steps[losses.index(min(losses))]

    @property
    def step_seconds(self) -> float:
        """Median time of a training step, in seconds."""
        return statistics.median(row["seconds"] for row in self.rows[1:])

    @property
    def tokens_per_second(self) -> float:
        """Median speed, in the task's unit (tokens or examples) per second."""
        return statistics.median(row["tokens"] / row["seconds"] for row in self.rows[1:])

    def save(self, path: str | Path) -> None:
        """Write the history as a JSON file."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or holds something else.
        """
        stored = read_json(path)
        try:
            return cls.from_dict(stored)
        except ValueError as error:
            raise ValueError(f"{path} holds no History: {error} Give a file that History.save wrote.") from None

    @classmethod
    def from_dict(cls, content: Any) -> History:
        """Return the inverse of ``dataclasses.asdict``, also after a round trip through JSON.

        Raises:
            ValueError: an entry is missing, unknown or of the wrong type, or the rows are not those of steps
                0, 1, 2, ...
        """
        check(content, dict, "The history")
        if mismatched := content.keys() ^ {entry.name for entry in fields(cls)}:
            raise ValueError(f"The history has missing or unknown entries: {short_repr(sorted(mismatched))}.")
        history = cls(**content)
        for step, row in enumerate(history.rows):
            _check_row(row, step)
        return history


def _check_row(row: Any, step: int) -> None:
    """Check that a row is that of its step; only row 0, before training, may lack what training gives."""
    check(row, Row, f"Row {step}")
    if row["step"] != step:
        raise ValueError(f"Row {step} is of step {row['step']}, but the rows must be those of steps 0, 1, 2 and so on.")
    for name in ("train_loss", "lr", "grad_norm"):
        if step > 0 and row[name] is None:
            raise ValueError(f"Row {step} has no {name}, which only row 0 may lack.")


def stop_if_diverged(what: str, loss: float, row: dict[str, Any]) -> None:
    """Raise DivergedError if a loss is NaN or infinite.

    Args:
        what: which loss it is, for the message.
        row: of the step, with its number and its learning rate.
    """
    if math.isfinite(loss):
        return
    if row["step"] == 0:
        raise DivergedError(
            f"The {what} is {loss} at step 0 (before training), so no learning rate can help; look for "
            "NaN and infinite numbers in weights and inputs, or load the model in float32."
        )
    raise DivergedError(
        f"The {what} is {loss} at step {row['step']} (learning rate {row['lr'] or 0:.2g}), so training stops; "
        "lower the learning rate, and reload the model, because its weights are unusable."
    )


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of ``model``.

    A module that stores a weight in another form, such as 4-bit blocks, has a property ``stands_for``: a dictionary
    from the ``id`` of each stored parameter to the number of elements of the weight that it represents.
    """
    sizes = {}
    for module in model.modules():
        sizes |= getattr(module, "stands_for", {})
    return sum(sizes.get(id(parameter), parameter.numel()) for parameter in model.parameters())
