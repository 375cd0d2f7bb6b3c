"""What the board draws of each kind of record, each picture with a description for those who cannot see it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab import plots
from lora_lab.ablation import overfitting
from lora_lab.ablation.compare import smallest_sufficient_rank
from lora_lab.ablation.stats import best_rate, losses_by_rate
from lora_lab.studies.claims import compared
from lora_lab.studies.claims.measured import MARGIN, time_interval
from lora_lab.studies.claims.rates import FIXED_ALPHA, FULL, SAME_SCALING, best_by_rank
from lora_lab.studies.records import KINDS, Record

Picture = tuple[Figure, str]
SMOLLM2 = "smollm2-135m"
NATS = "nats per token"
SCORES = {  # task -> column of its main score, and the axis
    "sentiment": ("accuracy", "accuracy"),
    "summarise": ("rouge_l", "ROUGE-L (0 to 1)"),
    "translate-fr": ("chrf", "chrF (0 to 100)"),
    "style": ("in_style", "share in the style"),
}


def below(ax: Axes, title: str) -> Figure:
    """The figure with its legend below the axes, which leaves them wide enough for a phone."""
    handles, labels = ax.get_legend_handles_labels()
    ax.get_legend().remove()
    ax.set_title(title)
    ax.figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    return ax.figure


def pareto_front(points: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the labels that no other beats: none is as low in every quantity and lower in one (the Pareto front).

    Args:
        points: label -> quantities, of which lower is better.
    """
    values = np.array(list(points.values()), dtype=float)  # (labels, quantities)
    beaten = [((values <= own).all(1) & (values < own).any(1)).any() for own in values]
    return [label for label, worse in zip(points, beaten, strict=True) if not worse]


def trade_off(points: Mapping[str, np.ndarray], xlabel: str, ylabel: str) -> Axes:
    """Two quantities of each setup, of which lower is better: a filled mark at the mean, a small one for each seed.

    A grey line joins the means that no other beats in both quantities.

    Args:
        points: setup -> (seeds, 2), the quantities on the two axes.
        xlabel, ylabel: the quantities, with their units.
    """
    ax = plots.plt.subplots(figsize=(5, 3.8))[1]
    seeds = {label: np.asarray(values, dtype=float) for label, values in points.items()}
    means = {label: values.mean(axis=0).tolist() for label, values in seeds.items()}
    front = sorted(means[label] for label in pareto_front(means))
    ax.plot(*zip(*front, strict=True), color="#999999", linewidth=1.2, drawstyle="steps-post", zorder=1)
    for label, style in plots.line_styles(list(points)).items():
        mark = {**style, "linestyle": "none"}
        ax.plot(*seeds[label].T, **mark, markersize=4, fillstyle="none")
        ax.plot(*means[label], **mark, markersize=9, label=label)
    ax.margins(0.12)
    ax.locator_params(nbins=5)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize="small", columnspacing=1, handletextpad=0.2)
    return ax


def by_setup(table: pandas.DataFrame, xlabel: str) -> Figure:
    """A number of each setup, a panel below another for each kind of data: a mark for each seed, a bar at their mean.

    Args:
        table: a row for each seed, with the columns ``data``, ``setup``, of which what is before a comma is the method,
            and ``value``.
        xlabel: the number, with its unit.
    """
    kinds = list(table["data"].unique())
    counts = [table[table["data"] == kind]["setup"].nunique() for kind in kinds]
    size = {"figsize": (6.4, 0.35 * sum(counts) + 0.9 * len(kinds)), "squeeze": False}
    figure, axes = plots.plt.subplots(len(kinds), 1, height_ratios=counts, layout="constrained", **size)
    for ax, kind in zip(axes[:, 0], kinds, strict=True):
        rows = table[table["data"] == kind]
        setups = list(rows["setup"].unique())
        methods = [setup.partition(",")[0] for setup in setups]
        styles = plots.line_styles(methods)
        for i, (setup, method) in enumerate(zip(setups, methods, strict=True)):
            plots.draw_seeds(ax, i, rows["value"][rows["setup"] == setup], styles[method], upright=False)
        ax.set_yticks(range(len(setups)), setups)
        ax.set(ylim=(len(setups) - 0.5, -0.5), title=kind)
        ax.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel(xlabel)
    return figure


# All machines in one picture


def memory(of_kind: Mapping[str, Record]) -> list[Picture]:
    series = {}
    for record in of_kind.values():
        steps = record.frame().query("model == @SMOLLM2 and batch == 1")
        peaks = steps.pivot(index="length", columns="setup", values="measured_bytes")
        series[record.device] = (peaks["full"] / peaks["LoRA r=8"]).dropna().to_dict()
    ax = plots.ratios(series, "measured peak of full / of LoRA r=8", {"equal": 1}, xlabel="tokens of one sequence")
    return [(below(ax, "SmolLM2-135M: what LoRA saves in memory"), f"Peak of full / of LoRA r=8. {in_words(series)}")]


def speed(of_kind: Mapping[str, Record]) -> list[Picture]:
    series = {}
    for record in of_kind.values():
        steps = record.frame().query("model == @SMOLLM2 and setup == 'LoRA r=8'")
        series[record.device] = {
            row["tokens"]: (row["ratio"], *(time_interval(row) or (row["ratio"], row["ratio"])))
            for row in steps.to_dict("records")
        }
    ax = plots.ratios(series, "time of LoRA r=8 / of full (bars: 95 %)", {"equal": 1})
    ax.set_ylim(bottom=0)
    words = in_words({device: {n: ratio for n, (ratio, *_) in by.items()} for device, by in series.items()})
    return [(below(ax, "SmolLM2-135M: the time of a step"), f"Time of LoRA r=8 / of full. {words}")]


def in_words(series: Mapping[str, Mapping[int, float]]) -> str:
    """Ratios by tokens, for each machine."""
    texts = [", ".join(f"{ratio:.2f} with {tokens:,} tokens" for tokens, ratio in by.items()) for by in series.values()]
    return "; ".join(f"{device}: {text}" for device, text in zip(series, texts, strict=True))


# One picture for each machine


def rates(record: Record) -> Picture:
    docs = record.frame().query("data == 'docs'")
    lines = {
        rule: {rank: best_rate(losses) for rank, losses in best_by_rank(docs, rule).items()}
        for rule in (SAME_SCALING, FIXED_ALPHA)
    }
    ax = plots.best_rates(lines, best_rate(losses_by_rate(docs[docs["setup"] == FULL])), power=-0.5)
    texts = [", ".join(f"rank {rank} {best.tried:g}" for rank, best in by_rank.items()) for by_rank in lines.values()]
    words = "; ".join(f"{rule}: {text}" for rule, text in zip(lines, texts, strict=True))
    return below(ax, "SmolLM2-135M: the best rate of each rank"), f"Best rates of those tried. {words}"


def ablation(record: Record) -> Picture:
    verdict = smallest_sufficient_rank(record.frame(), MARGIN)
    judged = [each for each in verdict.ranks if each.difference is not None]
    words = ", ".join(f"rank {each.rank} {each.difference:+.3f} ({each.status})" for each in judged)
    words = f"{verdict.answer}; test loss above that of rank {verdict.ranks[-1].rank}: {words}"
    return plots.rank_verdict(verdict).figure, words


def overfitted(record: Record) -> Picture:
    curves, _ = compared.select_inner_rates(record)
    best = overfitting.summarise_trials(curves)
    rises = best.groupby(["n_train", "setup"], sort=False)["forgotten_at_last"].mean()
    words = ", ".join(f"{setup} with {size:g} examples {rise:+.2f}" for (size, setup), rise in rises.items())
    figure = plots.paths_by_size(curves, best, NATS)
    return figure, f"Validation loss against the rise of the off-domain loss, which is at the end {words}"


def head_start(record: Record) -> Picture:
    table = compared.table(compared.gains(record))
    digits = table[table["data"] != compared.DOCS]
    each = [
        f"{row['data']}, {row['model']}, {row['n_train']} {row['points']:+.0f}" for row in digits.to_dict("records")
    ]
    figure = plots.gains(digits)
    figure.suptitle("Right answers: fine-tuned minus from scratch")
    return (
        figure,
        f"Percentage points of right answers that fine-tuning gains over training from scratch: {'; '.join(each)}",
    )


def spectra(record: Record) -> Picture:
    layers = record.frame().query("about == 'layer'")
    runs = {run: layers[layers["run"] == run] for run in layers["run"].unique() if "," not in run}  # no other seed
    words = ", ".join(f"{run} {rows['stable_rank'].median():.1f}" for run, rows in runs.items())
    ax = plots.medians_by_depth(runs, "stable_rank", plots.plt.subplots(figsize=(6.4, 5))[1])
    return below(ax, "The ranks of updates, by depth"), f"Stable ranks of updates by block; medians: {words}"


def scores(record: Record) -> Picture:
    """Of the tasks of "downstream" and "elicitation", without the controls of the latter."""
    frame = record.frame().query("about == 'result' and setup != 'trivial'")
    frame = frame[frame["control"].ne(True)] if "control" in frame else frame
    frame = frame.replace({"setup": {"probe": "linear probe"}})  # as lesson 09 names it
    parts = [rows.assign(score=rows[SCORES[task][0]]) for task, rows in frame.groupby("task", sort=False)]
    rows = pandas.concat(parts)
    baselines = rows[rows["setup"] == "zero-shot"].groupby("task", sort=False)["score"].max().to_dict()
    figure = plots.scores(rows, baselines, {task: axis for task, (_, axis) in SCORES.items()})
    figure.suptitle("Dotted: the best score zero-shot")
    for text in figure.axes[0].texts:
        text.remove()
    means = rows.groupby(["task", "setup"], sort=False)["score"].mean()
    return figure, "Mean scores: " + ", ".join(f"{task} {setup} {mean:.2f}" for (task, setup), mean in means.items())


def losses(record: Record) -> Picture:
    """Of a study in which each setup has a best rate, on the seeds that judge."""
    rows = record.frame().query("stage == 'judging'").dropna(subset="test_loss")
    means = rows.groupby(["data", "setup"], sort=False)["test_loss"].mean()
    words = ", ".join(f"{setup} on {data} {mean:.3f}" for (data, setup), mean in means.items())
    figure = by_setup(rows.rename(columns={"test_loss": "value"}), "test loss")
    return figure, f"Test losses, each setup at its rate; means: {words}"


def by_seed(trials: pandas.DataFrame, *columns: str) -> dict[str, np.ndarray]:
    """setup -> (seeds, columns), of those that have a value in each column."""
    complete = trials.dropna(subset=[*columns])
    return {str(setup): rows[[*columns]].to_numpy() for setup, rows in complete.groupby("setup", sort=False)}


def in_both(points: Mapping[str, np.ndarray]) -> str:
    means = {setup: values.mean(axis=0).tolist() for setup, values in points.items()}
    each = ", ".join(f"{setup} {x:,.4g} and {y:,.4g}" for setup, (x, y) in means.items())
    return f"Means: {each}. No other is lower in both than {', '.join(pareto_front(means))}"


def forgotten(record: Record) -> Picture:
    """Of the study of forgetting: both losses at the last step of the rate that learns most, means over the bases."""
    rows = record.frame().query("step == 240 and data.str.endswith('no replay')")
    best = rows.groupby(["data", "setup", "lr"])["validation_loss"].mean().groupby(["data", "setup"]).idxmin()
    last = rows[[key in set(best) for key in zip(rows["data"], rows["setup"], rows["lr"], strict=True)]]
    means = last.groupby(["setup", "seed"], sort=False)[["validation_loss", "off_domain_loss"]].mean().reset_index()
    points = by_seed(means, "validation_loss", "off_domain_loss")
    axes = trade_off(points, "loss on new text (nats)", "loss on old text (nats)")
    return axes.figure, f"Losses on new and on old text. {in_both(points)}"


OF_ALL = {"memory": memory, "speed": speed}
LOSSES = [kind for kind in KINDS if kind.startswith(("tiny_", "smol_")) and kind != "tiny_front"]
OF_EACH: dict[str, Callable[[Record], Picture]] = {
    "rates": rates,
    "ablation": ablation,
    "spectra": spectra,
    "overfitting": overfitted,
    "head_start": head_start,
    "downstream": scores,
    "elicitation": scores,
    "tiny_front": forgotten,
    **dict.fromkeys(("quality", *LOSSES), losses),
}


def of_study(kind: str, of_kind: Mapping[str, Record]) -> list[Picture]:
    """The pictures of all records of a kind."""
    if kind in OF_ALL:
        return OF_ALL[kind](of_kind)
    pictures = []
    for record in of_kind.values():
        figure, words = OF_EACH[kind](record)
        pictures.append((figure, f"{record.device}. {words}"))
    return pictures
