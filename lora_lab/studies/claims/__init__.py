"""What is claimed about LoRA, and what holds: published claims, each with a verdict that is computed.

    print(ll.claims.table(ll.claims.load()))                   # all of them
    print(ll.claims.verdict("rank-one-suffices").explained())  # one: their number beside ours, and what shows it

In reading order:

    deciding    the claims as data, what a verdict is, what decides which claim, and the ledger; is a record whole?
    computed    verdicts by counting parameters, bytes and FLOPs, and by computing with small layers
    measured    verdicts from records, and from what others published
    compared    verdicts from losses that are compared by seed: quality, head start, overfitting, forgetting
    small       verdicts from records that are judged by pages, of small bases and SmolLM2
    fronts      verdicts on forgetting on small bases
    rates       verdicts on ranks and best learning rates
"""

from lora_lab.studies.claims import compared, computed, fronts, measured, rates, small  # noqa: F401  # they register themselves
from lora_lab.studies.claims.deciding import Claim, Entry, Result, load, table, verdict

__all__ = ["Claim", "Entry", "Result", "load", "table", "verdict"]
