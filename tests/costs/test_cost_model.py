"""Step times predicted from prices that the tests set, and how prices are measured."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch

from lora_lab import FullFineTuning, Lean, Llama, LlamaConfig, LoRA, speed
from lora_lab.costs import cost_model
from lora_lab.costs import microbench as replay
from lora_lab.costs.cost_model import CostModel, Prediction, StepTrace, StepWork
from lora_lab.costs.fake import fake_copy
from lora_lab.costs.microbench import DISTANCES, VIEW, OperationTimer, OperatorCall
from lora_lab.costs.setup import Setup
from lora_lab.models.digits import DigitsMLP
from lora_lab.train import TrainingStep

DIGITS = (torch.rand(5, 64), torch.zeros(5, dtype=torch.long))


# What is refused, and what is left alone


FREE = CostModel(lambda _: 0.0, {})
FULL_AND_LORA = FullFineTuning(), LoRA(4)
TINY = partial(Llama, LlamaConfig(260, 32, 48, 2, 4, 2, 8))
REFUSED = [
    (lambda: FREE.predict(TINY, {"lean": LoRA(4)}, 2, 16, lean=Lean(threads=2)), "lean.threads is 2"),
    (lambda: FREE.predict(TINY, {"LoRA": LoRA(4)}, 2), "seq_len is None"),
    (lambda: FREE.predict(TINY, {}, 2, 16), "variants is empty"),
    (lambda: FREE.break_even_tokens(TINY, *FULL_AND_LORA, batch_size=2, seq_len=16), "batch_size is 2 and seq_len 16"),
    (lambda: FREE.break_even_tokens(TINY, *FULL_AND_LORA), "batch_size is None and seq_len None"),
    (lambda: FREE.break_even_tokens(TINY, *FULL_AND_LORA, seq_len=8192), "between is"),
    (lambda: FREE.break_even_tokens(TINY, *FULL_AND_LORA, batch_size=0), "between is"),
    (lambda: FREE.break_even_tokens(TINY, *FULL_AND_LORA, seq_len=16, between=(64, 32)), "between is"),
    (lambda: speed.step_time(TINY, {}, 2, 16), "variants is empty"),
    (lambda: speed.step_time(TINY, {"full": FullFineTuning()}, 2, 16, rounds=0), "rounds is 0"),
    (lambda: speed.step_time(TINY().to("meta"), {"full": FullFineTuning()}, 2, 16), "on the meta device"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_wrong_values_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# Predictions


M = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)  # weights of the tiny Llama's layers,
E = 260 * 32  # of its head,
P = 2 * (2 * 64 + 2 * 48 + 3 * 80)  # and of adapters for each rank
FIRST = 32 * 32 + 2 * 16 * 32  # q, k and v of the first block, under which LoRA trains nothing


def predict(config, seconds, overhead=None, variants=None, **options):
    variants = variants or {"full": FullFineTuning(), "LoRA": LoRA(4)}
    return CostModel(seconds, overhead or {}).predict(partial(Llama, config), variants, 2, 16, **options)


def test_products_cost_what_they_are_said_to_by_cause(tiny_config):
    found = predict(tiny_config, lambda operation: operation.flops / 64)  # two for each of 2 x 16 tokens: by weights
    assert found.seconds["full"] == {
        speed.FORWARD: M,
        speed.INPUT: M,
        speed.WEIGHT: M + E,
        speed.HEAD: 2 * E,
        **dict.fromkeys((speed.ATTENTION, speed.MEMORY, speed.UPDATE, speed.PYTHON), 0),
    }
    assert found.seconds["LoRA"] == {
        speed.FORWARD: M,
        speed.INPUT: M - FIRST,
        speed.HEAD: 2 * E,
        speed.ADAPTERS: 3 * 4 * P - 3 * 4 * 32,
        **dict.fromkeys((speed.ATTENTION, speed.MEMORY, speed.UPDATE, speed.PYTHON), 0),
    }
    assert found.total_s("full") == 3 * M + 3 * E
    assert found.ratio("LoRA") == (2 * M - FIRST + 2 * E + 12 * P - 384) / (3 * M + 3 * E)
    assert found.changes("LoRA")[speed.WEIGHT] == -(M + E)


def test_products_are_counted_by_cause(tiny_config):
    found = predict(tiny_config, lambda operation: float(operation.name == "mm"))
    full, lora = found.seconds.values()
    assert (full[speed.FORWARD], full[speed.INPUT], full[speed.WEIGHT], full[speed.HEAD]) == (14, 14, 15, 2)
    assert lora[speed.ADAPTERS] == 28 + 28 + 25  # the gradients of three inputs nobody wants
    assert found.works["LoRA"].count(cause=speed.ADAPTERS) == 81
    assert found.works["full"].count(cause=speed.WEIGHT) == 15
    assert (found.works["LoRA"].trained, found.works["full"].trained) == (4 * P, M + E + 5 * 32)


def test_products_under_autocast_are_priced_in_half_precision(tiny_config):
    variants = {"plain": FullFineTuning(), "half": Setup(autocast=torch.bfloat16)}
    dtypes = {}
    for name, work in predict(tiny_config, lambda _: 0.0, variants=variants).works.items():
        products = [operation for operation in work.kinds() if operation.flops]
        dtypes[name] = {operand.dtype for operation in products for operand in operation.operands}
    assert dtypes == {"plain": {torch.float32}, "half": {torch.bfloat16}}


def test_attention_and_what_is_recomputed_have_causes_of_their_own(tiny_config):
    variants = {"plain": LoRA(4), "again": Setup(LoRA(4), gradient_checkpointing=True)}
    found = predict(tiny_config, lambda operation: float("attention" in operation.name), variants=variants)
    assert found.seconds["plain"][speed.ATTENTION] == 4  # two blocks, forward and backward
    assert found.seconds["again"][speed.ATTENTION] == 6
    assert found.works["again"].count(cause=speed.AGAIN) == 14
    assert found.works["plain"].count(cause=speed.AGAIN) == 0


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
            works.append(trace.work())
    assert works[0] == works[1]
    distances = {operand.distance for kind in works[0].kinds() for operand in kind.operands}
    assert max(distances) < DISTANCES[-1]  # all that is read has been touched before


@pytest.mark.slow
def test_every_operation_of_a_phase_has_its_overhead(tiny_config):
    fixed = {"forward": 1.0, "backward": 10.0, "clipping": 100.0, "optimiser step": 1000.0}
    found = predict(tiny_config, lambda _: 0.0, {phase: (seconds, 0.0) for phase, seconds in fixed.items()})
    for parts in found.seconds.values():
        assert (parts[speed.PYTHON], parts[speed.UPDATE]) == (11.0, 1100.0)
    costs = CostModel(lambda _: 0.0, {phase: (seconds, 0.0) for phase, seconds in fixed.items()}, overlaps=True)
    found = costs.predict(partial(Llama, tiny_config), {"full": FullFineTuning()}, 2, 16)
    assert (found.seconds["full"][speed.PYTHON], found.seconds["full"][speed.UPDATE]) == (1111.0, 0.0)
    # Of 28 trained tensors in place of 20: a norm and a scaling each; a count of steps and an update each.
    for phase in ("clipping", "optimiser step"):
        found = predict(tiny_config, lambda _: 0.0, {phase: (0.0, 1.0)})
        assert found.changes("LoRA")[speed.UPDATE] == 2 * 8
        assert found.seconds["full"][speed.UPDATE] >= 2 * 20
        assert found.seconds["full"][speed.PYTHON] == 0
    for phase in ("forward", "backward"):
        found = predict(tiny_config, lambda _: 0.0, {phase: (0.0, 1.0)})
        assert found.seconds["full"][speed.PYTHON] == found.works["full"].count(phase=phase)
        assert found.changes("LoRA")[speed.PYTHON] > 100


def test_small_tensors_moved_bytes_are_priced_too(tiny_config):
    found = predict(tiny_config, lambda operation: float(operation.moved_bytes))
    # AdamW reads a parameter, its gradient and two moments, and the count of steps; clipping reads the gradient for
    # its norm, and the factor to scale it.
    trained = 4 * (M + E + 5 * 32)
    assert found.seconds["full"][speed.UPDATE] == pytest.approx(6 * trained, rel=0.01)


def test_a_device_that_overlaps_takes_the_longer_of_the_two(tiny_config):
    work = StepWork({})
    parts = {"a": {speed.FORWARD: 2.0, speed.PYTHON: 3.0}, "b": {speed.FORWARD: 4.0, speed.PYTHON: 3.0}}
    in_turn = Prediction(parts, {"a": work, "b": work}, 1)
    assert (in_turn.total_s("a"), in_turn.total_s("b")) == (5.0, 7.0)
    at_once = Prediction(parts, {"a": work, "b": work}, 1, overlaps=True)
    assert (at_once.total_s("a"), at_once.total_s("b")) == (3.0, 4.0)
    assert at_once.ratio("b") == 4 / 3


def by_hand(full, lora):
    """A prediction from (seconds, number of operations) by cause."""
    works = {
        name: StepWork({("backward", cause): Counter({VIEW: count}) for cause, (_, count) in parts.items()}, trained)
        for name, parts, trained in (("full", full, 9000), ("LoRA", lora, 70))
    }
    seconds = {
        name: {cause: second for cause, (second, _) in parts.items()}
        for name, parts in (("full", full), ("LoRA", lora))
    }
    return Prediction(seconds, works, 32, "Net")


FULL = {speed.FORWARD: (0.010, 7), speed.WEIGHT: (0.005, 7), speed.UPDATE: (0.002, 20), speed.PYTHON: (0.003, 100)}
SLOW = {speed.FORWARD: (0.010, 7), speed.ADAPTERS: (0.006, 42), speed.UPDATE: (0.001, 28), speed.PYTHON: (0.007, 300)}


def test_the_reason_has_the_counts_of_both_variants_where_lora_is_slower():
    slower = by_hand(FULL, SLOW)
    assert slower.ratio("LoRA") == pytest.approx(1.2)
    assert slower.why("LoRA").splitlines() == [
        "LoRA takes 1.20 of the time of full: 24.00 ms a step, not 20.00 ms.",
        "It saves 6.00 ms: 7 weight gradients, 5.00 ms; clipping and updating 70 parameters instead of 9,000, 1.00 ms.",
        "It adds 10.00 ms: 42 small matrix multiplications of the adapters, 6.00 ms; "
        "243 operations called by Python and autograd, 4.00 ms.",
        "So LoRA is slower here: 42 small matrix multiplications of the adapters and 243 operations called by Python "
        "and autograd cost more than what they replace, 7 weight gradients.",
    ]


def test_one_operation_is_in_the_singular_and_the_place_is_named():
    found = replace(by_hand({speed.WEIGHT: (0.001, 1)}, {speed.MEMORY: (0.002, 1)}), place="on the moon")
    assert found.why("LoRA").splitlines()[1:] == [
        "It saves 1.00 ms: 1 weight gradient, 1.00 ms.",
        "It adds 2.00 ms: 1 pass over memory, 2.00 ms.",
        "So LoRA is slower on the moon: 1 pass over memory cost more than what they replace, 1 weight gradient.",
    ]


class Line(CostModel):
    """Predicts a ratio that is a power of the tokens."""

    def __init__(self, even, power=0.3):
        super().__init__(lambda _: 0.0, {})
        self.even, self.power, self.asked = even, power, []

    def predict(self, model, variants, batch_size, seq_len, **options):
        self.asked.append((batch_size, seq_len))
        ratio = (batch_size * seq_len / self.even) ** self.power
        return Prediction({"first": {"x": 1.0}, "second": {"x": ratio}}, {}, batch_size * seq_len)


@pytest.mark.parametrize("even", [40, 200, 700, 4000])
@pytest.mark.parametrize("power", [0.3, -0.3])
def test_the_tokens_at_which_the_sign_changes_are_found(even, power):
    costs = Line(even, power)
    assert costs.break_even_tokens(None, FullFineTuning(), LoRA(4), seq_len=16) == even
    assert all(seq_len == 16 for _, seq_len in costs.asked)
    assert costs.break_even_tokens(None, FullFineTuning(), LoRA(4), batch_size=1) == even
    assert len(costs.asked) <= 12


@pytest.mark.parametrize("even", [20, 6000])
def test_no_tokens_are_found_where_the_sign_stays(even):
    costs = Line(even)
    assert costs.break_even_tokens(None, FullFineTuning(), LoRA(4), seq_len=32) is None
    assert (costs.asked[0], costs.asked[-1]) == ((1, 32), (128, 32))


@pytest.mark.parametrize(("middle", "expected"), [(0.9, (256, 512)), (1.2, (128, 256))])
def test_the_place_is_looked_for_between_the_two_nearest_sizes(monkeypatch, middle, expected):
    ratios = {32: 0.5, 128: 0.6, 256: middle, 512: 1.5}

    def predict(self, model, variants, batch_size, seq_len, **options):
        return Prediction({"first": {"x": 1.0}, "second": {"x": ratios[batch_size * seq_len]}}, {}, 1)

    monkeypatch.setattr(CostModel, "predict", predict)
    found = FREE.break_even_tokens(None, FullFineTuning(), LoRA(4), batch_size=1)
    low, high = (math.log(ratios[size]) for size in expected)
    assert found == round(expected[0] * 2 ** (-low / (high - low)))
    assert expected[0] < found < expected[1]


def test_sizes_that_cannot_be_are_replaced_by_the_nearest():
    costs = Line(700)
    assert costs.break_even_tokens(None, FullFineTuning(), LoRA(4), seq_len=100, between=(32, 6000)) == 700
    assert costs.asked == [(1, 100), (4, 100), (16, 100), (8, 100)]


@pytest.mark.parametrize("fixed", [400, 768, 1000, 4096])
def test_sizes_that_do_not_divide_the_range_are_looked_at_once(fixed):
    costs = Line(10**6)
    assert costs.break_even_tokens(None, FullFineTuning(), LoRA(4), seq_len=fixed) is None
    counts = [count for count, _ in costs.asked]
    assert counts == sorted(set(counts))
    assert min(counts) * fixed >= 32
    assert max(counts) * fixed <= 4096


def test_a_variant_that_only_saves_or_only_adds_is_described_so():
    works = {name: StepWork({}) for name in ("a", "b", "c")}
    found = Prediction({"a": {"head": 2.0}, "b": {"head": 1.0}, "c": {"head": 3.0}}, works, 1)
    head = "the same matrix multiplications of the head"
    assert found.why("b").endswith(f"So b is faster here: it saves {head}, and adds nothing.")
    assert found.why("c").endswith(f"So c is slower here: it adds {head}, and saves nothing.")


def test_where_python_runs_ahead_only_the_longer_side_is_explained():
    works = {name: StepWork({}) for name in "abcd"}
    python = speed.PYTHON
    seconds = {
        "a": {"head": 20.0, python: 30.0},
        "b": {"head": 14.0, python: 36.0},
        "c": {"head": 50.0, python: 36.0},
        "d": {"head": 20.0, "attention": 1.0, python: 30.5},
    }
    found = Prediction(seconds, works, 1, overlaps=True)
    assert found.ratio("b") == 36 / 30
    assert "b waits for Python, a for Python" in found.why("b")
    assert "matrix multiplications of the head" not in found.why("b")
    assert "called by Python" in found.why("b")
    assert found.why("c").endswith("c waits for the device, a for Python.")
    by_device = Prediction(
        {"c": seconds["c"], "x": {"head": 60.0, python: 1.0}}, {"c": StepWork({}), "x": StepWork({})}, 1, overlaps=True
    )
    assert "matrix multiplications of the head" in by_device.why("x")
    assert "called by Python" not in by_device.why("x")


# Calibration


def test_a_line_is_the_one_of_least_squares():
    points = [(14, 2.0), (32, 3.5), (165, 9.0), (304, 21.0)]
    slope, fixed = numpy.polyfit(*zip(*points, strict=True), 1)
    assert cost_model._line(points) == pytest.approx((fixed, slope))
    assert cost_model._line([(5, 2.0), (5, 4.0)]) == (3.0, 0.0)
    assert cost_model._line([(1, 4.0), (2, 3.0), (3, 2.0)]) == (3.0, 0.0)  # no operation takes less than no time


def test_the_phases_of_a_step_are_timed_apart(clock):
    class Slow(TrainingStep):
        def backward(self, *args):
            losses = super().backward(*args)
            clock.now += 2.0
            return losses

    step = Slow(**vars(Setup(FullFineTuning(), loss=clock.loss(1.0)).step(DigitsMLP())))

    def wait(seconds):
        def hook(*_):
            clock.now += seconds

        return hook

    step.optimizer.register_step_pre_hook(wait(4.0))
    step.optimizer.register_step_post_hook(wait(8.0))
    found = cost_model._phase_seconds(step, DIGITS, steps=3)
    assert found == {"forward": 1.0, "backward": 2.0, "clipping": 4.0, "optimiser step": 8.0}
    assert len(step.optimizer._optimizer_step_pre_hooks) == 1  # its own is taken off


@pytest.mark.slow
def test_a_machine_is_calibrated_and_predicts(tiny_config, monkeypatch):
    monkeypatch.setattr(replay, "_SAMPLE_S", 1e-5)
    monkeypatch.setattr(replay, "ROUNDS", 1)
    random = torch.get_rng_state()
    costs = speed.cost_model("cpu")
    assert list(costs.overhead) == list(speed.PHASES)
    assert all(math.isfinite(number) for pair in costs.overhead.values() for number in pair)
    assert any("GFLOP/s" in rate for rate in costs.rates.values())
    spent = costs.seconds_spent
    assert spent > 0
    found = costs.predict(partial(Llama, tiny_config), {"full": FullFineTuning(), "LoRA": LoRA(2)}, 1, 8)
    assert costs.seconds_spent > spent
    assert 0 < found.total_s("LoRA") < 1
    assert costs.seconds.failed == set()
    assert found.seconds["LoRA"][speed.ADAPTERS] > 0
    assert f"measured in {costs.seconds_spent:.1f} s" in str(costs)
    assert torch.equal(random, torch.get_rng_state())
    assert costs.predict(DigitsMLP, {"full": FullFineTuning()}, batch=DIGITS).tokens == 5


def test_doubts_are_told():
    watch = OperationTimer(torch.device("cpu"))
    costs = CostModel(watch, {})
    kinds = [OperatorCall(torch.ops.aten.nonzero.default, ()), OperatorCall(torch.ops.aten._unique2.default, ())]
    prediction = Prediction({}, {"full": StepWork({("forward", speed.MEMORY): Counter(kinds)})}, 1)
    assert costs._doubts(prediction) == []
    watch.failed = {"_unique2", "nonzero", "sort"}  # the last is another model's
    costs.disturbance = "Other processes kept 1.5 cores busy meanwhile."
    assert costs._doubts(prediction) == [
        "While costs were measured: Other processes kept 1.5 cores busy meanwhile.",
        "Counted as copies, because they cannot run by themselves: _unique2, nonzero.",
    ]


def test_a_busy_machine_is_noticed_while_costs_are_measured(monkeypatch, tiny_config):
    class Known(OperationTimer):
        """Every operation takes as long, once it is measured."""

        def measure(self, operations, done=lambda: None):
            self._known |= dict.fromkeys(operations, 1.0)

    costs = CostModel(Known(torch.device("cpu")), {})
    ways = {"full": FullFineTuning()}
    monkeypatch.setattr(cost_model.BusyCores, "disturbs", False)
    assert costs.predict(partial(Llama, tiny_config), ways, 1, 8).doubts == []
    monkeypatch.setattr(cost_model.BusyCores, "disturbs", True)
    assert costs.predict(partial(Llama, tiny_config), ways, 1, 8).doubts == []  # nothing was timed
    found = costs.predict(partial(Llama, tiny_config), ways, 2, 8)
    assert found.doubts[0].startswith("While costs were measured: Other processes kept")
