"""Steps predicted from prices that the tests set, real steps on a clock that they set, and what processes send."""

import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy import stats
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab import FullFineTuning, Lean, Llama, LlamaConfig, LoRA, LoRAFA, PartialFineTuning, speed
from lora_lab.costs import timing
from lora_lab.costs.fake import fake_copy
from lora_lab.costs.flops import ADAPTERS, AGAIN, ATTENTION, FORWARD, HEAD, INPUT, WEIGHT
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import (
    CostModel,
    OperatorCall,
    Prediction,
    Roofline,
    StepTrace,
    Times,
    describe_call,
    product_rates,
)
from lora_lab.models import shapes
from lora_lab.models.digits import DigitsMLP
from lora_lab.system import device
from lora_lab.system.device import BusyCores
from lora_lab.system.distributed import Processes
from tests.helpers import random_ids

ATEN = torch.ops.aten
BF16 = torch.bfloat16
CPU = torch.device("cpu")
DIGITS = (torch.rand(5, 64), torch.zeros(5, dtype=torch.long))


# What is refused, and what is left alone


FREE = CostModel(lambda _: 0.0)
TINY = partial(Llama, LlamaConfig(260, 32, 48, 2, 4, 2, 8))
REFUSED = [
    (lambda: FREE.predict(TINY, {"lean": LoRA(4)}, 2, 16, lean=Lean(threads=2)), "lean.threads is 2"),
    (lambda: FREE.predict(TINY, {"LoRA": LoRA(4)}, 2), "seq_len is None"),
    (lambda: FREE.predict(TINY, {}, 2, 16), "variants is empty"),
    (lambda: speed.communication(TINY, LoRA(4), processes=0), "processes is 0"),
    (lambda: speed.step_time(TINY, {}, 2, 16), "variants is empty"),
    (lambda: speed.step_time(TINY, {"full": FullFineTuning()}, 2, 16, rounds=0), "rounds is 0"),
    (lambda: speed.step_time(TINY().to("meta"), {"full": FullFineTuning()}, 2, 16), "on the meta device"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_wrong_values_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# Operations


class Watched(TorchDispatchMode):
    """Describes all operations in a block."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found.append(describe_call(func, args, kwargs or {}, out))
        return out


def test_views_and_allocations_move_nothing_and_other_operations_what_they_read_and_write():
    x, bias, row, steps = torch.ones(4, 6), torch.ones(6), torch.tensor([1]), [torch.ones(()), torch.ones(())]
    options = dict(lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
    with Watched() as watched:
        x.t()[:2].unsqueeze(0)
        torch.empty(5)
        assert set(watched.found) == {None}
        watched.found.clear()
        x + bias
        x.add_(1.0)
        torch.cat([x, x])
        torch.add(x, x, out=x)
        torch._foreach_mul([x, bias], 2.0)
        torch._fused_adamw_(*[[x, bias] for _ in range(4)], [], steps, **options)
        torch.nn.functional.embedding(row, x)
        torch.mm(x.t(), bias.expand(4, 6))
    sizes = [
        4 * (24 + 6 + 24),
        4 * 2 * 24,
        4 * 4 * 24,
        4 * 3 * 24,
        4 * 2 * 30,
        4 * 7 * 30 + 8,
        4 * 2 * 6,
        4 * (24 + 6 + 36),
    ]
    calls = [call for call in watched.found if call is not None]
    assert [call.moved_bytes for call in calls] == sizes
    assert [call.of_list for call in calls] == [False, False, False, False, True, True, False, False]
    assert calls[-1].factors == (((6, 4), (1, 6)), ((4, 6), (0, 1)))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_computes_two_products_forward_and_five_backward_and_half_of_them_if_it_is_causal(causal):
    one, q = 2 * 2 * 8 * 128 * 128 * 64, torch.ones(2, 8, 128, 64, device="meta")
    forward = ATEN._scaled_dot_product_flash_attention_for_cpu.default
    backward = ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
    for function, args, products in ((forward, (q, q, q), 2), (backward, (q, q, q, q, q, q[..., 0]), 5)):
        call = describe_call(function, (*args, 0.0, causal), {}, q.clone())
        assert call.flops == products * one // (1 + causal)


# Predictions


M = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)  # weights of the tiny Llama's layers,
E = 260 * 32  # of its head,
P = 2 * (2 * 64 + 2 * 48 + 3 * 80)  # and of adapters for each rank
FIRST = 32 * 32 + 2 * 16 * 32  # q, k and v of the first block, under which LoRA trains nothing


def predict(config, seconds, variants=None, **options):
    variants = variants or {"full": FullFineTuning(), "LoRA": LoRA(4)}
    return CostModel(seconds).predict(partial(Llama, config), variants, 2, 16, **options)


def test_products_cost_what_they_are_said_to_by_cause(tiny_config):
    # Of products with weights; two for each of 2 x 16 tokens.
    found = predict(tiny_config, lambda call: call.flops / 64 * ("attention" not in call.name))
    assert found.seconds["full"] == {
        FORWARD: M,
        INPUT: M,
        WEIGHT: M + E,
        HEAD: 2 * E,
        **dict.fromkeys((ATTENTION, speed.MEMORY, speed.UPDATE), 0),
    }
    assert found.seconds["LoRA"] == {
        FORWARD: M,
        INPUT: M - FIRST,
        HEAD: 2 * E,
        ADAPTERS: 3 * 4 * P - 3 * 4 * 32,
        **dict.fromkeys((ATTENTION, speed.MEMORY, speed.UPDATE), 0),
    }
    assert found.total_s("full") == 3 * M + 3 * E
    assert found.ratio("LoRA") == (2 * M - FIRST + 2 * E + 12 * P - 384) / (3 * M + 3 * E)
    assert found.changes("LoRA")[WEIGHT] == -(M + E)


def test_products_under_autocast_are_priced_in_half_precision(tiny_config):
    variants = {"plain": FullFineTuning(), "half": Setup(autocast=torch.bfloat16)}
    dtypes = {}
    for name, work in predict(tiny_config, lambda _: 0.0, variants=variants).works.items():
        dtypes[name] = {call.dtype for counted in work.calls.values() for call in counted if call.factors}
    assert dtypes == {"plain": {torch.float32}, "half": {torch.bfloat16}}


def test_attention_and_what_is_recomputed_have_causes_of_their_own(tiny_config):
    variants = {"plain": LoRA(4), "again": Setup(LoRA(4), gradient_checkpointing=True)}
    found = predict(tiny_config, lambda operation: float("attention" in operation.name), variants=variants)
    assert found.seconds["plain"][ATTENTION] == 4  # two blocks, forward and backward
    assert found.seconds["again"][ATTENTION] == 6
    assert sum(found.works["again"].calls[AGAIN].values()) == 14
    assert AGAIN not in found.works["plain"].calls


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(8)], ids=["full", "LoRA"])
def test_one_step_is_listed_as_the_third_of_three_is(method):
    works = []
    for at_once in (True, False):
        with fake_copy(DigitsMLP) as twin:
            setup = Setup(method)
            trace = StepTrace(setup.step(twin))
            batches = setup.batches((torch.zeros(512, 64), torch.zeros(512, dtype=torch.long)))
            if at_once:
                trace.run_second(*batches)
            else:
                for _ in range(3):
                    trace.run(*batches)
            works.append(trace.calls)
    assert works[0] == works[1]


def test_adamw_reads_four_numbers_a_weight_and_writes_three_and_clipping_reads_gradients_twice(tiny_config):
    found = predict(tiny_config, lambda call: float(call.moved_bytes))
    trained = 4 * (M + E + 5 * 32)
    assert found.seconds["full"][speed.UPDATE] == pytest.approx((7 + 1 + 2) * trained, rel=0.01)


SLOWER = [
    "LoRA takes 1.20 of the time of full: 24.00 ms a step, not 20.00 ms.",
    "It saves 6.00 ms: weight gradients 5.00 ms, clipping and optimiser 1.00 ms.",
    "It adds 10.00 ms: adapters 6.00 ms, head 4.00 ms.",
    "So LoRA is slower.",
]


def test_the_reason_has_what_is_saved_and_what_is_added():
    full = {FORWARD: 0.010, WEIGHT: 0.005, speed.UPDATE: 0.002, HEAD: 0.003}
    lora = {FORWARD: 0.010, ADAPTERS: 0.006, speed.UPDATE: 0.001, HEAD: 0.007}
    assert Prediction({"full": full, "LoRA": lora}, {}, 32).why("LoRA").splitlines() == SLOWER
    faster, alike = (Prediction({"full": full, "LoRA": each}, {}, 32).why("LoRA") for each in ({HEAD: 0.010}, full))
    assert faster.endswith("So LoRA is faster.")
    assert alike.endswith("So the two take about as long.")


# Costs


def test_an_operation_takes_computing_moving_and_its_call_and_where_they_overlap_the_longest():
    product = OperatorCall("mm", 3 * 4 * 64**2, 2 * 64**3)
    parts = {"computing": 2 * 64**3 / 1e9, "moving": 3 * 4 * 64**2 / 1e8, "calling": 1e-3}
    for call, times in ((product, parts.values()), (replace(product, of_list=True), list(parts.values())[:2])):
        assert Roofline(lambda _: 1e9, 1e8, 1e-3, overlaps=False)(call) == sum(times)
        assert Roofline(lambda _: 1e9, 1e8, 1e-3, overlaps=True)(call) == max(times)


def test_a_call_takes_what_is_left_of_a_small_step(monkeypatch):
    monkeypatch.setattr(timing, "median_seconds", lambda function, device: 2.0)
    work = Roofline(lambda _: math.inf, math.inf, call_s=0.0, overlaps=False)
    alone = timing._measure_call(work, CPU)
    launches = 2.0 / alone
    assert launches == round(launches) > 300
    half = Roofline(lambda _: math.inf, 1.0, call_s=0.0, overlaps=False)
    assert timing._measure_call(half, CPU) == 0.0  # the bytes alone take longer than the step took
    assert timing._measure_call(replace(half, overlaps=True), CPU) == alone


def test_each_product_is_timed_once_at_its_shape_and_large_ones_count_at_the_rate_of_a_square(monkeypatch):
    timed = []
    monkeypatch.setattr(timing, "median_seconds", lambda function, device: timed.append(function().shape) or 0.5)
    monkeypatch.setitem(timing._SIDE, "cpu", 32)
    rates = product_rates(CPU)
    factors = ((8, 16), (0, 1)), ((16, 4), (1, 16))  # of the first one row is expanded
    call = OperatorCall("mm", 0, 2 * 8 * 16 * 4, factors=factors)
    assert [rates(call), rates(replace(call, name="addmm_"))] == [2 * 8 * 16 * 4 / 0.5] * 2
    batched = replace(call, factors=(((3, 8, 16), (128, 16, 1)), ((3, 16, 4), (64, 4, 1))))
    assert rates(batched) == 3 * rates(call)
    for large in (replace(call, flops=2 * 32**3 + 1), replace(call, factors=())):
        assert rates(large) == 2 * 32**3 / 0.5
    assert timed == [(8, 4), (3, 8, 4), (32, 32)]


def test_the_median_of_five_samples_counts_and_quick_calls_are_repeated(clock):
    calls, seconds = [], iter([0.0, 1 / 4096, *[1 / 4096] * 10, *[1 / 2048] * 20])

    def call():
        calls.append(None)
        clock.now += next(seconds)

    assert timing.median_seconds(call, CPU) == 1 / 2048
    assert len(calls) == 2 + 5 * 5  # 5 / 4096 s is over a millisecond


@pytest.mark.slow
def test_a_machine_is_measured_and_predicts(tiny_config, monkeypatch):
    monkeypatch.setattr(timing, "_SAMPLE_S", 1e-5)
    random = torch.get_rng_state()
    costs = speed.cost_model("cpu")
    assert all(re.search(r"\d (GFLOP/s|GB/s|us)$", rate) for rate in costs.rates.values())
    found = costs.predict(partial(Llama, tiny_config), {"full": FullFineTuning(), "LoRA": LoRA(2)}, 1, 8)
    assert 0 < found.total_s("LoRA") < 1
    assert found.seconds["LoRA"][ADAPTERS] > 0
    assert str(costs).startswith("Costs on cpu")
    assert torch.equal(random, torch.get_rng_state())
    assert costs.predict(DigitsMLP, {"full": FullFineTuning()}, batch=DIGITS).tokens == 5


def test_a_busy_machine_is_a_doubt(monkeypatch, tiny_config):
    for busy in (False, True):
        monkeypatch.setattr(timing.BusyCores, "disturbs", busy)
        doubts = predict(tiny_config, lambda _: 1.0).doubts
        assert [doubt.partition(" kept")[0] for doubt in doubts] == [
            "While costs were measured: Other processes"
        ] * busy


# Real steps


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
    ("used", "this", "seconds", "cores"),
    [
        ([100.0, 100.0, 75.0, 25.0], 150.0, 2.0, 1.5),  # percent of each core, and of one core
        ([50.0, 50.0], 100.5, 2.0, 0.0),  # rounding may leave less than nothing
        ([100.0, 100.0], 0.0, 0.004, 0.0),  # the system counts in hundredths of a second, too coarse for a moment
    ],
)
def test_busy_cores_are_those_that_others_use(monkeypatch, used, this, seconds, cores):
    used, this, now = iter([[7.0], used]), iter([0.0, this]), iter([0.0, seconds])
    monkeypatch.setattr(device.psutil, "cpu_percent", lambda percpu: next(used))
    monkeypatch.setattr(device.psutil.Process, "cpu_percent", lambda _: next(this))
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
