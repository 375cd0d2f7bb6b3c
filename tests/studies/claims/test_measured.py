"""Verdicts from records: what the shipped ones give, and how they turn when the records change."""

import dataclasses
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from lora_lab import claims, records
from lora_lab.ablation import compare, overfitting, rank_advice
from lora_lab.ablation.stats import t_bounds
from lora_lab.studies.claims.measured import right_by
from lora_lab.system.files import write_json
from tests.helpers import COMMIT


@pytest.fixture
def changed(tmp_path):
    """(claim's id, kind of record, change of its rows, its folder, facts) -> the result from the changed record."""

    def changed(claim_id, kind, change, folder=None, **facts):
        for record in records.load_all(kind, folder).values():
            rows = change([dict(row) for row in record.rows])
            records.write(dataclasses.replace(record, rows=rows, facts=record.facts | facts), tmp_path)
        return claims.verdict(claim_id, tmp_path).result

    return changed


@pytest.fixture
def republished(tmp_path):
    """(claim's id, file, change of its rows) -> the result from the changed publication."""

    def republished(claim_id, name, change):
        shutil.copytree(records.shipped() / "published", tmp_path / "published", dirs_exist_ok=True)
        published = records.published(name)
        rows = change([dict(row) for row in published.rows])
        write_json(tmp_path / "published" / f"{name}.json", dataclasses.asdict(published) | {"rows": rows})
        return claims.verdict(claim_id, tmp_path).result

    return republished


def unchanged(rows):
    return rows


def where(condition, **values):
    """A change of the rows for which a condition holds: values, or functions of the row."""

    def change(rows):
        for row in rows:
            if condition(row):
                row |= {name: value(row) if callable(value) else value for name, value in values.items()}
        return rows

    return change


# Memory and time


def is_lora(row):
    return row["setup"].startswith("LoRA")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (unchanged, "falls"),
        (where(is_lora, measured_bytes=1000), "stands"),
        (where(lambda row: True, measured_bytes=1000), "falls"),
        (lambda rows: [row for row in rows if row["setup"] == "full"], "open"),
    ],
)
def test_memory_falls_as_parameters_do_only_if_the_peaks_do(changed, change, verdict):
    result = changed("memory-as-few-as-parameters", "memory", change)
    assert result.verdict == verdict
    if change is unchanged:
        assert "saves 33 to 71 %" in result.measured  # 3,429 against 2,295 MiB; 2,269 against 651


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (unchanged, "depends"),
        (where(is_lora, measured_bytes=1000), "stands"),
        (where(is_lora, measured_bytes=10**10), "falls"),
    ],
)
def test_a_third_of_the_memory(changed, change, verdict):
    result = changed("memory-a-third", "memory", change)
    assert result.verdict == verdict
    assert "bf16" not in result.measured
    assert bool(result.on) == (verdict == "depends")


def test_less_memory(changed):
    result = changed("lora-needs-less-memory", "memory", unchanged)
    assert (result.verdict, result.on) == ("depends", "the rank and the tokens in a step")
    assert "rank 64 1.35 (small, 4 x 128)" in result.measured
    # 134,515,008 parameters, 305,280 for each rank: 8 P > 12 r R without gradients; with them,
    # and two copies of a head of 49,152 x 576, 12 P + 8 * 28,311,552 > 16 r R, as lesson 04 counts
    assert "from rank 294 upwards; with gradients, which the peak holds with few tokens, from 377" in result.measured
    assert "bf16" not in result.measured  # whose adapters are in float32, which is no equal precision
    assert changed("lora-needs-less-memory", "memory", where(is_lora, measured_bytes=10**10)).verdict == "falls"


def test_fewer_gradients_lower_a_peak_only_where_it_holds_any(changed):
    result = changed("fewer-gradients-lower-the-peak", "memory", unchanged)
    assert (result.verdict, result.on) == ("depends", "the tokens in a step, the precision and checkpointing")
    yes, no = result.measured.split(". no: ")
    assert "small, 4 x 128 tokens, full, checkpointing: 72 MiB" in yes
    assert "small, 4 x 128 tokens, full, bf16, checkpointing: 0 MiB" in no
    assert "SGD" not in result.measured
    every = where(lambda row: True, gradients=2**20)
    assert changed("fewer-gradients-lower-the-peak", "memory", every).verdict == "stands"
    none = where(lambda row: True, gradients=0)
    assert changed("fewer-gradients-lower-the-peak", "memory", none).verdict == "falls"


def test_the_gap_closes_only_if_it_does_at_every_length(changed):
    result = changed("memory-gap-closes", "memory", unchanged)
    assert result.verdict == "stands"
    assert "0.43 at 256 (1,289 MiB less)" in result.measured
    at_1024 = where(lambda row: row["length"] == 1024 and row["setup"] == "LoRA r=8", measured_bytes=1000)
    assert changed("memory-gap-closes", "memory", at_1024).verdict == "falls"


def test_stored_activations(changed):
    assert changed("frozen-layers-store-nothing", "memory", unchanged).verdict == "falls"
    assert changed("frozen-layers-store-nothing", "memory", where(is_lora, saved_bytes=10)).verdict == "stands"


def test_lora_fa_and_dora(changed):
    assert changed("lora-fa-less-memory", "memory", unchanged).verdict == "stands"
    fa = where(lambda row: row["setup"].startswith("LoRA-FA"), measured_bytes=10**10)
    assert changed("lora-fa-less-memory", "memory", fa).verdict == "falls"
    at_most = changed("lora-fa-saves-up-to-1-4-times", "memory", unchanged)
    assert str(at_most) == "depends on the precision of base and adapters"
    assert "yes: 1.30 (small, 4 x 128, bf16). no: 1.12" in at_most.measured
    half = where(lambda row: row["setup"].startswith("LoRA-FA"), measured_bytes=lambda row: row["measured_bytes"] / 2)
    assert changed("lora-fa-less-memory", "memory", half).verdict == "stands"
    assert changed("lora-fa-saves-up-to-1-4-times", "memory", half).verdict == "falls"  # 2 times and more
    without = lambda rows: [row for row in rows if row["setup"] != "LoRA-FA r=8, bf16"]  # noqa: E731
    assert changed("lora-fa-saves-up-to-1-4-times", "memory", without).verdict == "falls"  # up to 1.16 times


def of_two_models(factor):
    """Peaks of DoRA that are so many times LoRA's, of both models."""

    def change(rows):
        lora = [row for row in rows if row["setup"] == "LoRA r=8" and row["measured_bytes"]]
        others = [row for row in rows if row["setup"] != "DoRA r=8"]
        return others + [row | {"setup": "DoRA r=8", "measured_bytes": factor * row["measured_bytes"]} for row in lora]

    return change


def test_dora_is_judged_on_two_models_or_more(changed):
    result = changed("dora-costs-little-memory", "memory", unchanged)
    assert result.verdict == "open"
    assert "fewer than two models" in result.measured
    assert changed("dora-costs-little-memory", "memory", of_two_models(1.05)).verdict == "stands"
    assert changed("dora-costs-little-memory", "memory", of_two_models(1.5)).verdict == "falls"


def interval(low, high):
    return where(lambda row: row["setup"] == "LoRA r=8", verdict=f"faster: {low} to {high} of full's time")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (unchanged, "falls"),
        (interval("0.35", "0.45"), "stands"),
        (interval("0.40", "0.60"), "open"),
        (interval("0.04", "0.05"), "falls"),  # 20 times faster is not 2 to 3 times
        (where(is_lora, verdict="3 rounds will not tell; take 6 or more"), "open"),
    ],
)
def test_two_to_three_times_faster_is_decided_by_the_record_of_a_gpu_only(changed, change, verdict):
    assert changed("smollm2-2-to-3-times-faster", "speed", change, device="cuda").verdict == verdict
    result = changed("smollm2-2-to-3-times-faster", "speed", change)
    assert result.verdict == "open"
    assert "only on a CPU" in result.measured


def test_faster_depends_on_the_rank_and_an_interval_that_holds_1_decides_nothing(changed):
    result = changed("lora-trains-faster", "speed", unchanged)
    assert result.on.startswith("the rank, and outside")  # nothing else alone makes a slower step a faster one
    (record,) = records.load_all("speed").values()
    slower = [row for row in record.rows if is_lora(row) and row["verdict"].startswith("slower")]
    assert f"slower in {len(slower)}," in result.measured
    faster = where(is_lora, verdict="faster: 0.50 to 0.90 of full's time")
    assert changed("lora-trains-faster", "speed", faster).verdict == "stands"
    unclear = where(is_lora, verdict="no difference that this run can show: 0.90 to 1.10 of full's time")
    assert changed("lora-trains-faster", "speed", unclear).verdict == "open"
    rounded = where(is_lora, verdict="faster: 0.96 to 1.00 of full's time")
    assert changed("lora-trains-faster", "speed", rounded).verdict == "stands"


@pytest.mark.parametrize("why", ["inconclusive on a busy machine", "cannot be told, because the times jump"])
def test_what_a_record_calls_inconclusive_decides_nothing(changed, why):
    busy = where(is_lora, verdict=f"{why}: 0.50 to 0.60 of full's time")
    for claim_id in ("lora-trains-faster", "time-ratio-is-flop-ratio"):
        assert changed(claim_id, "speed", busy).verdict == "open"
    assert changed("smollm2-2-to-3-times-faster", "speed", busy, device="cuda").verdict == "open"


def test_times_and_flops(changed):
    result = changed("time-ratio-is-flop-ratio", "speed", unchanged)
    assert str(result) == "depends on the blocks with adapters"
    assert "yes: small, 2048 tokens, r=8, last 1 block: FLOPs 0.47, time 0.46 to 0.50" in result.measured

    def around(offset, width):
        flops = {}

        def share(row):
            key = row["model"], row["tokens"]
            flops.setdefault(key, row["flops"])  # full fine-tuning is the first of its cell
            ratio = row["flops"] / flops[key] + offset
            return f"faster: {ratio - width:.2f} to {ratio + width:.2f} of full's time"

        return where(lambda row: True, verdict=share)

    for offset, width, verdict in ((0, 0.02, "stands"), (0.2, 0.02, "falls"), (0, 0.09, "open"), (0.04, 0.03, "open")):
        assert changed("time-ratio-is-flop-ratio", "speed", around(offset, width)).verdict == verdict


def test_fewer_blocks_are_compared_by_intervals_that_do_not_overlap(changed):
    result = changed("fewer-blocks-shorter-steps", "speed", unchanged)
    assert result.verdict == "stands"
    assert "smollm2-135m, 128 tokens, 10 and all: 0.52 to 0.53 and 0.89 to 1.06" in result.measured

    def last_ten_take(ends):
        changed_row = where(lambda row: "last 10" in row["setup"], verdict=f"faster: {ends} of full's time")
        return changed("fewer-blocks-shorter-steps", "speed", changed_row).verdict

    assert last_ten_take("0.52 to 0.90") == "open"  # overlaps with all blocks
    assert last_ten_take("1.20 to 1.30") == "depends"


def test_predictions_of_the_faster_method_are_counted_beside_those_by_flops(changed):
    result = changed("time-can-be-predicted", "speed", unchanged)
    assert result.on.startswith("the prediction, the rank and the tokens in a step, and outside this record")
    assert "cost model: right in 41 of 42 decided cases. Wrong: smollm2-135m, 32 tokens, LoRA r=64" in result.measured
    assert result.measured.endswith("FLOPs alone: right in 42 of 42 decided cases")
    right = where(lambda row: True, predicted_ratio=lambda row: row["ratio"])
    assert changed("time-can-be-predicted", "speed", right).verdict == "stands"
    wrong = where(lambda row: True, predicted_ratio=lambda row: 1 / row["ratio"])
    assert changed("time-can-be-predicted", "speed", wrong).on.startswith("the prediction, and")
    both_wrong = where(is_lora, predicted_ratio=2.0, flops=10**18, verdict="faster: 0.50 to 0.60 of full's time")
    assert changed("time-can-be-predicted", "speed", both_wrong).verdict == "falls"
    undecided = where(lambda row: True, verdict="no difference that this run can show: 0.90 to 1.10 of full's time")
    assert changed("time-can-be-predicted", "speed", undecided).verdict == "open"


# Ranks


def beyond(rank, lr, worse=1.0):
    """Adds a rate beyond the best of a rank, with higher losses, so that the best is at no edge any more."""

    def change(rows):
        best = max(row["lr"] for row in rows if row["rank"] == rank)
        new = [row | {"lr": lr} for row in rows if row["rank"] == rank and row["lr"] == best]
        for row in new:
            row |= {name: row[name] and row[name] + worse for name in ("validation_loss", "test_loss")}
        return rows + new

    return change


def test_a_rate_at_the_edge_supports_no_verdict_on_rank_one(changed):
    result = changed("rank-one-suffices", "ablation", unchanged)
    assert result.verdict == "open"
    assert "the rate of rank 1 is at the edge of its grid" in result.measured
    assert "+0.040 nats (+0.027 to +0.054)" in result.measured


def test_a_record_of_wider_grids_shows_that_the_rate_of_rank_one_is_inside(changed, tmp_path):
    (rates,) = records.load_all("rates").values()
    records.write(rates, tmp_path)
    result = changed("rank-one-suffices", "ablation", unchanged)
    assert result.verdict == "falls"
    assert "rank 1's rate, at the edge of this grid, is the best inside that of the record 'rates'" in result.measured
    assert result.shown_by.count("record ") == 2
    longer = {**rates.settings["docs"]["setups"], "r=1, alpha = 2r": {"steps": 240, "batch_size": 4}}
    other = {**rates.settings, "docs": {**rates.settings["docs"], "setups": longer}}
    records.write(dataclasses.replace(rates, settings=other), tmp_path)
    assert changed("rank-one-suffices", "ablation", unchanged).verdict == "open"


def test_rank_one_falls_inside_its_grid_and_stands_where_it_loses_nothing(changed):
    inside = beyond(1, 0.016)
    assert changed("rank-one-suffices", "ablation", inside).verdict == "falls"

    def as_good(rows):
        at_end = [row for row in rows if row["step"] == row["steps"]]
        reference = {row["seed"]: row["test_loss"] for row in at_end if (row["rank"], row["lr"]) == (64, 0.001)}
        of_rank_1 = where(lambda row: row["rank"] == 1 and row["step"], test_loss=lambda row: reference[row["seed"]])
        return of_rank_1(inside(rows))

    assert changed("rank-one-suffices", "ablation", as_good).verdict == "stands"


def test_rank_sixteen_is_open_where_the_bounds_hold_the_margin_or_seeds_are_few(changed):
    assert changed("loss-flat-from-rank-16", "ablation", unchanged).verdict == "open"
    two = changed("loss-flat-from-rank-16", "ablation", lambda rows: [row for row in rows if row["seed"] < 2])
    assert two.verdict == "open"
    assert "fewer than 3 seeds" in two.measured


# Overfitting


OLD = Path(__file__).parents[2] / "data" / "records"  # a record of overfitting of before there were stages
ON_EQUAL = "the stopping point, rank and size, and whether steps or training losses are equal"


def wider(rows):
    """256 examples only, with rates beyond both edges at which every loss after the start is higher by 1."""
    rows = [row for row in rows if row["n_train"] == 256]
    new = []
    for setup in ("full", "LoRA r=1", "LoRA r=8"):
        lrs = {row["lr"] for row in rows if row["setup"] == setup}
        for source, lr in ((min(lrs), min(lrs) / 3), (max(lrs), max(lrs) * 3)):
            for row in rows:
                if (row["setup"], row["lr"], row["seed"]) == (setup, source, 0):
                    worse = 1.0 if row["step"] else 0.0
                    new.append(row | {"lr": lr, "validation_loss": row["validation_loss"] + worse})
    return rows + new


def rising(setups):
    """After the first evaluation the validation loss of these setups rises, and that of all others stays."""

    def change(rows):
        for row in wider(rows):
            if row["step"]:
                train_loss = row["validation_loss"] - row["gap"]
                rise = row["step"] / 100 if row["setup"].startswith(setups) else 0
                worse = row["lr"] not in (0.0003, 0.002, 0.0006)  # the best of full, rank 1 and rank 8
                row["validation_loss"] = 3.0 + rise + worse + row["seed"] / 1000
                row["gap"] = row["validation_loss"] - train_loss
            yield row

    return lambda rows: list(change(rows))


def test_overfitting_depends_on_what_is_equal_if_no_rate_is_at_an_edge(changed):
    result = changed("lora-overfits-less", "overfitting", unchanged)
    assert (result.verdict, result.on) == ("depends", "whether steps or training losses are equal")
    assert "64 examples, LoRA r=8: less at 24, 32, 40, 48, 56, 64" in result.measured
    assert "256 examples, LoRA r=8: more at 2" in result.measured
    at_edge = where(lambda row: row["setup"] == "full", edge="largest")
    assert changed("lora-overfits-less", "overfitting", at_edge).verdict == "open"
    without_training_losses = where(lambda row: row["setup"].startswith("LoRA"), gap=None)
    assert "lacks what is needed" in changed("lora-overfits-less", "overfitting", without_training_losses).measured


@pytest.mark.parametrize(("stops", "losses", "verdict"), [(26, 9, "depends"), (35, 35, "open")])
def test_joint_bounds_change_the_verdict_only_for_both_kinds_together(monkeypatch, stops, losses, verdict):
    for name, cases in {"by_stopping_point": stops, "by_training_loss": losses}.items():  # as docs/claims.md states
        monkeypatch.setattr(overfitting, name, with_bounds_for(cases, getattr(overfitting, name), monkeypatch))
    result = claims.verdict("lora-overfits-less").result
    assert result.verdict == verdict
    assert claims.verdict("better-at-equal-fit").result.verdict == ("falls" if verdict == "depends" else "open")
    parts = result.measured.split("where both have a training loss")
    lists = [re.findall(r"(?:less|more|undecided) at ([\d., ]+)", text) for text in parts]
    assert [sum(len(numbers.split(",")) for numbers in of_kind) for of_kind in lists] == [26, 9]


def with_bounds_for(cases, compared, monkeypatch):
    def jointly(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(compare, "t_bounds", partial(t_bounds, confidence=1 - 0.05 / cases))
            return compared(*args, **options)

    return jointly


def test_overfitting_is_open_at_the_edges_and_depends_on_the_stopping_point_inside(changed):
    result = changed("lora-overfits-less", "overfitting", unchanged, OLD)
    assert result.verdict == "open"
    assert "is at an edge" in result.measured
    assert "LoRA r=8: less at 64, 96, 128, 160, 192, 224; undecided at 256, 288; more at 320" in result.measured
    assert "where both have a training loss in nats" in result.measured
    inside = changed("lora-overfits-less", "overfitting", wider, OLD)
    assert (inside.verdict, inside.on) == ("depends", ON_EQUAL)


def test_a_method_that_rises_less_because_it_is_behind_does_not_overfit_less(changed):
    def behind(rows):
        """LoRA's losses of validation rise less, and its training losses are far higher at every step."""
        made = rising("full")(rows)
        for row in made:
            if row["setup"].startswith("LoRA") and row["train_loss"]:
                row["train_loss"] /= 10  # as low as full's when its validation loss is still high
                row["validation_loss"] += 1.0
        return made

    result = changed("lora-overfits-less", "overfitting", behind, OLD)
    assert (result.verdict, result.on) == ("depends", "whether steps or training losses are equal")


@pytest.mark.parametrize(("setups", "verdict"), [("full", "stands"), ("LoRA", "falls")])
def test_overfitting_is_decided_where_every_stopping_point_agrees(changed, setups, verdict):
    assert changed("lora-overfits-less", "overfitting", rising(setups), OLD).verdict == verdict


@pytest.mark.parametrize(("edge", "verdict"), [("", "stands"), ("largest", "open")])
def test_seeds_that_chose_and_cosines_are_not_judged(changed, edge, verdict):
    best = {"full": 0.0003, "LoRA r=1": 0.002, "LoRA r=8": 0.0006, "last blocks": 0.0003}

    def staged(rows):
        for row in rising("full")(rows):
            judged = row["lr"] == best[row["setup"]]
            row |= {"stage": "judging" if judged else "choosing", "schedule": "constant", "edge": edge}
            yield row
            if judged and row["setup"].startswith("LoRA"):  # they rise more under a cosine
                cosine = {"setup": f"{row['setup']}, cosine", "schedule": "cosine"}
                yield row | cosine | {"validation_loss": row["validation_loss"] + row["step"]}

    assert changed("lora-overfits-less", "overfitting", lambda rows: list(staged(rows)), OLD).verdict == verdict


def test_worse_at_some_training_losses_and_better_at_none_is_worse(changed):
    result = changed("better-at-equal-fit", "overfitting", unchanged)
    assert result.verdict == "falls"
    assert "64 examples, LoRA r=8: undecided at 3, 1.5; more at 2" in result.measured
    assert "1024 examples, LoRA r=8: undecided at 3" in result.measured


def test_generalisation_at_equal_fit(changed):
    assert changed("better-at-equal-fit", "overfitting", unchanged, OLD).verdict == "open"
    inside = changed("better-at-equal-fit", "overfitting", wider, OLD)
    assert inside.verdict == "falls"
    assert "LoRA r=8: undecided at 2; more at 1.5, 1, 0.6" in inside.measured


def test_better_at_some_training_losses_and_worse_at_others_depends_on_them(changed):
    def early(rows):
        """LoRA's validation losses with 64 examples are lower in the first four epochs."""
        for row in rows:
            if row["n_train"] == 64 and is_lora(row) and 0 < row["step"] <= 32:
                row |= {"validation_loss": row["validation_loss"] - 1, "gap": row["gap"] - 1}
            yield row

    both = changed("better-at-equal-fit", "overfitting", lambda rows: list(early(rows)))
    assert (both.verdict, both.on) == ("depends", "the training loss")
    assert "64 examples, LoRA r=8: less at 3; more at 2" in both.measured


# Tasks


def result_of(setup):
    return lambda row: row.get("about") == "result" and row.get("setup") == setup


@pytest.mark.parametrize(
    ("claim_id", "change", "verdict"),
    [
        ("fine-tuning-beats-asking", unchanged, "stands"),
        ("fine-tuning-beats-asking", where(result_of("zero-shot"), accuracy=0.99), "falls"),
        ("fine-tuning-beats-asking", where(result_of("zero-shot"), accuracy=0.75), "open"),
        ("chrf-40-means-translation", unchanged, "falls"),
        ("chrf-40-means-translation", where(lambda row: "exact" in row, exact=0.6), "stands"),
        ("chrf-40-means-translation", where(lambda row: "chrf" in row, chrf=30.0), "open"),
    ],
)
def test_tasks(changed, claim_id, change, verdict):
    change_present = lambda rows: change([{k: v for k, v in row.items() if v is not None} for row in rows])  # noqa: E731
    assert changed(claim_id, "downstream", change_present).verdict == verdict


def test_the_rise_off_domain_differs_between_rates_that_tie(changed):
    result = changed("off-domain-rise-is-the-methods", "ablation", unchanged)
    assert result.verdict == "falls"
    assert "no: rank 64 at 0.0005 and 0.002: validation +0.001 (-0.018 to +0.020), off-domain +0.134" in result.measured
    alike = where(lambda row: row["step"] == 60, off_domain_loss=3.7)
    assert changed("off-domain-rise-is-the-methods", "ablation", alike).verdict == "stands"
    apart = where(lambda row: row["step"] == 60, validation_loss=lambda row: 3 + 100 * row["lr"])
    assert changed("off-domain-rise-is-the-methods", "ablation", apart).verdict == "open"  # no two rates tie
    noisy = where(lambda row: row["step"] == 60, off_domain_loss=lambda row: 3.7 + row["seed"] * 1000 * row["lr"])
    assert changed("off-domain-rise-is-the-methods", "ablation", noisy).verdict == "open"


def test_fine_tuning_is_compared_with_the_prompt_that_the_validation_texts_choose(changed):
    alone = changed("fine-tuning-beats-asking", "downstream", unchanged)
    assert "full +38 points" in alone.measured
    asked = changed("fine-tuning-beats-asking", "elicitation", unchanged)  # the other record is still there
    assert (asked.verdict, asked.shown_by) == (
        "stands",
        "record amd-epyc-2-cores-downstream and record amd-epyc-2-cores-elicitation",
    )
    assert "full +29 points" in asked.measured  # 0.79 against the mean of 0.54, 0.54 and 0.42
    prompt = where(lambda row: row.get("k") == 16 and row["calibration"] == "", accuracy=0.95)
    assert changed("fine-tuning-beats-asking", "elicitation", prompt).measured == asked.measured  # it is not chosen
    chosen = where(lambda row: row.get("k") == 16 and row["calibration"] == "", accuracy=0.95, validation=0.95)
    assert changed("fine-tuning-beats-asking", "elicitation", chosen).verdict == "falls"


# Courses


RATES = {"as taught": (2e-5, 2e-5), "tuned": (1e-4, 8e-3)}


def taught(accuracy=(-0.4, 0.0), loss=(0.3, 0.02), ratio=(0.55, 0.65), seeds=3, edge=""):
    """A record in which LoRA differs from full fine-tuning by so much, as taught and with tuned rates."""
    rows = []
    for i, (rates, lrs) in enumerate(RATES.items()):
        for seed in range(seeds):
            for lora, (method, lr) in enumerate(zip(("full", "LoRA"), lrs, strict=True)):
                row = {"stage": "judging", "setup": f"{method}, {rates}", "lr": lr, "seed": seed, "edge": edge}
                row |= {"outcome": "done", "step": 9, "steps": 9}
                shares = [0.7 + lora * accuracy[i] + 0.02 * (-1) ** (seed + block + lora) for block in range(8)]
                losses = [2.5 + lora * loss[i] + 0.001 * (-1) ** (seed + block + lora) for block in range(8)]
                rows.append(row | {"data": "sentiment", "score_accuracy": json.dumps(shares)})
                rows.append(row | {"data": "docs", "score_test": json.dumps(losses)})
    verdict = f"faster: {ratio[0]:.2f} to {ratio[1]:.2f} of full's time"
    time = {"stage": "time", "model": "smollm2-135m", "tokens": 256}
    rows += [time | {"setup": "full", "verdict": ""}, time | {"setup": "LoRA r=4", "verdict": verdict}]
    return records.Record("taught", "A CPU", {"cpu": "x"}, COMMIT, "2026-11-27", "a command", {}, rows)


@pytest.mark.parametrize(
    ("claim_id", "changes", "verdict"),
    [
        ("cmu-lora-much-worse", {}, "depends"),
        ("cmu-lora-much-worse", {"accuracy": (-0.4, -0.3)}, "stands"),
        ("cmu-lora-much-worse", {"accuracy": (-0.05, 0.05)}, "falls"),
        ("cmu-lora-much-worse", {"accuracy": (-0.4, -0.136)}, "open"),
        ("cmu-lora-much-worse", {"seeds": 2}, "open"),
        ("cmu-lora-much-worse", {"edge": "largest"}, "open"),
        ("smollm-lora-far-better", {}, "falls"),
        ("smollm-lora-far-better", {"loss": (-0.3, -0.2)}, "stands"),
        ("smollm-lora-far-better", {"loss": (-0.3, 0.0)}, "depends"),
        ("smollm-lora-far-better", {"loss": (-0.3, -0.01)}, "open"),
        ("smollm-minutes-not-hours", {}, "falls"),
        ("smollm-minutes-not-hours", {"ratio": (0.2, 0.4)}, "stands"),
        ("smollm-minutes-not-hours", {"ratio": (0.4, 0.6)}, "open"),
    ],
)
def test_what_courses_print_is_decided_as_taught_and_with_tuned_rates(tmp_path, claim_id, changes, verdict):
    records.write(taught(**changes), tmp_path)
    result = claims.verdict(claim_id, tmp_path).result
    assert result.verdict == verdict, result.measured
    assert "lacks" not in result.measured
    assert result.on == ("the learning rates" if verdict == "depends" else "")
    assert claims.verdict(claim_id).result.verdict == "open" or records.load_all("taught")


def test_the_words_on_a_course_have_both_numbers_and_both_rates(tmp_path):
    records.write(taught(), tmp_path)
    measured = claims.verdict("cmu-lora-much-worse", tmp_path).result.measured
    assert "yes: as taught (rates 2e-05 and 2e-05, 3 seeds): accuracy 0.300 against 0.700, by -0.400" in measured
    assert "no: tuned (rates 0.0001 and 0.008, 3 seeds)" in measured
    assert "perplexity 12.43 against 12.18" in claims.verdict("smollm-lora-far-better", tmp_path).result.measured


# Translation


KINDS = ("new combination", "new word", "right by a baseline")


def translation(shares, seeds=3, edge=""):
    """A record in which so many of 40 examples of each kind are right, by data; every third one is of a kind."""
    rows = []
    for data, of_data in shares.items():
        for position in range(120):
            kind = KINDS[position % 3]
            features = "plural, negation" if position % 2 else "plural"
            example = {"stage": "example", "position": position, "kind": kind, "features": features}
            rows.append({"data": data, **example})
        right = [float(position // 3 < 40 * of_data[position % 3]) for position in range(120)]
        for seed in range(seeds):
            row = {"data": data, "stage": "judging", "setup": "LoRA r=8", "seed": seed, "edge": edge}
            rows.append(row | {"outcome": "done", "lr": 1e-3, "score_accuracy": json.dumps(right)})
    return records.Record("translation", "A CPU", {"cpu": "x"}, COMMIT, "2026-11-27", "a command", {}, rows)


def sentences_of(fr, en):
    return {"sentences-fr": fr, "sentences-en": en}


@pytest.mark.parametrize(
    ("claim_id", "shares", "options", "verdict"),
    [
        ("135m-learns-to-translate", {"translate-fr": (0.1, 0.1, 1)}, {}, "falls"),
        ("135m-learns-to-translate", {"translate-fr": (0.9, 0.9, 0)}, {}, "stands"),
        ("135m-learns-to-translate", {"translate-fr": (0.5, 0.5, 1)}, {}, "open"),
        ("135m-learns-to-translate", {"translate-fr": (0.9, 0.9, 0)}, {"seeds": 2}, "open"),
        ("135m-learns-to-translate", {"translate-fr": (0.9, 0.9, 0)}, {"edge": "largest"}, "open"),
        ("135m-learns-a-grammar", sentences_of((0.9, 0.1, 1), (0.9, 0.9, 1)), {}, "depends"),
        ("135m-learns-a-grammar", sentences_of((0.2, 0.1, 1), (0.1, 0.1, 1)), {}, "falls"),
        ("135m-learns-a-grammar", sentences_of((0.9, 0.9, 0), (0.9, 0.9, 0)), {}, "stands"),
    ],
)
def test_translating_is_what_no_baseline_gets_right(tmp_path, claim_id, shares, options, verdict):
    records.write(translation(shares, **options), tmp_path)
    result = claims.verdict(claim_id, tmp_path).result
    assert result.verdict == verdict, result.measured
    assert "lacks" not in result.measured
    assert "baseline:" not in result.measured
    assert bool(result.on) == (verdict == "depends")


def test_the_share_of_right_answers_is_counted_by_kind_and_by_feature():
    record = translation({"sentences-fr": (0.75, 0.25, 1)})
    by_kind = right_by(record, "sentences-fr", "LoRA r=8").set_index("kind")
    assert by_kind["share"].to_dict() == pytest.approx(dict(zip(KINDS, (0.75, 0.25, 1), strict=True)))
    assert (by_kind["examples"] == 40).all()
    assert by_kind.loc["new word", "lower"] < 0.25 < by_kind.loc["new word", "upper"] < 0.5
    by_feature = right_by(record, "sentences-fr", "LoRA r=8", "features").set_index("features")
    assert by_feature["examples"].to_dict() == {"negation": 60, "plural": 120}
    assert by_feature.loc["plural", "share"] == pytest.approx(2 / 3)


# What training wrote


def more_seeds(rows):
    runs = [row for row in rows if row["about"] == "run" and row["run"] == "full"]
    return rows + [row | {"seed": seed} for row in runs for seed in (8, 9)]


def test_the_rank_of_updates_needs_seeds(changed):
    result = changed("full-update-10-to-100-ranks", "spectra", unchanged)
    assert result.verdict == "open"
    assert "16 times rank 8" in result.measured
    assert "1 seed; fewer than 3 seeds" in result.measured
    assert changed("full-update-10-to-100-ranks", "spectra", more_seeds).verdict == "stands"

    def low(rows):
        return where(lambda row: row["about"] == "layer" and row["run"] == "full", energy_rank=8.0)(more_seeds(rows))

    assert changed("full-update-10-to-100-ranks", "spectra", low).verdict == "falls"


# What others published


def test_published_numbers_decide_and_turn(republished):
    same = republished("at-most-1-5-times-faster", "peft-metamathqa", unchanged)
    assert same.verdict == "falls"
    assert "rank32 3.1 times" in same.measured
    assert same.machine == "theirs: PEFT's method comparison on MetaMathQA"
    slow = where(lambda row: row["peft_type"] == "LORA", tokens_per_second=3000.0)
    assert republished("at-most-1-5-times-faster", "peft-metamathqa", slow).verdict == "stands"
    one = where(lambda row: row["experiment"].endswith("rank32"), tokens_per_second=3000.0)
    assert republished("at-most-1-5-times-faster", "peft-metamathqa", one).verdict == "falls"


def test_the_price_of_four_bits_on_the_model_and_in_the_format_that_are_meant(republished):
    result = republished("qlora-takes-more-time", "litgpt", unchanged)
    assert result.verdict == "stands"
    assert "Llama 2 7B +56 %" in result.measured  # 0.2208 against 0.1416 s
    times = {None: 1.0, "nf4": 0.98, "nf4-dq": 1.9}
    faster = where(lambda row: row["model"] == "Llama 2 7B", iteration_s=lambda row: times[row["quantization"]])
    assert republished("qlora-takes-more-time", "litgpt", faster).verdict == "falls"
    result = republished("qlora-33-percent-less-memory", "litgpt", unchanged)
    assert result.verdict == "stands"
    assert "Llama 2 7B -34 %" in result.measured  # 14.14 against 21.30 GB
    equal = where(lambda row: row["model"] == "Llama 2 7B", peak_bytes=10**9)
    assert republished("qlora-33-percent-less-memory", "litgpt", equal).verdict == "falls"


def test_torchtunes_ratio_depends_on_the_recipe(republished):
    result = republished("lora-1-8-times-faster", "torchtune", unchanged)
    assert result.verdict == "depends"
    assert "rtx-a6000: 1.82 times" in result.measured
    # 8,210 tokens a second against 9,174 and 7,210
    assert (
        "0.89 times full's fastest row (chunked cross-entropy), 1.14 times its row with checkpointing"
        in result.measured
    )
    one = where(lambda row: True, tokens_per_second=lambda row: 1820 if row["method"] == "LoRA" else 1000)
    assert republished("lora-1-8-times-faster", "torchtune", one).verdict == "stands"


# Four bits, and the rank from one run


def from_rows(tmp_path, kind, claim_id, rows):
    """The result from a record of that kind with these rows."""
    (record,) = records.load_all("ablation").values()
    records.write(dataclasses.replace(record, what=kind, rows=rows), tmp_path)
    return claims.verdict(claim_id, tmp_path).result


def judged(data, losses, seeds=3, edge=""):
    """Rows of trials that judge: setup -> the loss of each of ten blocks, for every seed."""
    shared = {"stage": "judging", "data": data, "edge": edge, "lr": 1e-3, "outcome": "done", "step": 4, "steps": 4}
    return [
        shared | {"setup": setup, "seed": seed, "score_test": str([loss + 0.001 * seed] * 10)}
        for setup, loss in losses.items()
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("bfloat16", "nf4", "seeds", "edge", "verdict"),
    [
        (3.0, 3.005, 3, "", "stands"),
        (3.0, 2.9, 3, "", "stands"),
        (3.0, 3.1, 3, "", "falls"),
        (3.1, 3.1, 3, "", "depends"),
        (3.0, 3.1, 2, "", "open"),
        (3.0, 3.1, 3, "largest", "open"),
    ],
)
def test_qlora_is_compared_with_both_bases(tmp_path, bfloat16, nf4, seeds, edge, verdict):
    losses = {"float32": 3.0, "bfloat16": bfloat16, "NF4": nf4}
    rows = [row for base, loss in losses.items() for row in judged(base, {base: loss}, seeds, edge)]
    result = from_rows(tmp_path, "quantised", "qlora-matches-16-bits", rows)
    assert result.verdict == verdict
    assert f"{nf4 - 3:+.4f} nats" in result.measured


@pytest.mark.parametrize(("into_float32", "verdict"), [(3.2, "stands"), (3.0, "falls"), (2.9, "falls")])
def test_where_to_merge_is_decided_by_the_losses(tmp_path, into_float32, verdict):
    rows = judged("NF4, merged", {"unmerged": 3.0, "merged": 3.0, "merged into float32": into_float32})
    assert from_rows(tmp_path, "quantised", "merge-into-dequantised-base", rows).verdict == verdict


@pytest.mark.parametrize(("works", "verdict"), [(True, "stands"), (False, "falls"), (None, "open")])
def test_the_rank_from_one_run(tmp_path, works, verdict):
    ranks = {"planted 1": 1, "planted 4": 4, "planted 16": 16, "digits 1": 4, "docs": 16}
    ranks |= {} if works is None else {"style": 1}
    rows = []
    for task, rank in ranks.items():
        losses = {f"r={each}": 3.0 if each >= rank else 3.5 for each in (1, 4, 16, 64)}
        rows += [row | {"rank": int(row["setup"][2:])} for row in judged(task, losses)]
        energy = 16 if works is False and task in ("digits 1", "style") else rank
        scores = {f"score_{name}": 5.0 for name in rank_advice.SPECTRAL} | {"score_energy_rank_90": energy}
        high = {"data": task, "stage": "high rank", "rank": 64, "margin": 0.01, "outcome": "done", "seed": 0}
        rows.append(high | scores | {"score_truncated": '{"64": 1.0, "1": 1.0}'})
    result = from_rows(tmp_path, "rank_advice", "spectrum-predicts-rank", rows)
    assert result.verdict == verdict
    assert "1 times energy_rank_90" in result.measured
    assert "docs +0.0 (always 8: -1.0)" in result.measured
