"""Setup: how a model is trained, as far as memory, FLOPs and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_lab.costs.fake import shape_of
from lora_lab.lean.step import Lean, LeanStep
from lora_lab.methods import FullFineTuning, Method
from lora_lab.models.quantize import quantize_nf4
from lora_lab.system.schema import Size, check
from lora_lab.task import Loss, cross_entropy
from lora_lab.train import Batch, TrainConfig, TrainingStep, make_step, set_training_mode

_OPTIMIZERS = {"adamw": "AdamW", "adamw-foreach": "AdamW by foreach", "sgd": "SGD"}  # name -> in a description


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as bytes and seconds depend on it. All else is as in ``fit``.

    Args:
        method: FullFineTuning(), LoRA(...), ...; or ``methods.AsItIs()``, for a model that is ready to train.
        dtype: cast the model's floating-point weights to this first (adapters stay in float32 or finer); None leaves
            them as they are.
        nf4: quantise the linear layers to 4 bits first, as QLoRA does (:func:`lora_lab.quantize_nf4`).
        optimizer: "adamw", as in ``fit``: one operation a weight; "adamw-foreach", torch's default on a GPU: eight
            passes over all weights; or "sgd": plain gradient descent, which has no state.
        gradient_checkpointing, lean, autocast, clip: as in :func:`lora_lab.fit`.
        accumulate: the number of micro-batches that a batch is split into.
        loss: (model, inputs, targets) -> mean loss.

    Raises:
        ValueError: a value is not one of those listed, or plain gradient descent is combined with the lean step.
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
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}, but it must be 'adamw', 'adamw-foreach' or 'sgd'.")
        if self.optimizer != "adamw" and self.lean is not None:
            raise ValueError(
                f"optimizer is {self.optimizer!r}, but the lean step has an AdamW of its own; use lean=None."
            )
        object.__setattr__(self, "accumulate", check(self.accumulate, Size, "accumulate"))

    def step(self, model: nn.Module) -> TrainingStep:
        """Make ``model`` ready to train, in place. A fake model gets a step that assumes that every target counts.

        Args:
            model: from :func:`fake_copy` or :func:`build_model`, which have cast it to ``dtype``.
        """
        if self.nf4:
            quantize_nf4(model)
        config = TrainConfig(
            steps=1,
            lr=1e-6,
            clip=self.clip,
            gradient_checkpointing=self.gradient_checkpointing,
            lean=self.lean,
            autocast=self.autocast,
        )
        step = make_step(model, self.loss, self.method, config)
        set_training_mode(model)
        if self.optimizer != "adamw":
            trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
            sgd = self.optimizer == "sgd"
            step.optimizer = torch.optim.SGD(trained, lr=1e-6) if sgd else torch.optim.AdamW(trained, foreach=True)
        if isinstance(step, LeanStep) and isinstance(next(model.parameters()), FakeTensor):
            step.every_target = True  # fake targets have no values to compare with IGNORE
        return step

    def batches(self, batch: Batch) -> tuple[list[Batch], list[float]]:
        """Return the batch split into ``accumulate`` micro-batches for each thread, and their weights.

        Raises:
            ValueError: there are fewer examples than micro-batches.
        """
        threads = 1 if self.lean is None else self.lean.threads
        count = self.accumulate * threads
        if count > len(batch[0]):
            raise ValueError(
                f"accumulate is {self.accumulate}, but the batch has only {len(batch[0])} examples"
                + (f" for {threads} threads." if threads > 1 else ".")
            )
        parts = list(zip(*(tensor.tensor_split(count) for tensor in batch), strict=True))
        return parts, [len(inputs) / len(batch[0]) for inputs, _ in parts]

    def describe(self) -> str:
        """Return a short description, such as "lora r=8, bfloat16, checkpointing"."""
        settings, lean = self.method.settings(), self.lean
        names = settings.get("targets", "all-linear")
        words = {
            self.method.name + (f" r={settings['rank']}" if "rank" in settings else ""): True,
            "+".join(names) if len(names) <= 4 else f"{len(names)} targets": names != "all-linear",
            "NF4 base": self.nf4,
            _OPTIMIZERS[self.optimizer]: self.optimizer != "adamw",
            str(self.dtype).removeprefix("torch."): self.dtype is not None,
            "lean bf16 base" if lean and lean.base_dtype else "lean": lean is not None,
            "autocast": self.autocast is not None,
            "checkpointing": self.gradient_checkpointing or (lean is not None and lean.checkpoint),
            f"{self.accumulate} micro-batches": self.accumulate > 1,
            "no clipping": self.clip is None,
        }
        return ", ".join(word for word, said in words.items() if said)

    def check_watchable(self) -> None:
        """Raise ValueError if the step runs in several threads: hooks and dispatch modes see one thread only."""
        if self.lean is not None and self.lean.threads > 1:
            raise ValueError(
                f"lean.threads is {self.lean.threads}, but what autograd saves and the operations it runs are watched "
                "by hooks that hold for one thread only; use Lean(threads=1) here."
            )


def as_setup(method: Method | Setup, options: dict[str, Any]) -> Setup:
    """Return a setup from a method and options, or from another setup and the options that differ."""
    return replace(method, **options) if isinstance(method, Setup) else Setup(method, **options)


def setting_of(setup: Setup, model: nn.Module, batch: Batch) -> str:
    """Return the model's class, the setup and the batch as text, such as "Llama, lora r=8, batch 4 x 128"."""
    return f"{type(model).__name__}, {setup.describe()}, batch {shape_of(batch)}"
