"""Verdicts from the record of forgetting on small bases, by the rules of :mod:`lora_lab.studies.front`.

What is forgotten is the rise of the loss on text that the base has read. At equal learning it is the least over the
rates and steps of a setup where the loss on the new text has fallen by so much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, cast

import numpy as np
import pandas

from lora_lab.ablation.overfitting import interpolate_at
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.stats import rank_correlations
from lora_lab.studies.claims.compared import SHARES, bound_together
from lora_lab.studies.claims.deciding import Cases, above, below, decides
from lora_lab.studies.claims.measured import MARGIN
from lora_lab.studies.claims.small import SEEDS, both
from lora_lab.studies.records import Record

NEW, OLD = "validation_loss", "off_domain_loss"
LORA = ("r=8", "r=64")
OfSetup = Mapping[int, list[pandas.DataFrame]]  # seed -> a curve for each rate
Curves = dict[str, dict[int, list[pandas.DataFrame]]]  # setup -> the same
AT = ", ".join(f"{100 * share:g}" for share in SHARES)


def read_table(record: Record) -> pandas.DataFrame:
    """Return the finished runs' rows with ``base`` and ``replay``; ``learned`` and ``forgotten`` count from step 0."""
    rows = record.frame().query("outcome == 'done'").sort_values("step", kind="stable")
    parts = rows["data"].str.partition(", ")
    first = rows.groupby(["data", "setup", "seed", "lr"])[[NEW, OLD]].transform("first")
    learned, forgotten = first[NEW] - rows[NEW], rows[OLD] - first[OLD]
    return rows.assign(base=parts[0], replay=parts[2], learned=learned, forgotten=forgotten)


def read_curves(record: Record, replay: str = "no replay") -> Iterator[tuple[str, Curves]]:
    """Yield each base with its curves."""
    rows = read_table(record)
    for base, of_base in rows[rows["replay"] == replay].groupby("base", sort=False):
        curves: Curves = {}
        for (setup, seed, _), curve in of_base.groupby(["setup", "seed", "lr"]):
            curves.setdefault(str(setup), {}).setdefault(cast(int, seed), []).append(curve)
        yield str(base), curves


def most_learned(curves: list[pandas.DataFrame]) -> float:
    """Return what is learned at the best step of the best rate."""
    return max(float(curve["learned"].max()) for curve in curves)


def least_forgotten(curves: list[pandas.DataFrame], amount: float) -> tuple[float, float]:
    """Return the least that is forgotten where so much is learned, over the rates that get there, and its rate."""
    able = [curve for curve in curves if curve["learned"].max() >= amount]
    lost = [interpolate_at(curve["learned"].tolist(), curve["forgotten"].tolist(), amount) for curve in able]
    return min(zip(lost, (float(curve["lr"].iloc[0]) for curve in able), strict=True))


def forgotten_at(curves: list[pandas.DataFrame], amount: float) -> float:
    """Return the least that is forgotten where so much is learned, over the rates that get there."""
    return least_forgotten(curves, amount)[0]


def differences(first: OfSetup, second: OfSetup, share: float) -> np.ndarray:
    """Return by how much more the first has forgotten where both have learned a share of what the lesser one can."""
    values = []
    for seed in sorted(first.keys() & second.keys()):
        amount = share * min(most_learned(first[seed]), most_learned(second[seed]))
        values.append(forgotten_at(first[seed], amount) - forgotten_at(second[seed], amount))
    return np.array(values)


def at_edge(first: OfSetup, second: OfSetup) -> bool:
    """Return whether most seeds of either forgot least at the lowest rate, so that a lower one may forget less."""
    edges: list[list[bool]] = [[], []]
    for seed in sorted(first.keys() & second.keys()):
        of_both = first[seed], second[seed]
        amount = SHARES[-1] * min(map(most_learned, of_both))
        for edge, curves in zip(edges, of_both, strict=True):
            lowest = min(float(curve["lr"].iloc[0]) for curve in curves)
            edge.append(least_forgotten(curves, amount)[1] == lowest)
    return any(np.mean(edge) > 0.5 for edge in edges)


def compare_fronts(first: OfSetup, second: OfSetup, cases: int, seeds: int = SEEDS) -> tuple[bool | None, str]:
    """Return whether the first forgets less at all shares (False: more at all), with bounds for so many cases.

    By less than the margin is not less: curves are read on straight lines between evaluations, which is not exact.

    Raises:
        ValueError: fewer seeds have both.
    """
    if len(first.keys() & second.keys()) < seeds:
        raise ValueError(f"fewer than {seeds} seeds have a result for both")
    answers, words = set(), []
    for share in SHARES:
        values = differences(first, second, share)
        lower, upper = bound_together(values, cases * len(SHARES))
        answers.add(True if upper < -MARGIN else False if lower > MARGIN else None)
        words.append(f"{values.mean():+.3f} ({lower:+.3f} to {upper:+.3f})")
    return answers.pop() if len(answers) == 1 else None, " ".join(words)


@decides("small-lora-forgets-less", record="tiny_front", on=("the base", "the rank", "what it is compared with"))
def forgets_less(record: Record) -> Cases:
    """LoRA's forgetting less that of full fine-tuning, and of that of the blocks, at equal learning."""
    half = SEEDS // 2
    for base, curves in read_curves(record):
        every = [each for _, each in sorted(curves["full"].items())]
        one, other = (dict(enumerate(part)) for part in (every[:half], every[half:SEEDS]))
        differs = compare_fronts(one, other, 2 * len(LORA), half)[0] is not None
        for setup, reference in product(LORA, ("full", "blocks")):
            answer, words = compare_fronts(curves[setup], curves[reference], 2 * len(LORA))
            words = f"{base}, {setup} less {reference}, at {AT} %: {words}"
            edge = at_edge(curves[setup], curves[reference])
            words += ", but the control differs: full fine-tuning with other seeds" * differs
            words += ", at the lowest of the rates" * edge
            yield None if differs or edge else answer, words, base, setup, reference


@decides("replay-cuts-forgetting-by-80", record="tiny_front", on="the base")
def replay_of_samples(record: Record) -> Cases:
    """Whether LoRA of rank 8 forgets less with replay of what the base wrote than without, and than with real text."""
    kinds = ("replay of what it wrote", "no replay", "replay of what it read")
    for (base, own), (_, none), (_, real) in zip(*(read_curves(record, kind) for kind in kinds), strict=True):
        (less, words), (better, beside) = (compare_fronts(own["r=8"], each["r=8"], 2) for each in (none, real))
        amount = SHARES[-1] * min(most_learned(each) for every in (own, none) for each in every["r=8"].values())
        means = [np.mean([forgotten_at(each, amount) for each in every["r=8"].values()]) for every in (own, none)]
        cut = f"by {100 * (1 - means[0] / means[1]):.0f} % at {100 * SHARES[-1]:g} %"
        yield both(less, better), f"{base}, {cut}; less none: {words}; less real text: {beside}"


@decides("final-checkpoint-overshoots", record="tiny_front", on=("the base", "the rank"))
def overshoots(record: Record) -> Cases:
    """Losses of an adapter at less than its strength less those at its strength, at the best rate."""
    for base, curves in read_curves(record):
        for setup in LORA:
            last = pandas.concat([curve.tail(1) for every in curves[setup].values() for curve in every])
            best = last.groupby("lr")[NEW].mean().idxmin()
            last = last[last["lr"] == best]
            answers, words = [], []
            factors = [0.25, 0.5, 0.75]
            for factor in factors:
                new, old = (
                    last[f"{SCORE}{part}, {factor:g}"] - last[loss] for part, loss in (("new", NEW), ("old", OLD))
                )
                bounds = [bound_together(each.to_numpy(float), 2 * len(factors)) for each in (new, old)]
                answers.append(both(*(below(*each, 0) for each in bounds)))
                words.append(f"{factor:g}: {new.mean():+.3f} and {old.mean():+.3f}")
            answer = True if True in answers else None if None in answers else False
            yield answer, f"{base}, {setup}, new and old at {', '.join(words)}", base, setup


@decides("kl-predicts-forgetting", record="tiny_front", on="the base")
def kl_predicts(record: Record) -> Cases:
    """Spearman's correlation with what is forgotten at the last step: of KL on the new text, and of other things."""
    for base, curves in read_curves(record):
        last = pandas.concat([curve.tail(1) for every in curves.values() for seed in every.values() for curve in seed])
        last = last.rename(columns={f"{SCORE}divergence": "KL", f"{SCORE}size": "size"})
        table = rank_correlations(last, "forgotten", ["KL", "size", "lr"])
        found: list[tuple[str, Any]] = [(str(row.predictor), row) for row in table.itertuples()]
        words = ", ".join(
            f"{name} {row.correlation:+.2f} ({row.lower:+.2f} to {row.upper:+.2f})" for name, row in found
        )
        ahead = [above(row.difference_lower, row.difference_upper) for name, row in found if name != "KL"]
        yield both(above(found[0][1].lower, found[0][1].upper), *ahead), f"{base}: {words}"


@decides("forgetting-linear-in-loss", record="tiny_front", on=("the base", "the setup"))
def forgets_from_the_start(record: Record) -> Cases:
    """What is forgotten where half of what a setup can learn is learned, and whether more is at 95 %."""
    for base, curves in read_curves(record):
        for setup, every in curves.items():
            half, most = (
                np.array([forgotten_at(each, share * most_learned(each)) for each in every.values()])
                for share in (SHARES[0], SHARES[-1])
            )
            cases = 2 * len(curves)
            answer = both(above(*bound_together(half, cases)), above(*bound_together(most - half, cases)))
            yield answer, f"{base}, {setup}: {half.mean():+.3f} at half, {most.mean():+.3f} at 95 %", base, setup
