"""What the README and the lessons say about records, held against the records' own numbers.

A record is made anew from time to time, and prose is not: here each sentence is found by its words, and its numbers
are computed again. A sentence that is written otherwise must be written otherwise here too.
"""

import json
import re

import pandas
import pytest

from lora_lab import records
from lora_lab.ablation import summary

CPU = "intel-xeon-processor-2-cores"
MIB = 2**20


@pytest.fixture(scope="module")
def memory():
    return records.load_all("memory")[f"{CPU}-memory"].frame()


@pytest.fixture(scope="module")
def speed():
    return records.load_all("speed")[f"{CPU}-speed"].frame()


@pytest.fixture(scope="module")
def readme(request):
    return (request.config.rootpath / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lesson(request):
    def read(name):
        cells = json.loads((request.config.rootpath / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")

    return read


def said(text, pattern):
    """The numbers in the one place where the text has these words."""
    (found,) = re.finditer(pattern, " ".join(text.split()))
    return [float(number.replace(",", "")) for number in found.groups()]


def table(text, title):
    """label -> numbers of the table's rows, below the heading that begins so."""
    rows = re.search(rf"^\| {re.escape(title)}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows.splitlines()]
    return {label: [float(value.replace(",", "")) for value in values] for label, *values in cells}


def main_case(frame):
    """The README's table is of these."""
    return frame[(frame.model == "smollm2-135m") & (frame.batch == 2) & (frame.length == 128)].set_index("setup")


def test_the_readmes_table_of_memory(readme, memory):
    names = {
        "full fine-tuning": "full",
        "full fine-tuning, checkpointing": "full, checkpointing",
        "LoRA r=8": "LoRA r=8",
        "LoRA-FA r=8": "LoRA-FA r=8",
        "LoRA r=8, base in NF4": "LoRA r=8, NF4 base",
        "LoRA r=8, base in bfloat16": "LoRA r=8, bf16",
        "LoRA r=8, checkpointing": "LoRA r=8, checkpointing",
        "LoRA r=8, lean and checkpointing": "LoRA r=8, lean, checkpointing",
    }
    rows, steps = table(readme, "one step of SmolLM2-135M, 2 x 128 tokens, MiB"), main_case(memory)
    assert rows.keys() == names.keys()
    for label, numbers in rows.items():
        step = steps.loc[names[label]]
        assert numbers == [
            round(step[column] / MIB) for column in ("predicted_bytes", "measured_bytes", "process_bytes")
        ]


def test_the_readme_on_how_far_the_memory_bills_are_off(readme, memory):
    off = (memory.predicted_bytes / memory.measured_bytes - 1).abs()
    steps, most, few, many = said(
        readme,
        r"Of (\d+) configurations on two sizes of model the prediction was off by ([\d.]+) % at most, .*?"
        r"and by under ([\d.]+) % in (\d+)",
    )
    assert (steps, most) == (len(memory), round(100 * off.max(), 1))
    assert many == (100 * off < few).sum()
    assert memory.model.nunique() == 2
    closest, share = said(readme, r"in the (\d+) steps of SmolLM2 within ([\d.]+) % of the bill")
    over = (memory.process_bytes / memory.measured_bytes - 1).abs()[memory.model == "smollm2-135m"]
    assert (closest, share) == (len(over), round(100 * over.max(), 1))
    (worst,) = memory.setup[off == off.max()]
    assert "bf16" in worst  # "where a bfloat16 product on the CPU takes scratch memory of its own"


def test_the_readmes_table_of_speed(readme, speed):
    rows = table(readme, "LoRA r=8 on SmolLM2-135M: time of a step over full fine-tuning's, 2 cores")
    steps = speed[(speed.model == "smollm2-135m") & (speed.setup == "LoRA r=8")]
    assert rows == {
        f"{step.batch} x {step.length} tokens": [round(step.predicted_ratio, 2), round(step.ratio, 2)]
        for step in steps.itertuples()
    }


def test_the_readme_on_the_record_of_speed(readme, speed):
    others = speed[speed.setup != "full"]
    off = others.predicted_ratio / others.ratio - 1
    within, ratios, worst = said(readme, r"In the record (\d+) of (\d+) are within 15 %, the other is off by (-\d+) %")
    assert (within, ratios, worst) == ((off.abs() <= 0.15).sum(), len(others), round(100 * off[off.abs().idxmax()]))
    assert within == ratios - 1


def test_lesson_04_on_bfloat16_in_the_records(lesson, memory):
    assert "There LoRA's peak is still lower, but the reason is visible already" in lesson("04_memory")
    full, lora = main_case(memory).loc["full, bf16"], main_case(memory).loc["LoRA r=8, bf16"]
    assert lora.measured_bytes < full.measured_bytes
    assert lora.saved_bytes > full.saved_bytes


def test_lesson_04_on_the_ratio_of_the_peaks(lesson, memory):
    assert "the ratio of the two peaks must fall from the static one towards that of the bytes a token: 1.08" in lesson(
        "04_memory"
    )
    one_text = memory[(memory.model == "smollm2-135m") & (memory.batch == 1)]
    peaks = one_text.pivot_table("measured_bytes", "length", "setup")
    ratios = (peaks["full"] / peaks["LoRA r=8"]).sort_index().tolist()
    assert 3.5 > ratios[0] > ratios[1] > ratios[2] > 1.08


def test_lesson_05_explains_what_the_record_shows(lesson, speed):
    """LoRA over full climbs with the tokens and with the rank, and is low where few blocks have adapters."""
    text = lesson("05_speed")
    assert (
        "With more tokens a step the same saving is spread thinner: the ratio climbs towards the one of the FLOPs"
        in (" ".join(text.split()))
    )
    assert "Rank pushes up, fewer adapted blocks pull down." in " ".join(text.split())
    ratios = speed[speed.model == "smollm2-135m"].pivot_table("ratio", "tokens", "setup")
    assert ratios["LoRA r=8"][32] < ratios["LoRA r=8"][512]
    assert (ratios["LoRA r=256"] > ratios["LoRA r=8"]).all()
    assert (ratios["LoRA r=8, last 1 block"] < ratios["LoRA r=8"]).all()


@pytest.mark.parametrize("change", [("980", "990"), ("Of 56", "Of 57"), ("at most, where", "at worst, where")])
def test_a_changed_sentence_is_noticed(readme, memory, change):
    other = readme.replace(*change)
    assert other != readme

    def both():
        test_the_readmes_table_of_memory(other, memory)
        test_the_readme_on_how_far_the_memory_bills_are_off(other, memory)

    with pytest.raises((AssertionError, ValueError)):
        both()


REAL = "amd-epyc-2-cores"  # the ablation and the spectra that lessons 07 and 08 tell of


def test_lesson_07_on_the_real_model(lesson):
    text = lesson("07_rank_ablation")
    frame = records.load_all("ablation")[f"{REAL}-ablation"].frame()
    real = summary(frame)
    by_rank = {one.rank: one for one in real.ranks}
    too_small, lost, reference = said(text, r"rank (\d+) is too small: it loses ([\d.]+) nats against rank (\d+)")
    assert by_rank[too_small].standing == "too small"
    assert (lost, reference) == (round(by_rank[too_small].difference, 2), max(by_rank))
    assert by_rank[too_small].lower > real.margin  # "and the interval is clear of the margin"
    open_ranks = said(text, r"Ranks (\d+) and (\d+) are open. They lose about a hundredth")
    assert [one.rank for one in real.ranks if one.standing == "open"] == open_ranks
    assert all(0 < by_rank[rank].difference < 0.02 for rank in open_ranks)
    assert not real.decided
    last = frame[frame.step == frame.steps]
    ended = last.merge(pandas.DataFrame([{"rank": one.rank, "lr": one.lr} for one in real.ranks]))
    winners = {int(own.loc[own.test_loss.idxmin(), "rank"]) for _, own in ended.groupby("seed")}
    assert winners == set(said(text, r"One seed alone would have named (\d+) or (\d+)"))
    high, low_rank, low, high_rank = said(
        text, r"falls from ([\d.]+), the highest that was tried, at rank (\d+) to ([\d.]+) at rank (\d+)\."
    )
    assert (by_rank[low_rank].lr, by_rank[high_rank].lr) == (high, low)
    assert high == frame.lr.max()


def test_lesson_08_on_all_matrices(lesson):
    text = lesson("08_svd_of_updates")
    rows = records.load_all("spectra")[f"{REAL}-spectra"].frame()
    layers = rows[rows.about == "layer"]
    level, updates = said(text, r"by energy rank, a whole number, (\d+) of (\d+) are level with it")
    for name in ("effective_rank", "stable_rank"):  # "every update of every run is below noise"
        assert (layers[name] < layers[f"{name}_low"]).all()
    assert (layers.energy_rank <= layers.energy_rank_low).all()
    assert (level, updates) == ((layers.energy_rank == layers.energy_rank_low).sum(), len(layers))
    middle = layers.groupby("run").energy_rank.median()
    full, eight, rest = said(
        text,
        r"Full fine-tuning takes (\d+) \(the median layer\) for nine tenths of its energy, LoRA of rank 8 takes (\d+), "
        r"LoRA of rank 64 takes (\d+)",
    )
    assert [full, eight, rest] == [round(middle[run]) for run in ("full", "LoRA r=8", "LoRA r=64")]
    pairs = rows[rows.about == "pair"]
    for number in (1, 8):  # "share little on the side of the inputs, and clearly more on the side of the outputs"
        shares = pairs.groupby("other")[[f"inputs_{number}", f"outputs_{number}"]].median()
        assert (shares[f"outputs_{number}"] > 3 * shares[f"inputs_{number}"]).all()
    assert "There is no intruder, and noise of that size makes none either" in text
    found = rows[rows.about == "intruders"]
    assert found.intruders.sum() == 0 == found.intruders_high.max()
    assert 0.005 < layers.relative_norm.median() < 0.02  # "a hundredth of the weight"


def test_lesson_08_on_the_cuts_of_the_record(lesson):
    text = lesson("08_svd_of_updates")
    rows = records.load_all("spectra")[f"{REAL}-spectra"].frame()
    loss = rows[rows.about == "run"].set_index("run").test_loss
    cuts = rows[rows.about == "cut"].set_index(["run", "rank"])

    def kept(run, rank):
        return round(100 * (loss["base"] - cuts.test_loss[run, rank]) / (loss["base"] - loss[run]))

    rank, gain, energy, whole = said(
        text,
        r"A full fine-tune cut to rank (\d+) keeps (\d+) % of its gain with (\d+) % of its energy. "
        r"At full rank (\d+) %",
    )
    assert (kept("full", rank), round(100 * cuts.energy["full", rank]), kept("full", 576)) == (gain, energy, whole)
    gain, rank = said(text, r"LoRA of rank 64 keeps (\d+) % in (\d+) directions")
    assert kept("LoRA r=64", rank) == gain
