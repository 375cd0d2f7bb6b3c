"""How a model is trained, as far as cost goes: what memory, FLOPs and time are asked about."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
)

from lora_lab.costs.fake import Batch, shape_of
from lora_lab.lean.step import Lean, LeanStep
from lora_lab.methods import FullFineTuning, Method
from lora_lab.models.quantize import quantize_nf4
from lora_lab.task import Loss, cross_entropy
from lora_lab.train import TrainConfig, TrainingStep, make_step


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as bytes and seconds go. What is left out is as in ``fit``.

    Args:
        method: FullFineTuning(), LoRA(...), ...; or ``methods.AsItIs()``, for a model that is ready already.
        dtype: cast the model's floating-point weights to this before it is made ready (adapters stay in
            float32 or finer); None leaves them as they are.
        nf4: put the linear layers into 4 bits first, as QLoRA does (:func:`lora_lab.quantize_nf4`).
        optimizer: "adamw", as ``fit`` has it, or "sgd", plain gradient descent, which has no state.
        gradient_checkpointing, lean, clip: as in :func:`lora_lab.fit`.
        accumulate: micro-batches that a batch is computed in.
        loss: (model, inputs, targets) -> mean loss.

    Raises:
        ValueError: a value is none of those that it can be, or plain gradient descent is asked of the lean step.
    """

    method: Method = field(default_factory=FullFineTuning)
    dtype: torch.dtype | None = None
    nf4: bool = False
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    lean: Lean | None = None
    clip: float | None = 1.0
    accumulate: int = 1
    loss: Loss = cross_entropy

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise ValueError(f"method is {self.method!r}, but it must be one such as LoRA(rank=8) or FullFineTuning().")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer is {self.optimizer!r}, but it must be 'adamw' or 'sgd'.")
        if self.optimizer == "sgd" and self.lean is not None:
            raise ValueError("optimizer is 'sgd', but the lean step has an AdamW of its own; use lean=None.")
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}, but it must be at least 1.")

    def step(self, model: nn.Module) -> TrainingStep:
        """Make ``model`` ready, in place; a fake one for batches in which every target counts.

        Args:
            model: from :func:`fake_copy` or :func:`made`, which have cast it to ``dtype``.
        """
        if self.nf4:
            quantize_nf4(model)
        config = TrainConfig(
            steps=1,
            lr=1e-6,
            clip=self.clip,
            gradient_checkpointing=self.gradient_checkpointing,
            lean=self.lean,
        )
        step = make_step(model.train(), self.loss, self.method, config)
        if self.optimizer == "sgd":
            trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
            step.optimizer = torch.optim.SGD(trained, lr=1e-6)
        if isinstance(step, LeanStep) and isinstance(next(model.parameters()), FakeTensor):
            step.every_target = True  # fake targets cannot be asked whether they count
        return step

    def batches(self, batch: Batch) -> tuple[list[Batch], list[float]]:
        """The batch as micro-batches, as many as ``accumulate`` says for each thread, and their weights.

        Raises:
            ValueError: there are fewer examples than micro-batches.
        """
        count = self.accumulate * (1 if self.lean is None else self.lean.threads)
        if count > len(batch[0]):
            raise ValueError(
                f"accumulate is {self.accumulate}, but the batch has only {len(batch[0])} examples"
                + (f" for {self.lean.threads} threads." if count > self.accumulate else ".")
            )
        parts = list(zip(*(tensor.tensor_split(count) for tensor in batch), strict=True))
        return parts, [len(inputs) / len(batch[0]) for inputs, _ in parts]

    def describe(self) -> str:
        """A few words, such as "LoRA r=8, bfloat16, checkpointing"."""
        settings = self.method.settings()
        words = [self.method.name + (f" r={settings['rank']}" if "rank" in settings else "")]
        if settings.get("targets", "all-linear") != "all-linear":
            names = settings["targets"]
            words.append("+".join(names) if len(names) <= 4 else f"{len(names)} targets")
        if self.nf4:
            words.append("NF4 base")
        if self.optimizer != "adamw":
            words.append(self.optimizer.upper())
        if self.dtype is not None:
            words.append(str(self.dtype).removeprefix("torch."))
        if self.lean is not None:
            words.append("lean" + (" bf16 base" if self.lean.base_dtype else ""))
        if self.gradient_checkpointing or (self.lean is not None and self.lean.checkpoint):
            words.append("checkpointing")
        if self.accumulate > 1:
            words.append(f"{self.accumulate} micro-batches")
        if self.clip is None:
            words.append("no clipping")
        return ", ".join(words)

    def check_watchable(self) -> None:
        """Raise ValueError if the step runs in threads, where hooks and modes, kept per thread, see nothing."""
        if self.lean is not None and self.lean.threads > 1:
            raise ValueError(
                f"lean.threads is {self.lean.threads}, but what autograd saves and the operations it runs are watched "
                "by hooks that hold for one thread only; use Lean(threads=1) here."
            )


def as_setup(method: Method | Setup, options: dict[str, Any]) -> Setup:
    """A setup from a method and keywords, or from a setup that keywords change."""
    return replace(method, **options) if isinstance(method, Setup) else Setup(method, **options)


def setting_of(setup: Setup, model: nn.Module, batch: Batch) -> str:
    """Such as "Llama, lora r=8, batch 4 x 128"."""
    return f"{type(model).__name__}, {setup.describe()}, batch {shape_of(batch)}"
