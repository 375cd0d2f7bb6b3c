"""How long a step would take on a card that is not here, from the numbers of its datasheet: predicted, not measured.

    cost_model("l40s").predict("llama-3.2-3b", {"full": ..., "LoRA": ...}, 4, 210, dtype=torch.bfloat16)

An operation takes the longest of three times: its FLOPs at the card's rate, its bytes at the card's bandwidth, and one
launch. No program reaches the rates of a datasheet, so each counts by a share. Operations run
one after another, and not compiled. Predictions were compared with measurements of others on L40S and A100 only.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_lab.costs.bill import GIB
from lora_lab.costs.flops import GIGA
from lora_lab.costs.timing import CostModel, OperatorCall, Prediction, Roofline

NOT_MEASURED = "from the datasheet, not measured"
TERA = 10**12


@dataclass(frozen=True)
class Card:
    """A card as its vendor describes it. Rates are those of dense matrices; many datasheets print twice as much first.

    Args:
        name: the vendor's name for it.
        half_flops: FLOPs a second of matrix multiplications in bfloat16, accumulated in float32.
        float32_flops: the same in float32, without TF32, as torch computes them by default.
        bytes_per_second: the memory's bandwidth.
        memory_bytes: the most that its memory may hold: a GB of the datasheet counts as 2**30 bytes.
        source: the document with these numbers, and its year.
        note: what else there is to know, with the card as the subject.
    """

    name: str
    half_flops: float
    float32_flops: float
    bytes_per_second: float
    memory_bytes: int
    source: str
    note: str = ""


def _card(name: str, half: float, float32: float, bandwidth: int, memory: int, source: str, note: str = "") -> Card:
    """Return a card from the units of datasheets: TFLOP/s, GB/s and GB."""
    return Card(name, half * TERA, float32 * TERA, bandwidth * GIGA, memory * GIB, source, note)


_NO_BF16 = "has no bfloat16, so its rate is that of float16"
_NOT_A10G = "is another card than the A10G of AWS; at 150 W its clock may fall"
CARDS = {
    "v100": _card("NVIDIA V100 SXM2", 125, 15.7, 900, 32, "NVIDIA V100 datasheet, 2020", _NO_BF16),
    "t4": _card("NVIDIA T4", 65, 8.1, 320, 16, "NVIDIA T4 datasheet, 2019", f"{_NO_BF16}; at 70 W its clock may fall"),
    "rtx-3090": _card(
        "NVIDIA GeForce RTX 3090", 71, 35.6, 936, 24, "NVIDIA Ampere GA102 architecture whitepaper, V2.0, 2021"
    ),
    "rtx-a6000": _card(
        "NVIDIA RTX A6000", 154.8, 38.7, 768, 48, "NVIDIA Ampere GA102 architecture whitepaper, V2.0, 2021"
    ),
    "rtx-4090": _card(
        "NVIDIA GeForce RTX 4090", 165.2, 82.6, 1008, 24, "NVIDIA Ada GPU architecture whitepaper, V2.01, 2023"
    ),
    "a10": _card("NVIDIA A10", 125, 31.2, 600, 24, "NVIDIA A10 datasheet, 2021", _NOT_A10G),
    "l4": _card("NVIDIA L4", 121, 30.3, 300, 24, "NVIDIA L4 datasheet, 2023", "has 72 W, so its clock may fall"),
    "l40s": _card("NVIDIA L40S", 362.05, 91.6, 864, 48, "NVIDIA L40S datasheet, 2023"),
    "a100-40gb": _card("NVIDIA A100 SXM 40GB", 312, 19.5, 1555, 40, "NVIDIA A100 datasheet, 2021"),
    "a100-80gb": _card("NVIDIA A100 SXM 80GB", 312, 19.5, 2039, 80, "NVIDIA A100 datasheet, 2021"),
    "h100-pcie": _card("NVIDIA H100 PCIe", 756, 51, 2000, 80, "NVIDIA H100 datasheet, 2023"),
    "h100-sxm": _card("NVIDIA H100 SXM", 989, 67, 3350, 80, "NVIDIA H100 datasheet, 2023"),
    "h200": _card("NVIDIA H200 SXM", 989, 67, 4800, 141, "NVIDIA H200 datasheet, 2023"),
}


# The shares of a datasheet's rates that a step reaches follow from two rows of PEFT's benchmark on an L40S, full
# fine-tuning and LoRA r=32, in benchmarks/published.py, which predicts all other rows. The time of a launch
# is assumed: those rows hardly depend on it.
MATMUL_SHARE, MEMORY_SHARE = 0.69, 0.77
LAUNCH_S = 5e-6
_BASIS = (
    f"The shares of the datasheet's rates are fitted to two steps on an L40S, and {LAUNCH_S * 1e6:.0f} us "
    "for a launch are assumed. Predictions were compared with measurements of others on L40S and A100 only, with an "
    "aim of 25 %: see docs/costs.md."
)
# Launches are 36 to 47 % of the times predicted for LitGPT's steps, which really took three times as long, and at most
# 16 % of the times of all other steps in benchmarks/published.py.
_MANY_LAUNCHES = 0.25


def card(name: str) -> Card:
    """Return a card by its name in :data:`CARDS`, such as "l40s", in letters of any case.

    Raises:
        ValueError: the table has no such card.
    """
    if name.lower() not in CARDS:
        raise ValueError(f"No card is known by the name {name!r}; use one of: {', '.join(CARDS)}.")
    return CARDS[name.lower()]


def roofline(
    chosen: Card, matmul: float = MATMUL_SHARE, memory: float = MEMORY_SHARE, launch_s: float = LAUNCH_S
) -> Roofline:
    """Return the seconds of operations on a card that reaches these shares of its rates."""

    def rate(operation: OperatorCall) -> float:
        # The first operand decides: attention in half precision keeps its row sums in float32.
        half = operation.dtype.itemsize <= 2
        return (chosen.half_flops if half else chosen.float32_flops) * matmul

    return Roofline(rate, chosen.bytes_per_second * memory, launch_s, overlaps=True)


@dataclass(frozen=True, kw_only=True)
class CardCosts(CostModel):
    """What operations cost on a card; nothing was measured, so that a prediction has more doubts."""

    card: Card

    def _doubts(self, prediction: Prediction, disturbed: str) -> list[str]:
        card, doubts = self.card, []
        shares = {
            name: work.launches() * LAUNCH_S / prediction.total_s(name) for name, work in prediction.works.items()
        }
        if many := [f"{share * 100:.0f} % ({name})" for name, share in shares.items() if share > _MANY_LAUNCHES]:
            doubts.append(
                f"Launches alone make up {', '.join(many)} of the predicted time, and each may take longer than is "
                "assumed: the real time may be several times the predicted one, and the ratio may differ, too."
            )
        sizes = {name: work.static_bytes for name, work in prediction.works.items()}
        if large := [f"{size / GIB:,.1f} GiB ({name})" for name, size in sizes.items() if size > card.memory_bytes]:
            doubts.append(
                f"Weights, gradients and optimiser state alone need {', '.join(large)}, more than the "
                f"{card.memory_bytes / GIB:.0f} GiB of the card, so the step does not fit."
            )
        if card.note:
            doubts.append(f"The {card.name} {card.note}.")
        return [*doubts, _BASIS]


def cost_model(name: str) -> CardCosts:
    """Return what operations cost on a card that is not here, from its datasheet; nothing is measured.

    Args:
        name: as for :func:`card`.

    Raises:
        ValueError: as for :func:`card`.
    """
    chosen = card(name)
    rates = {
        "matrix multiplications in bfloat16": f"{chosen.half_flops / TERA:,.1f} TFLOP/s x {MATMUL_SHARE:.2f}",
        "matrix multiplications in float32": f"{chosen.float32_flops / TERA:,.1f} TFLOP/s x {MATMUL_SHARE:.2f}",
        "memory": f"{chosen.bytes_per_second / GIGA:,.0f} GB/s x {MEMORY_SHARE:.2f}",
        "shortest operation": f"{LAUNCH_S * 1e6:.1f} us",
        "source": chosen.source,
    }
    return CardCosts(roofline(chosen), rates=rates, where=f"{chosen.name}, {NOT_MEASURED}", card=chosen)
