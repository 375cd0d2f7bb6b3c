"""Verdicts from a record of remedies with planted answers, and with the opposite ones."""

import math

import pytest
import torch

from lora_lab import claims, records
from tests.helpers import COMMIT

# setup -> (rank, rates, how much is learned at the end, what is forgotten for each nat that is learned)
PLAIN = {
    "LoRA r=8": (8, (1e-3, 2e-3, 4e-3), 1.0, 0.10),
    "LoRA r=1": (1, (4e-3,), 0.9, 0.10),
    "LoRA r=64": (64, (1e-3,), 1.0, 0.10),
    "full": (576, (6e-5, 1.2e-4), 1.0, 0.20),
    "LoRA r=32, PEFT's rate": (32, (1e-4,), 0.5, 0.15),
    "full, PEFT's rate": (576, (1e-5,), 0.2, 0.20),
}
REMEDIES = {
    "own replies, a quarter": (8, (2e-3,), 0.9, 0.03),
    "own replies, half": (8, (2e-3,), 0.8, 0.02),
    "other text, a quarter": (8, (2e-3,), 0.9, 0.09),
}


def rows(setups, scaled=-0.05, by_divergence=True):
    """Straight curves of six evaluations for three seeds, and the adapter at strengths.

    Args:
        setups: as above.
        scaled: how much higher both losses are at half the strength.
        by_divergence: whether KL on the new task, or the size of the update, orders the trials by what they forgot.
    """
    result = []
    for setup, (rank, lrs, learned, price) in setups.items():
        for lr in lrs:
            for seed in range(3):
                amount = learned + 0.01 * seed + (0.05 * lrs.index(lr))
                for step in range(0, 61, 10):
                    share = step / 60
                    row = {"setup": setup, "rank": rank, "lr": lr, "seed": seed, "step": step, "steps": 60}
                    row |= {"outcome": "done", "gap": 0.0 if step else None}
                    row["validation_loss"] = 4.0 - amount * share
                    row["off_domain_loss"] = 2.5 + price * amount * share
                    hidden = math.sin(37 * rank + 1000 * lr)  # has nothing to do with it
                    measures = (price * amount, hidden) if by_divergence else (hidden, price * amount)
                    names = ("score_divergence", "score_size")
                    result.append(row | (dict(zip(names, measures, strict=True)) if step == 60 else {}))
                    if setup == "LoRA r=8":
                        row |= {"setup": "LoRA r=8, scaled", "step": round(100 * share), "gap": None}
                        if step == 30:
                            row |= {"validation_loss": 4.0 - amount + scaled}
                            row |= {"off_domain_loss": 2.5 + price * amount + scaled}
                        result.append(row)
    return result


@pytest.fixture
def verdict(tmp_path):
    def verdict(claim_id, setups, **options):
        record = records.new("remedies", rows(setups, **options), {}, "a test", torch.device("cpu"), COMMIT)
        records.write(record, tmp_path)
        return claims.verdict(claim_id, tmp_path).result

    return verdict


def changed(**prices):
    """The setups with other prices, by the beginning of their names."""
    every = PLAIN | REMEDIES
    return {
        name: (*numbers[:3], next((price for start, price in prices.items() if name.startswith(start)), numbers[3]))
        for name, numbers in every.items()
    }


def test_lora_forgets_less_where_each_nat_costs_it_less(verdict):
    result = verdict("learns-less-forgets-less", changed())
    assert result.verdict == "stands"
    assert "LoRA r=1 at 50 %: -0.0" in result.measured
    assert verdict("learns-less-forgets-less", changed(LoRA=0.4)).verdict == "falls"
    mixed = {**changed(), "LoRA r=64": (64, (1e-3,), 1.0, 0.4)}
    assert verdict("learns-less-forgets-less", mixed).verdict == "depends"


def test_at_the_defaults_the_last_step_decides(verdict):
    result = verdict("lora-forgets-more-at-defaults", changed())
    assert result.verdict == "stands"  # it has learned more, too
    assert "at equal learning: LoRA r=32, PEFT's rate at 50 %: -0.0" in result.measured
    assert verdict("lora-forgets-more-at-defaults", changed(LoRA=0.01)).verdict == "falls"


def test_kl_predicts_forgetting_where_it_orders_the_trials_and_nothing_else_does(verdict):
    assert verdict("kl-predicts-forgetting", changed()).verdict == "stands"
    other = verdict("kl-predicts-forgetting", changed(), by_divergence=False)
    assert other.verdict in ("falls", "depends")
    assert "size of the update" in other.measured.partition("no: ")[2]


def test_replay_of_own_replies_is_compared_with_none_and_with_other_text(verdict):
    result = verdict("replay-cuts-forgetting-by-80", changed())
    assert result.verdict == "stands"
    assert "against other text, a quarter, -67 %" in result.measured
    assert verdict("replay-cuts-forgetting-by-80", changed(own=0.5)).verdict == "falls"
    assert verdict("replay-cuts-forgetting-by-80", changed(other=0.02)).verdict == "depends"


def test_a_checkpoint_overshoots_where_half_its_update_is_better_at_both(verdict):
    assert verdict("final-checkpoint-overshoots", changed()).verdict == "stands"
    assert verdict("final-checkpoint-overshoots", changed(), scaled=0.05).verdict == "falls"


def test_forgetting_is_ordered_inversely_by_the_loss_or_not(verdict):
    alike = {name: (*numbers[:3], 0.1) for name, numbers in PLAIN.items()}
    assert verdict("forgetting-linear-in-loss", alike).verdict == "stands"
    against = {f"LoRA r={rank}": (rank, (1e-3,), rank / 10, 5 / rank**2) for rank in range(2, 12)}  # 0.5 / rank
    assert verdict("forgetting-linear-in-loss", against).verdict == "falls"


def test_two_seeds_or_a_missing_setup_decide_nothing(verdict, tmp_path):
    few = [row for row in rows(changed()) if row["seed"] < 2]
    records.write(records.new("remedies", few, {}, "a test", torch.device("cpu"), COMMIT), tmp_path)
    result = claims.verdict("learns-less-forgets-less", tmp_path).result
    assert (result.verdict, "fewer than 3 seeds" in result.measured) == ("open", True)
    without = {name: numbers for name, numbers in changed().items() if name != "LoRA r=64"}
    result = verdict("learns-less-forgets-less", without)
    assert (result.verdict, "there is no setup 'LoRA r=64'" in result.measured) == ("open", True)
