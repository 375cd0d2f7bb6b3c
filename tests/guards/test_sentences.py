"""What the README and the lessons say about records, held against the records' own numbers.

A record is made anew from time to time, and prose is not: here each sentence is found by its words, and its numbers
are computed again. A sentence that is written otherwise must be written otherwise here too.
"""

import json
import math
import re

import pandas
import pytest

from lora_lab import records
from lora_lab.ablation import overfitting as learning

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
    """The README and the pages that it leads to."""
    root = request.config.rootpath
    return "\n".join(path.read_text(encoding="utf-8") for path in (root / "README.md", *sorted(root.glob("docs/*.md"))))


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


REAL = "amd-epyc-2-cores"  # the ablation and the spectra that lessons 06 and 11 tell of


def test_lesson_08_on_all_matrices(lesson):
    text = lesson("11_what_training_wrote")
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
    text = lesson("11_what_training_wrote")
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


@pytest.fixture(scope="module")
def downstream():
    return records.load_all("downstream")[f"{REAL}-downstream"]


def results(record, task):
    """way -> the results of a task at the chosen rate, in the order of their seeds."""
    rows = record.frame()
    rows = rows[(rows.about == "result") & (rows.task == task)]
    return {setup: own.sort_values("seed") for setup, own in rows.groupby("setup")}


def test_lesson_02_on_scratch_and_fine_tuned(lesson, downstream):
    text = lesson("02_why_fine_tune")
    train, test = said(text, r"There are (\d+) texts to learn from and (\d+) in the test")
    rows = downstream.frame()
    task = rows[(rows.about == "task") & (rows.task == "sentiment")].squeeze()
    assert (train, test) == (task.train, task.test)
    steps, batch = said(
        text, r"(\d+) steps of (\d+) texts, three seeds, the learning rate of each way chosen from three"
    )
    plan = downstream.settings
    assert (steps, batch, 3) == (plan["steps"]["sentiment"], plan["batch_size"], plan["seeds"])
    assert said(text, r"and (\d+) of the texts were read once, none twice") == [steps * batch] < [train]
    found = results(downstream, "sentiment")
    low, high = said(text, r"validation loss ends at ([\d.]+) to (\d\.\d+)")
    losses = found["scratch"].validation_loss
    assert [low, high] == [round(losses.min(), 2), round(losses.max(), 2)]
    assert said(text, r"\$\\ln 3 / 2 = ([\d.]+)\$ nats") == [round(math.log(3) / 2, 2)]
    assert "that of one word said to all 69 texts: neutral, negative, neutral" in " ".join(text.split())
    shares = found["scratch"].accuracy  # of a word that is right for a share p, F1 is 2 p / (1 + p); of the others 0
    assert found["scratch"].macro_f1.tolist() == pytest.approx((2 * shares / (1 + shares) / 3).tolist())
    assert shares.iloc[0] == shares.iloc[2] > shares.iloc[1]
    words, total, asked = said(text, r"gets (\d+) of the (\d+) right: .*? only asked \((\d+)\)")
    assert (total, asked) == (test, round(test * found["zero-shot"].accuracy.item()))
    assert said(text, r"gets (\d+) or (\d+)\.") == sorted({round(test * share) for share in found["full"].accuracy})
    assert asked < words < test * found["full"].accuracy.min()  # words: lesson 02 fits them, and asserts this
    assert "its best rate is the highest that was tried" in " ".join(text.split())
    assert set(found["scratch"].lr) == {max(plan["lrs"]["scratch"])}


def test_lesson_09_on_how_the_record_was_made(lesson, downstream, request):
    """Its other sentences about the record are printed from the numbers."""
    adapters = (request.config.rootpath / "lora_lab/adapters/data/README.md").read_text(encoding="utf-8")
    all_stories, in_style = said(lesson("09_many_tasks"), r"For all (\d+), the adapter's README in .*? counts (\d+)\.")
    counted = said(adapters, r"stories in the style, of (\d+) test prompts, sampled \| 0 \| (\d+) \|")
    assert counted == [all_stories, in_style]
    text, plan = " ".join(lesson("09_many_tasks").split()), downstream.settings
    steps = plan["steps"].values()
    numbers = said(text, r"Training is short, (\d+) to (\d+) steps of (\d+) examples")
    assert numbers == [min(steps), max(steps), plan["batch_size"]]
    assert "of each chosen from three by the validation loss of one seed, three seeds at that rate" in text
    assert {len(plan["lrs"][setup]) for setup in ("full", "LoRA r=8")} == {plan["seeds"]} == {3}
    assert said(text, r"and (\d+) texts had to show which words we want") == [
        plan["steps"]["sentiment"] * plan["batch_size"]
    ]
    (guess,) = said(text, r"\$\\ln 3 / 2 = ([\d.]+)\$ nats")
    assert guess == round(math.log(3) / 2, 2)
    assert "The model from scratch hardly pays more, and it says one word to all texts." in text
    scratch = results(downstream, "sentiment")["scratch"]
    assert guess < scratch.test_loss.mean() < guess + 0.1
    assert "The judge accepts nearly all stories of the fine-tuned models" in text
    stories = results(downstream, "style")
    assert min(stories[setup].in_style.min() for setup in ("full", "LoRA r=8")) > 0.9


@pytest.fixture(scope="module")
def overfitting():
    return records.load_all("overfitting")[f"{REAL}-overfitting"]


def at_chosen_rates(record):
    """All that was measured; all trials in short; those at the chosen rates, and their means."""
    rows = record.frame()
    found = learning.summarise_trials(rows)
    picked = learning.at_best_rate(found)
    return rows, found, picked, picked.groupby(["n_train", "setup"]).mean(numeric_only=True)


def test_lesson_06_on_who_overfits(lesson, overfitting):
    text = lesson("07_overfitting")
    rows, _, picked, mean = at_chosen_rates(overfitting)
    (before,) = said(text, r"Before training the loss on the manual is ([\d.]+) nats")
    assert before == round(rows[rows.step == 0].validation_loss.mean(), 2)
    ended = said(
        text, r"it is ([\d.]+) to ([\d.]+) with 16 pieces \(last blocks: ([\d.]+)\) and ([\d.]+) to (\d\.\d) with 256"
    )
    few, many = mean.last_loss[16].drop("last blocks"), mean.last_loss[256]
    last_blocks = round(mean.last_loss[16, "last blocks"], 2)
    assert ended == [
        *(round(one, 1) for one in (few.min(), few.max())),
        last_blocks,
        *many.agg(["min", "max"]).round(1),
    ]
    trained, tokens = said(text, r"it trains ([\d,]+) numbers of 135 million, but 16 pieces hold only (\d+) tokens")
    assert {trained} == set(rows[rows.setup == "LoRA r=1"].trainable_parameters)
    assert tokens == 16 * overfitting.settings["seq_len"]
    edges = picked.drop_duplicates(["n_train", "setup"]).edge
    assert "Six of the eight chosen rates are the highest or the lowest that was tried" in text
    assert ((edges != "").sum(), len(edges)) == (6, 8)


def test_lesson_06_on_the_rates_that_were_not_chosen(lesson, overfitting):
    text = lesson("07_overfitting")
    _, found, picked, _ = at_chosen_rates(overfitting)
    first = found[found.seed == 0].set_index(["n_train", "setup", "lr"]).sort_index()
    other, chosen, within, low, high = said(
        text,
        r"Rank 1 at ([\d.]+) comes as low as at its chosen ([\d.]+), within ([\d.]+) nats. "
        r"There it ends at ([\d.]+), and at the chosen rate at (\d\.\d+)",
    )
    tie = first.loc[16, "LoRA r=1"]
    assert {chosen} == set(picked[(picked.n_train == 16) & (picked.setup == "LoRA r=1")].lr)
    assert 0 < tie.best_loss[other] - tie.best_loss[chosen] < within
    assert [low, high] == [round(tie.last_loss[lr], 2) for lr in (other, chosen)]
    last = first.loc[16, "last blocks"]
    within, *rises = said(
        text, r"three rates within ([\d.]+) nats, and they rise by ([\d.]+), ([\d.]+) and (\d\.\d+)\."
    )
    assert round(last.best_loss.max() - last.best_loss.min(), 2) == within
    assert rises == [round(rise, 2) for rise in last.overfit]
    assert "on the first seed at each of the nine pairs of rates" in text
    rises = first.overfit[256]
    assert len(rises["full"]) * len(rises["LoRA r=8"]) == 9
    assert rises["LoRA r=8"].min() > rises["full"].max()
    third, chosen = 0.002, 0.006
    eighth = first.loc[16, "LoRA r=8"]
    assert {chosen} == set(picked[(picked.n_train == 16) & (picked.setup == "LoRA r=8")].lr)
    (within,) = said(text, r"a third of rank 8's rate comes as low within ([\d.]+) nats")
    assert 0 < eighth.best_loss[third] - eighth.best_loss[chosen] < within
    numbers = said(text, r"forgotten ([\d.]+) to ([\d.]+) nats more than full .*? rate it is ([\d.]+) to (\d\.\d+)\.")
    trials = found[(found.n_train == 16) & (found.seed == 0)]
    full = trials[(trials.setup == "full") & (trials.lr == 3e-4)]
    reach = []
    for lr in (third, chosen):
        pair = pandas.concat([full, trials[(trials.setup == "LoRA r=8") & (trials.lr == lr)]])
        both = [
            learning.at_equal_learning(overfitting.frame(), pair, share).set_index("setup").forgotten
            for share in (0.8, 0.9, 1)
        ]
        more = [one["LoRA r=8"] - one["full"] for one in both]
        reach += [round(min(more), 2), round(max(more), 2)]
    assert numbers == reach


def test_lesson_06_on_lora_against_full_fine_tuning(lesson, overfitting):
    text = lesson("07_overfitting")
    rows, _, picked, _ = at_chosen_rates(overfitting)
    own = rows.merge(picked[["n_train", "setup", "lr"]].drop_duplicates())
    told = learning.compare_over_rates(own, "overfit").set_index(["n_train", "setup"])
    assert "With 16 pieces that is open" in text
    assert set(told.verdict[16].drop("last blocks")) == {"open"}
    low, high = said(text, r"rank 8 overfits \*more\* than full fine-tuning, by ([\d.]+) to ([\d.]+) nats")
    thin = said(text, r"Rank 1 does so by ([\d.]+) to (\d\.\d+),")
    for setup, numbers in (("LoRA r=8", [low, high]), ("LoRA r=1", thin)):
        assert numbers == told.loc[(256, setup), ["lower", "upper"]].astype(float).round(2).tolist()
        assert told.verdict[256, setup] == "more"
    ends = learning.compare_over_rates(own, "best_loss").set_index(["n_train", "setup"])
    low, high, least = said(
        text, r"at both sizes, by ([\d.]+) to ([\d.]+) nats, and rank 1 with 16 pieces by ([\d.]+) at most"
    )
    last = ends.xs("last blocks", level="setup")
    assert [low, high, least] == [round(x, 2) for x in (last.lower.min(), last.upper.max(), ends.upper[16, "LoRA r=1"])]
    assert ends.verdict.drop("last blocks", level="setup").to_dict() == {
        (16, "LoRA r=1"): "more",
        (16, "LoRA r=8"): "open",
        (256, "LoRA r=1"): "open",
        (256, "LoRA r=8"): "open",
    }
    assert "passed after one to three epochs of ten. That is 2 to 6 steps with 16 pieces, and 32 or 64 with 256" in text
    steps = picked[(picked.n_train != 16) | (picked.setup != "last blocks")].groupby("n_train").best_step
    assert (steps.min()[16], steps.max()[16], steps.min()[256], steps.max()[256]) == (2, 6, 32, 64)
    assert "full fine-tuning is lowest at the first look" in text
    assert set(picked[(picked.n_train == 256) & (picked.setup == "full")].best_step) == {32}


def test_lesson_06_on_who_forgets(lesson, overfitting):
    text = lesson("07_overfitting")
    rows, found, picked, mean = at_chosen_rates(overfitting)
    highest, worst = said(
        text, r"at most ([\d.]+) nats higher than before training, and in the worst .*? run (\d\.\d+)\."
    )
    assert [highest, worst] == [round(mean.forgotten.max(), 2), round(picked.forgotten.max(), 2)]
    late = mean.forgotten_at_last.drop((16, "last blocks"))
    assert said(text, r"Those who go on forget ([\d.]+) to ([\d.]+) nats") == [
        round(late.min(), 1),
        round(late.max(), 1),
    ]
    own = rows.merge(picked[["n_train", "setup", "lr"]].drop_duplicates())
    told = {share: learning.compare_over_rates(own, "forgotten", share=share) for share in (0.8, 0.9, 1)}
    verdicts = pandas.DataFrame({share: one.set_index(["n_train", "setup"]).verdict for share, one in told.items()})
    same = verdicts[verdicts.nunique(axis=1) == 1].iloc[:, 0].drop("last blocks", level="setup")
    assert same[same != "open"].to_dict() == {(16, "LoRA r=8"): "more"}
    assert set(same[256]) == {"open"}  # "With 256 pieces no verdict on LoRA holds"
    lora = pandas.concat(told.values()).query("n_train == 16 and setup == 'LoRA r=8'")
    reach = [round(lora.lower.min(), 2), round(lora.upper.max(), 2)]
    assert said(text, r"the bounds run from ([\d.]+) to ([\d.]+) nats") == reach
    chosen = picked[picked.n_train == 16].groupby("setup").lr.first()
    (most,) = said(text, r"At its lowest loss no run has forgotten more than ([\d.]+) nats")
    assert most - 0.01 < found.forgotten.max() < most
    (least,) = said(text, r"at every rate full fine-tuning and LoRA rise by ([\d.]+) nats or more")
    many = found[(found.n_train == 256) & (found.setup != "last blocks")]
    assert least == round(many.overfit.min(), 1) <= many.overfit.min()
    assert "And both rates are the highest that were tried" in text
    setups = overfitting.settings["setups"]
    assert all(chosen[setup] == max(setups[setup]["lrs"]) for setup in ("full", "LoRA r=8"))
    assert "have forgotten half a nat less than full fine-tuning" in text
    late = (
        learning.compare_over_rates(own, "forgotten_at_last").set_index(["n_train", "setup"]).loc[(256, "last blocks")]
    )
    assert (round((late.lower + late.upper) / 2, 1), late.verdict) == (-0.5, "less")
