"""Operations described with their distances, cut into parts, and done again, against cases by hand."""

import itertools
import statistics

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.costs import microbench as replay
from lora_lab.costs.microbench import (
    DISTANCES,
    MIB,
    ROUNDS,
    VIEW,
    Operand,
    OperationTimer,
    OperatorCall,
    ReuseDistances,
)
from lora_lab.system import process
from lora_lab.system.process import BusyCores

ATEN = torch.ops.aten
CPU = torch.device("cpu")
FAR = DISTANCES[-1]


def row_major(*shape, dtype=torch.float32, distance=0):
    stride = [1]
    for size in shape[:0:-1]:
        stride.insert(0, stride[0] * size)
    return Operand(shape, tuple(stride) if shape else (), dtype, distance)


def product(m, k, n, **options):
    return OperatorCall(ATEN.mm.default, (row_major(m, k), row_major(k, n)), (), 4 * m * n, **options)


# Operands and operations


def test_bytes_of_an_operand():
    assert row_major(3, 5).size_bytes == row_major(3, 5).extent_bytes == 60
    assert row_major(3, 5, dtype=torch.bfloat16).size_bytes == 30
    expanded = Operand((3, 5), (0, 1), torch.float32)
    assert (expanded.size_bytes, expanded.extent_bytes) == (20, 20)
    halves = Operand((3, 5), (10, 1), torch.float32)  # a slice of rows of ten
    assert (halves.size_bytes, halves.extent_bytes) == (60, 4 * 25)
    assert (row_major().size_bytes, row_major().extent_bytes) == (4, 4)
    assert row_major(0, 5).size_bytes == 0


def test_flops_of_products_alone():
    assert product(2, 3, 5).flops == 2 * 2 * 3 * 5
    summed = OperatorCall(ATEN.addmm.default, (row_major(5), row_major(2, 3), row_major(3, 5)))
    assert summed.flops == 2 * 2 * 3 * 5
    batched = OperatorCall(ATEN.bmm.default, (row_major(7, 2, 3), row_major(7, 3, 5)))
    assert batched.flops == 7 * 2 * 2 * 3 * 5
    assert OperatorCall(ATEN.mul.Tensor, (row_major(2, 3), row_major(2, 3))).flops == 0
    assert product(2, 3, 5).moved_bytes == 4 * (6 + 15 + 10)


@pytest.mark.parametrize(("m", "k", "n"), [(8192, 576, 1536), (512, 576, 49152), (49152, 512, 576), (576, 8192, 1536)])
def test_a_part_of_a_product_is_cut_at_its_largest_size(m, k, n):
    part = product(m, k, n).part()
    left, right = part.operands
    sizes, cut = (m, k, n), (*left.shape, right.shape[1])
    assert left.shape[1] == right.shape[0]
    assert [size == other for size, other in zip(sizes, cut, strict=True)].count(False) == 1
    assert max(sizes) / cut[sizes.index(max(sizes))] in (8, 16)
    assert 9e8 <= part.flops <= 2e9
    assert (left.stride, right.stride) == ((left.shape[1], 1), (right.shape[1], 1))


def test_a_part_of_a_pass_keeps_the_layout_and_its_other_sizes():
    column = Operand((65536, 256), (1, 65536), torch.float32, FAR)
    row = Operand((256,), (1,), torch.float32)
    part = OperatorCall(ATEN.add.Tensor, (column, row), (), column.size_bytes).part()  # 128 MiB and a little
    assert part.operands == [Operand((4096, 256), (1, 4096), torch.float32, FAR), row]


def test_sizes_among_the_arguments_are_cut_too():
    whole = OperatorCall(ATEN.expand_copy.default, (row_major(1, 65536), (512, 65536)), (), 2**27)
    assert whole.part().args == (row_major(1, 65536 // 16), (512, 65536 // 16))


def test_a_convolution_stays_whole():
    picture, patch = row_major(64, 3, 512, 512), row_major(8, 3, 3, 3)
    whole = OperatorCall(ATEN.convolution.default, (picture, patch, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1))
    assert whole.moved_bytes > 100 * MIB
    assert whole.part() is whole


def test_attention_is_cut_by_sequences_alone():
    query = row_major(8, 9, 8, 64)
    name = ATEN._scaled_dot_product_flash_attention_for_cpu.default
    part = OperatorCall(name, (query, query, query, 0.0, True)).part()
    assert [operand.shape for operand in part.operands] == [(2, 9, 8, 64)] * 3  # the 8 positions stay
    assert part.args[3:] == (0.0, True)
    assert part.part() is part


# Traffic


class Watched(TorchDispatchMode):
    """Describes all operations in a block."""

    def __init__(self):
        super().__init__()
        self.traffic, self.found = ReuseDistances(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found += self.traffic.operations(func, args, kwargs or {}, out)
        return out


def test_a_distance_is_what_was_moved_since_the_last_touch():
    x, y, z = (torch.ones(MIB // 4 * size) for size in (1, 8, 1))
    with Watched() as watched:
        x.mul_(2.0)  # 1 MiB is moved
        x.mul_(2.0)  # nothing since: beside it
        y.mul_(2.0)  # 8 MiB
        x.mul_(2.0)
        z.mul_(2.0)  # never touched
    assert [operation.operands[0].distance for operation in watched.found] == [FAR, 0, FAR, 8 * MIB, FAR]
    assert watched.traffic.moved_bytes == 12 * MIB


def test_views_move_nothing_and_touch_what_they_show():
    x = torch.ones(4, MIB)
    with Watched() as watched:
        halves = x.t()[:2]
        torch.empty(5)
        halves.mul_(2.0)
        x.mul_(2.0)
    assert watched.found[:3] == [VIEW, VIEW, VIEW]
    assert watched.found[3].operands == [Operand((2, 4), (1, MIB), torch.float32, FAR)]
    assert watched.found[4].operands[0].distance == 0  # the same storage
    assert watched.traffic.moved_bytes == 32 + x.nbytes


def test_a_new_tensor_takes_the_place_of_the_last_dead_one_of_its_size():
    x = torch.ones(MIB)
    with Watched() as watched:
        first = x * 2.0
        del first
        second = x * 2.0
        third = x * 2.0
        del second, third
    assert [operation.distance for operation in watched.found] == [FAR, 0, FAR]
    assert [operation.made_bytes for operation in watched.found] == [4 * MIB] * 3


def test_of_several_places_the_one_left_last_is_taken():
    x, y = torch.ones(MIB // 4), torch.ones(4 * MIB)
    with Watched() as watched:
        first = x * 2.0
        y.mul_(2.0)  # 16 MiB between the two
        second = x * 2.0
        del first
        del second
        x * 2.0
    assert watched.found[-1].distance == 0


def test_small_tensors_have_no_distance():
    small, large = torch.ones(100), torch.ones(1100)
    with Watched() as watched:
        small.mul_(2.0)
        large.mul_(2.0)
    assert [operation.operands[0].distance for operation in watched.found] == [0, FAR]


def test_an_operation_on_lists_is_one_for_each_entry():
    lists = [[torch.ones(3), torch.ones(2, 2)] for _ in range(4)]
    steps = [torch.ones(()), torch.ones(())]
    options = dict(lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
    with Watched() as watched:
        torch._fused_adamw_(*lists, [], steps, **options)
        torch.cat([torch.ones(3), torch.ones(2)])
    entries = [operation for operation in watched.found if operation.of_list]
    assert [[operand.shape for operand in entry.operands] for entry in entries] == [
        [(3,)] * 4 + [()],
        [(2, 2)] * 4 + [()],
    ]
    assert dict(entries[0].kwargs)["lr"] == 0.1
    joined = watched.found[-1]
    assert (joined.name, joined.of_list, len(joined.operands), joined.made_bytes) == ("cat", False, 2, 20)


# The stopwatch


@pytest.fixture
def quick(monkeypatch):
    """A small pool, and short samples."""
    monkeypatch.setattr(replay, "_SAMPLE_S", 1e-5)
    monkeypatch.setattr(replay, "ROUNDS", 1)


KINDS = {
    "product": product(16, 32, 8),
    "addmm in place": OperatorCall(ATEN.addmm_.default, (row_major(4, 5), row_major(4, 3), row_major(3, 5))),
    "scalar operand": OperatorCall(ATEN.mul_.Tensor, (row_major(64, 64, distance=FAR), row_major())),
    "expanded": OperatorCall(ATEN.div.Scalar, (Operand((8, 4), (1, 0), torch.float32), 4), (), 128),
    "lookup": OperatorCall(ATEN.embedding.default, (row_major(10, 4), row_major(6, dtype=torch.int64)), (), 96),
    "bfloat16": OperatorCall(ATEN.mm.default, (row_major(4, 4, dtype=torch.bfloat16),) * 2, (), 32),
    "list": OperatorCall(ATEN.cat.default, ((row_major(2, 3), row_major(2, 4)), 1), (), 56),
    "entry of a list": OperatorCall(ATEN._foreach_mul_.Scalar, ((row_major(5),), 2.0), of_list=True),
    "keyword": OperatorCall(ATEN.sum.dim_IntList, (row_major(4, 5), (1,), True), (("dtype", torch.float64),), 32),
    "view": VIEW,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_done_again(quick, kind):
    watch = OperationTimer(CPU)
    seconds = watch(KINDS[kind])
    assert 0 < seconds < 0.1
    assert watch.failed == set()
    assert watch(KINDS[kind]) == seconds  # it is known now


def test_what_cannot_be_done_alone_is_taken_for_a_copy(quick):
    impossible = OperatorCall(ATEN.mm.default, (row_major(16, 32), row_major(16, 32)), (), 64)
    watch = OperationTimer(CPU)
    assert watch(impossible) > 0
    assert watch.failed == {"mm"}


def test_no_two_operands_share_memory_and_each_has_as_many_as_fill_its_distance():
    watch = OperationTimer(CPU)
    watch._pool = torch.ones(320 * MIB // 4)
    left, right = row_major(256, 256, distance=FAR), row_major(256, 512, distance=8 * MIB)
    operation = OperatorCall(ATEN.mm.default, (left, right), (), 4 * 256 * 512)  # 1.25 MiB are moved
    slots = watch._slots(operation, 1)
    assert [len(slot) for slot in slots] == [204, 6]  # 256 / 1.25 and 8 / 1.25
    places = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for slot in slots for tensor in slot)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert all(bool((tensor == 1).all()) for slot in slots for tensor in slot[:2])
    used = [(args[0].data_ptr(), args[1].data_ptr()) for args, _ in watch._calls(operation)]
    assert len(used) == len({first for first, _ in used}) == 204
    assert len({second for _, second in used}) == 6


def test_integers_are_zeros_and_what_does_not_fit_into_the_pool_has_memory_of_its_own():
    watch = OperationTimer(CPU)
    watch._pool = torch.ones(MIB // 4)
    (indices,) = watch._tensors(Operand((16,), (1,), torch.int64), [0])
    assert torch.equal(indices, torch.zeros(16, dtype=torch.int64))  # valid indices of any table
    inside, beyond = watch._tensors(row_major(256, 512), [0, MIB - 4096])  # half a MiB each
    assert torch.equal(inside, torch.ones(256, 512))
    assert torch.equal(beyond, torch.ones(256, 512))
    assert inside.data_ptr() == watch._pool.data_ptr()


def test_what_is_written_into_an_argument_by_name_is_not_new():
    x, into = torch.ones(64, 64), torch.empty(64, 64)
    (operation,) = ReuseDistances().operations(ATEN.add.out, (x, x), {"out": into}, torch.add(x, x, out=into))
    assert operation.made_bytes == 0


def test_entries_of_a_list_are_timed_eight_at_once(quick, monkeypatch):
    seen = []

    class Spy:
        _opname = "spy_"

        def __call__(self, tensors, factor):
            seen.append(len({tensor.data_ptr() for tensor in tensors}))

    watch = OperationTimer(CPU)
    now = itertools.count()
    monkeypatch.setattr(replay.time, "perf_counter", lambda: float(next(now)))  # every sample takes a second
    assert watch(OperatorCall(Spy(), ((row_major(4096, distance=FAR),), 2.0), of_list=True)) == 1 / 8
    assert set(seen) == {8}


def test_the_median_of_all_rounds_counts(monkeypatch):
    watch = OperationTimer(CPU)
    rounds = iter([[1.0, 9.0], [2.0, 3.0], [4.0, 8.0]])
    monkeypatch.setattr(watch, "_samples", lambda _: next(rounds))
    assert ROUNDS == 3
    assert watch(product(2, 3, 5)) == statistics.median([1.0, 9.0, 2.0, 3.0, 4.0, 8.0]) == 3.5


WHOLE = {
    "by its FLOPs": (product(8192, 576, 1536), 8.0),
    "by its bytes": (OperatorCall(ATEN.neg.default, (row_major(2**24),), (), 2**26), 8.0),
    # Of the gradient (16 MiB) a quarter is summed into a table (24 MiB) that is still whole.
    "by the bytes that it moves": (
        OperatorCall(
            ATEN.embedding_dense_backward.default,
            (row_major(4096, 1024), row_major(4096, dtype=torch.int64), 6144, -1, False),
            (),
            24 * MIB,
        ),
        (16 * MIB + 8 * 4096 + 24 * MIB) / (4 * MIB + 8 * 1024 + 24 * MIB),
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_parts_time_is_multiplied(monkeypatch, case):
    whole, times = WHOLE[case]
    watch, timed = OperationTimer(CPU), set()
    monkeypatch.setattr(watch, "_samples", lambda part: timed.add(part) or [1.0, 1.0])
    assert watch(whole) == pytest.approx(times)
    assert [part.args for part in timed] == [whole.part().args]
    assert whole.part() != whole


def test_the_generators_stay_as_they_are(quick):
    random = torch.get_rng_state()
    OperationTimer(CPU)(OperatorCall(ATEN.bernoulli_.float, (row_major(8), 0.5)))
    assert torch.equal(random, torch.get_rng_state())


# The crowd


def test_a_crowd_is_what_others_use_of_the_cores(monkeypatch):
    spent = iter([(10.0, 4.0), (16.0, 7.0)])  # all processes, and this one
    now = iter([0.0, 2.0])
    monkeypatch.setattr(process, "_cpu_seconds", lambda: next(spent))
    monkeypatch.setattr(process.time, "perf_counter", lambda: next(now))
    with BusyCores(3) as crowd:
        pass
    assert crowd.cores == 1.5
    monkeypatch.setattr(process.psutil, "cpu_count", lambda: 4)
    assert crowd.disturbs
    monkeypatch.setattr(process.psutil, "cpu_count", lambda: 5)
    assert not crowd.disturbs


def test_of_a_moment_a_crowd_tells_nothing(monkeypatch):
    """The system counts in hundredths of a second, so that a few milliseconds could seem to be many cores."""
    spent, now = iter([(10.0, 4.0), (10.02, 4.0)]), iter([0.0, 0.004])
    monkeypatch.setattr(process, "_cpu_seconds", lambda: next(spent))
    monkeypatch.setattr(process.time, "perf_counter", lambda: next(now))
    with BusyCores(3) as crowd:
        pass
    assert (crowd.cores, crowd.disturbs) == (0, (process.psutil.cpu_count() or 1) + 0.25 < 3)


def test_a_square_is_not_cut_to_crumbs():
    """Both of its sides are the largest size, so each halving quarters it."""
    n = 4096
    square = OperatorCall(ATEN.relu.default, (row_major(n, n),), (), 4 * n * n)
    part = square.part()
    assert part.operands[0].shape == (1024, 1024)
    assert part.moved_bytes == square.moved_bytes // 16
    oblong = OperatorCall(ATEN.relu.default, (row_major(n, n // 2),), (), 2 * n * n).part()
    assert oblong.operands[0].shape == (1024, n // 2)
    assert oblong.moved_bytes == 16 * MIB
