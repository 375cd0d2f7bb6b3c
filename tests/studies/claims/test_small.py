"""Verdicts from small bases, from records with planted answers, and how they turn."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lora_lab.studies import records
from lora_lab.studies.claims import small
from lora_lab.studies.claims.deciding import judge_record, read_claims
from lora_lab.studies.claims.deciding import verdict as verdict_of
from lora_lab.studies.claims.small import gaps_on
from tests.studies.claims import decide, make

BASES, RANKS, STEPS = ("tiny-64-0, numpy", "tiny-128-0, numpy"), (1, 8, 64), (60, 240, 720)


def rows(gap, seeds=8, noise=0.002, edge="", blocks=0.05):
    """Rows in which LoRA's loss is above that of the blocks by ``gap(base, rank, steps)``, and that above full's."""
    random, made = np.random.default_rng(0), []
    for base in BASES:
        for steps in STEPS:
            pages = 3 - 0.0005 * steps + 0.3 * random.random(12)
            setups = {"full": (None, 0.0), "blocks": (None, blocks)}
            setups |= {f"r={rank}": (rank, blocks + gap(base, rank, steps)) for rank in RANKS}
            for setup, (rank, above) in setups.items():
                shared = {"stage": "judging", "data": base, "outcome": "done", "step": steps, "steps": steps}
                shared |= {"setup": f"{setup}, {steps} steps", "rank": rank, "edge": edge, "lr": 1e-3}
                for seed in range(2, 2 + seeds):
                    losses = {
                        part: (pages + above + random.normal(0, noise, 12)).tolist() for part in ("test", "validation")
                    }
                    made.append(shared | {"seed": seed} | {f"score_{part}": str(each) for part, each in losses.items()})
    return made


def verdict(claim, *arguments, **options):
    return decide(claim, "tiny_rank", rows(*arguments, **options))


def level(base, rank, steps):
    return 0.0


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (level, "stands"),
        (lambda base, rank, steps: 0.1, "falls"),
        (lambda base, rank, steps: 0.1 * (rank == 1), "stands"),  # some rank is
        (lambda base, rank, steps: 0.1 * (base == BASES[0]), "depends"),
        (lambda base, rank, steps: 0.01, "open"),
    ],
)
def test_lora_is_as_good_as_the_blocks_where_its_gap_is_within_the_margin(gap, expected):
    found = verdict("small-lora-equals-full-blocks", gap)
    assert found.verdict == expected
    assert verdict("small-lora-equals-full", gap).verdict == "falls"  # which trains the embedding, too


def test_what_it_depends_on_is_said():
    assert verdict("small-lora-equals-full-blocks", lambda base, rank, steps: 0.1 * (base == BASES[0])).on == "the base"
    assert verdict("small-lora-equals-full-blocks", lambda base, rank, steps: 0.1 * (steps == 60)).on == (
        "the number of steps"
    )


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (lambda base, rank, steps: steps / 5000 * (rank < 64), "stands"),
        (lambda base, rank, steps: -steps / 5000 * (rank < 64), "falls"),
        (lambda base, rank, steps: 0.2 * (rank < 64), "open"),  # behind from the beginning, and no further
        (lambda base, rank, steps: (1 - 2 * (rank == 8)) * steps / 5000, "depends"),
    ],
)
def test_a_rank_falls_behind_if_its_gap_grows_with_the_text(gap, expected):
    assert verdict("small-low-ranks-fall-behind", gap).verdict == expected


@pytest.mark.parametrize("claim", ["small-lora-equals-full-blocks", "small-low-ranks-fall-behind"])
def test_a_rate_at_an_edge_decides_nothing(claim):
    assert verdict(claim, lambda base, rank, steps: 0.1 + steps / 5000, edge="largest").verdict == "open"


def test_fewer_than_eight_seeds_decide_nothing():
    with pytest.raises(ValueError, match="fewer than 8 seeds"):
        dict(gaps_on("blocks", make("tiny_rank", rows(level, seeds=7))))


def test_one_page_that_differs_widens_the_bounds():
    record = make("tiny_rank", rows(level))
    one = dict(gaps_on("blocks", record))[BASES[0]][8, 60]
    assert one.as_good is True
    odd = replace(one, values=one.values + 0.3 * np.eye(12)[0])
    assert odd.as_good is None


def test_another_kind_of_text_is_a_case_of_its_own():
    few, claim = make("tiny_rank", rows(level)), read_claims()["small-lora-equals-full-blocks"]
    far = [
        row | {"data": "tiny-64-0, readmes"} for row in rows(lambda base, rank, steps: 0.1) if row["data"] == BASES[0]
    ]
    assert judge_record(claim, few).verdict == "stands"
    found = judge_record(claim, few, make("tiny_readmes", far))
    assert (found.verdict, found.on) == ("depends", "the text")


def test_machines_that_measured_a_base_each_are_judged_together(tmp_path):
    every = rows(lambda base, rank, steps: 0.1 * (base == BASES[0]))
    for base, device in zip(BASES, ("One CPU", "Another CPU"), strict=True):
        part = replace(make("tiny_rank", [row for row in every if row["data"] == base]), device=device)
        records.write(part, tmp_path)
    found = verdict_of("small-lora-equals-full-blocks", tmp_path)
    assert (found.result.verdict, found.result.on) == ("depends", "the base")
    assert found.result.machine == "Another CPU and One CPU"


# Two setups, each at its own rate

NAMES = ("tiny-64-0", "tiny-128-0")


def judged(losses, data="numpy", seeds=8, noise=0.002, edge="", steps=240, named=True):
    """Rows of setups that judge, with losses (base, setup) -> above 3 nats."""
    random, made = np.random.default_rng(len(data)), []
    for base in NAMES:
        pages = 3 + 0.3 * np.random.default_rng(0).random(12)
        for setup, above in losses.items():
            above = above(base) if callable(above) else above
            row = {"stage": "judging", "data": f"{base}, {data}", "outcome": "done", "edge": edge, "lr": 1e-3}
            row |= {"setup": f"{setup}, {steps} steps" if named else setup}
            for seed in range(seeds):
                blocks = (pages + above + random.normal(0, noise, 12)).tolist()
                made.append(row | {"seed": seed, "score_test": str(blocks), "test_loss": float(np.mean(blocks))})
    return made


LAYERS = {"q, v": 0.05, "attention": 0.04, "MLP": 0.0, "all": 0.0}
VARIANTS = dict.fromkeys(["rsLoRA", "LoRA+", "LoRA-FA", "DoRA", "PiSSA", "DoRA r=8", "LoRA"], 0.0)
VARIANTS |= {"LoRA r=64": 0.0, "rsLoRA r=64": 0.0}


@pytest.mark.parametrize(
    ("claim", "change", "expected"),
    [
        ("all-linear-gains-little", {}, "falls"),
        ("all-linear-gains-little", {"q, v": 0.0}, "stands"),
        ("all-linear-gains-little", {"q, v": 0.01}, "open"),
        ("all-linear-gains-little", {"q, v": lambda base: 0.05 * (base == NAMES[0])}, "depends"),
        ("mlp-beats-attention", {}, "stands"),
        ("mlp-beats-attention", {"MLP": 0.03}, "falls"),  # worse than all
        ("mlp-beats-attention", {"attention": 0.0}, "falls"),  # no better than attention
        ("mlp-10-beats-qv-32", {}, "open"),  # it learns more; what is forgotten is not measured
        ("mlp-10-beats-qv-32", {"q, v": 0.0}, "falls"),
    ],
)
def test_which_layers(claim, change, expected):
    assert decide(claim, "tiny_layers", judged(LAYERS | change)).verdict == expected


@pytest.mark.parametrize(
    ("claim", "change", "expected"),
    [
        ("tuned-variants-are-alike", {"PiSSA": 0.004, "DoRA": -0.004}, "stands"),
        ("tuned-variants-are-alike", {"PiSSA": 0.05, "DoRA": -0.05}, "falls"),
        ("tuned-variants-are-alike", {"PiSSA": 0.05}, "depends"),
        ("tuned-variants-are-alike", {"DoRA": 0.01}, "open"),
        ("pissa-beats-lora", {"PiSSA": -0.02}, "stands"),
        ("pissa-beats-lora", {"PiSSA": 0.0}, "falls"),
        ("dora-at-half-rank", {"DoRA r=8": -0.02}, "stands"),
        ("dora-at-half-rank", {"DoRA r=8": 0.02}, "falls"),
        ("lora-plus-2-times-faster", {"LoRA+": -0.02}, "open"),
        ("lora-plus-2-times-faster", {"LoRA+": 0.0}, "falls"),
        ("lora-fa-as-good-as-lora", {"LoRA-FA": 0.0}, "stands"),
        ("lora-fa-as-good-as-lora", {"LoRA-FA": 0.02}, "falls"),
        ("rslora-makes-high-ranks-pay", {"rsLoRA r=64": -0.02}, "stands"),
        ("rslora-makes-high-ranks-pay", {"rsLoRA r=64": -0.02, "LoRA r=64": -0.02}, "falls"),
        ("rslora-makes-high-ranks-pay", {}, "falls"),
    ],
)
def test_variants(claim, change, expected):
    assert decide(claim, "tiny_variants", judged(VARIANTS | change)).verdict == expected


@pytest.mark.parametrize("claim", ["all-linear-gains-little", "mlp-beats-attention"])
def test_two_setups_need_inner_rates_and_eight_seeds(claim):
    assert decide(claim, "tiny_layers", judged(LAYERS, edge="largest")).verdict == "open"
    at_edge = judged(VARIANTS | {"PiSSA": 0.05}, edge="smallest")
    assert decide("pissa-beats-lora", "tiny_variants", at_edge).verdict == "open"
    with pytest.raises(ValueError, match="fewer than 8 seeds"):
        list(small.compare("MLP", "all", make("tiny_layers", judged(LAYERS, seeds=7))))


def test_smollm2_is_one_more_base():
    rows = [row | {"data": "smollm2-135m, numpy"} for row in judged(LAYERS | {"q, v": 0.0}) if NAMES[0] in row["data"]]
    with_it = judge_record(
        read_claims()["all-linear-gains-little"], make("tiny_layers", judged(LAYERS)), make("smol_layers", rows)
    )
    assert (with_it.verdict, with_it.on) == ("depends", "the base")
    assert "smollm2-135m -0.000" in with_it.measured


def test_what_is_beside_may_be_of_several_machines_too(tmp_path):
    few = rows(lambda base, rank, steps: 0.02)
    more = [row | {"steps": 30, "setup": row["setup"].replace("240", "30")} for row in few if row["steps"] == 240]
    parts = {"A CPU": few[: len(few) // 2], "B CPU": few[len(few) // 2 :]}
    for device, part in parts.items():
        records.write(replace(make("tiny_rank", part), device=device), tmp_path)
    records.write(make("tiny_batch", more), tmp_path)
    found = verdict_of("large-batches-hurt-lora", tmp_path).result
    assert "rank 64 -0.000 (" in found.measured or "rank 64 +0.000 (" in found.measured


# Best rates

FOUR = ("tiny-64-0", "tiny-64-1", "tiny-128-0", "tiny-128-1")


def tried(best, data="numpy", steps=240):
    """Rows of two seeds that chose, whose losses are lowest at ``best(base, setup)``."""
    made = []
    for base in FOUR:
        for setup, rate in best(base).items():
            for lr in (rate / 2.4, rate / 1.2, rate * 1.6667):
                for seed in range(2):
                    loss = 3 + 0.01 * math.log(lr / rate) ** 2 + 0.001 * seed
                    row = {"stage": "choosing", "data": f"{base}, {data}", "setup": f"{setup}, {steps} steps"}
                    row |= {"outcome": "done", "step": steps, "steps": steps, "lr": lr, "seed": seed}
                    row |= {"score_validation": str([loss, loss + 0.1])}
                    made.append(row)
    return made


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(lambda base: 10, "stands"), (lambda base: 3, "falls"), (lambda base: 3 if base == NAMES[0] else 30, "open")],
)
def test_how_much_lower_the_rate_of_pissa_is(ratio, expected):
    rows = tried(lambda base: {"LoRA": 4e-3, "PiSSA": 4e-3 / ratio(base)})
    assert decide("pissa-rate-ten-times-lower", "tiny_variants", rows).verdict == expected


def test_a_best_rate_at_an_edge_gives_no_ratio():
    rows = [row for row in tried(lambda base: {"LoRA": 4e-3, "PiSSA": 4e-4}) if row["lr"] < 4e-3]
    result = decide("pissa-rate-ten-times-lower", "tiny_variants", rows)
    assert (result.verdict, "edge" in result.measured) == ("open", True)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, "stands"), (1.5, "falls"), (1.0, "open")])
def test_repetition_and_the_best_rate(factor, expected):
    wobble = dict(zip(FOUR, (0.97, 1.03, 0.98, 1.02), strict=True))
    fresh = make("tiny_rank", tried(lambda base: {"r=8": 4e-3, "full": 1e-3}))
    repeated = make(
        "tiny_repeats",
        tried(lambda base: {"r=8": 4e-3 * factor * wobble[base], "full": 1e-3 * factor * wobble[base]}, "again"),
    )
    result = judge_record(read_claims()["repetition-lowers-the-rate"], repeated, fresh)
    assert result.verdict == expected


@pytest.mark.parametrize(("factor", "expected"), [(0.5, "stands"), (1.5, "falls"), (1.0, "open")])
def test_longer_training_and_the_best_rate(factor, expected):
    wobble = dict(zip(FOUR, (0.97, 1.03, 0.98, 1.02), strict=True))
    short = tried(lambda base: {"r=8": 4e-3, "full": 1e-3}, steps=60)
    long = tried(lambda base: {"r=8": 4e-3 * factor * wobble[base], "full": 1e-3 * factor * wobble[base]}, steps=720)
    result = decide("longer-training-lower-rate", "tiny_rank", [*short, *long])
    assert result.verdict == expected, result.measured
    two = [row for row in [*short, *long] if row["data"].startswith("tiny-64")]
    assert decide("longer-training-lower-rate", "tiny_rank", two).verdict == "open"  # two bases are no sample


# Passes


def runs(losses, data="numpy"):
    """Rows of the judging stage: steps -> what is added to the losses of full fine-tuning and of LoRA."""
    return [
        row
        for steps, above in losses.items()
        for row in judged({"full": above, "r=8": above}, data, steps=steps, noise=0.01)
    ]


@pytest.mark.parametrize(
    ("claim", "repeated", "expected"),
    [
        ("four-passes-beat-one", {240: -0.05}, "stands"),
        ("four-passes-beat-one", {240: 0.05}, "falls"),
        ("four-passes-beat-one", {240: lambda base: 0.05 * (base == NAMES[0]) - 0.05 * (base != NAMES[0])}, "depends"),
        ("four-passes-like-fresh-text", {240: -0.1}, "stands"),
        ("four-passes-like-fresh-text", {240: -0.05}, "falls"),
        ("twelve-passes-beat-four", {240: 0.0, 720: -0.05}, "stands"),
        ("twelve-passes-beat-four", {240: 0.0, 720: 0.0}, "falls"),
    ],
)
def test_passes(claim, repeated, expected):
    fresh = make("tiny_rank", runs({60: 0.0, 240: -0.1}))
    again = make("tiny_repeats", runs(repeated, "numpy, repeated"))
    beside = () if claim.startswith("twelve") else (fresh,)
    assert judge_record(read_claims()[claim], again, *beside).verdict == expected
    at_edge = make("tiny_repeats", [row | {"edge": "smallest"} for row in again.rows])
    assert judge_record(read_claims()[claim], at_edge, *beside).verdict == "open"


# Batches, and other versions of a base


@pytest.mark.parametrize(
    ("large", "expected"),
    [
        (lambda base, rank: 0.1, "stands"),
        (lambda base, rank: -0.1, "falls"),
        (lambda base, rank: 0.1 * (rank == 1) - 0.1 * (rank == 64), "depends"),
        (lambda base, rank: 0.0, "open"),
    ],
)
def test_batches(large, expected):
    few = make("tiny_rank", rows(lambda base, rank, steps: 0.02))
    more = [row | {"steps": 30, "setup": row["setup"].replace("240", "30")} for row in few.rows if row["steps"] == 240]
    for row in more:
        if row["rank"] is not None:
            blocks = np.array(json.loads(row["score_test"])) + large(row["data"], row["rank"])
            row["score_test"] = str(blocks.tolist())
    found = judge_record(read_claims()["large-batches-hurt-lora"], make("tiny_batch", more), few)
    assert found.verdict == expected


@pytest.mark.parametrize(("nf4", "expected"), [(0.0, "stands"), (-0.05, "stands"), (0.05, "falls"), (0.008, "open")])
def test_a_base_in_four_bits(nf4, expected):
    rows = judged({"float32": 0.0}, "float32", noise=0.01) + judged({"NF4": nf4}, "NF4", noise=0.01)
    assert decide("qlora-matches-16-bits", "tiny_quantised", rows).verdict == expected


@pytest.mark.parametrize(("into_float32", "expected"), [(0.2, "stands"), (0.0, "falls"), (-0.1, "falls")])
def test_where_to_merge(into_float32, expected):
    rows = judged({"merged": 0.0, "merged into float32": into_float32}, "NF4, merged", named=False)
    rows += judged({"merged": 0.5}, "float32, merged", named=False)  # another adapter's
    assert decide("merge-into-dequantised-base", "tiny_quantised", rows).verdict == expected


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (lambda corpus: 0.9, "falls"),
        (lambda corpus: 0.1, "stands"),
        (lambda corpus: 0.9 * (corpus == "known"), "depends"),
    ],
)
def test_a_copied_adapter_keeps_its_gain_or_not(kept, expected):
    rows = []
    for corpus in ("known", "readmes"):
        rows += judged({corpus: 0.0}, corpus)
        copied = {f"{corpus}, alone": 0.2, f"{corpus}, copied": 0.2 * (1 - kept(corpus))}
        rows += judged(copied, "as it is, on others", named=False)
    result = decide("adapters-die-with-their-base", "tiny_upgrade", rows)
    assert result.verdict == expected
    assert f"{100 * kept('known'):.0f} % of 0.200 nats" in result.measured
