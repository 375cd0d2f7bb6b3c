"""Records of setups each of which has the rate that is best for it (:class:`lora_lab.studies.recorder.BlockSweep`).

quality      Is LoRA as good as full fine-tuning, and up to how many steps does each rank keep up? Full fine-tuning and
             LoRA of three ranks, after several numbers of steps, each with the rate that is best for that number. All
             of them multiply by the model's weights in bfloat16; what they train is in float32.
targets      Which layers should have adapters, at an equal number of trained parameters? Queries and values (the
             original paper's choice), attention, the MLP, and all linear layers, with ranks that make each about three
             million.
variants     Do LoRA's variants learn more? LoRA, rsLoRA, LoRA+ (ratio 16), PiSSA and DoRA of two ranks. Alpha is twice
             the rank, so rsLoRA differs from LoRA by a factor sqrt(rank) of the scaling alone. The base is in float32,
             because DoRA and PiSSA have no lean step.
rates        How does the best learning rate depend on the rank, and how far is it from full's? Full fine-tuning and
             LoRA of seven ranks, each under two rules for alpha (twice the rank: the scaling alpha / r is the same for
             all ranks; and 32: it falls as 1 / r), on the digits net and on the real model.
rank_advice  On each task a sweep over ranks, each at its own learning rate, says which rank is enough; and runs at rank
             64, at the rate chosen for it, give the statistics from which :mod:`lora_lab.ablation.rank_advice` predicts
             it. The tasks are nets with a planted update of a known rank, on which the rule is chosen, and those on
             which it is judged: digits from few and from many pictures, Python's manual, translation and summaries. The
             trials on Python's manual are those of ``lora-lab record rates``: copy them from
             ``runs/record-rates/docs/choosing-128-4`` into the folder of the same name here, to run them only once.
quantised    What does a base in fewer bits cost in loss and time, and what do its merges lose? LoRA over four bases:
             float32, bfloat16, NF4 (QLoRA), and the blocks of Q4_1 in which the model is shipped. The float32 base is
             what those blocks hold, so the two differ in time alone, and the loss of NF4 is that of a second
             quantisation. Then each adapter that was trained over float32 or NF4 is merged, in every form; and the
             steps are timed in turn. A merge into blocks rounds twice: the base, which may not lie on the grid of the
             blocks, and the update, which may be smaller than the grid. The control shows the first alone: the base is
             rounded, and the adapter stays unmerged beside it.

Rates beside setups are the middles of the first grids, which are widened where the best rate is not inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from lora_lab import tasks
from lora_lab.ablation import materials
from lora_lab.ablation.rank_advice import UpdateRanks
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.stats import BlockLosses
from lora_lab.adapters.edit import off, switch
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import step_time
from lora_lab.inject import adapter_state, inject, lora_layers
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.pretrained import SMOLLM2, load_pretrained
from lora_lab.models.quantize import quantize_nf4, round_matrix
from lora_lab.studies.recorder import (
    BF16_BASE,
    BFLOAT16,
    ON_TEST,
    BlockSweep,
    Methods,
    Row,
    Source,
    plan_seeds,
    plan_setups,
    plan_size,
    read_loss,
    record_sweeps,
)
from lora_lab.studies.steps import ATTENTION
from lora_lab.task import Task
from lora_lab.variants import DoRA, LoRAPlus, PiSSA, RsLoRA

# Quality

AFTER = {  # the more steps, the lower the best rate
    "full": (FullFineTuning(), {60: 1.25e-4, 240: 6.25e-5, 960: 3.125e-5}),
    "r=1": (LoRA(1, 2), {60: 8e-3, 240: 4e-3, 960: 1e-3}),
    "r=8": (LoRA(8, 16), {60: 2e-3, 240: 2e-3, 960: 5e-4}),
    "r=64": (LoRA(64, 128), {60: 1e-3, 240: 1e-3, 960: 1.25e-4}),
}


def plan_quality(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in a night, or a GPU in an hour.

    The longest runs are a part of their own, with fewer seeds, which would otherwise take a day. On two cores a single
    seed chooses their rates: where two rates are nearly alike, another seed might choose the other.
    """
    gpu = device.type == "cuda"
    size, count, first = (8, 5, 3) if gpu else (4, 3, 2)  # the last: of the seeds that judge, in all parts
    long = (3, 5) if gpu else (1, 3)
    parts = {"docs": ((60, 240), first, 6), "docs, 960 steps": ((960,), *long)}
    for data, (budgets, choosing, judging) in parts.items():
        setups = {}
        for steps in budgets:
            methods = {f"{name}, {steps} steps": (each, lrs[steps]) for name, (each, lrs) in AFTER.items()}
            setups |= plan_setups(methods, steps, size, count, **BFLOAT16)
        yield BlockSweep(setups, range(choosing), range(first, first + judging), data=data)


QUALITY = record_sweeps("quality", plan_quality)


# Targets and variants

MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS_OF = {
    "q, v": (LoRA(53, 106, targets=("q_proj", "v_proj")), 2e-3),
    "attention": (LoRA(26, 52, targets=ATTENTION), 2e-3),
    "MLP": (LoRA(16, 32, targets=MLP), 2e-3),
    "all": (LoRA(10, 20, targets=(*ATTENTION, *MLP)), 2e-3),
}


# A method, given its rank and alpha, and the middles of its rates by rank.
VARIANTS_OF = {
    "LoRA": (LoRA, {16: 2e-3, 128: 5e-4}),
    "rsLoRA": (RsLoRA, {16: 5e-4, 128: 1.25e-4}),
    "LoRA+": (partial(LoRAPlus, ratio=16), {16: 2.5e-4, 128: 6.25e-5}),
    "PiSSA": (PiSSA, {16: 5e-4, 128: 2.5e-4}),
    "DoRA": (DoRA, {16: 2e-3, 128: 5e-4}),
}


def plan_targets(device: torch.device) -> list[BlockSweep]:
    """Return what two cores can do in an hour or two, or a GPU in less."""
    setups = plan_setups(TARGETS_OF, *plan_size(device), **BFLOAT16)
    return [BlockSweep(setups, range(2), plan_seeds(device, 2), data="docs", chosen_on=128)]


def plan_variants(device: torch.device) -> list[BlockSweep]:
    """Return what two cores can do in an evening, or a GPU in an hour."""
    methods = {
        f"{name}, r={rank}": (variant(rank, 2 * rank), centres[rank])
        for rank, (name, (variant, centres)) in product((16, 128), VARIANTS_OF.items())
    }
    setups = plan_setups(methods, *plan_size(device), lean=Lean(), eval_every=10, eval_examples=16)
    return [BlockSweep(setups, range(2), plan_seeds(device, 2), data="docs", chosen_on=128)]


TARGETS = record_sweeps("targets", plan_targets)
VARIANTS = record_sweeps("variants", plan_variants)


# Rates

RANKS = (1, 2, 4, 8, 16, 32, 64)
RULES = {"alpha = 2r": lambda rank: 2 * rank, "alpha = 32": lambda rank: 32}
CENTRES = {  # by rank
    "digits": {
        "full": 8e-3,
        "alpha = 2r": (6.4e-2, 3.2e-2, 3.2e-2, 1.6e-2, 1.6e-2, 8e-3, 8e-3),
        "alpha = 32": (8e-3, 8e-3, 8e-3, 1.6e-2, 1.6e-2, 1.6e-2, 1.6e-2),
    },
    "docs": {
        "full": 1.25e-4,
        "alpha = 2r": (8e-3, 4e-3, 4e-3, 2e-3, 2e-3, 1e-3, 1e-3),
        "alpha = 32": (1e-3, 1e-3, 1e-3, 1e-3, 2e-3, 2e-3, 2e-3),
    },
}


def plan_rates(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in a few hours, or a GPU in one; the rates and their intervals are all it asks."""
    on = {"judged_on": {}, "beyond": 2}
    digits = plan_setups(_list_rules("digits"), 200, 32)
    yield BlockSweep(digits, range(5), data="digits", chosen_on=200, seq_len=None, **on)
    docs = plan_setups(_list_rules("docs"), *plan_size(device), lean=BF16_BASE)
    yield BlockSweep(docs, plan_seeds(device), data="docs", chosen_on=128, **on)


def _list_rules(data: str) -> Methods:
    """Return full fine-tuning, and LoRA of each rank under each rule, with the middles of their rates."""
    full = {"full": (FullFineTuning(), CENTRES[data]["full"])}
    return full | {
        f"r={rank}, {rule}": (LoRA(rank, alpha(rank)), lr)
        for rule, alpha in RULES.items()
        for rank, lr in zip(RANKS, CENTRES[data][rule], strict=True)
    }


RATES = record_sweeps("rates", plan_rates)


# Rank advice

PLANTED = (1, 2, 4, 8, 16)  # ranks of the planted updates
PICTURES = (100, 500, 1200)  # of digits to train on
# Differences of losses that do not matter, and that of the language model.
MARGINS, MARGIN = {"planted": 0.001, "digits": 0.03}, 0.02
DOWNSTREAM = {"translate-fr": (50, 44), "summarise": (25, 113)}  # steps, and the mean tokens of an example
# By rank; those of digits and docs are in CENTRES.
PLANTED_RATES = (1.6e-2, 1.6e-2, 1.6e-2, 8e-3, 8e-3, 4e-3, 4e-3)
DOWNSTREAM_RATES = (8e-3, 8e-3, 4e-3, 4e-3, 2e-3, 2e-3, 1e-3)


def plan_rank_advice(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in two hours, or a GPU in one; there the downstream tasks have all ranks, too."""
    gpu = device.type == "cuda"
    high = partial(UpdateRanks, RANKS)  # the judge of the runs at rank 64, the last of the setups
    nets = {f"planted {rank}": (partial(imitate, rank), 600, PLANTED_RATES) for rank in PLANTED}
    digits, docs = (CENTRES[data]["alpha = 2r"] for data in ("digits", "docs"))
    nets |= {f"digits {count}": (partial(read_moved_digits, count), 200, digits) for count in PICTURES}
    on = {"chosen_on": 200, "judged_on": {"validation": 200, "test": 256}, "seq_len": None}
    for data, (source, steps, rates) in nets.items():
        setups = plan_setups(_list_ranks(rates), steps, 32)
        yield BlockSweep(setups, range(3), range(3, 13), data=data, source=source, rerun=(high(200), advise), **on)
    judging = plan_seeds(device, 5 if gpu else 3)
    setups = plan_setups(_list_ranks(docs), *plan_size(device), **BFLOAT16)
    yield BlockSweep(setups, plan_seeds(device), judging, data="docs", rerun=(high(128), advise), chosen_on=128)
    ranks, count = (RANKS, 5) if gpu else (RANKS[::2], 3)
    for data, (steps, tokens) in DOWNSTREAM.items():
        setups = plan_setups(_list_ranks(DOWNSTREAM_RATES, ranks), steps, 8, count, **BFLOAT16)
        yield BlockSweep(setups, range(2), judging, data=data, rerun=(high(64), advise), seq_len=tokens)


def _list_ranks(centres: Sequence[float], ranks: Sequence[int] = RANKS) -> Methods:
    """Return LoRA of each rank, with alpha twice the rank, and the middle of its rates."""
    return {f"r={rank}": (LoRA(rank, 2 * rank), lr) for rank, lr in zip(RANKS, centres, strict=True) if rank in ranks}


def imitate(rank: int, device: torch.device) -> Source:
    """Return a small net, and the task of imitating it plus a hidden update of this rank."""
    return DigitsMLP(dtype=torch.float64), tasks.planted(DigitsMLP(dtype=torch.float64), rank, n_train=4096)


def read_moved_digits(count: int, device: torch.device) -> Source:
    """Return a small net that reads digits, and the task of reading them moved down, from so many pictures."""
    return materials.pretrained_digits(count), tasks.digits(n_train=count)


def advise(trial: Row) -> Iterator[Row]:
    """Yield the row of a run at rank 64: its statistics, and no losses, which are of fewer examples than others."""
    margin = MARGINS.get(trial["data"].partition(" ")[0], MARGIN)
    names = ("data", "setup", "rank", "lr", "seed", "outcome", "reason", "commit")
    columns = {name: trial[name] for name in trial if name in names or name.startswith(SCORE)}
    yield {"stage": "high rank", "margin": margin, **columns, "validation_loss": None, "test_loss": None}


RANK_ADVICE = record_sweeps("rank_advice", plan_rank_advice)


# Quantised

# The blocks, of which the first is QLoRA's and the second that of the model's file.
NF4, Q4_1 = "NF4-double", "Q4_1"
METHOD = LoRA(8, 16)
BASES = {"float32": Lean(), "bfloat16": Lean(torch.bfloat16), "NF4": Lean(), "Q4_1": Lean()}
BLOCKS_OF = {"float32": None, "NF4": NF4}  # of the bases whose adapters are merged
ROUNDS = 9  # of the timing


def plan_quantised(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in an hour and a half, or a GPU in less."""
    for base, lean in BASES.items():
        setups = plan_setups({base: (METHOD, 2e-3)}, *plan_size(device), lean=lean)
        rerun = (Merges(base, ON_TEST["test"]), merge_rows) if base in BLOCKS_OF else None
        source, judging = partial(load_source, base), plan_seeds(device, 2)
        yield BlockSweep(setups, range(2), judging, data=base, source=source, rerun=rerun)


def load_source(base: str, device: torch.device) -> Source:
    """Return what makes the model and the task."""
    return partial(load_base, base, device), partial(materials.docs_task, 64)


def load_base(base: str, device: torch.device) -> nn.Module:
    """Return the language model over that base; in bfloat16 it is the lean step that casts it."""
    if base == "Q4_1":
        return load_pretrained(SMOLLM2, device=device, keep_blocks=True)[0]
    model = materials.language_model(device)
    if base == "NF4":
        quantize_nf4(model)
    return model


def forms_of(base: str) -> list[str]:
    """Return the names of the models that are made of an adapter, in the order of :class:`Merges`."""
    forms = ["base", "unmerged", "merged"]
    for blocks in (NF4, Q4_1):
        forms += [f"unmerged, base in {blocks}", f"merged, then {blocks}"]
    if base != "float32":
        forms += ["merged into float32", *(f"merged into float32, then {blocks}" for blocks in (NF4, Q4_1))]
    return forms


@dataclass(frozen=True)
class Merges:
    """A judge for :func:`lora_lab.ablation.ablate`: the losses of every form in which an adapter can be used.

    With W the weight of the base in float32, Q the rounding to blocks, V the weight under which the adapter was trained
    (W, or Q(W) for QLoRA) and D its update, the forms are

        base                          V               without the adapter
        unmerged                      V + D           as it was trained
        merged                        V + D           as one dense matrix
        unmerged, base in Q           Q(V) + D        the control: the base is rounded, the update is not
        merged, then Q                Q(V + D)
        merged into float32           W + D           under V = Q(W) alone, as are the next
        merged into float32, then Q   Q(W + D)

    Its scores are the losses of blocks of test examples by form, as those of
    :class:`lora_lab.ablation.stats.BlockLosses`.

    Args:
        base: of the adapter, in :data:`BLOCKS_OF`.
        examples: of the test part, how many.
    """

    base: str
    examples: int

    @torch.no_grad()
    def __call__(self, model: nn.Module, task: Task) -> dict[str, str]:
        state, device = adapter_state(model), next(model.parameters()).device
        model = materials.language_model(device)
        inject(model, METHOD)
        switch(model, state)
        layers = lora_layers(model)
        W = {name: layer.base.weight.detach().clone() for name, layer in layers.items()}  # (192, 576)
        V = {name: _quantise(weight, BLOCKS_OF[self.base]) for name, weight in W.items()}  # (192, 576)
        judge = BlockLosses({"test": self.examples}, BlockSweep.block)
        scores = {}
        for form in forms_of(self.base):
            under = W if "float32" in form else V
            blocks = next((kind for kind in (NF4, Q4_1) if form.endswith(kind)), None)
            for name, layer in layers.items():
                dense = under[name] + layer.delta() if form.startswith("merged") else under[name]  # (192, 576)
                layer.base.weight.data.copy_(_quantise(dense, blocks))  # (192, 576)
            with nullcontext() if form.startswith("unmerged") else off(model):
                scores[form] = judge(model, task)["test"]
        return scores


def _quantise(weight: Tensor, kind: str | None) -> Tensor:
    return weight if kind is None else round_matrix(weight, kind)


def merge_rows(trial: Row) -> Iterator[Row]:
    """Yield a row of every form of an adapter, with the data "<base>, merged" and the form as its setup.

    So :func:`lora_lab.ablation.compare.compare_losses` compares the forms.
    """
    row = {"data": f"{trial['data']}, merged", "stage": "judging"}
    row |= {name: trial[name] for name in ("edge", "lr", "seed", "steps", "step", "outcome", "reason", "commit")}
    for form in forms_of(trial["data"]):
        losses = {SCORE + "test": trial.get(SCORE + form), "validation_loss": None}
        yield row | {"setup": form} | losses | {"test_loss": read_loss(losses, "test")}


def time_steps(device: torch.device) -> Iterator[Row]:
    """Yield rows of the time of a step over each base, measured in turn, with the data "time"."""
    sources = {base: partial(load_base, base, device) for base in BASES}
    variants = {base: Setup(METHOD, lean=lean) for base, lean in BASES.items()}
    times = step_time(sources, variants, plan_size(device)[1], 64, rounds=ROUNDS, device=device)
    for row in times.to_dict()["variants"]:
        setup = {"data": "time", "stage": "timing", "setup": row.pop("variant"), "rounds": ROUNDS}
        yield setup | {**row, "disturbance": times.disturbance}


QUANTISED = record_sweeps("quantised", plan_quantised, after=time_steps)
