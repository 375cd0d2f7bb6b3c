"""A learner's code leaves no trace: arguments, output, random states, signal handlers, timers."""

import contextlib
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from lora_lab.course import calls
from lora_lab.course.calls import TimeUp, call, file_of, limited, untouched

needs_alarm = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no SIGALRM on this system")


def test_a_call_works_on_copies_and_names_what_it_changed():
    array, tensor, rows, layer = np.ones(3), torch.ones(3), [[1], [2]], torch.nn.Linear(2, 2)
    generator = torch.Generator().manual_seed(1)

    def change(array, tensor, rows, layer, generator, number):
        array[0] = np.nan
        tensor.mul_(2)
        rows[0].append(3)
        torch.nn.init.zeros_(layer.bias)
        return torch.rand(1, generator=generator), number

    names = ["array", "tensor", "rows", "layer", "generator", "number"]
    outcome = call(change, (array, tensor, rows, layer, generator, 5), names)
    assert outcome.changed == {"array", "tensor", "rows", "layer"}
    assert outcome.value[1] == 5
    assert array.tolist() == tensor.tolist() == [1, 1, 1]
    assert rows == [[1], [2]]
    assert layer.bias.any()
    same_draw = call(lambda g: torch.rand(1, generator=g), (generator,), ["g"]).value
    assert torch.equal(same_draw, outcome.value[0])  # a copy of the generator draws the same


def test_arguments_that_are_only_read_are_not_changed():
    arguments = (np.array([np.nan, 1]), torch.ones(2, requires_grad=True), {"a": {1}}, object())
    assert call(lambda *_: None, arguments, list("abcd")).changed == frozenset()


def test_output_is_captured_and_errors_are_values(capsys):
    def talk():
        print("a")
        print("b", file=sys.stderr)
        raise SystemExit(3)

    outcome = call(talk, (), [])
    assert isinstance(outcome.error, SystemExit)
    assert (outcome.value, outcome.printed) == (None, "a\n")
    assert capsys.readouterr() == ("", "")
    for error in (GeneratorExit, MemoryError, RecursionError, StopIteration):
        assert type(call(lambda error=error: (_ for _ in ()).throw(error), (), []).error) in (error, RuntimeError)


def test_the_learner_can_interrupt():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(interrupt, (), [])


def endless():
    while True:
        pass


def stubborn():
    """Catches every exception, and goes on."""
    for _ in range(3):
        with contextlib.suppress(BaseException):
            endless()
    endless()


@needs_alarm
@pytest.mark.parametrize("function", [endless, stubborn, lambda: time.sleep(60)])
def test_what_does_not_end_is_stopped(function):
    started = time.monotonic()
    with pytest.raises(TimeUp):
        limited(lambda: call(function, (), []), 0.05)
    assert time.monotonic() - started < 30  # and not at all


@needs_alarm
def test_no_time_left_is_time_up():
    with pytest.raises(TimeUp):
        limited(lambda: 1, 0)


@needs_alarm
def test_the_handler_and_the_timer_of_others_come_back():
    rings = []
    before = signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100, 50)
        assert limited(lambda: 7, 1) == 7
        with pytest.raises(TimeUp):
            limited(endless, 0.05)
        with pytest.raises(ZeroDivisionError):
            limited(lambda: 1 / 0, 1)
        delay, interval = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 50 < delay < 100
        assert interval == 50
        assert rings == []
        signal.raise_signal(signal.SIGALRM)
        assert rings == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@needs_alarm
def test_after_the_end_no_alarm_rings():
    with pytest.raises(TimeUp):
        limited(endless, 0.01)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    time.sleep(2 * calls.REPEAT)


def test_in_another_thread_there_is_no_limit():
    results = []
    thread = threading.Thread(target=lambda: results.append(limited(lambda: 7, 0.0)))
    thread.start()
    thread.join()
    assert results == [7]


def test_random_states_and_gradients_stay_as_they_were():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with contextlib.suppress(ZeroDivisionError), untouched():
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        torch.set_grad_enabled(False)
        1 / 0  # noqa: B018
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(states[2], torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_the_file_of_functions_classes_and_other_callables():
    class Here:
        def f(self): ...

    class Decorated:
        @torch.no_grad()
        def f(self): ...

    assert file_of(endless) == file_of(Here) == file_of(Decorated) == __file__
    assert file_of(print) is file_of(type("Empty", (), {})) is None
