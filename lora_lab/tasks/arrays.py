"""Tasks for small nets, which train in seconds: digits, a hidden update of known rank, and arrays of your own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.inject import LoRAConfig, inject, lora_layers
from lora_lab.system.schema import NotNegative, Seed, Size, check
from lora_lab.system.wording import shortened
from lora_lab.task import Examples, Task, cross_entropy, mean_squared_error

CHANGES = {
    "moved": "moved down by a pixel",
    "inverted": "black and white swapped",
    "other digits": "5 to 9, after 0 to 4",
}
_VALIDATION = 200  # changed pictures to choose by


def digits(part: str = "adapt", seed: int = 0, n_train: int = 500, change: str = "moved") -> Task:
    """Return a task of scikit-learn's handwritten digits: to be learned first as they are, then changed.

    Moved down by one pixel, each picture loses its lowest row; a net trained on the original digits misreads a quarter
    (the transformer) to more than half of them (the MLP).

    Args:
        part: "pretrain" (900 pictures as they are) or "adapt" (the other 897, changed; off-domain as they are).
        seed: of the split and of the order.
        n_train: changed pictures to train on, up to 1,200; above 500, fewer pictures stay as they are. Of the "other
            digits" there are 896, so up to 600.
        change: in :data:`CHANGES`. "other digits" are 5 to 9 as they are, and those to be learned first are 0 to 4.

    Raises:
        ValueError: ``part`` or ``change`` is another word, or ``n_train`` is out of range.
    """
    check(part, Literal["pretrain", "adapt"], "part")
    check(change, Literal["moved", "inverted", "other digits"], "change")
    most = 600 if change == "other digits" else 1200
    check(n_train, Annotated[int, Field(ge=1, le=most)], "n_train")
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(check(seed, Seed, "seed")))  # (1797,)
    upright = torch.tensor(pictures, dtype=torch.float32)[order] / 16  # (1797, 64) in [0, 1]
    labels = torch.tensor(labels)[order]  # (1797,)
    if change == "other digits":
        as_is, changed = (Examples(upright[chosen], labels[chosen]) for chosen in (labels < 5, labels >= 5))
    else:
        n = len(labels) - 397 - n_train  # pictures that stay as they are: 900 by default
        # Moved: without the last row of 8 pixels, an empty one before.
        new = F.pad(upright[n:, :-8], (8, 0)) if change == "moved" else 1 - upright[n:]  # (897, 64)
        as_is, changed = Examples(upright[:n], labels[:n]), Examples(new, labels[n:])
    n, few = len(as_is), min(100, len(as_is) // 4)
    pretrain = as_is[: n - 2 * few], as_is[n - 2 * few : n - few], as_is[n - few :]
    n = n_train + _VALIDATION
    adapt = changed[:n_train], changed[n_train:n], changed[n:]
    own, other = (pretrain, adapt) if part == "pretrain" else (adapt, pretrain)
    about = f"scikit-learn's 8 x 8 digits: as they are, or {CHANGES[change]}"
    return Task(f"digits-{part}", *own, off_domain=other[1], about=about)


def planted(
    model: nn.Module,
    rank: int = 4,
    noise: float = 0.1,
    n_train: int = 512,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> Task:
    """Return a task with a known solution: imitate ``model`` plus a hidden update of the given rank.

    The teacher is a copy of the model with an update of exactly that rank, as large as the weight itself, in each
    target layer. Inputs are Gaussian, of the type of the model's weights. Noise is added to the teacher's outputs for
    training only, so a student that finds the update reaches zero validation loss, however noisy its training targets.

    Args:
        model: a net that takes (n, features); it is not changed.
        rank: of the hidden update.
        noise: standard deviation of the noise, relative to that of the teacher's outputs.
        n_train: number of training examples.
        targets: layers with a hidden update, as in :class:`lora_lab.LoRAConfig`.
        seed: of everything random.

    Raises:
        ValueError: ``noise`` is negative, the model has no linear layer, or as for
            :func:`lora_lab.inject`.
    """
    noise, n_train = check(noise, NotNegative, "noise"), check(n_train, Size, "n_train")
    if (first := next((module for module in model.modules() if isinstance(module, nn.Linear)), None)) is None:
        raise ValueError(f"A {type(model).__name__} has no linear layer, but planted needs a net of features.")
    student = copy.deepcopy(model).cpu().eval()  # a model on a GPU stays there
    teacher = copy.deepcopy(student)
    inject(teacher, LoRAConfig(rank=rank, alpha=rank, targets=targets), seed=seed)
    generator = torch.Generator().manual_seed(check(seed, Seed, "seed"))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=first.weight.dtype)

    with torch.no_grad():
        for layer in lora_layers(teacher).values():
            layer.lora_B.copy_(draw(*layer.lora_B.shape))  # (out, rank)
            layer.lora_B.mul_(layer.base.weight.norm() / layer.delta().norm())
        inputs = draw(n_train + 3 * 256, first.in_features)
        outputs = teacher(inputs)  # (n, out)
        outputs[:n_train] += noise * outputs.std() * draw(n_train, outputs.shape[1])
        off_inputs = 3 * draw(256, first.in_features)  # three times as far out
        off_domain = Examples(off_inputs, student(off_inputs))
    rows = Examples(inputs, outputs)
    own = rows[:n_train], rows[n_train : n_train + 256], rows[n_train + 256 : n_train + 512]
    about = f"a hidden update of rank {rank}, training answers with noise {noise:g}; off-domain: the model as it was"
    return Task(f"planted-rank{rank}", *own, off_domain=off_domain, loss=mean_squared_error, about=about)


def from_arrays(X: Any, y: Any, *, kind: str = "auto", seed: int = 0) -> Task:
    """Return a task for small nets from arrays, as scikit-learn takes them: classification or regression.

    Four fifths of the examples are for training, a tenth each for validation and test, drawn at random. The split is
    stratified by class if each class has ten examples or more. The off-domain part is the test part, so its loss says
    nothing new; ``dataclasses.replace(task, off_domain=Examples(inputs, targets))`` gives the task another.

    Args:
        X: features, (n, ...); they become float32. Scale them as the model needs.
        y: (n,) classes (whole numbers, texts or truth values; they are numbered in sorted order), or (n,) or
            (n, outputs) numbers to predict.
        kind: "classification", "regression", or "auto": regression if y has floating-point numbers that are not all
            whole.
        seed: of the split.

    Returns:
        A task whose model maps (batch, ...) to (batch, classes), with the cross-entropy; or to (batch, outputs), with
        the mean squared error.

    Raises:
        ValueError: the arrays do not fit each other, hold something that is not finite, have fewer than ten examples,
            or y does not fit the kind.
        TypeError: the classes have no common order, such as numbers and texts.
    """
    check(seed, Annotated[int, Field(ge=0, lt=2**32)], "seed")
    check(kind, Literal["auto", "classification", "regression"], "kind")
    inputs, values = _numbers(X, "X"), _array(y)
    if inputs.ndim < 2 or values.ndim == 0 or len(inputs) != len(values) or len(inputs) < 10:
        shapes = f"X has shape {inputs.shape} and y has {values.shape}"
        raise ValueError(f"{shapes}, but they must be (n, ...) and (n,) or (n, outputs), of the same n, at least 10.")
    whole = values.dtype.kind != "f" or bool(np.all(values == np.round(values)))
    about = f"{len(inputs)} examples of yours"
    if kind == "classification" or (kind == "auto" and whole):
        import pandas

        if values.ndim != 1 or pandas.isna(_array(y, object)).any():  # as a text in ``values``, NaN is not missing
            raise ValueError(f"y has shape {values.shape}, but must be of shape (n,), without missing classes.")
        classes, numbers = np.unique(values, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y has only the class {classes.tolist()[0]!r}, but two or more are needed.")
        loss, targets = cross_entropy, torch.from_numpy(numbers)  # (n,)
        counts = targets.bincount()  # (classes,)
        about += f", {len(classes)} classes"
        stratify = targets.numpy() if int(counts.min()) >= 10 else None
    else:
        loss, stratify = mean_squared_error, None
        targets = torch.from_numpy(_numbers(values, "y").reshape(len(values), -1))  # (n, outputs)
    everything = Examples(torch.from_numpy(inputs), targets)
    train, validation, test = (everything[rows] for rows in _split(len(inputs), seed, stratify))
    return Task("arrays", train, validation, test, test, loss, about=f"{about}; off-domain: the test part")


def _array(values: Any, dtype: Any = None) -> np.ndarray:
    """Return an array of what holds numbers or texts, tensors that require gradients included."""
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype)


def _numbers(values: Any, name: str) -> np.ndarray:
    """Return an array in float32, whose numbers are all finite."""
    from sklearn.utils import check_array

    try:
        return check_array(_array(values), dtype="float32", ensure_2d=False, allow_nd=True, input_name=name)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be an array of finite numbers, but: {shortened(str(error))}") from None


def _split(count: int, seed: int, stratify: np.ndarray | None) -> list[Any]:
    """Return the rows for training, validation and test; each has as large a share of each class to stratify by."""
    from sklearn.model_selection import train_test_split

    options: Any = {"test_size": max(1, count // 10), "random_state": seed}
    rest, test = train_test_split(np.arange(count), stratify=stratify, **options)
    return [*train_test_split(rest, stratify=None if stratify is None else stratify[rest], **options), test]
