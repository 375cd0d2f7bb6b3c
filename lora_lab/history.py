"""What a run did, step by step, and how it ends early when its loss diverges."""

from __future__ import annotations

import math
import reprlib
import statistics
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from lora_lab.system.files import read_json, write_json

COLUMNS = ("step", "train_loss", "validation_loss", "off_domain_loss", "lr", "grad_norm", "seconds", "tokens")


class DivergedError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass
class History:
    """What a run did, step by step.

    ``rows`` holds one dict a step with the keys of ``COLUMNS``; row 0 is the model before training. Losses
    are in nats (or the task's unit), ``seconds`` is the time of the step without evaluation, ``tokens``
    counts the task's unit. A loss that was not evaluated at a step is None.
    """

    task: dict[str, str]
    method: dict[str, Any]
    settings: dict[str, Any]
    trainable_parameters: int
    total_parameters: int
    optimizer_bytes: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def start(self) -> None:
        """Begin with row 0, the model before training."""
        self.rows.append({**dict.fromkeys(COLUMNS), "step": 0, "seconds": 0.0, "tokens": 0})

    def add(self, step: int, **values: float) -> None:
        """Append the row of a step.

        Raises:
            DivergedError: its training loss is no finite number.
        """
        row = {**dict.fromkeys(COLUMNS), "step": step, **values}
        stop_if_diverged("loss", row["train_loss"], row)
        self.rows.append(row)

    def add_evaluation(self, part: str, loss: float) -> None:
        """Fill in the last row's ``<part>_loss``.

        Raises:
            DivergedError: the loss is no finite number.
        """
        stop_if_diverged(f"{part} loss", loss, self.rows[-1])
        self.rows[-1][f"{part}_loss"] = loss

    def frame(self):
        """A pandas DataFrame, one row a step, one column for each of ``COLUMNS``."""
        import pandas

        return pandas.DataFrame(self.rows, columns=list(COLUMNS)).astype(dict.fromkeys(COLUMNS[1:-1], float))

    def curve(self, column: str) -> tuple[list[int], list[float]]:
        """Steps and values of one column, where it has values; or of "gap", the generalisation gap.

        The gap is the validation loss less the mean training loss over the steps since the evaluation before. Losses
        of training are taken before each step, so it lags a little: a gap at 0 is no proof that there is none.
        """
        if column == "gap":
            return self._gap()
        points = [(row["step"], row[column]) for row in self.rows if row[column] is not None]
        return [step for step, _ in points], [value for _, value in points]

    def _gap(self) -> tuple[list[int], list[float]]:
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
        """The step of the lowest validation loss: where early stopping would have stopped."""
        steps, losses = self.curve("validation_loss")
        return steps[losses.index(min(losses))]

    @property
    def step_seconds(self) -> float:
        """Median time of a training step, in seconds."""
        return statistics.median(row["seconds"] for row in self.rows[1:])

    @property
    def tokens_per_second(self) -> float:
        """Median speed, in the task's unit (tokens or examples) a second."""
        return statistics.median(row["tokens"] / row["seconds"] for row in self.rows[1:])

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it holds something else, or is damaged.
        """
        stored = read_json(path)
        try:
            return cls.from_dict(stored)
        except ValueError as error:
            reason = str(error).removesuffix(".")
            raise ValueError(f"{path} holds no History ({reason}); give a file that History.save wrote.") from None

    @classmethod
    def from_dict(cls, content: Any) -> History:
        """The history that ``dataclasses.asdict`` has turned into ``content``, and perhaps JSON into a text and back.

        Raises:
            ValueError: an entry is missing, unknown or of another kind, or the rows are not those of steps 0, 1, 2, ...
        """
        if not isinstance(content, dict):
            raise ValueError(f"The content is a {type(content).__name__}, but it must be an object.")
        if odd := content.keys() ^ {each.name for each in fields(cls)}:
            raise ValueError(f"The content lacks, or should not have, {', '.join(sorted(map(str, odd)))}.")
        for name in ("task", "method", "settings"):
            if not isinstance(content[name], dict):
                raise ValueError(f"{name} is {reprlib.repr(content[name])}, but it must be an object.")
        for name in ("trainable_parameters", "total_parameters", "optimizer_bytes"):
            if type(content[name]) is not int or not 0 <= content[name] <= sys.float_info.max:
                raise ValueError(f"{name} is {reprlib.repr(content[name])}, but it must be a whole number.")
        if not isinstance(content["rows"], list):
            raise ValueError(f"rows are {reprlib.repr(content['rows'])}, but they must be a list.")
        for step, row in enumerate(content["rows"]):
            _check_row(step, row)
        return cls(**content)


def _check_row(step: int, row: Any) -> None:
    if not isinstance(row, dict) or row.keys() != set(COLUMNS):
        raise ValueError(f"Row {step} is {reprlib.repr(row)}, but it must have the values {', '.join(COLUMNS)}.")
    if type(row["step"]) is not int or row["step"] != step:
        raise ValueError(f"Row {step} is of step {reprlib.repr(row['step'])}, but rows must be of steps 0, 1, 2, ...")
    # Losses are not evaluated at every step, and no step led to row 0.
    optional = {"validation_loss", "off_domain_loss"} | ({"train_loss", "lr", "grad_norm"} if step == 0 else set())
    for name in COLUMNS[1:]:
        value = row[name]
        endless = name == "grad_norm" and value == math.inf  # its squares overflow; clipping survives that
        if not (is_number(value) or endless or (value is None and name in optional)):
            raise ValueError(f"Row {step} has {reprlib.repr(value)} as {name}, but it must be a finite number.")


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number that a float can hold: no NaN, no infinity, no truth value."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def stop_if_diverged(what: str, loss: float, row: dict[str, Any]) -> None:
    """Raise DivergedError if a loss is NaN or infinite.

    Args:
        what: which loss it is.
        row: the step's: its number and its learning rate.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"The {what} is {loss} at step {row['step']} (learning rate {row['lr'] or 0:.2g}), so training stops; "
            "lower the learning rate, and load the model anew, because its weights are spoilt."
        )


def count_parameters(model: nn.Module) -> int:
    """The model's numbers. A layer whose weight is stored in another form says in ``stands_for`` how many those are."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        sizes |= getattr(module, "stands_for", {})
    return sum(sizes.get(id(parameter), parameter.numel()) for parameter in model.parameters())
