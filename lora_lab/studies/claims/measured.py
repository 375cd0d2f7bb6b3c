"""Verdicts from records, and from what others published: bytes, times, tasks, courses, four bits and spectra.

All that records decide obeys one set of rules, and docs/claims.md lists what is exempt. A learning rate at the edge of
its grid supports no verdict; fewer than three seeds support none, nor does a timing that its record calls inconclusive;
a difference counts if its one-sided 95 % bounds over the seeds exclude zero or the margin; overfitting is judged at
every stopping point, with equal training loss beside it. What breaks a rule is open.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pandas

from lora_lab.ablation.stats import CONFIDENCE, t_bounds
from lora_lab.costs.bill import MIB
from lora_lab.models import shapes
from lora_lab.studies.claims import deciding
from lora_lab.studies.claims.computed import rank_of_equal_memory
from lora_lab.studies.claims.deciding import Answer, Cases, Claim, Result, decide_cases, decides, near, within
from lora_lab.studies.records import Published, Record
from lora_lab.system.wording import count_noun

MARGIN = 0.01  # nats that do not matter
TIME_MARGIN = 0.05  # of full fine-tuning's time, that does not matter
MIN_SEEDS = 3
PARTS = ("validation", "off_domain")  # of the losses that a record has
Pairs = Sequence[tuple[str, str]]  # setups, and what each is compared with


def select(record: Record, **values: str) -> pandas.DataFrame:
    """Return the rows of a record that have these values."""
    frame = record.frame()
    return frame[np.all([frame[name] == value for name, value in values.items()], axis=0)]


# Memory


def _bytes(record: Record, column: str = "measured_bytes") -> dict[tuple[str, int, int], dict[str, int]]:
    """Return (model, batch, length) -> setup -> bytes; the peak is the measured one, or on a GPU the allocator's."""
    cells = {}
    for row in record.rows:
        if row.get(column):
            cells.setdefault((row["model"], row["batch"], row["length"]), {})[row["setup"]] = row[column]
    return cells


def _memory_ratios(record: Record, pairs: Pairs, column: str = "measured_bytes") -> Iterator[tuple[float, str]]:
    """Yield (ratio first / second, words) for each cell of the record that has both setups of a pair."""
    for (model, batch, length), setups in _bytes(record, column).items():
        for first, second in pairs:
            if {first, second} <= setups.keys():
                ratio = setups[first] / setups[second]
                options = "".join(first.partition(", ")[1:])
                yield ratio, f"{ratio:.2f} ({model}, {batch} x {length}{options})"


# All in float32: over a base in bfloat16 adapters stay in float32, which full fine-tuning in bfloat16 does not match.
ALSO = ("", ", checkpointing")
FULL_AND_LORA = [(f"full{also}", f"LoRA r=8{also}") for also in ALSO]


_GRADIENTS = ("the model", "the tokens in a step", "the precision", "checkpointing")


@decides("fewer-gradients-lower-the-peak", record="memory", on=_GRADIENTS)
def gradients_at_the_peak(record: Record) -> Cases:
    """Whether the peak of full fine-tuning holds gradients of its parameters, in each setup with AdamW."""
    for row in record.rows:
        name, *options = row["setup"].split(", ")
        if name == "full" and "SGD" not in options:
            held, size = row.get("gradients", 0), f"{row['batch']} x {row['length']} tokens"
            words = f"{row['model']}, {size}, {row['setup']}: {held / MIB:,.0f} MiB"
            yield held > 0, words, row["model"], size, "bf16" in options, "checkpointing" in options


@decides("lora-needs-less-memory", record="memory", on="the rank and the tokens in a step")
def less_memory(record: Record) -> Result:
    """Measured peaks of full fine-tuning in units of LoRA's of several ranks, all in float32; a count stands beside."""
    cases = []
    for also, rank in product(ALSO, (1, 8, 64)):
        ratios = _memory_ratios(record, [(f"full{also}", f"LoRA r={rank}{also}")])
        cases += [(ratio > 1, f"rank {rank} {words}") for ratio, words in ratios]
    result = decide_cases(cases, "the rank and the tokens in a step")
    without, with_gradients = (rank_of_equal_memory(shapes.config("smollm2-135m"), held) for held in (False, True))
    text = f"counted on SmolLM2-135M, LoRA's weights and Adam's moments are more from rank {without} on; with "
    text += f"gradients, which the peak holds with few tokens, from {with_gradients} on"
    return replace(result, measured=f"full fine-tuning's peak divided by LoRA's. {result.measured}. Not judged: {text}")


@decides("memory-gap-closes", record="memory", on="the model")
def memory_and_context(record: Record) -> Cases:
    """Whether LoRA's peak, in units of full fine-tuning's, rises with every length of one sequence."""
    peaks = {}  # model -> [(ratio, words)], by length
    for (model, batch, length), setups in sorted(_bytes(record).items()):
        if batch == 1 and {"LoRA r=8", "full"} <= setups.keys():
            lora, full = setups["LoRA r=8"], setups["full"]
            words = f"{lora / full:.2f} at {length} ({(full - lora) / MIB:,.0f} MiB less)"
            peaks.setdefault(model, []).append((lora / full, words))
    for model, of_model in peaks.items():
        ratios, texts = zip(*of_model, strict=True)
        if len(ratios) >= 3:
            rises = all(shorter < longer for shorter, longer in pairwise(ratios))
            yield rises, f"{model}: {', '.join(texts)}"


@decides("memory-a-third", record="memory", on="the tokens in a step and checkpointing")
def a_third(claim: Claim, record: Record) -> Cases:
    """Full fine-tuning's peak in units of LoRA's."""
    return [(ratio >= claim.stated, words) for ratio, words in _memory_ratios(record, FULL_AND_LORA)]


@decides("frozen-layers-store-nothing", record="memory", on="the model and the precision")
def frozen_layers(record: Record) -> Cases:
    """What autograd has saved after LoRA's forward pass, in units of full fine-tuning's."""
    pairs = [("LoRA r=8", "full"), ("LoRA r=8, bf16", "full, bf16")]
    return [(ratio < 0.5, words) for ratio, words in _memory_ratios(record, pairs, "saved_bytes")]


LORA_FA = [(f"LoRA r=8{also}", f"LoRA-FA r=8{also}") for also in ("", ", bf16", ", checkpointing")]


@decides("lora-fa-less-memory", record="memory")
def lora_fa(record: Record) -> Result:
    """Whether LoRA-FA's peak is the lower one."""
    result = decide_cases([(ratio > 1, words) for ratio, words in _memory_ratios(record, LORA_FA)], "the setup")
    return replace(result, measured=f"LoRA's peak divided by LoRA-FA's. {result.measured}")


@decides("lora-fa-saves-up-to-1-4-times", record="memory")
def lora_fa_saves(claim: Claim, record: Record) -> Answer:
    """The largest of LoRA's peaks in units of LoRA-FA's: "up to" a number is near the largest."""
    ratios = [*_memory_ratios(record, LORA_FA)]
    largest, _ = max(ratios)
    return near(largest, claim.stated), f"largest first: {', '.join(words for _, words in sorted(ratios)[::-1])}"


@decides("dora-costs-little-memory", record="memory")
def dora(record: Record) -> Result:
    """DoRA's peak in units of LoRA's, on two models or more."""
    ratios = _memory_ratios(record, [("DoRA r=8", "LoRA r=8")])
    result = decide_cases([(ratio < 1.1, words) for ratio, words in ratios], "the model")
    models = {model for (model, *_), setups in _bytes(record).items() if "DoRA r=8" in setups}
    return result if len(models) > 1 else Result(deciding.OPEN, f"{result.measured}; fewer than two models have DoRA")


# Time


def time_interval(row: dict[str, Any]) -> tuple[float, float] | None:
    """Return the 95 % interval of the ratio of times to full fine-tuning's in a row's verdict; None if inconclusive."""
    match = re.match(r"(?:faster|slower|no .*): (\d+\.\d+) to (\d+\.\d+) of full's time", row["verdict"])
    return (float(match[1]), float(match[2])) if match else None


# The conditions of a timed case.
SPEED = ("the rank", "the blocks with adapters", "the model", "the tokens in a step")


def _timed(record: Record, setups: str) -> Iterator[dict[str, Any]]:
    """Yield the row of each timed case with a conclusive interval whose setup matches a pattern.

    It has five entries more: ``faster``, whether the step is faster than full fine-tuning's (None: there is no
    significant difference), ``low`` and ``high``, the interval, ``words``, and the ``case`` by its conditions.
    """
    for row in record.rows:
        ends = time_interval(row) if "verdict" in row else None
        if ends and re.fullmatch(setups, row["setup"]):
            faster = {"faster": True, "slower": False}.get(row["verdict"].partition(":")[0])
            words = f"{row['model']}, {row['tokens']} tokens, {row['setup']}: {ends[0]:.2f} to {ends[1]:.2f}"
            rank, _, blocks = row["setup"].partition(", ")  # "LoRA r=8, last 1 block"
            case = rank, blocks or "all", row["model"], row["tokens"]
            yield row | {"faster": faster, "low": ends[0], "high": ends[1], "words": words, "case": case}


@decides("lora-trains-faster", record="speed")
def trains_faster(record: Record) -> Result:
    """What the record says of LoRA's time in units of full fine-tuning's, by rank."""
    cases = [(row["faster"], row["words"], *row["case"]) for row in _timed(record, "LoRA r=(1|8|64|256)")]
    of_rank = {}
    for answer, _, rank, *_ in cases:
        of_rank.setdefault(rank, []).append(answer)
    names = {True: "faster", None: "undecided", False: "slower"}
    counts = [
        f"{rank.removeprefix('LoRA ')} "
        + ", ".join(f"{word} in {answers.count(which)}" for which, word in names.items() if which in answers)
        for rank, answers in of_rank.items()
    ]
    slower = "; ".join(words for answer, words, *_ in cases if answer is False) or "none"
    return replace(decide_cases(cases, SPEED), measured=f"{'; '.join(counts)} cases. Slower: {slower}")


@decides("smollm2-2-to-3-times-faster", record="speed", on="the tokens in a step")
def times_as_fast(claim: Claim, record: Record) -> Cases | Result:
    """Whether the interval of LoRA's time on SmolLM2-135M lies within what is stated of a GPU; a CPU cannot tell."""
    timed = [row for row in _timed(record, "LoRA r=8") if row["model"] == "smollm2-135m"]
    least, most = (1 / times for times in reversed(claim.values))
    cases = [(within(row["low"], row["high"], least, most), row["words"]) for row in timed]
    if record.facts["device"] == "cpu":
        measured = decide_cases(cases, always=True).measured
        return Result(deciding.OPEN, f"only on a CPU, which cannot tell. {measured}")
    return cases


@decides("time-ratio-is-flop-ratio", record="speed", on=SPEED)
def time_and_flops(record: Record) -> Cases:
    """Whether the ratio of the times is that of the FLOPs within the margin, from 512 tokens on."""
    full = _flops_of_full(record)
    for row in _timed(record, "LoRA r=.*"):
        if row["tokens"] >= 512:
            flops, low, high = row["flops"] / full[row["model"], row["tokens"]], row["low"], row["high"]
            same = within(low, high, flops - TIME_MARGIN, flops + TIME_MARGIN)
            words = f"{row['model']}, {row['tokens']} tokens, {row['setup'].partition(' ')[2]}: FLOPs {flops:.2f}"
            yield same, f"{words}, time {low:.2f} to {high:.2f}", *row["case"]


def _flops_of_full(record: Record) -> dict[tuple[str, int], int]:
    """Return (model, tokens) -> FLOPs of a step of full fine-tuning."""
    return {(row["model"], row["tokens"]): row["flops"] for row in record.rows if row["setup"] == "full"}


PREDICTIONS = ("the cost model", "FLOPs alone")


@decides("time-can-be-predicted", record="speed")
def time_predicted(record: Record) -> Result:
    """Whether the cost model, and FLOPs alone, say which is faster, in the cases whose interval excludes 1."""
    full = _flops_of_full(record)
    decided = [row for row in _timed(record, "(?!full$).*") if row["faster"] is not None]
    cases, texts = [], []
    for name in PREDICTIONS:
        wrong = []
        for row in decided:
            flops = row["flops"] / full[row["model"], row["tokens"]]
            ratio = flops if name == "FLOPs alone" else row["predicted_ratio"]
            right = (ratio < 1) == row["faster"]
            wrong += [] if right else [f"{row['words']}, predicted {ratio:.2f}"]
            cases.append((right, "", name, *row["case"]))
        text = f"{name}: right in {len(decided) - len(wrong)} of {len(decided)} decided cases"
        texts.append(f"{text}. Wrong: {'; '.join(wrong)}" if wrong else text)
    texts.append("So which is faster, counting FLOPs tells as well" if _is_flops_enough(cases) else "")
    return replace(decide_cases(cases, ("the prediction", *SPEED)), measured=". ".join(filter(None, texts)))


def _is_flops_enough(cases: Sequence[tuple[Any, ...]]) -> bool:
    """Return whether FLOPs alone are right at least as often as the cost model."""
    model, flops = ([right for right, _, name, *_ in cases if name == which] for which in PREDICTIONS)
    return sum(flops) >= sum(model)


@decides("fewer-blocks-shorter-steps", record="speed", on="the model, the tokens in a step and the numbers of blocks")
def fewer_blocks(record: Record) -> Cases:
    """Times of a step with adapters of rank 8 in the last blocks and in all: whether they are longer in that order."""
    steps = []
    for row in _timed(record, r"LoRA r=8(, last \d+ blocks?)?"):
        _, blocks, *cell = row["case"]
        steps.append((*cell, math.inf if blocks == "all" else float(blocks.split()[1]), row["low"], row["high"]))
    for (*cell, few, low, high), (*same, more, next_low, next_high) in pairwise(sorted(steps)):
        if cell == same:
            answer = True if high < next_low else False if next_high < low else None
            numbers = f"{few:g} and {'all' if more == math.inf else f'{more:g}'}"
            words = f"{low:.2f} to {high:.2f} and {next_low:.2f} to {next_high:.2f}"
            yield answer, f"{cell[0]}, {cell[1]} tokens, {numbers}: {words}"


# Tasks


def _results(record: Record, task: str, *setups: str) -> list[dict[str, Any]]:
    """Return the rows with results on a task, of these setups or of all; one for each seed."""
    rows = [row for row in record.rows if row.get("about") == "result" and row.get("task") == task]
    return [row for row in rows if row["setup"] in setups or not setups]


def _accuracy_above(record: Record, rows: Sequence[dict[str, Any]], reference: float) -> Answer:
    """Return whether the accuracy on sentiment is above a reference's (None: the bounds hold zero), and by how much.

    The one-sided 95 % bounds hold two errors: that of the seeds, by Student's t, and that of so few test texts, by the
    normal approximation of the binomial distribution, on both sides. The record does not pair the answers to a text,
    so that the bounds are too wide rather than too narrow.
    """
    mean, lower, _ = t_bounds([row["accuracy"] - reference for row in rows])
    words = f"{100 * mean:+.0f} points, {len(rows)} seeds"
    if len(rows) < MIN_SEEDS:
        return None, words
    (texts,) = (row["test"] for row in record.rows if row.get("about") == "task" and row["task"] == "sentiment")
    accuracy = mean + reference
    variance = (accuracy * (1 - accuracy) + reference * (1 - reference)) / texts
    distance = math.hypot(mean - lower, statistics.NormalDist().inv_cdf(CONFIDENCE) * math.sqrt(variance))
    lower, upper = mean - distance, mean + distance
    return deciding.above(lower, upper), f"{words}, bounds {100 * lower:+.0f} to {100 * upper:+.0f}"


@decides("fine-tuning-beats-asking", record="downstream", beside="elicitation", on="the method")
def beats_asking(record: Record, *asked: Record) -> Cases:
    """Accuracy on sentiment less that of the best way of asking, or of the most frequent class, by method, over seeds.

    Of the ways of asking in a record of elicitation, that counts which the validation texts choose.
    """
    floors = [row["accuracy"] for row in _results(record, "sentiment", "zero-shot", "trivial")]
    floor = max([*floors, *map(_best_asking, asked)])
    for setup in ("full", "LoRA r=8"):
        if not (rows := _results(record, "sentiment", setup)):
            raise ValueError(f"there is no result of {setup!r}")
        answer, words = _accuracy_above(record, rows, floor)
        yield answer, f"{setup} {words}"


@decides("full-collapses-below-300m", record="downstream")
def collapses(record: Record) -> Answer:
    """Whether full fine-tuning, at its tuned rate, ends below zero-shot on sentiment."""
    (zero_shot,) = _results(record, "sentiment", "zero-shot")
    above, words = _accuracy_above(record, _results(record, "sentiment", "full"), zero_shot["accuracy"])
    return None if above is None else not above, f"full fine-tuning less zero-shot: {words}"


def _best_asking(record: Record) -> float:
    """Return the mean accuracy on sentiment of the prompt (examples and calibration) that is best on validation."""
    rows = pandas.DataFrame(_results(record, "sentiment", "zero-shot", "few-shot"))
    prompts = rows[~rows["control"]].groupby(["k", "calibration"], sort=False)[["validation", "accuracy"]].mean()
    return float(prompts["accuracy"].iloc[prompts["validation"].argmax()])


# What training wrote


@decides("full-update-10-to-100-ranks", record="spectra")
def full_rank_update(record: Record) -> Answer:
    """Directions with 90 % of the energy of full fine-tuning's updates, in units of the adapter's rank 8."""
    rows = [row for row in record.rows if row.get("run") == "full"]
    layers = [row["energy_rank"] for row in rows if row["about"] == "layer"]
    seeds = len({row["seed"] for row in rows if row["about"] == "run"})
    ratio = statistics.median(layers) / 8
    text = f"median {ratio:.0f} times rank 8 over {len(layers)} layers, {count_noun(seeds, 'seed')}"
    if seeds < MIN_SEEDS:
        return None, f"{text}; fewer than {MIN_SEEDS} seeds"
    return 10 <= ratio <= 100, text


# What others published


@decides("at-most-1-5-times-faster", published="peft-metamathqa", on="the rank", always=True)
def at_most_half_again(claim: Claim, published: Published) -> Cases:
    """Tokens a second of each LoRA, in units of full fine-tuning's, in one benchmark on one card."""
    (full,) = (row["tokens_per_second"] for row in published.rows if row["experiment"].startswith("full-finetuning"))
    for row in published.rows:
        if row["experiment"] in ("lora/llama-3.2-3B-rank32", "lora/llama-3.2-3B-rank64"):
            times = row["tokens_per_second"] / full
            yield times <= claim.stated, f"{row['experiment'].rpartition('-')[2]} {times:.1f} times"


@decides("lora-1-8-times-faster", published="torchtune", on=("the model", "the card"))
def torchtune_speed(claim: Claim, published: Published) -> Cases:
    """LoRA's tokens a second in units of full fine-tuning's fastest recipe on the same card and model.

    Its row with checkpointing, which LoRA's has too, is stated beside it.
    """
    for card, model in sorted({(row["card"], row["model"]) for row in published.rows}):
        rows = [row for row in published.rows if (row["card"], row["model"]) == (card, model)]
        lora = max(row["tokens_per_second"] for row in rows if row["method"] == "LoRA")
        full = {row["technique"]: lora / row["tokens_per_second"] for row in rows if row["method"] == "full"}
        fastest = min(full, key=full.__getitem__)
        text = f"{model} on {card}: {full[fastest]:.2f} times full's fastest row ({fastest})"
        text += f", {full['checkpointing']:.2f} times its row with checkpointing" if "checkpointing" in full else ""
        yield near(full[fastest], claim.stated), text, model, card


@decides("qlora-takes-more-time", "qlora-33-percent-less-memory", published="litgpt")
def qlora_beside_bfloat16(claim: Claim, published: Published) -> Answer:
    """By how many per cent time or peak is higher in NF4 than in bfloat16, with one sequence in a micro-batch.

    It is judged on the source's model; the other models are stated beside it.
    """
    of_time = claim.id == "qlora-takes-more-time"
    single = [row for row in published.rows if row["micro_batch_size"] == 1]
    values = {(row["model"], row["quantization"]): row["iteration_s" if of_time else "peak_bytes"] for row in single}
    models = dict.fromkeys(model for model, _ in values)
    higher = {model: 100 * (values[model, "nf4"] / values[model, None] - 1) for model in models}
    judged = higher["Llama 2 7B"]
    texts = ", ".join(f"{model} {percent:+.0f} %" for model, percent in higher.items())
    answer = judged > 0 if of_time else near(-judged, claim.stated, 0.25)
    return answer, f"{'time' if of_time else 'peak'} with NF4 beside bfloat16: {texts}"
