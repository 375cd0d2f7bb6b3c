"""Several adapters as one: their updates, weighted and added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_lab.adapters.edit import Factors, join_state, truncate_product
from lora_lab.adapters.peft_format import read
from lora_lab.lora import LoRALayer
from lora_lab.system.schema import Number, Size, check
from lora_lab.system.wording import short_repr

RULES = ("cat", "linear", "svd")


class Combined(dict[str, Tensor]):
    """An adapter as :func:`lora_lab.adapter_state` returns it, with the error that combining has made.

    Attributes:
        errors: the relative error ||sum of the updates - B A|| / ||sum of the updates|| (Frobenius) of each layer.
    """

    errors: dict[str, float]


@torch.no_grad()
def combine(
    adapters: Sequence[str | Path | dict[str, Tensor]],
    weights: Sequence[float] | None = None,
    how: str = "cat",
    rank: int | None = None,
) -> Combined:
    """Return one adapter whose update is the weighted sum of those of several adapters of the same base.

        W0 + sum_i w_i s_i B_i A_i

    A layer that only some of them adapt gets the sum of theirs. The rules are those of PEFT's
    ``add_weighted_adapter`` with the same names:

    * "cat" puts the factors side by side. The update is the sum to rounding, and its rank is the sum of the ranks.
    * "svd" is the nearest update of the given rank.
    * "linear" adds the factors, each multiplied by the square root of w_i s_i. It keeps the rank, but B A then also
      has the products of one adapter's B with another's A: in general it is *not* the sum of the updates. Combining
      an adapter with itself, each at weight 0.5, for example, gives twice its update.

    Args:
        adapters: folders, or what :func:`read_adapter` or :func:`lora_lab.adapter_state` returned; of any kind but
            DoRA.
        weights: one finite number for each adapter; None counts each once. Below 0 subtracts an adapter.
        how: "cat", "linear" or "svd".
        rank: for "svd" alone: of the result, or as much of it as a layer's shape allows.

    Returns:
        The adapter with scaling 1, for :func:`load_adapter` or :func:`lora_lab.adapters.switch`, and the error of each
        layer as ``errors``.

    Raises:
        ValueError: there are no adapters; the weights, the rule or the rank do not fit; an adapter is of DoRA, whose
            updates do not add up; a number of one is NaN or infinite; or the shapes in a layer differ.
    """
    weights = [1.0 for _ in adapters] if weights is None else [check(weight, Number, "weight") for weight in weights]
    if len(adapters) == 0 or len(weights) != len(adapters):
        raise ValueError(f"There are {len(adapters)} adapters and {len(weights)} weights; give each adapter one.")
    if how not in RULES:
        raise ValueError(f"how is {short_repr(how)}, but it must be one of {list(RULES)}.")
    if (rank is not None) != (how == "svd"):
        raise ValueError(f"how is {how!r} and rank is {rank}; a rank is for 'svd', which needs one.")
    if rank is not None:
        rank = check(rank, Size, "rank")
    layers: dict[str, list[tuple[float, Tensor, Tensor]]] = {}  # weight * scaling, A (r, in) and B (out, r) of each
    for weight, adapter in zip(weights, adapters, strict=True):
        for name, (tensors, _, scaling) in read(adapter).factors.items():
            if tensors.keys() != {*LoRALayer.parts}:
                raise ValueError(
                    f"An adapter holds {sorted(tensors)} of {name!r}, so its update is more than scaling * B A and "
                    "does not add up with others; merge it, extract a plain adapter, and combine that."
                )
            A, B = (tensors[part] for part in LoRALayer.parts)
            exact = torch.promote_types(A.dtype, torch.float32)
            layers.setdefault(name, []).append((weight * scaling, A.to(exact), B.to(exact)))
    factors, errors = {}, {}
    for name, terms in layers.items():
        if len({(A.shape[1:], len(B), B.shape[2:]) for _, A, B in terms}) > 1:
            raise ValueError(f"The adapters of {name!r} are of layers of different shapes; combine those of one base.")
        ranks = [len(A) for _, A, _ in terms]
        if how == "linear" and len(set(ranks)) > 1:
            raise ValueError(f"The adapters of {name!r} have ranks {ranks}, but 'linear' needs equal ones; use 'cat'.")
        A, B, errors[name] = _add(terms, how, rank)
        factors[name] = Factors({"lora_A": A, "lora_B": B}, float(len(A)), 1.0)
    result = Combined(join_state(factors))
    result.errors = errors
    return result


def _add(terms: Sequence[tuple[float, Tensor, Tensor]], how: str, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Return the factors A and B of a layer's weighted sum of updates, and their relative error."""
    A = torch.cat([scale * A for scale, A, _ in terms])  # (r1 + r2, in)
    B = torch.cat([B for *_, B in terms], dim=1)  # (out, r1 + r2)
    if how == "cat":
        return A, B, 0.0
    if rank is not None:
        return truncate_product(A, B, rank)
    total = B.flatten(1) @ A.flatten(1)  # (out, in)
    A = torch.stack([math.copysign(math.sqrt(abs(scale)), scale) * A for scale, A, _ in terms]).sum(0)  # (r, in)
    B = torch.stack([math.sqrt(abs(scale)) * B for scale, _, B in terms]).sum(0)  # (out, r)
    size = float(total.norm())
    return A, B, float((total - B.flatten(1) @ A.flatten(1)).norm()) / size if size else 0.0
