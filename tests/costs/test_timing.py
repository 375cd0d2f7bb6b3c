"""Real steps timed in turn, on a clock that the tests set; and what processes send each other."""

from collections import Counter
from functools import partial

import pytest
import torch
from scipy import stats
from torch import distributed as dist
from torch.nn import functional as F

from lora_lab import FullFineTuning, Lean, Llama, LoRA, LoRAFA, PartialFineTuning, speed
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import Times
from lora_lab.models import shapes
from lora_lab.models.digits import DigitsMLP
from lora_lab.system import device
from lora_lab.system.device import BusyCores
from lora_lab.system.distributed import Processes
from tests.helpers import random_ids

BF16 = torch.bfloat16
DIGITS = (torch.rand(5, 64), torch.zeros(5, dtype=torch.long))


def times(full, lora, **options):
    return Times({"full": full, "LoRA": lora}, 512, **options)


def test_statistics_by_hand():
    found = times([1.0, 2.0, 4.0, 3.0], [2.0, 2.0, 2.0, 6.0])
    assert found.median_s("full") == 2.5
    assert found.quartiles_s("full") == (1.75, 3.25)
    assert found.tokens_per_second("full") == 512 / 2.5
    assert found.ratios("LoRA") == [2.0, 1.0, 0.5, 2.0]
    assert found.ratio("LoRA") == 1.5  # of the medians it would be 0.8
    assert found.ratio("full") == 1.0
    full, row = found.to_dict()["variants"]
    assert (full["verdict"], row["verdict"]) == (None, "inconclusive after 4 rounds; take 6 or more")
    assert (row["seconds"], row["ratio"], row["tokens_per_second"]) == (2.0, 1.5, 256.0)


@pytest.mark.parametrize("rounds", range(1, 40))
def test_the_interval_is_the_narrowest_that_holds_the_median_19_times_in_20(rounds):
    found = times([1.0] * rounds, [float(i) for i in range(rounds)]).interval("LoRA")
    # The k-th lowest of the rounds lies above the median with the chance of fewer than k tails.
    fits = [k for k in range(1, rounds // 2 + 1) if 2 * stats.binom.cdf(k - 1, rounds, 0.5) <= 0.05]
    assert found == ((fits[-1] - 1, rounds - fits[-1]) if fits else None)
    assert (found is None) == (rounds < 6)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.8] * 9, "faster: 0.80 to 0.80 of full's time"),
        ([1.2] * 9, "slower: 1.20 to 1.20"),
        ([0.5, *[1.2] * 7, 0.5], "inconclusive, because the times vary too much: 0.50 to 1.20"),
        ([0.5, *[1.2] * 8], "slower: 1.20 to 1.20"),  # one outlier does no harm
        ([0.97, 1.01] * 4 + [1.0], "no significant difference: 0.97 to 1.01"),
        ([0.8] * 5, "inconclusive after 5 rounds; take 6 or more"),
    ],
)
def test_verdicts(ratios, verdict):
    assert times([1.0] * len(ratios), ratios).verdict("LoRA").startswith(verdict)


def test_each_variant_may_have_a_model_of_its_own():
    models = {"narrow": partial(DigitsMLP, 16), "wide": partial(DigitsMLP, 64)}
    made = Counter()

    def make(name):
        made[name] += 1
        return models[name]()

    factories = {name: partial(make, name) for name in models}
    found = speed.step_time(factories, dict.fromkeys(models, LoRA(2)), batch=DIGITS, rounds=1)
    assert made == {"narrow": 1, "wide": 1}
    assert [*found.seconds] == ["narrow", "wide"]


def test_no_verdict_on_a_busy_machine():
    found = times([1.0] * 9, [0.8] * 9, disturbance="Other processes kept 1.5 cores busy meanwhile.")
    assert found.verdict("LoRA") == "inconclusive on a busy machine: 0.80 to 0.80 of full's time"
    assert "1.5 cores busy" in str(found)
    assert "inconclusive" in str(found)
    assert "busy" not in str(times([1.0] * 9, [0.8] * 9))


def test_steps_are_timed_in_turn_each_round_from_another_one(clock):
    log = []
    variants = {name: Setup(FullFineTuning(), loss=clock.loss(s, log, name)) for name, s in (("a", 1.0), ("b", 3.0))}
    found = speed.step_time(DigitsMLP, variants, batch=DIGITS, rounds=3)
    assert found.seconds == {"a": [1.0] * 3, "b": [3.0] * 3}
    assert found.ratio("b") == 3.0
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"]  # the first two warm up
    assert found.tokens == 5


def test_quick_steps_are_repeated_until_a_timing_lasts(clock):
    log = []
    seconds = {"a": 1 / 64, "b": 0.25}
    variants = {name: Setup(FullFineTuning(), loss=clock.loss(s, log, name)) for name, s in seconds.items()}
    found = speed.step_time(DigitsMLP, variants, batch=DIGITS, rounds=2)
    assert found.seconds == {"a": [1 / 64] * 2, "b": [0.25] * 2}
    assert Counter(log) == {"a": 2 + 2 * 4, "b": 1 + 2}  # 4 / 64 s is over 50 ms


def test_two_threads_have_a_part_of_the_batch_each(tiny_config):
    seen = []

    def loss(model, inputs, targets):
        seen.append(len(inputs))
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    variants = {"threads": Setup(LoRA(2), lean=Lean(threads=2), accumulate=2, loss=loss)}
    speed.step_time(partial(Llama, tiny_config), variants, 8, 4, rounds=1)
    assert set(seen) == {2}
    with pytest.raises(ValueError, match="accumulate is 2, but the batch has 3 examples for 4 parts"):
        speed.step_time(partial(Llama, tiny_config), variants, 3, 4, rounds=1)


# Other processes


@pytest.mark.parametrize(
    ("all_before", "all_after", "this_after", "seconds", "cores"),
    [
        (10.0, 16.0, 7.0, 2.0, 1.5),
        (10.0, 10.02, 4.0, 0.004, 0.0),  # the system counts in hundredths of a second, too coarse for a moment
    ],
)
def test_busy_cores_are_those_that_others_use(monkeypatch, all_before, all_after, this_after, seconds, cores):
    spent, now = iter([(all_before, 4.0), (all_after, this_after)]), iter([0.0, seconds])
    monkeypatch.setattr(device, "_cpu_seconds", lambda: next(spent))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(now))
    with BusyCores(3) as others:
        pass
    assert others.cores == cores
    for count, disturbs in ((4, cores > 0), (5, False)):
        monkeypatch.setattr(device.psutil, "cpu_count", lambda count=count: count)
        assert others.disturbs == disturbs


# What processes send each other

METHODS = [FullFineTuning(), LoRA(2), LoRAFA(2), PartialFineTuning(("model.norm",))]
SETUPS = [*map(Setup, METHODS), Setup(dtype=BF16), Setup(LoRA(2), dtype=BF16), Setup(LoRA(2), lean=Lean())]


@pytest.mark.parametrize("setup", SETUPS, ids=Setup.describe)
def test_as_many_bytes_are_reduced_as_are_predicted(tiny_config, monkeypatch, setup):
    reduced = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: reduced.append(tensor.nbytes))
    model = Llama(tiny_config, seed=1)
    predicted = speed.communication(model, setup)
    step = setup.step(model if setup.dtype is None else model.to(setup.dtype))
    step.processes = Processes(0, 2)
    ids = random_ids(2, 6)
    step([(ids, ids)], [0.5])
    assert sum(reduced) == predicted


def test_of_smollm2_lora_sends_a_fiftieth():
    """2 (n - 1) / n of the gradients of four bytes, and eight bytes for each trained tensor and the loss."""
    config = shapes.config("smollm2-135m")
    hidden, inner, cached = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    ends = [(hidden, hidden)] * 2 + [(hidden, cached)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    both, one = 30 * 8 * sum(a + b for a, b in ends), 30 * 8 * sum(b for _, b in ends)
    for method, numbers, tensors in ((LoRA(8), both, 420), (LoRAFA(8), one, 210), (FullFineTuning(), 134_515_008, 272)):
        alone, of_two, of_four = (speed.communication("smollm2-135m", method, processes=n) for n in (1, 2, 4))
        assert of_two == 4 * numbers + 8 * (1 + tensors)
        assert (alone, of_four) == (0, 1.5 * of_two)
    assert round(4 * both / 1e6, 1) == 9.8  # of 538 MB


def test_there_is_at_least_one_process(tiny_config):
    with pytest.raises(ValueError, match="processes is 0, but it must be at least 1"):
        speed.communication(Llama(tiny_config), LoRA(rank=2), processes=0)
