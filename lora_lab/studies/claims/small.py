"""Verdicts from the records of small bases, by the rules of :mod:`lora_lab.studies.tiny`: each base is a case.

Losses are those of pages, so the bounds resample pages and seeds; on each base they hold for all that is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lora_lab.studies.claims.compared import Gap, gaps, list_gaps
from lora_lab.studies.claims.deciding import Cases, above, decides
from lora_lab.studies.records import Record

SEEDS = 8  # that judge, at least


def gaps_on(record: Record, reference: str) -> Iterator[tuple[str, dict[tuple[int, int], Gap]]]:
    """Yield each base with LoRA's gaps to a reference there, by (rank, steps).

    Args:
        record: of a study of small bases.
        reference: the setup's name up to its number of steps, such as "blocks".

    Raises:
        ValueError: a case has fewer than eight seeds with a result for both.
    """
    for data in dict.fromkeys(row["data"] for row in record.rows):
        rows = [row for row in record.rows if row["data"] == data]
        yield data, gaps(replace(record, rows=rows), reference, SEEDS)


def list_on(record: Record, reference: str) -> Cases:
    """Yield whether LoRA is as good as the reference in each case, the case in words, base, rank and steps."""
    for data, every in gaps_on(record, reference):
        for as_good, words, rank, steps in list_gaps(every):
            yield as_good, f"{data}: {words}", data, rank, steps


@decides("small-lora-equals-full", record="tiny_rank", on=("the base", "the rank", "the number of steps"))
def as_good_as_full(record: Record) -> Cases:
    """Each rank after each number of steps, on each base, where "as good" allows for the margin."""
    return list_on(record, "full")


@decides("small-lora-equals-full-blocks", record="tiny_rank", on=("the base", "the rank", "the number of steps"))
def as_good_as_full_of_blocks(record: Record) -> Cases:
    """The same beside full fine-tuning of the blocks that LoRA adapts, without the embedding."""
    return list_on(record, "blocks")


@decides("small-low-ranks-fall-behind", record="tiny_rank", on=("the base", "the rank"))
def falls_behind(record: Record) -> Cases:
    """By how much a lower rank's gap to the blocks grows from the fewest steps to the most, all on fresh text."""
    for data, every in gaps_on(record, "blocks"):
        highest = max(rank for rank, _ in every)
        low, high = min(steps for _, steps in every), max(steps for _, steps in every)
        for rank in sorted({rank for rank, _ in every if rank < highest}):
            first, last = every[rank, low], every[rank, high]
            at_edge = first.at_edge or last.at_edge
            growth = Gap(last.values - first.values, last.beside - first.beside, at_edge, cases=2 * len(every))
            lower, upper = growth.bounds
            numbers = f"{growth.values.mean():+.3f} ({lower:+.3f} to {upper:+.3f})"
            words = f"{data}: rank {rank}, {low} to {high} steps: {numbers}"
            yield None if growth.at_edge else above(lower, upper), words, data, rank
