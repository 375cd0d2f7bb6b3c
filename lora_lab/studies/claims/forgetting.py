"""Verdicts from the record ``remedies``: what forgets less, what predicts it, and what eases it.

Forgetting is KL(base || tuned) on text that the base wrote. Where methods or remedies are compared, it is read where
both have learned as much, at several shares of what the lesser one learned, over all pairs of their rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_lab.ablation.compare import compare_by_seed
from lora_lab.ablation.overfitting import at_equal_learning, compare_over_rates, summarise_trials
from lora_lab.ablation.stats import rank_correlations, t_bounds
from lora_lab.studies.claims.deciding import Answer, Cases, Claim, decides, excludes_zero
from lora_lab.studies.claims.measured import MIN_SEEDS
from lora_lab.studies.records import Record

if TYPE_CHECKING:
    import pandas

SHARES = (0.5, 0.8, 0.95)
REFERENCE = "LoRA r=8"  # of the remedies
REPLAYS = ("own replies, a quarter", "own replies, half")
AS_TRAINED = 100  # the strength of an adapter in per cent
LESS = {"less": True, "more": False}


def _frame(record: Record, setups: Sequence[str] = ()) -> pandas.DataFrame:
    """The rows of these setups, or of all but the scaled adapters.

    Raises:
        ValueError: there are too few seeds, or a setup is missing.
    """
    frame = record.frame()
    chosen = frame["setup"].isin(setups) if setups else ~frame["setup"].str.endswith(", scaled")
    if missing := set(setups) - set(frame["setup"]):
        raise ValueError(f"there is no setup {sorted(missing)[0]!r}")
    if frame["seed"].nunique() < MIN_SEEDS:
        raise ValueError(f"fewer than {MIN_SEEDS} seeds")
    return frame[chosen]


def _at_equal_learning(record: Record, setups: Sequence[str], reference: str) -> Iterator[tuple[str, bool | None, str]]:
    """(setup, whether it forgets less than the reference, words) for each setup and share."""
    for setup in setups:
        for share in SHARES:
            row = compare_over_rates(_frame(record, (setup, reference)), "forgotten", reference, share=share).iloc[0]
            words = f"{setup} at {100 * share:.0f} %: {row['lower']:+.3f} to {row['upper']:+.3f}"
            yield setup, LESS.get(row["verdict"]), words


@decides("learns-less-forgets-less", record="remedies", on="rank, rates and how much is learned")
def forgets_less(claim: Claim, record: Record) -> Cases:
    """What LoRA of each rank has forgotten, less what full fine-tuning has, where both have learned as much."""
    ranks = ("LoRA r=1", "LoRA r=8", "LoRA r=64")
    return [(answer, words) for _, answer, words in _at_equal_learning(record, ranks, "full")]


@decides("lora-forgets-more-at-defaults", record="remedies")
def forgets_more_at_defaults(claim: Claim, record: Record) -> Answer:
    """What both have forgotten after the last step, at the rates of PEFT's benchmark; at equal learning beside it."""
    lora, full = "LoRA r=32, PEFT's rate", "full, PEFT's rate"
    trials = summarise_trials(_frame(record, (lora, full)))
    row = compare_by_seed(trials, "forgotten_at_last", full).set_index("setup").to_dict("index")[lora]
    text = f"after the last step {row['difference']:+.4f} ({row['lower']:+.4f} to {row['upper']:+.4f}) nats"
    beside = "; ".join(words for _, _, words in _at_equal_learning(record, [lora], full))
    return excludes_zero(row["lower"], row["upper"]), f"{text}; at equal learning: {beside}"


@decides("kl-predicts-forgetting", record="remedies", on="what KL is compared with")
def divergence_predicts(claim: Claim, record: Record) -> Cases:
    """Rank correlations of forgetting with KL on the new task, size of the update, rank and rate, over all setups."""
    frame = _frame(record)
    trials = summarise_trials(frame).merge(frame[["setup", "rank"]].drop_duplicates())
    predictors = ["score_divergence", "score_size", "rank", "lr"]
    table = rank_correlations(trials, "forgotten_at_last", predictors)
    names = {"score_divergence": "KL on the new task", "score_size": "size of the update", "lr": "rate"}
    for row in table.to_dict("records"):
        name, prefix = names.get(row["predictor"], row["predictor"]), "difference_"
        if row["predictor"] == predictors[0]:  # what the others are compared with
            prefix = ""
        answer = excludes_zero(row[f"{prefix}lower"], row[f"{prefix}upper"])
        yield answer, f"{name} {row['correlation']:+.2f} ({row['lower']:+.2f} to {row['upper']:+.2f})"


@decides("replay-cuts-forgetting-by-80", record="remedies", on="the control and how much is learned")
def replay_helps(claim: Claim, record: Record) -> Cases:
    """Forgetting with replies of the base among the examples, against none and against as much other text."""
    other = "other text, a quarter"
    for reference, setups in ((REFERENCE, REPLAYS), (other, REPLAYS[:1])):
        for setup, answer, words in _at_equal_learning(record, setups, reference):
            yield answer, f"{words} against {reference}, {_change(record, setup, reference):+.0f} %"


def _change(record: Record, setup: str, reference: str) -> float:
    """By how many per cent a setup has forgotten more, in the mean, where all have learned as much."""
    frame = _frame(record, (setup, reference))
    equal = at_equal_learning(frame, summarise_trials(frame), SHARES[-1])
    means = equal.groupby("setup")["forgotten"].mean()
    return float(100 * (means[setup] / means[reference] - 1))


@decides("final-checkpoint-overshoots", record="remedies", on="the rate")
def overshoots(claim: Claim, record: Record) -> Cases:
    """Both losses of adapters that are scaled down, less those at the strength that was trained, for each rate."""
    frame = _frame(record, (f"{REFERENCE}, scaled",))
    for lr, of_rate in frame.groupby("lr"):
        tables = {
            part: of_rate.pivot(index="seed", columns="step", values=f"{part}_loss")
            for part in ("validation", "off_domain")
        }
        answers = []
        for strength in sorted(step for step in set(of_rate["step"].tolist()) if 0 < step < AS_TRAINED):
            bounds = [t_bounds((table[strength] - table[AS_TRAINED]).tolist()) for table in tables.values()]
            better = all(upper is not None and upper < 0 for *_, upper in bounds)
            worse = any(lower is not None and lower > 0 for _, lower, _ in bounds)
            losses = " and ".join(f"{mean:+.3f}" for mean, *_ in bounds)
            answers.append((True if better else False if worse else None, f"{strength:.0f} % {losses}"))
        each = [answer for answer, _ in answers]
        some = True if True in each else None if None in each else False
        yield some, f"rate {lr:g}: {', '.join(words for _, words in answers)}"


@decides("forgetting-linear-in-loss", record="remedies")
def inverse_to_the_loss(claim: Claim, record: Record) -> Answer:
    """Whether the setups without a remedy that have the lower validation loss have forgotten more: the sign alone."""
    plain = [name for name in set(_frame(record)["setup"]) if name.startswith(("LoRA", "full"))]
    table = rank_correlations(summarise_trials(_frame(record, plain)), "forgotten_at_last", ["last_loss"])
    row = table.iloc[0]
    text = f"rank correlation of forgetting with the loss {row['correlation']:+.2f}"
    text = f"{text} ({row['lower']:+.2f} to {row['upper']:+.2f}), {len(plain)} setups"
    return excludes_zero(-row["upper"], -row["lower"]), text
