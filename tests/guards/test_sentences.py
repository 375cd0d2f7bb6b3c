"""What the README and the lessons say about records, held against the records' own numbers.

A record is made anew from time to time, and prose is not: here each sentence is found by its words, and its numbers
are computed again. A sentence that is written otherwise must be written otherwise here too.
"""

import json
import re

import pytest

from lora_lab import DoRA, LoRA, LoRAFA, LoRAPlus, PiSSA, RsLoRA, records
from lora_lab.ablation import overfitting as learning
from lora_lab.ablation.learning_rate import (
    best_rate,
    losses_by_rate,
    powers,
    ratio_interval,
    sample_vertices,
)
from lora_lab.models.digits import DigitsMLP
from lora_lab.studies.claims.deciding import IN_OUTPUT
from lora_lab.studies.claims.rates import by_alpha_and_rank

MEMORY, SPEED = "intel-xeon-processor-2-cores-memory", "amd-epyc-2-cores-speed"
MIB = 2**20


@pytest.fixture(scope="module")
def memory():
    return records.load_all("memory")[MEMORY].frame()


@pytest.fixture(scope="module")
def speed():
    return records.load_all("speed")[SPEED].frame()


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
    """label -> cells of the table's rows, below the heading that begins so."""
    rows = re.search(rf"^\| {re.escape(title)}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows.splitlines()]
    return {label: values for label, *values in cells}


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
            f"{step[column] / MIB:,.0f}" for column in ("predicted_bytes", "measured_bytes", "process_bytes")
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
    closest, share = said(readme, r"in the (\d+) steps of SmolLM2 it is within ([\d.]+) % of the bill")
    over = (memory.process_bytes / memory.measured_bytes - 1).abs()[memory.model == "smollm2-135m"]
    assert (closest, share) == (len(over), round(100 * over.max(), 1))
    (worst,) = memory.setup[off == off.max()]
    assert "bf16" in worst  # "where a bfloat16 product on the CPU takes scratch memory of its own"


def test_the_readmes_table_of_speed(readme, speed):
    rows = table(readme, "LoRA r=8 on SmolLM2-135M: time of a step over full fine-tuning's")
    steps = speed[(speed.model == "smollm2-135m") & (speed.setup == "LoRA r=8")]
    assert rows == {
        f"{step.batch} x {step.length} tokens": [f"{step.predicted_ratio:.2f}", f"{step.ratio:.2f}", interval(step)]
        for step in steps.itertuples()
    }


def interval(step):
    """As the table has it; a record's verdicts name it where there were enough rounds."""
    reach = re.search(r"[\d.]+ to [\d.]+", step.verdict)
    return reach[0] if reach else "too few rounds"


@pytest.mark.parametrize("kind", ["memory", "speed"])
def test_the_costs_page_names_where_and_when_its_records_were_made(readme, kind):
    record = records.load_all(kind)[{"memory": MEMORY, "speed": SPEED}[kind]]
    name = record.device.replace("(R)", "").split(",")[0]
    cores, threads = re.search(r"(\d+) logical cores, (\d+) torch threads", record.facts["cpu"]).groups()
    stated = {
        "memory": f"of an {name} ({cores} cores, {record.date})",
        "speed": f"of an {name} ({cores} cores, {threads} threads, {record.date}, a heap without settings)",
    }
    assert f"The record {stated[kind]}" in " ".join(readme.split())
    heap = [key for key in record.settings["environment"] if key.startswith("MALLOC_")]
    assert heap == (["MALLOC_MMAP_THRESHOLD_"] if kind == "memory" else [])


def test_the_readme_on_the_record_of_speed(readme, speed):
    others = speed[speed.setup != "full"]
    off = others.predicted_ratio / others.ratio - 1
    within, ratios, worst = said(
        readme,
        r"In the record (\d+) of (\d+) ratios are within 15 %, the others, all of steps of 32 tokens, are off by up to "
        r"(\d+) %",
    )
    assert (within, ratios, worst) == ((off.abs() <= 0.15).sum(), len(others), round(100 * off.abs().max()))
    assert "no prediction is doubted" in " ".join(readme.split())
    assert (others.doubts == "").all()
    decided = others[others.verdict.str.match("faster|slower")]
    agree = (decided.predicted_ratio < 1) == (decided.ratio < 1)
    counted = r"In (\d+) of them the measurement decides which method is faster, and the prediction agrees in (\d+): "
    one = r"LoRA r=64 with 32 tokens should take ([\d.]+) of full fine-tuning's time, and took ([\d.]+)\."
    wrong = decided[~agree].squeeze()
    assert said(readme, counted + one) == [
        *(len(decided), agree.sum()),
        *(round(wrong.predicted_ratio, 2), round(wrong.ratio, 2)),
    ]
    assert (wrong.setup, wrong.tokens) == ("LoRA r=64", 32)
    outside = others[off.abs() > 0.15]
    assert within < ratios
    assert set(outside.batch * outside.length) == {32}


def test_the_costs_page_on_what_others_published(readme):
    """The null beside the five predictions, what PEFT's runs reserved, and LitGPT's ratios."""
    peft = {row["experiment"]: row for row in records.published("peft-metamathqa").rows}
    full, lora = peft["full-finetuning/llama-3.2-3B-lr_0.00001"], peft["lora/llama-3.2-3B-rank32"]
    others = ("rank64", "rank64-rslora", "rank10-target-mlp", "rank32-dora", "rank32-lorafa")
    errors = said(readme, r"for the five rows above it is off by (-\d+), (-\d+), (-\d+), (-\d+) and (-\d+) %")
    rates = [peft[f"lora/llama-3.2-3B-{name}"]["tokens_per_second"] / lora["tokens_per_second"] for name in others]
    assert errors == [round(100 * (rate - 1)) for rate in rates]
    reserved = said(readme, r"reserved ([\d.]+) GB with full fine-tuning and ([\d.]+) GB with LoRA r=32")
    assert reserved == [round(row["mean_reserved_bytes"] / 1e9, 1) for row in (full, lora)]
    seconds = {
        (row["model"], row["quantization"], row["micro_batch_size"]): row["iteration_s"]
        for row in records.published("litgpt").rows
    }
    ratios = said(readme, r"two sequences took ([\d.]+) times .*?, and 13B ([\d.]+) times as long as 7B")
    small, large = seconds["Llama 2 7B", None, 1], seconds["Llama 2 13B", None, 1]
    assert ratios == [round(seconds["Llama 2 7B", None, 2] / small, 2), round(large / small, 2)]
    number = r"([\d.]+)"
    in_nf4 = said(readme, rf"LitGPT publishes {number}, {number}, {number} and {number} times")
    doubly = said(readme, rf"with double quantisation {number}, {number}, {number} and {number} times")
    for stated, kind in ((in_nf4, "nf4"), (doubly, "nf4-dq")):
        models = ("phi-1.5", "StableLM Alpha 3B", "Llama 2 7B", "Llama 2 13B")
        assert stated == [round(seconds[name, kind, 1] / seconds[name, None, 1], 2) for name in models]


def test_lesson_05_explains_what_the_record_shows(lesson, speed):
    """By the model LoRA over full climbs with tokens at rank 1, and with the rank; few adapted blocks keep it low."""
    text = " ".join(lesson("05_speed").split())
    assert "According to the model, the optimiser's work pulls the ratio down when tokens are few" in text
    assert "A higher rank pushes it up, fewer adapted blocks pull it down." in text
    predicted, ratios = (
        speed[speed.model == "smollm2-135m"].pivot_table(column, "tokens", "setup")
        for column in ("predicted_ratio", "ratio")
    )
    for column in (predicted, ratios):
        assert column["LoRA r=1"][32] < column["LoRA r=1"][512]
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


@pytest.fixture(scope="module")
def downstream():
    return records.load_all("downstream")[f"{REAL}-downstream"]


def results(record, task):
    """way -> the results of a task at the chosen rate, in the order of their seeds."""
    rows = record.frame()
    rows = rows[(rows.about == "result") & (rows.task == task)]
    return {setup: own.sort_values("seed") for setup, own in rows.groupby("setup")}


def test_lesson_09_on_the_readme_of_the_adapters(lesson, request):
    adapters = (request.config.rootpath / "lora_lab/adapters/data/README.md").read_text(encoding="utf-8")
    in_style, all_stories = said(lesson("09_many_tasks"), r"the adapter's README in .*? counts (\d+) of (\d+)\.")
    counted = said(adapters, r"stories in the style, of (\d+) test prompts, sampled \| 0 \| (\d+) \|")
    assert counted == [all_stories, in_style]
    repeated = said(lesson("09_many_tasks"), r"README, (\d+) % of the base's sequences .*? and (\d+) % of")
    assert repeated == said(adapters, r"repeated three-word sequences, greedy \| (\d+) % \| (\d+) % \|")


@pytest.fixture(scope="module")
def overfitting():
    (record,) = records.load_all("overfitting").values()
    return record


@pytest.fixture(scope="module")
def claims(request):
    """The claims of a lesson's stored outputs: id -> the verdict."""

    def read(name):
        cells = json.loads((request.config.rootpath / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        stored = [
            output["metadata"][IN_OUTPUT]["results"] for output in outputs if IN_OUTPUT in output.get("metadata", {})
        ]
        return {name: result["verdict"] for results in stored for name, result in results.items()}

    return read


def test_lesson_05_refutes_what_the_intervals_of_the_record_refute(claims, speed):
    steps = speed[(speed.model == "small") & (speed.tokens >= 512)].set_index(["setup", "tokens"])
    lora, full = steps.loc["LoRA r=8"], steps.loc["full"]
    lowest = lora.verdict.str.extract(r"([\d.]+) to")[0].astype(float)
    verdict = "falls" if (lowest > lora.flops / full.flops).all() else "open"
    assert claims("05_speed")["time-ratio-is-flop-ratio"] == verdict


def test_lesson_07_decides_on_overfitting_only_what_every_stopping_point_and_training_loss_shows(claims, overfitting):
    frame = overfitting.frame().query("stage == 'judging' and schedule == 'constant'")
    by_step, by_loss = learning.by_stopping_point(frame), learning.by_training_loss(frame, [3, 2, 1.5])
    risen = by_step[(by_step.lower != 0) | (by_step.upper != 0)]
    verdicts = {*risen.verdict, *by_loss.verdict}
    assert frame.edge.eq("").all()
    expected = "depends" if {"less", "more"} <= verdicts else "open"
    assert claims("07_overfitting")["lora-overfits-less"] == expected
    fit = "depends" if {"less", "more"} <= {*by_loss.verdict} else "falls" if "more" in {*by_loss.verdict} else "open"
    assert claims("07_overfitting")["better-at-equal-fit"] == fit


def test_lesson_09_decides_nothing_where_the_best_rate_is_the_highest_tried(claims, downstream):
    lrs = downstream.settings["lrs"]
    best = {setup: own.lr.iloc[0] for setup, own in results(downstream, "translate-fr").items()}
    at_edge = any(best[setup] in (min(lrs[setup]), max(lrs[setup])) for setup in ("full", "LoRA r=8"))
    assert claims("09_many_tasks")["135m-learns-to-translate"] == "open" or not at_edge


def test_lesson_10_knows_the_effective_rates_of_B(request):
    """The factor in front of B A beside LoRA's, times the factor of B's learning rate: what methods are compared by."""
    cells = json.loads((request.config.rootpath / "notebooks/10_variants.ipynb").read_text(encoding="utf-8"))["cells"]
    (stated,) = re.findall(r"^TIMES = (\{.*\})$", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    methods = {"LoRA": LoRA(4, 8), "rsLoRA": RsLoRA(4, 8), "LoRA+": LoRAPlus(4, 8, ratio=4), "LoRA-FA": LoRAFA(4, 8)}
    methods |= {"PiSSA": PiSSA(4, 8), "DoRA": DoRA(4, 8)}
    times = {}
    for name, method in methods.items():
        method.prepare(net := DigitsMLP(width=16), seed=0)
        times[name] = net.hidden1.scaling / 2 * max(group.get("lr_factor", 1) for group in method.groups(net))
    assert json.loads(stated) == times


def test_the_page_of_questions_states_how_far_the_best_rates_are_above_full_fine_tunings(readme, lesson):
    (frame,) = (record.frame() for record in records.load_all("rates").values())
    losses = {setup: losses_by_rate(rows) for setup, rows in frame[frame["data"] == "docs"].groupby("setup")}
    best = {setup: best_rate(of_setup).vertex for setup, of_setup in losses.items()}
    samples = {setup: sample_vertices(of_setup) for setup, of_setup in losses.items()}
    reach = {setup: ratio_interval(of_setup, samples["full"]) for setup, of_setup in samples.items()}
    fixed = [best[f"r={rank}, alpha = 32"] / best["full"] for rank in (1, 2, 4, 8, 16, 32, 64)]
    stated = said(readme, r"was (\d+) to (\d+) times full fine-tuning's with alpha = 32, at all ranks from 1 to 64")
    assert stated == [round(min(fixed)), round(max(fixed))]
    lower, upper = zip(*(reach[f"r={rank}, alpha = 32"] for rank in (1, 2, 4, 8, 16, 32, 64)), strict=True)
    assert said(readme, r"intervals reach from (\d+) to (\d+)\)") == [round(min(lower)), round(max(upper))]
    moving = [best[f"r={rank}, alpha = 2r"] / best["full"] for rank in (1, 64)]
    stated = said(
        readme,
        r"alpha = 2r it was (\d+) times at rank 1 \((\d+) to (\d+)\) and (\d+) times at rank 64 \((\d+) to (\d+)\)",
    )
    one, most = (reach[f"r={rank}, alpha = 2r"] for rank in (1, 64))
    assert stated == [round(number) for number in (moving[0], *one, moving[1], *most)]
    of_alpha, of_rank = powers(by_alpha_and_rank(frame[frame["data"] == "docs"]))
    assert abs(of_alpha[0] + 0.5) < 0.1  # "about proportional to 1 / √alpha"
    assert 0 < of_rank[0] < 0.15  # "a slight rise"
    assert "on SmolLM2-135M a slight rise" in lesson("12_which_rate")
