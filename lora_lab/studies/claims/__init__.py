"""What is claimed about LoRA, and what holds: published claims, each with a verdict that is computed.

    print(ll.claims.table(ll.claims.load()))                   # all of them
    print(ll.claims.verdict("rank-one-suffices").explained())  # one: their number beside ours, and what shows it

In reading order:

    deciding    the claims as data, what a verdict is, and which function, record or lesson decides which claim
    counted     verdicts by counting parameters, bytes and FLOPs
    computed    verdicts by computing with small layers and random matrices
    measured    verdicts from records, and from what others published
    compared    verdicts from losses that are compared by seed: quality, head start, overfitting, forgetting
    rates       verdicts on ranks and best learning rates
    ledger      each claim with its verdict: table, JSON, explanation; and whether a record is whole
"""

from lora_lab.studies.claims.deciding import Claim, Result
from lora_lab.studies.claims.ledger import Entry, load, table, verdict

__all__ = ["Claim", "Entry", "Result", "load", "table", "verdict"]
