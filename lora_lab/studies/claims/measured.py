"""Verdicts from records, and from what others published.

They obey one set of rules, and docs/claims.md lists what is exempt. A learning rate at the edge of its grid supports no
verdict; fewer than three seeds support none, nor does a timing that its record calls inconclusive; a difference counts
if its one-sided 95 % bounds over the seeds exclude zero or the margin; overfitting is judged at every stopping point,
with equal training loss beside it. What breaks a rule is open.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise, product
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lora_lab.ablation import overfitting, rank_advice
from lora_lab.ablation.compare import RankResult, compare_losses, last_rows, smallest_sufficient_rank
from lora_lab.ablation.stats import (
    CONFIDENCE,
    best_rate,
    block_losses_of,
    interval,
    losses_by_rate,
    resampled_means,
    t_bounds,
)
from lora_lab.costs.bill import MIB
from lora_lab.models import shapes
from lora_lab.studies.claims.counted import rank_of_equal_memory
from lora_lab.studies.claims.deciding import (
    DEPENDS,
    FALLS,
    OPEN,
    STANDS,
    Answer,
    Cases,
    Claim,
    Result,
    decide_cases,
    decide_conditions,
    decides,
    near,
    within,
)
from lora_lab.studies.records import Published, Record
from lora_lab.system.wording import count_noun

if TYPE_CHECKING:
    import pandas

MARGIN = 0.01  # nats that do not matter
TIME_MARGIN = 0.05  # of full fine-tuning's time, that does not matter
MIN_SEEDS = 3
PARTS = ("validation", "off_domain")

# Memory


def _peaks(record: Record) -> dict[tuple[str, int, int], dict[str, dict[str, Any]]]:
    """(model, batch, length) -> setup -> row; the peak is the measured one, or on a GPU the allocator's."""
    cells: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for row in record.rows:
        if row.get("measured_bytes"):
            cells.setdefault((row["model"], row["batch"], row["length"]), {})[row["setup"]] = row
    return cells


def _memory_ratios(record: Record, pairs: Sequence[tuple[str, str]], column: str = "measured_bytes"):
    """(ratio first / second, words) for each cell of the record that has both setups of a pair."""
    for (model, batch, length), setups in _peaks(record).items():
        for first, second in pairs:
            if setups.get(first, {}).get(column) and setups.get(second, {}).get(column):
                ratio = setups[first][column] / setups[second][column]
                words = f", {first.partition(', ')[2]}" if ", " in first else ""
                yield ratio, f"{ratio:.2f} ({model}, {batch} x {length}{words})"


# All in float32: over a base in bfloat16 adapters stay in float32, which full fine-tuning in bfloat16 does not match.
ALSO = ("", ", checkpointing")
FULL_AND_LORA = [(f"full{also}", f"LoRA r=8{also}") for also in ALSO]


@decides("memory-as-few-as-parameters", record="memory")
def memory_as_parameters(claim: Claim, record: Record) -> Answer:
    """The memory that LoRA saves, in per cent of full fine-tuning's peak."""
    pairs = [*FULL_AND_LORA, ("full", "LoRA r=1")]
    savings = sorted(100 * (1 - 1 / ratio) for ratio, _ in _memory_ratios(record, pairs))
    if not savings:
        return None, "the record has no pair of full fine-tuning and LoRA"
    text = f"saves {savings[0]:.0f} to {savings[-1]:.0f} % in {len(savings)} cases"
    return savings[0] >= 0.9 * claim.stated, text


@decides("fewer-gradients-lower-the-peak", record="memory")
def gradients_at_the_peak(claim: Claim, record: Record) -> Cases:
    """Whether the peak of full fine-tuning holds gradients of its parameters, in each setup with AdamW."""
    for row in record.rows:
        name, *options = row["setup"].split(", ")
        if name == "full" and "SGD" not in options:
            held = row.get("gradients", 0)
            words = f"{row['model']}, {row['batch']} x {row['length']} tokens, {row['setup']}: {held / MIB:,.0f} MiB"
            case = {"the model": row["model"], "the tokens in a step": (row["batch"], row["length"])}
            case |= {"the precision": "bf16" in options, "checkpointing": "checkpointing" in options}
            yield held > 0, words, case


@decides("lora-needs-less-memory", record="memory", on="the rank and the tokens in a step")
def less_memory(claim: Claim, record: Record) -> Cases:
    """Measured peaks of full fine-tuning in units of LoRA's of several ranks, all in float32; and a rank too high."""
    cases: list[tuple[bool | None, str]] = []
    for also, rank in product(ALSO, (1, 8, 64)):
        ratios = _memory_ratios(record, [(f"full{also}", f"LoRA r={rank}{also}")])
        cases += [(ratio > 1, f"rank {rank} {words}") for ratio, words in ratios]
    without, with_gradients = (rank_of_equal_memory(shapes.config("smollm2-135m"), held) for held in (False, True))
    text = f"counting SmolLM2-135M's weights and Adam's moments alone, from rank {without} upwards; with gradients, "
    text += f"which the peak holds with few tokens, from {with_gradients}"
    return [*cases, (False, text)] if cases else []


@decides("memory-gap-closes", record="memory", on="the model")
def memory_and_context(claim: Claim, record: Record) -> Cases:
    """LoRA's peak in units of full fine-tuning's, along the lengths of one sequence."""
    by_model: dict[str, list[tuple[float, str]]] = {}  # in ascending order of the length
    for (model, batch, length), setups in sorted(_peaks(record).items()):
        if batch == 1 and {"LoRA r=8", "full"} <= setups.keys():
            lora, full = (setups[name]["measured_bytes"] for name in ("LoRA r=8", "full"))
            words = f"{lora / full:.2f} at {length} ({(full - lora) / MIB:,.0f} MiB less)"
            by_model.setdefault(model, []).append((lora / full, words))
    for model, ratios in by_model.items():
        if len(ratios) >= 3:
            rises = all(low < high for (low, _), (high, _) in pairwise(ratios))
            yield rises, f"{model}: {', '.join(words for _, words in ratios)}"


# Claims on the ratio of two setups' bytes: pairs, column, whether it holds, and on what it may depend.
_LORA_FA = [(f"LoRA r=8{also}", f"LoRA-FA r=8{also}") for also in ("", ", bf16", ", checkpointing")]
_STORED = [("LoRA r=8", "full"), ("LoRA r=8, bf16", "full, bf16")]
_DORA = [("DoRA r=8", "LoRA r=8")]
_IN_A_STEP, _OF_BOTH = "the tokens in a step and checkpointing", "the precision of base and adapters"
_PEAK, _SAVED = "measured_bytes", "saved_bytes"  # the second is what autograd has saved after the forward pass
RATIOS: dict[str, tuple[Any, str, Callable[[float, Claim], bool], str]] = {
    "memory-a-third": (FULL_AND_LORA, _PEAK, lambda ratio, claim: ratio >= claim.stated, _IN_A_STEP),
    "frozen-layers-store-nothing": (_STORED, _SAVED, lambda ratio, _: ratio < 0.5, "the model and the precision"),
    "lora-fa-less-memory": (_LORA_FA, _PEAK, lambda ratio, _: ratio > 1, "the setup"),
    "lora-fa-saves-up-to-1-4-times": (_LORA_FA, _PEAK, lambda ratio, claim: near(ratio, claim.stated), _OF_BOTH),
    "dora-costs-little-memory": (_DORA, _PEAK, lambda ratio, _: ratio < 1.1, "the model"),
}


def memory_ratio(claim: Claim, record: Record) -> Result:
    """Return the verdict on a claim in :data:`RATIOS`, from all cells of the record."""
    pairs, column, holds, on = RATIOS[claim.id]
    cases = [(holds(ratio, claim), words) for ratio, words in _memory_ratios(record, pairs, column)]
    result = decide_cases(cases, on)
    if claim.id == "lora-fa-less-memory":
        return replace(result, measured=f"LoRA's peak divided by LoRA-FA's. {result.measured}")
    models = {model for (model, _, _), setups in _peaks(record).items() if "DoRA r=8" in setups}
    if pairs is _DORA and len(models) < 2:
        return Result(OPEN, f"{result.measured}; fewer than two models have DoRA")
    return result


for _id in RATIOS:
    decides(_id, record="memory")(memory_ratio)


# Time


def time_interval(row: dict[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of the ratio of times to full fine-tuning's in a row's verdict; None if inconclusive."""
    match = re.match(r"(?:faster|slower|no .*): (\d+\.\d+) to (\d+\.\d+) of full's time", row["verdict"])
    return (float(match[1]), float(match[2])) if match else None


def _timed(record: Record, setups: str, model: str | None = None):
    """(row, interval, words) of each timed case with a conclusive interval, whose setup matches a pattern."""
    for row in record.rows:
        ends = time_interval(row)
        if ends and re.fullmatch(setups, row["setup"]) and model in (None, row["model"]):
            words = f"{row['model']}, {row['tokens']} tokens, {row['setup']}: {ends[0]:.2f} to {ends[1]:.2f}"
            yield row, ends, words


@decides("lora-trains-faster", record="speed")
def trains_faster(claim: Claim, record: Record) -> Result:
    """What the record says of LoRA's time in units of full fine-tuning's."""
    timed = _timed(record, "LoRA r=(1|8|64|256)")
    cases = [(_is_faster(row), words, _conditions(row)) for row, _, words in timed]
    answers = [answer for answer, *_ in cases]
    counts = f"faster in {answers.count(True)}, slower in {answers.count(False)}, undecided in {answers.count(None)}"
    slower = "; ".join(words for answer, words, _ in cases if answer is False)
    return _outside_too(decide_conditions(cases), f"{counts} of {len(cases)} cases. Slower: {slower or 'none'}")


def _outside_too(result: Result, measured: str) -> Result:
    on = f"{result.on}, and outside this record on the model (lesson 05)" if result.on else ""
    return Result(result.verdict, measured, on)


def _is_faster(row: dict[str, Any]) -> bool | None:
    """Whether a timed step is faster than full fine-tuning's; None if there is no significant difference."""
    return {"faster": True, "slower": False}.get(row["verdict"].partition(":")[0])


def _conditions(row: dict[str, Any]) -> dict[str, Any]:
    rank, _, blocks = row["setup"].partition(", ")  # "LoRA r=8, last 1 block"
    adapters = {"the rank": rank, "the blocks with adapters": blocks or "all"}
    return {**adapters, "the model": row["model"], "the tokens in a step": row["tokens"]}


@decides("smollm2-2-to-3-times-faster", record="speed")
def two_to_three_times(claim: Claim, record: Record) -> Result:
    """Whether the interval of LoRA's time lies within what is stated, on the model and on a GPU, as is meant."""
    result = decide_cases(_is_as_fast_as_stated(claim, record, "LoRA r=8"), "the tokens in a step")
    on_cpu = record.facts["device"] == "cpu"
    return Result(OPEN, f"only on a CPU, which cannot tell. {result.measured}") if on_cpu else result


def _is_as_fast_as_stated(claim: Claim, record: Record, setup: str) -> Cases:
    """Whether a setup's time on SmolLM2-135M is below what the claim's value states, and above that of a second one."""
    least = 1 / claim.values[0] if claim.values else 0.0
    return [
        (within(low, high, least, 1 / claim.stated), words)
        for _, (low, high), words in _timed(record, setup, "smollm2-135m")
    ]


@decides("time-ratio-is-flop-ratio", record="speed")
def time_and_flops(claim: Claim, record: Record) -> Cases:
    """Whether the ratio of the times is that of the FLOPs within the margin, from 512 tokens on."""
    full = _flops_of_full(record)
    for row, (low, high), _ in _timed(record, "LoRA r=.*"):
        if row["tokens"] >= 512:
            flops = row["flops"] / full[row["model"], row["tokens"]]
            same = within(low, high, flops - TIME_MARGIN, flops + TIME_MARGIN)
            words = f"{row['model']}, {row['tokens']} tokens, {row['setup'].partition(' ')[2]}: FLOPs {flops:.2f}"
            yield same, f"{words}, time {low:.2f} to {high:.2f}", _conditions(row)


def _flops_of_full(record: Record) -> dict[tuple[str, int], int]:
    """(model, tokens) -> FLOPs of a step of full fine-tuning."""
    return {(row["model"], row["tokens"]): row["flops"] for row in record.rows if row["setup"] == "full"}


@decides("time-can-be-predicted", record="speed")
def time_predicted(claim: Claim, record: Record) -> Result:
    """Whether the cost model, and FLOPs alone, say which is faster, in the cases whose interval excludes 1."""
    full = _flops_of_full(record)
    cases, texts = [], []
    timed = _timed(record, "(?!full$).*")
    decided = [(row, words) for row, _, words in timed if _is_faster(row) is not None]
    for name in ("the cost model", "FLOPs alone"):
        wrong = []
        for row, words in decided:
            flops = row["flops"] / full[row["model"], row["tokens"]]
            ratio = flops if name == "FLOPs alone" else row["predicted_ratio"]
            words = f"{words}, predicted {ratio:.2f}"
            right = (ratio < 1) == _is_faster(row)
            wrong += [] if right else [words]
            cases.append((right, words, {"the prediction": name, **_conditions(row)}))
        text = f"{name}: right in {len(decided) - len(wrong)} of {len(decided)} decided cases"
        texts.append(f"{text}. Wrong: {'; '.join(wrong)}" if wrong else text)
    return _outside_too(decide_conditions(cases), ". ".join(texts))


@decides("fewer-blocks-shorter-steps", record="speed", on="the model, the tokens in a step and the numbers of blocks")
def fewer_blocks(claim: Claim, record: Record) -> Cases:
    """Times of a step with adapters of rank 8 in the last blocks and in all: whether they are longer in that order."""
    timed: dict[tuple[str, int], list[tuple[float, tuple[float, float]]]] = {}  # model, tokens -> blocks, times
    for row, ends, _ in _timed(record, r"LoRA r=8(, last \d+ blocks?)?"):
        last = re.search(r"last (\d+)", row["setup"])
        timed.setdefault((row["model"], row["tokens"]), []).append((float(last[1]) if last else math.inf, ends))
    for (model, tokens), steps in timed.items():
        for (few, shorter), (more, longer) in pairwise(sorted(steps)):
            answer = True if shorter[1] < longer[0] else False if longer[1] < shorter[0] else None
            words = " and ".join("{:.2f} to {:.2f}".format(*each) for each in (shorter, longer))
            numbers = f"{few:g} and {'all' if more == math.inf else f'{more:g}'}"
            yield answer, f"{model}, {tokens} tokens, {numbers}: {words}"


# Ranks


def _rank_results(record: Record) -> tuple[dict[int, RankResult], list[int], int]:
    """Each rank beside the largest, the ranks whose rate is at the edge of those tried, and the number of seeds."""
    answer = smallest_sufficient_rank(record.frame(), MARGIN)
    tried = {each.rank: {row["lr"] for row in record.rows if row["rank"] == each.rank} for each in answer.ranks}
    edges = [each.rank for each in answer.ranks if each.lr in (min(tried[each.rank]), max(tried[each.rank]))]
    return {each.rank: each for each in answer.ranks}, edges, len(answer.seeds)


def _best_inside(record: Record, wider: Sequence[Record], rank: int, rate: float | None) -> bool:
    """Whether a record "rates" of the same training runs shows a rate as the best inside a wider grid."""
    setup, same = f"r={rank}, alpha = 2r", ("seq_len", "steps", "batch_size")
    for other in wider:
        study = other.settings.get("docs", {})
        options = {**study.get("setups", {}).get(setup, {}), "seq_len": study.get("seq_len")}
        if [options.get(key) for key in same] == [record.settings.get(key) for key in same]:
            frame = other.frame()
            best = best_rate(losses_by_rate(frame[(frame["data"] == "docs") & (frame["setup"] == setup)]))
            if best.tried == rate and not best.edge:
                return True
    return False


def rank_is_enough(rank: int, claim: Claim, record: Record, wider: Sequence[Record]) -> Answer:
    """Return whether a rank is enough beside the largest one, each at its own rate."""
    results, edges, seeds = _rank_results(record)
    largest = max(results)
    if rank not in results or rank == largest:
        return None, f"the record does not compare rank {rank} with a larger one"
    result = results[rank]
    if result.difference is None or result.lower is None or result.upper is None:
        return None, f"rank {rank} is not judged: {result.note}"
    text = (
        f"test loss {result.difference:+.3f} nats ({result.lower:+.3f} to {result.upper:+.3f}) beside rank {largest}, "
        f"margin {MARGIN:g}, {seeds} seeds"
    )
    for each in (rank, largest):
        if each in edges and not _best_inside(record, wider, each, results[each].lr):
            return None, f"{text}; the rate of rank {each} is at the edge of its grid"
        if each in edges:
            text += f"; rank {each}'s rate, at the edge of this grid, is the best inside that of the record 'rates'"
    if seeds < MIN_SEEDS:
        return None, f"{text}; fewer than {MIN_SEEDS} seeds"
    return {"enough": True, "too small": False}.get(result.status), text


decides("rank-one-suffices", record="ablation", beside="rates")(partial(rank_is_enough, 1))
decides("loss-flat-from-rank-16", record="ablation", beside="rates")(partial(rank_is_enough, 16))


# Overfitting

_AT_EQUAL_TRAINING_LOSS = "LoRA's validation loss beside full fine-tuning's, where both have a training loss in nats"


def select_inner_rates(record: Record) -> tuple[pandas.DataFrame, list[tuple[int, str]], list[str]]:
    """The curves at each method's best rate; (size, LoRA setup) that may be judged; and what is at an edge.

    A pair may be judged if neither LoRA's rate nor full fine-tuning's is at the edge of its grid, with enough seeds.
    Seeds that chose a rate are left out, and so is a cosine, which contains no shorter run.
    """
    frame = record.frame()
    curves = frame[(frame["stage"] == "judging") & (frame["schedule"] == "constant")]
    edge = {(int(row["n_train"]), str(row["setup"])): str(row["edge"]) for row in curves.to_dict("records")}
    seeds = curves.groupby(["n_train", "setup"])["seed"].nunique()
    judged, doubts = [], []
    for size, setup in sorted(key for key in edge if key[1].startswith("LoRA")):
        at = [name for name in ("full", setup) if edge[size, name]]
        if at:
            doubts.append(f"{size} examples, {setup}: the rate of {' and '.join(at)} is at an edge")
        elif min(seeds[size, setup], seeds[size, "full"]) < MIN_SEEDS:
            doubts.append(f"{size} examples, {setup}: fewer than {MIN_SEEDS} seeds")
        else:
            judged.append((size, setup))
    return curves, judged, doubts


def _verdict_of(words: list[str], text: str, on: str, doubts: list[str], judged: bool) -> Result:
    """From the words "less", "more" and "open" of comparisons, where "less" is what the claim states.

    As for :func:`lora_lab.studies.claims.deciding.decide_cases`, it falls if it fails in some comparisons and holds in
    none.
    """
    if not judged:
        return Result(OPEN, f"{'; '.join(doubts)}. At these rates: {text}")
    text = "; ".join([text, *(f"not judged: {doubt}" for doubt in doubts)])
    if {"less", "more"} <= set(words):
        return Result(DEPENDS, text, on)
    return Result(FALLS if "more" in words else STANDS if set(words) == {"less"} else OPEN, text)


def _count_verdicts(table: pandas.DataFrame, column: str, pairs: Sequence[tuple[int, str]]) -> tuple[list[str], str]:
    """The verdicts of the rows of these pairs, and the same in words: where it is less, more or undecided."""
    words, texts = [], []
    for size, setup in pairs:
        rows = table[(table["n_train"] == size) & (table["setup"] == setup)]
        words += rows["verdict"].tolist()
        parts = [
            f"{'undecided' if word == OPEN else word} at {', '.join(f'{value:g}' for value in of_word[column])}"
            for word, of_word in rows.groupby("verdict", sort=False)
        ]
        texts.append(f"{size} examples, {setup}: {'; '.join(parts)}")
    return words, ". ".join(texts)


@decides("lora-overfits-less", record="overfitting")
def overfits_less(claim: Claim, record: Record) -> Result:
    """The rise of the validation loss since its lowest, LoRA's beside full fine-tuning's, at every stopping point.

    A method that is merely slower has risen less after equally many steps. So the validation loss where both fit the
    training set equally well counts, too.
    """
    curves, judged, doubts = select_inner_rates(record)
    pairs = judged or _all_pairs(curves)
    rises = overfitting.by_stopping_point(curves)
    rises = rises[(rises["lower"] != 0) | (rises["upper"] != 0)]  # otherwise no loss has risen yet
    words, text = _count_verdicts(rises, "step", pairs)
    at_equal_loss, beside = _count_verdicts(_at_equal_training_loss(curves), "train_loss", pairs)
    text = f"rise of LoRA's validation loss beside full fine-tuning's, if both stop after a step: {text}"
    text = f"{text}. {_AT_EQUAL_TRAINING_LOSS}: {beside}"
    on = "whether steps or training losses are equal"
    if "more" in words or "less" in at_equal_loss:
        on = f"the stopping point, rank and size, and {on}"
    return _verdict_of([*words, *at_equal_loss], text, on, doubts, bool(judged))


@decides("better-at-equal-fit", record="overfitting")
def generalises_better(claim: Claim, record: Record) -> Result:
    """The validation loss where both methods fit the training set equally well."""
    curves, judged, doubts = select_inner_rates(record)
    words, text = _count_verdicts(_at_equal_training_loss(curves), "train_loss", judged or _all_pairs(curves))
    text = f"{_AT_EQUAL_TRAINING_LOSS}: {text}"
    return _verdict_of(words, text, "the training loss", doubts, bool(judged))


def _all_pairs(curves: pandas.DataFrame) -> list[tuple[int, str]]:
    setups = sorted(name for name in curves["setup"].unique() if name.startswith("LoRA"))
    return list(product(sorted(map(int, curves["n_train"].unique())), setups))


def _at_equal_training_loss(curves: pandas.DataFrame) -> pandas.DataFrame:
    table = overfitting.by_training_loss(curves, [3.0, 2.0, 1.5, 1.0, 0.6])
    return table.assign(verdict=table["verdict"].where(table["seeds"] >= MIN_SEEDS, OPEN))


# Tasks


def _results(record: Record, task: str) -> dict[str, list[dict[str, Any]]]:
    """setup -> its rows with results on a task, one for each seed."""
    rows = [row for row in record.rows if row.get("about") == "result" and row.get("task") == task]
    return {setup: [row for row in rows if row["setup"] == setup] for setup in {row["setup"] for row in rows}}


def _accuracy_above(record: Record, rows: Sequence[dict[str, Any]], reference: float) -> tuple[bool | None, str]:
    """Whether the accuracy of the seeds on sentiment is above a reference's, and by how much; None if bounds hold zero.

    The one-sided 95 % bounds hold two errors: that of the seeds, by Student's t, and that of so few test texts, by the
    normal approximation of the binomial distribution, on both sides. The record does not pair the answers to a text,
    so that the bounds are too wide rather than too narrow.
    """
    mean, lower, _ = t_bounds([row["accuracy"] - reference for row in rows])
    words = f"{100 * mean:+.0f} points, {len(rows)} seeds"
    if lower is None or len(rows) < MIN_SEEDS:
        return None, words
    (texts,) = (row["test"] for row in record.rows if row.get("about") == "task" and row["task"] == "sentiment")
    accuracy = mean + reference
    variance = (accuracy * (1 - accuracy) + reference * (1 - reference)) / texts
    distance = math.hypot(mean - lower, statistics.NormalDist().inv_cdf(CONFIDENCE) * math.sqrt(variance))
    answer = None if abs(mean) <= distance else mean > 0
    return answer, f"{words}, bounds {100 * (mean - distance):+.0f} to {100 * (mean + distance):+.0f}"


@decides("fine-tuning-beats-asking", record="downstream", beside="elicitation", on="the method")
def beats_asking(claim: Claim, record: Record, asked: Sequence[Record]) -> Cases:
    """Accuracy on sentiment less that of the best way of asking, or of the most frequent class, by method, over seeds.

    Of the ways of asking in a record of elicitation, that counts which the validation texts choose.
    """
    results = _results(record, "sentiment")
    floors = [row["accuracy"] for name in ("zero-shot", "trivial") for row in results.get(name, ())]
    floor = max([*floors, *map(_best_asking, asked)])
    for setup in ("full", "LoRA r=8"):
        answer, words = _accuracy_above(record, results[setup], floor)
        yield answer, f"{setup} {words}"


def _best_asking(record: Record) -> float:
    """The mean accuracy on sentiment of the prompt (its number of examples, its calibration) best on validation."""
    by_prompt: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for setup, rows in _results(record, "sentiment").items():
        for row in rows:
            if setup in ("zero-shot", "few-shot") and not row["control"]:
                by_prompt.setdefault((row["k"], row["calibration"]), []).append(row)
    best = max(by_prompt.values(), key=lambda rows: statistics.fmean(row["validation"] for row in rows))
    return statistics.fmean(row["accuracy"] for row in best)


@decides("off-domain-rise-is-the-methods", record="ablation", on="the rank", always=True)
def off_domain_by_rate(claim: Claim, record: Record) -> Cases:
    """Off-domain losses of one rank at two rates whose mean validation losses differ by at most the margin.

    The bounds hold for all such pairs together.
    """
    frame = last_rows(record.frame())
    pairs = []
    for rank, trials in frame[frame["outcome"] == "done"].groupby("rank"):
        parts = {part: trials.pivot(index="seed", columns="lr", values=f"{part}_loss").dropna() for part in PARTS}
        for low, high in combinations(parts["validation"].columns, 2):
            tie, risen = ((parts[part][high] - parts[part][low]).tolist() for part in PARTS)
            if abs(statistics.fmean(tie)) <= MARGIN and len(risen) >= MIN_SEEDS:
                pairs.append((f"rank {rank:g} at {low:g} and {high:g}", tie, risen))
    for words, tie, risen in pairs:
        mean, lower, upper = cast(tuple[float, float, float], t_bounds(risen, 1 - (1 - CONFIDENCE) / len(pairs)))
        answer = None if lower <= 0 <= upper and not within(lower, upper, -MARGIN, MARGIN) else lower <= 0 <= upper
        level, *ends = cast(tuple[float, float, float], t_bounds(tie))
        text = "validation {:+.3f} ({:+.3f} to {:+.3f}), ".format(level, *ends)
        text += f"off-domain {mean:+.3f} ({lower:+.3f} to {upper:+.3f})"
        yield answer, f"{words}: {text}"


@decides("chrf-40-means-translation", record="downstream", on="the run")
def chrf_forty(claim: Claim, record: Record) -> Cases:
    """Runs with such a score, and how many of their translations are exactly right."""
    runs = [
        (row["chrf"], row["exact"], f"{setup}, seed {row['seed']:g}")
        for setup, rows in sorted(_results(record, "translate-fr").items())
        for row in rows
        if row.get("seed") is not None and row["chrf"] >= claim.stated
    ]
    return [(exact >= 0.5, f"{name}: chrF {chrf:.0f}, {100 * exact:.0f} % exact") for chrf, exact, name in runs]


# Four bits, and the rank from one run


def _compare_pairs(
    record: Record, data: Sequence[str], pairs: Sequence[tuple[str, str]], answers: dict[str, bool]
) -> Cases:
    """Yield a case for each pair (setup, reference), from the verdict of :func:`compare_losses` by ``answers``."""
    frame = record.frame()
    for setup, reference in pairs:
        table = compare_losses(frame[frame["data"].isin(data)], reference, margin=MARGIN)
        row = {row["setup"]: row for row in table.to_dict("records")}[setup]
        between = f"{row['difference']:+.4f} nats ({row['lower']:+.4f} to {row['upper']:+.4f}, {row['seeds']} seeds)"
        answer = answers.get(row["verdict"]) if row["seeds"] >= MIN_SEEDS else None
        edge = ", a rate at the edge of its grid" if row["why"] == "edge" else ""
        yield answer, f"{setup} less {reference}: {between}{edge}"


@decides("qlora-matches-16-bits", record="quantised", on="the base it is compared with")
def qlora_matches(claim: Claim, record: Record) -> Cases:
    """LoRA's test loss over a base in NF4, less that over float32 and over bfloat16, each at its own rate."""
    pairs = [("NF4", base) for base in ("float32", "bfloat16")]
    answers = {"lower": True, "equal": True, "higher": False}
    return _compare_pairs(record, ["float32", "bfloat16", "NF4"], pairs, answers)


@decides("merge-into-dequantised-base", record="quantised", on="the model")
def merge_into_dequantised(claim: Claim, record: Record) -> Cases:
    """The test loss of QLoRA adapters merged into the float32 weights, less that in the dequantised ones."""
    pairs = [("merged into float32", "merged")]
    answers = {"lower": False, "equal": False, "higher": True}
    return _compare_pairs(record, ["NF4, merged"], pairs, answers)


@decides("spectrum-predicts-rank", record="rank_advice")
def spectrum_predicts_rank(claim: Claim, record: Record) -> Answer:
    """The error of a rule that was chosen on planted ranks, on other tasks, beside that of a constant."""
    advice = rank_advice.assess(record.rows)
    text = f"{advice.rule}, chosen on planted ranks; in doublings: " + ", ".join(
        f"{row['task']} {row['error']:+.1f} (always {rank_advice.GUESS}: {row['constant_error']:+.1f})"
        for row in advice.judged.to_dict("records")
    )
    text += f"; not decided by the sweep: {', '.join(advice.undecided)}" if advice.undecided else ""
    return advice.works, text


def right_by(record: Record, data: str, setup: str, column: str = "kind") -> pandas.DataFrame:
    """The share of exact answers in a record of translations, by the kind of the examples.

    Args:
        record: of the kind "translation".
        data: such as "sentences-fr".
        setup: such as "LoRA r=8".
        column: "kind"; or "features", of which an example may have several.

    Returns:
        That column, ``share``, ``lower`` and ``upper`` (the two-sided 95 % interval of a bootstrap over seeds and
        examples), ``examples``, ``seeds``, and ``edge`` of the rate's grid.
    """
    import pandas

    frame = record.frame()
    frame = frame[frame["data"] == data]
    judged = frame[(frame["stage"] == "judging") & (frame["setup"] == setup)]
    done = judged[judged["outcome"] == "done"]
    right = np.array([block_losses_of(row, "accuracy") for row in done.to_dict("records")])  # (seeds, examples)
    examples = frame[frame["stage"] == "example"]
    table = []
    for value, rows in examples.assign(value=examples[column].str.split(", ")).explode("value").groupby("value"):
        of_value = right[:, rows["position"].astype(int)]
        lower, upper = interval(resampled_means(of_value))
        row = {column: value, "share": of_value.mean(), "lower": lower, "upper": upper}
        table.append(row | {"examples": len(rows), "seeds": len(done), "edge": judged["edge"].iloc[0]})
    return pandas.DataFrame(table)


IN_GRAMMAR = "the direction, and on whether training shows every word"


@decides("135m-learns-to-translate", record="translation", on="the method")
@decides("135m-learns-a-grammar", record="translation", on=IN_GRAMMAR)
def translates(claim: Claim, record: Record) -> Cases:
    """Whether half of the translations that no baseline gets right are exact, by data, setup and kind."""
    data = ("sentences-en", "sentences-fr") if claim.id.endswith("grammar") else ("translate-fr",)
    for name, setup in product(data, sorted({row["setup"] for row in record.rows if row["stage"] == "judging"})):
        for row in right_by(record, name, setup).to_dict("records"):
            if row["kind"] == "right by a baseline":
                continue
            answer = True if row["lower"] > 0.5 else False if row["upper"] < 0.5 else None
            text = f"{name}, {setup}, {row['kind']}: {100 * row['share']:.0f} % ({100 * row['lower']:.0f} to "
            text += f"{100 * row['upper']:.0f}) of {row['examples']} exact, {row['seeds']} seeds"
            if row["edge"]:
                text += ", rate at the edge of its grid"
            yield None if row["edge"] or row["seeds"] < MIN_SEEDS else answer, text


# Courses


def _taught(record: Record, data: str, part: str, margin: float = 0.0) -> list[tuple[str, pandas.Series, bool]]:
    """LoRA beside full fine-tuning as taught, and with tuned rates.

    Returns:
        The rates in words, LoRA's row of :func:`compare_losses`, and whether a verdict may rest on it.
    """
    frame = record.frame()
    cases = []
    for rates in ("as taught", "tuned"):
        table = compare_losses(frame[frame["data"] == data], f"full, {rates}", part, margin).set_index("setup")
        full, lora = table.loc[f"full, {rates}"], table.loc[f"LoRA, {rates}"]
        words = f"{rates} (rates {full['lr']:.3g} and {lora['lr']:.3g}, {lora['seeds']} seeds)"
        cases.append((words, lora, lora["why"] == "" and lora["seeds"] >= MIN_SEEDS))
    return cases


@decides("cmu-lora-much-worse", record="taught", on="the learning rates")
def much_worse(claim: Claim, record: Record) -> Cases:
    """Whether LoRA's accuracy on sentiment is lower by at least what they print, as taught and with tuned rates."""
    for words, row, judged in _taught(record, "sentiment", "accuracy"):
        lora, full = row["loss"], row["loss"] - row["difference"]
        answer = True if row["upper"] < -claim.stated else False if row["lower"] > -claim.stated else None
        text = (
            f"{lora:.3f} against {full:.3f}, by {row['difference']:+.3f} ({row['lower']:+.3f} to {row['upper']:+.3f})"
        )
        yield answer if judged else None, f"{words}: accuracy {text}"


@decides("smollm-lora-far-better", record="taught", on="the learning rates")
def far_better(claim: Claim, record: Record) -> Cases:
    """Whether LoRA's test loss is lower by more than a margin, as taught and with tuned rates."""
    for words, row, judged in _taught(record, "docs", "test", MARGIN):
        answer = {"lower": True, "equal": False, "higher": False}.get(row["verdict"]) if judged else None
        lora, full = math.exp(row["loss"]), math.exp(row["loss"] - row["difference"])
        text = f"loss by {row['difference']:+.3f} ({row['lower']:+.3f} to {row['upper']:+.3f})"
        yield answer, f"{words}: perplexity {lora:.2f} against {full:.2f}, {text}"


@decides("smollm-minutes-not-hours", record="taught", on="the tokens in a step and the targets")
def minutes_not_hours(claim: Claim, record: Record) -> Cases:
    """Whether the interval of LoRA's time admits a half of full fine-tuning's, with their rank and targets."""
    times = replace(record, rows=[row for row in record.rows if row["stage"] == "time"])
    return _is_as_fast_as_stated(claim, times, "LoRA r=4")


# What training wrote


@decides("full-update-10-to-100-ranks", record="spectra")
def full_rank_update(claim: Claim, record: Record) -> Answer:
    """Directions with 90 % of the energy of full fine-tuning's updates, in units of the adapter's rank 8."""
    rows = [row for row in record.rows if row.get("run") == "full"]
    layers = [row["energy_rank"] for row in rows if row.get("about") == "layer"]
    seeds = len({row.get("seed") for row in rows if row.get("about") == "run"})
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


@decides("lora-1-8-times-faster", published="torchtune")
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
        text += "".join(f", {full[name]:.2f} times its row with {name}" for name in full if name == "checkpointing")
        yield near(full[fastest], claim.stated), text, {"the model": model, "the card": card}


@decides("qlora-takes-more-time", published="litgpt")
@decides("qlora-33-percent-less-memory", published="litgpt")
def qlora_beside_bfloat16(claim: Claim, published: Published) -> Answer:
    """By how many per cent time or peak is higher in NF4 than in bfloat16, with one sequence in a micro-batch.

    It is judged on the source's model; the other models are stated beside it.
    """
    of_time = claim.id == "qlora-takes-more-time"
    column, higher = "iteration_s" if of_time else "peak_bytes", {}
    for model in dict.fromkeys(row["model"] for row in published.rows):
        single = (row for row in published.rows if row["model"] == model and row["micro_batch_size"] == 1)
        values = {row["quantization"]: row[column] for row in single}
        higher[model] = 100 * (values["nf4"] / values[None] - 1)
    judged = higher["Llama 2 7B"]
    texts = ", ".join(f"{model} {percent:+.0f} %" for model, percent in higher.items())
    answer = judged > 0 if of_time else near(-judged, claim.stated, 0.25)
    return answer, f"{'time' if of_time else 'peak'} with NF4 beside bfloat16: {texts}"
