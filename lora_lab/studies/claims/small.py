"""Verdicts from the records of small bases, and of SmolLM2 by pages, by the rules of :mod:`lora_lab.studies.paged`.

Each base is a case, and SmolLM2 is one where its record is there. Losses are those of pages, so the bounds resample
pages and seeds; on each base they hold for all that is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_lab.ablation.stats import best_rate, losses_by_rate, t_bounds
from lora_lab.studies.claims.compared import MIN_SEEDS, Gap, block_losses, gaps, list_gaps
from lora_lab.studies.claims.deciding import Answer, Cases, Claim, above, below, decides, within
from lora_lab.studies.claims.measured import MARGIN, select
from lora_lab.studies.records import Record

SEEDS = 8  # that judge, at least
ON = "the base"
OF_STEPS = ("the base", "the text", "the number of steps")
OF_RANK = ("the base", "the text", "the rank")


def gaps_on(reference: str, *records: Record) -> Iterator[tuple[str, dict[tuple[int, int], Gap]]]:
    """Yield each base and corpus with LoRA's gaps to a reference there, by (rank, steps).

    Args:
        reference: the setup's name up to its number of steps, such as "blocks".

    Raises:
        ValueError: a case has fewer than eight seeds with a result for both.
    """
    for record in records:
        for data in dict.fromkeys(row["data"] for row in record.rows):
            rows = [row for row in record.rows if row["data"] == data]
            yield data, gaps(replace(record, rows=rows), reference, SEEDS)


def list_on(reference: str, *records: Record) -> Cases:
    """Yield whether LoRA of some rank is as good as the reference, the case in words, base, text and steps."""
    for data, every in gaps_on(reference, *records):
        of_steps: dict[int, list[tuple[bool | None, str]]] = {}
        for as_good, words, _, steps in list_gaps(every):
            of_steps.setdefault(steps, []).append((as_good, words))
        for steps, listed in of_steps.items():
            answers = {as_good for as_good, _ in listed}
            words = f"{data}: {', '.join(words for _, words in listed)}"
            yield True if True in answers else None if None in answers else False, words, *data.split(", "), steps


@decides("small-lora-equals-full", record="tiny_rank", beside="tiny_readmes", on=OF_STEPS)
def as_good_as_full(*records: Record) -> Cases:
    """The best rank after each number of steps, on each base and corpus, where "as good" allows for the margin."""
    return list_on("full", *records)


@decides("small-lora-equals-full-blocks", record="tiny_rank", beside="tiny_readmes", on=OF_STEPS)
def as_good_as_full_of_blocks(*records: Record) -> Cases:
    """The same beside full fine-tuning of the blocks that LoRA adapts, without the embedding."""
    return list_on("blocks", *records)


@decides("small-low-ranks-fall-behind", record="tiny_rank", beside="tiny_readmes", on=OF_RANK)
def falls_behind(*records: Record) -> Cases:
    """By how much a lower rank's gap to the blocks grows from the fewest steps to the most, all on fresh text."""
    for data, every in gaps_on("blocks", *records):
        highest = max(rank for rank, _ in every)
        low, high = min(steps for _, steps in every), max(steps for _, steps in every)
        for rank in sorted({rank for rank, _ in every if rank < highest}):
            first, last = every[rank, low], every[rank, high]
            at_edge = first.at_edge or last.at_edge
            growth = Gap(last.values - first.values, last.beside - first.beside, at_edge, cases=2 * len(every))
            lower, upper = growth.bounds
            numbers = f"{growth.values.mean():+.3f} ({lower:+.3f} to {upper:+.3f})"
            words = f"{data}: rank {rank}, {low} to {high} steps: {numbers}"
            yield None if growth.at_edge else above(lower, upper), words, *data.split(", "), rank


# Two setups, each at its own rate

# All that is compared on a base, by the record's kind without its first word: each setup less the other.
PAIRS = {
    "layers": (("q, v", "all"), ("MLP", "all"), ("MLP", "attention"), ("MLP", "q, v")),
    "variants": (
        *((name, "LoRA") for name in ("rsLoRA", "LoRA+", "LoRA-FA", "DoRA", "PiSSA", "DoRA r=8", "LoRA r=64")),
        ("rsLoRA r=64", "rsLoRA"),
    ),
    "quantised": (("NF4", "float32"), ("merged into float32", "merged")),
    "upgrade": tuple((f"{corpus}, copied", corpus) for corpus in ("known", "readmes")),
}


def compare(first: str, second: str, *records: Record, among: str = "") -> Iterator[tuple[str, Gap]]:
    """Yield each base, and the gap of one setup to another there.

    Args:
        among: the end of the rows' data, where two have setups of one name.

    Raises:
        ValueError: a base has fewer than eight seeds with a result for both.
    """
    for record in records:
        judged = select(record, stage="judging", outcome="done").sort_values("seed")
        judged = judged[judged["data"].str.endswith(among)]
        judged = judged.assign(setup=judged["setup"].str.replace(r", \d+ steps$", "", regex=True))
        pairs = PAIRS[record.what.partition("_")[2]]
        for base, rows in judged.groupby(judged["data"].str.partition(",")[0], sort=False):
            one, other = (rows[rows["setup"] == setup] for setup in (first, second))
            if one["seed"].tolist() != other["seed"].tolist() or len(one) < SEEDS:
                raise ValueError(f"{base}: fewer than {SEEDS} seeds have a result for {first!r} and for {second!r}")
            test = block_losses(one, "test") - block_losses(other, "test")
            at_edge = bool(one["edge"].fillna("").any() or other["edge"].fillna("").any())
            yield str(base), Gap(test, np.array([]), at_edge, MARGIN, len(pairs))


def describe(base: str, gap: Gap) -> str:
    """Return a gap in words."""
    edge = ", a rate at the edge of its grid" * gap.at_edge
    return f"{base} {gap.values.mean():+.3f} ({{:+.3f}} to {{:+.3f}}){edge}".format(*gap.bounds)


def is_lower(gap: Gap) -> bool | None:
    """Return whether the first setup's loss is lower; one that is higher, or as good within the margin, is not."""
    lower, upper = gap.bounds
    return None if gap.at_edge else True if upper < 0 else False if lower > -MARGIN else None


def both(*answers: bool | None) -> bool | None:
    """Return whether all hold; False if one fails."""
    return False if False in answers else None if None in answers else True


@decides("all-linear-gains-little", record="tiny_layers", beside="smol_layers", on=ON)
def queries_and_values(*records: Record) -> Cases:
    """The loss with adapters on queries and values less that with adapters on all layers, margin 0.01 nats."""
    for base, gap in compare("q, v", "all", *records):
        yield gap.as_good, describe(base, gap)


@decides("mlp-beats-attention", record="tiny_layers", beside="smol_layers", on=ON)
def mlp(*records: Record) -> Cases:
    """The loss with adapters on the MLP less that with all (as good within the margin) and with attention (lower)."""
    pairs = zip(compare("MLP", "all", *records), compare("MLP", "attention", *records), strict=True)
    for (base, to_all), (_, to_attention) in pairs:
        words = f"{describe(base, to_all)} beside all, {describe('', to_attention).strip()} beside attention"
        yield both(to_all.as_good, is_lower(to_attention)), words


@decides("mlp-10-beats-qv-32", record="tiny_layers", beside="smol_layers", on=ON)
def mlp_and_queries(*records: Record) -> Cases:
    """The loss with adapters on the MLP less that with adapters on queries and values; forgetting is not measured."""
    for base, gap in compare("MLP", "q, v", *records):
        yield False if is_lower(gap) is False else None, describe(base, gap)


@decides("tuned-variants-are-alike", record="tiny_variants", beside="smol_variants", on=("the base", "the variant"))
def alike(*records: Record) -> Cases:
    """Losses of PiSSA and DoRA less LoRA's, which are alike within the margin."""
    for variant in ("PiSSA", "DoRA"):
        for base, gap in compare(variant, "LoRA", *records):
            alike = None if gap.at_edge else within(*gap.bounds, -MARGIN, MARGIN)
            yield alike, describe(f"{base}, {variant}", gap), base, variant


@decides("pissa-beats-lora", record="tiny_variants", beside="smol_variants", on=ON)
def pissa(*records: Record) -> Cases:
    """PiSSA's loss less LoRA's."""
    for base, gap in compare("PiSSA", "LoRA", *records):
        yield is_lower(gap), describe(base, gap)


@decides("dora-at-half-rank", record="tiny_variants", beside="smol_variants", on=ON)
def dora(*records: Record) -> Cases:
    """DoRA's loss at rank 8 less LoRA's at rank 16."""
    for base, gap in compare("DoRA r=8", "LoRA", *records):
        yield is_lower(gap), describe(base, gap)


@decides("lora-plus-2-times-faster", record="tiny_variants", beside="smol_variants", on=ON)
def lora_plus(*records: Record) -> Cases:
    """LoRA+'s loss less LoRA's after as many steps; how much sooner it gets there is not measured."""
    for base, gap in compare("LoRA+", "LoRA", *records):
        yield False if is_lower(gap) is False else None, describe(base, gap)


@decides("lora-fa-as-good-as-lora", record="tiny_variants", beside="smol_variants", on=ON)
def lora_fa(*records: Record) -> Cases:
    """LoRA-FA's loss less LoRA's."""
    for base, gap in compare("LoRA-FA", "LoRA", *records):
        yield gap.as_good, describe(base, gap)


@decides("rslora-makes-high-ranks-pay", record="tiny_variants", beside="smol_variants", on=ON)
def high_ranks(*records: Record) -> Cases:
    """Losses at rank 64 less those at rank 16: not lower under alpha / r, and lower under alpha / sqrt(r)."""
    pairs = zip(compare("LoRA r=64", "LoRA", *records), compare("rsLoRA r=64", "rsLoRA", *records), strict=True)
    for (base, lora), (_, rslora) in pairs:
        stops = is_lower(lora)
        words = f"{describe(base, lora)} under alpha / r, {describe('', rslora).strip()} under alpha / sqrt(r)"
        yield both(None if stops is None else not stops, is_lower(rslora)), words


@decides("pissa-rate-ten-times-lower", record="tiny_variants", beside="smol_variants")
def rate_of_pissa(claim: Claim, *records: Record) -> Answer:
    """LoRA's best rate in units of PiSSA's, one value a base, with Student's t over the bases."""
    pairs = {}
    for (base, setup), rate in best_rates(*records).items():
        pairs.setdefault(base, {})[setup.partition(",")[0]] = rate
    answer, words = compare_rates([(rates["LoRA"], rates["PiSSA"]) for rates in pairs.values()])
    if answer is None:
        return None, words
    return within(*answer, claim.stated / 2, 2 * claim.stated), f"{words} over {len(pairs)} bases"


def best_rates(*records: Record) -> dict[tuple[str, str], float | None]:
    """Return (base, setup) -> the best rate by the seeds that chose; None where it is at an edge of its grid."""
    rates = {}
    for record in records:
        chosen = select(record, stage="choosing", outcome="done")
        for (data, setup), rows in chosen.groupby(["data", "setup"], sort=False):
            rates[str(data).partition(",")[0], str(setup)] = best_rate(losses_by_rate(rows)).vertex
    return rates


def compare_rates(pairs: Sequence[tuple[float | None, float | None]]) -> tuple[tuple[float, float] | None, str]:
    """Return the bounds of the mean ratio of pairs of rates, one a base, by Student's t; and the ratio in words."""
    ratios = [math.log(first / second) for first, second in pairs if first and second]
    if len(ratios) < len(pairs):
        return None, "a best rate is at the edge of its grid"
    if len(ratios) < MIN_SEEDS:
        return None, f"{' and '.join(f'{math.exp(each):.2f}' for each in ratios)} times on {len(ratios)} bases, too few"
    mean, lower, upper = map(math.exp, t_bounds(ratios))
    return (lower, upper), f"{mean:.2f} times ({lower:.2f} to {upper:.2f})"


@decides("longer-training-lower-rate", record="tiny_rank", beside="tiny_readmes", on=("the text", "the method"))
def rates_by_steps(*records: Record) -> Cases:
    """The best rate after the most steps in units of that after the fewest, with Student's t over the bases."""
    for record in records:
        text = str(record.rows[0]["data"]).partition(", ")[2]
        by_method: dict[str, dict[str, dict[int, float | None]]] = {}
        for (base, setup), rate in best_rates(record).items():
            method, steps = setup.removesuffix(" steps").split(", ")
            by_method.setdefault(method, {}).setdefault(base, {})[int(steps)] = rate
        for method, of_base in by_method.items():
            counts = {steps for rates in of_base.values() for steps in rates}
            few, more = min(counts), max(counts)
            bounds, words = compare_rates([(rates[more], rates[few]) for rates in of_base.values()])
            answer = below(*bounds, 1) if bounds else None
            yield answer, f"{text}, {method}, {few} to {more} steps: {words}", text, method


# Batches, repetition, and other versions of a base


@decides("large-batches-hurt-lora", record="tiny_batch", beside="tiny_rank", on=("the base", "the rank"))
def batches(record: Record, *others: Record) -> Cases:
    """By how much LoRA's gap to full fine-tuning of the blocks grows from batches of 8 windows to those of 64."""
    small = {data: gaps for each in others for data, gaps in gaps_on("blocks", each)}
    for data, large in gaps_on("blocks", record):
        for (rank, steps), gap in large.items() if data in small else ():
            other = small[data][rank, 8 * steps]
            at_edge = gap.at_edge or other.at_edge
            growth = Gap(gap.values - other.values, np.array([]), at_edge, MARGIN, len(large))
            yield None if at_edge else above(*growth.bounds), describe(f"{data}, rank {rank}", growth), data, rank


@decides("repetition-lowers-the-rate", record="tiny_repeats", beside="tiny_rank", on="the method and the steps")
def repetition(record: Record, *fresh: Record) -> Cases:
    """The best rate on repeated text in units of that on fresh text, one value a base, with Student's t over these."""
    rates, others = best_rates(record), best_rates(*fresh)
    for setup in dict.fromkeys(setup for key, setup in rates if (key, setup) in others):
        bounds, words = compare_rates([(rates[key], others[key]) for key in rates if key[1] == setup])
        yield below(*bounds, 1) if bounds else None, f"{setup}: {words}"


PASSES = ("the base", "the method")


def compare_passes(first: Sequence[Record], steps: int, second: Sequence[Record], other_steps: int) -> Iterator[tuple]:
    """Yield base, method, and the gap of runs of so many steps to runs of others; nine gaps of a base are judged."""
    runs, others = (
        {
            (str(data).partition(",")[0], str(setup).partition(",")[0]): rows.sort_values("seed")
            for record in records
            for (data, setup), rows in select(record, stage="judging", outcome="done").groupby(["data", "setup"])
            if str(setup).endswith(f", {count} steps")
        }
        for records, count in ((first, steps), (second, other_steps))
    )
    for base, method in [case for case in runs if case in others]:
        one, other = runs[base, method], others[base, method]
        test = block_losses(one, "test") - block_losses(other, "test")
        at_edge = bool(one["edge"].fillna("").any() or other["edge"].fillna("").any())
        yield base, method, Gap(test, np.array([]), at_edge, MARGIN, 9)


@decides("four-passes-beat-one", record="tiny_repeats", beside="tiny_rank", on=PASSES)
def four_passes(record: Record, *fresh: Record) -> Cases:
    """The test loss after four passes over 480 windows less that after one pass over as much text."""
    for base, method, gap in compare_passes([record], 240, fresh, 60):
        yield is_lower(gap), describe(f"{base}, {method}", gap), base, method


@decides("twelve-passes-beat-four", record="tiny_repeats", on=PASSES)
def twelve_passes(record: Record) -> Cases:
    """The test loss after twelve passes over 480 windows less that after four."""
    for base, method, gap in compare_passes([record], 720, [record], 240):
        yield is_lower(gap), describe(f"{base}, {method}", gap), base, method


@decides("four-passes-like-fresh-text", record="tiny_repeats", beside="tiny_rank", on=PASSES)
def four_passes_like_fresh(record: Record, *fresh: Record) -> Cases:
    """The test loss after four passes over 480 windows less that after one over four times as much text."""
    for base, method, gap in compare_passes([record], 240, fresh, 240):
        yield gap.as_good, describe(f"{base}, {method}", gap), base, method


# Other versions of a base


@decides("qlora-matches-16-bits", record="tiny_quantised", beside="smol_quantised", on=ON)
def qlora_matches(*records: Record) -> Cases:
    """LoRA's test loss over a base in NF4 less that over float32, each at its own rate."""
    for base, gap in compare("NF4", "float32", *records):
        yield gap.as_good, describe(base, gap)


@decides("merge-into-dequantised-base", record="tiny_quantised", beside="smol_quantised", on=ON)
def merge_into_dequantised(*records: Record) -> Cases:
    """The test loss of QLoRA adapters merged into the float32 weights, less that in the dequantised ones."""
    for base, gap in compare("merged into float32", "merged", *records, among="NF4, merged"):
        yield None if gap.as_good is None else not gap.as_good, describe(base, gap)


@decides("adapters-die-with-their-base", record="tiny_upgrade", on=("the base", "what the later base has read"))
def copied(record: Record) -> Cases:
    """The loss of a later base with the adapter of the earlier, less the middle of its losses without and with its own.

    Above zero, less than half of the gain is kept.
    """
    for corpus in ("known", "readmes"):
        alone = dict(compare(f"{corpus}, alone", corpus, record))
        for base, gap in compare(f"{corpus}, copied", corpus, record):
            gain = alone[base]
            half = replace(gap, values=gap.values - gain.values / 2)
            kept = 1 - gap.values.mean() / gain.values.mean()
            words = f"{base}, then {corpus}: {100 * kept:.0f} % of {gain.values.mean():.3f} nats are kept"
            yield None if half.at_edge else above(*half.bounds), words, base, corpus
