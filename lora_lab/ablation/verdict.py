r"""Which rank is enough? The statistics of an ablation, in a form that stands up to review.

    print(smallest_sufficient_rank(load("runs/ranks"), margin=0.01))

1. For each rank, the learning rate is chosen by the mean VALIDATION loss over the seeds. A rate counts only if it has
   a result for every seed: one that diverged for some seeds would otherwise be judged by those that suit it.
2. At those rates, ranks are judged by the TEST loss, which took no part in the choice.
3. Trials are paired by seed (the same order of the data), which removes the noise that they share:

       d_s = loss(rank, seed s) - loss(largest rank, seed s)

4. The mean of d over n seeds has one-sided 95 % bounds from Student's t (Student 1908, Biometrika 6), with
   sd the standard deviation of d:

       mean(d) -+ t(0.95, n - 1) sd / sqrt(n)

   It holds for as few as two seeds if d is roughly normal. A percentile bootstrap does not: over three seeds its
   95 % interval holds the true value in only about three quarters of all cases.
5. A rank is enough if the upper bound lies below the margin, and too small if the lower bound lies above it. The
   answer is the smallest rank that is enough; if none is, and some rank is neither, more seeds are needed.

The bounds hold for each rank by itself and take the chosen rates as given; and they hold on this task, this model and
this number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_lab.ablation.learning_rate import Choice, choose_rate, last_rows
from lora_lab.ablation.results import OUTCOME, PROVENANCE, SCORE

if TYPE_CHECKING:
    import pandas
from lora_lab.ablation.stats import CONFIDENCE, t_bounds
from lora_lab.system.schema import Positive, check
from lora_lab.system.wording import short_repr

_NEEDED = ("method", "rank", "lr", "seed", "steps", "outcome", "step", "validation_loss", "test_loss")
# All else is a setting, and settings must be equal for a comparison to be one.
_MAY_VARY = ("key", "rank", "alpha", "lr", "seed", *OUTCOME, *PROVENANCE)


@dataclass(frozen=True)
class RankResult:
    """One rank at its best learning rate.

    ``difference`` is the mean over seeds of loss(rank) - loss(largest rank) on the test part, in the task's unit of
    loss, and ``lower`` and ``upper`` are its one-sided 95 % bounds; they are None for the largest rank, for one seed,
    and for a rank that could not be judged. ``status`` is "reference" (the largest rank), "enough", "too small",
    "open" (more seeds are needed) or "not judged", and ``note`` says why, where that is not plain.
    """

    rank: int
    status: str
    lr: float | None = None
    validation_loss: float | None = None
    test_loss: float | None = None
    difference: float | None = None
    lower: float | None = None
    upper: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """The smallest sufficient rank, or that the trials do not decide it; ``print`` shows the whole table.

    ``rank`` is None where it is undecided. ``reason`` is one sentence, ``ranks`` holds each rank's numbers from the
    smallest to the largest, and ``notes`` are sentences on what weakens the answer.
    """

    rank: int | None
    reason: str
    method: str
    margin: float
    seeds: tuple[int, ...]
    ranks: tuple[RankResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def decided(self) -> bool:
        """Whether there is an answer."""
        return self.rank is not None

    @property
    def answer(self) -> str:
        """The verdict in a few words."""
        return f"rank {self.rank} is enough" if self.decided else "undecided"

    @property
    def losses(self) -> dict[int, float]:
        """rank -> mean test loss at its chosen rate; ranks that could not be judged are left out."""
        return {one.rank: one.test_loss for one in self.ranks if one.test_loss is not None}

    def frame(self) -> pandas.DataFrame:
        """A row for each rank: its rate and test loss, the difference from the largest rank, bounds and status."""
        import pandas

        columns = ["rank", "lr", "test_loss", "difference", "lower", "upper", "status"]
        return pandas.DataFrame([{name: getattr(one, name) for name in columns} for one in self.ranks])

    def to_dict(self) -> dict[str, Any]:
        """The verdict and each rank's numbers, in values of JSON."""
        return {"answer": self.answer, **asdict(self)}

    def __str__(self) -> str:
        head = f"rank {self.rank}" if self.decided else "undecided"
        lines = [
            f"{self.method}: {head}: {self.reason}",
            f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}, margin {self.margin:g}; losses on the test "
            f"part; differences from the largest rank, with one-sided {CONFIDENCE:.0%} bounds",
            f"{'rank':>6}{'rate':>10}{'loss':>10}{'difference':>12}{'lower':>10}{'upper':>10}  status",
        ]
        for one in self.ranks:
            numbers = [
                _number(one.lr, 10, ".3g"),
                _number(one.test_loss, 10, ".4f"),
                _number(one.difference, 12, "+.4f"),
                _number(one.lower, 10, "+.4f"),
                _number(one.upper, 10, "+.4f"),
            ]
            note = f": {one.note}" if one.note else ""
            lines.append(f"{one.rank:>6}{''.join(numbers)}  {one.status}{note}")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def _number(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def smallest_sufficient_rank(frame: pandas.DataFrame, margin: float = 0.01, method: str | None = None) -> Verdict:
    """The smallest rank whose loss is at most ``margin`` above the largest rank's, as far as the seeds can tell.

    Args:
        frame: what :func:`lora_lab.ablation.run.ablate` or ``load`` returns, of one task, one model and one setting
            of everything but rank, alpha, learning rate and seed.
        margin: the difference of losses that does not matter, in the task's unit (nats for cross-entropy); positive.
        method: which method, where the frame has several with ranks.

    Raises:
        ValueError: the margin is not positive; or the frame lacks columns, mixes settings, holds a trial twice, has
            fewer than two ranks, or has several methods and none was named.
    """
    margin = check(margin, Positive, "margin")
    trials = _last_rows(frame, method)
    seeds = tuple(sorted(int(seed) for seed in trials["seed"].unique()))
    tried = sorted(int(rank) for rank in trials["rank"].unique())
    if len(tried) < 2:
        raise ValueError(f"The frame has only rank {tried[0]}; ranks are compared, so it takes at least two.")
    choices = {rank: choose_rate(trials[trials["rank"] == rank], seeds) for rank in tried}
    largest = choices[tried[-1]]
    ranks = tuple(_judge(rank, choice, largest, margin) for rank, choice in choices.items())
    rank, reason = _answer(ranks, seeds, margin)
    notes = [f"rank {each}: {choice.note}." for each, choice in choices.items() if choice.note and choice.lr]
    better = [result.rank for result in ranks if result.upper is not None and result.upper < -margin]
    if better:
        notes.append(
            f"rank {', '.join(map(str, better))}: better than the largest by more than the margin, so the "
            "largest was most likely trained badly and is not a fair reference; try more learning rates."
        )
    for edge in ("smallest", "largest"):
        if at := [each for each, choice in choices.items() if choice.edge == edge]:
            notes.append(f"the best learning rate of {_ranks(at)} is the {edge} tried, so a better one may lie beyond.")
    if untuned := [each for each, choice in choices.items() if choice.edge == "only"]:
        notes.append(f"only one learning rate was tried for {_ranks(untuned)}, so it may not be the best.")
    return Verdict(rank, reason, str(trials["method"].iloc[0]), margin, seeds, ranks, tuple(notes))


def _last_rows(frame: pandas.DataFrame, method: str | None) -> pandas.DataFrame:
    """The last row of each trial of the method, which is one that can be compared with the others."""
    import pandas

    if not isinstance(frame, pandas.DataFrame):
        raise ValueError(f"frame is {short_repr(frame)}, but it must be the table that ablate or load returns.")
    if missing := [name for name in _NEEDED if name not in frame]:
        raise ValueError(f"The frame lacks the columns {missing}; give what ablate or load returns.")
    with_ranks = frame[frame["rank"].notna()]
    methods = sorted(with_ranks["method"].unique())
    if method is None and len(methods) == 1:
        method = methods[0]
    if not isinstance(method, str) or method not in methods:
        raise ValueError(
            f"method is {short_repr(method)}, but the methods with ranks in this frame are {methods}; name one."
        )
    of_method = with_ranks[with_ranks["method"] == method]
    rows = last_rows(of_method)
    for name in map(str, rows):
        if name not in _MAY_VARY and not name.startswith(SCORE):
            _one_value(rows, name, "")
    if "alpha" in rows:
        for rank, of_rank in rows.groupby("rank"):
            _one_value(of_rank, "alpha", f" for rank {rank:g}")
    if (repeated := rows.duplicated(["rank", "lr", "seed"])).any():
        first = rows[repeated].iloc[0]
        raise ValueError(
            f"The frame holds rank {first['rank']:g}, lr {first['lr']:g}, seed {first['seed']:g} twice; "
            "drop_duplicates removes repeated rows."
        )
    return rows


def _one_value(rows: pandas.DataFrame, name: str, where: str) -> None:
    values: list[Any] = rows[name].drop_duplicates().tolist()
    if len(values) > 1:
        raise ValueError(
            f"The frame mixes {name} {values[0]!r} and {values[1]!r}{where}, which cannot be compared; select one "
            f"with frame[frame[{name!r}] == ...]."
        )


def _ranks(ranks: Sequence[int]) -> str:
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"


def _judge(rank: int, choice: Choice, largest: Choice, margin: float) -> RankResult:
    if choice.lr is None:
        return RankResult(rank, "not judged", note=f"no learning rate has a result for every seed: {choice.note}")
    losses = choice.rows.set_index("seed")["test_loss"]
    known: dict[str, Any] = {"lr": choice.lr, "validation_loss": choice.validation_loss, "test_loss": fmean(losses)}
    if choice is largest:
        return RankResult(rank, "reference", **known)
    if largest.lr is None:
        return RankResult(rank, "not judged", **known, note="the largest rank has no result to compare it with")
    differences = losses - largest.rows.set_index("seed")["test_loss"]
    mean, lower, upper = t_bounds(differences.tolist())
    if lower is None or upper is None:
        return RankResult(rank, "open", **known, difference=mean, note="one seed has no spread to judge by")
    status = "enough" if upper < margin else "too small" if lower > margin else "open"
    return RankResult(rank, status, **known, difference=mean, lower=lower, upper=upper)


def _answer(ranks: Sequence[RankResult], seeds: Sequence[int], margin: float) -> tuple[int | None, str]:
    """The rank, or None, and why."""
    largest = ranks[-1].rank
    if ranks[-1].status == "not judged":
        return None, f"the largest rank, {largest}, has no learning rate with a result for every seed: run those first."
    if len(seeds) < 2:
        return None, "more seeds needed: one seed cannot tell a difference from chance."
    enough = [one.rank for one in ranks if one.status == "enough"]
    unsettled = [one.rank for one in ranks if one.status in ("open", "not judged")]
    if enough:
        smaller = [str(rank) for rank in unsettled if rank < enough[0]]
        still = f"; rank {', '.join(smaller)} is not settled by these seeds" if smaller else ""
        return enough[0], (
            f"with {CONFIDENCE:.0%} confidence its loss is less than {margin:g} above that of rank {largest}{still}."
        )
    if unsettled:
        names = ", ".join(map(str, unsettled))
        return None, f"more seeds needed: no smaller rank is shown to be enough, and rank {names} may be."
    return largest, f"every smaller rank loses more than {margin:g} against it; a larger one may be better still."
