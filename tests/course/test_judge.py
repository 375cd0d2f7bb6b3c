"""What is found about an answer, in the order in which it is looked for; and a learner's code leaves no trace."""

import contextlib
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from lora_lab.course import judge as module
from lora_lab.course.exercise import EXERCISES, Exercise
from lora_lab.course.judge import SHORT, TimeUp, call, difference, factor, file_of, judge, limited, same

needs_alarm = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no SIGALRM on this system")


@pytest.fixture
def register():
    """Registers an exercise for one test: register(solution, inputs=..., ...)."""
    names = []

    def add(solution, name="trial", mistakes=(), properties=(), **options):
        names.append(name)
        texts = {"hints": ["One.", "Two."], "praise": "It matters.", "draws": 6}
        exercise = Exercise(name, **(texts | options))
        exercise.solution, exercise.mistakes = solution, list(mistakes)
        for holds, sentence in properties:
            exercise.must(sentence)(holds)
        return exercise

    yield add
    for name in names:
        EXERCISES.pop(name, None)


def weight_and_input(rng):
    return rng.normal(size=(2, 3)), rng.normal(size=3)


def product(W, x):
    """The result is W x."""
    return W @ x


@pytest.fixture
def trial(register):
    return register(
        product,
        inputs=weight_and_input,
        mistakes=[
            (lambda W, x: W @ x * [2, 1], "The first entry is doubled."),
            (lambda W, x: x @ W, "This raises."),
            (lambda W, x: np.maximum(W @ x, 0), "Only positive entries are right."),
        ],
    )


def test_a_right_answer_passes_however_it_is_written(trial):
    verdict = judge(trial, lambda W, x: np.array([sum(a * b for a, b in zip(row, x, strict=True)) for row in W]))
    assert (verdict.passed, verdict.text) == (True, "It matters.")


def test_a_known_mistake_names_itself_by_value_or_by_error(trial):
    assert judge(trial, lambda W, x: np.array([2 * (W[0] @ x), W[1] @ x])).text == "The first entry is doubled."
    assert judge(trial, lambda W, x: x @ W + 1).text == "This raises."
    assert judge(trial, lambda W, x: np.where(W @ x > 0, W @ x, 0)).text == "Only positive entries are right."


def test_a_mistake_must_agree_on_all_inputs(register):
    """Right on most inputs, wrong on one: neither right nor the mistake that agrees on that one."""
    numbers = iter(range(10**6))
    trial = register(
        (lambda x: x + 1),
        inputs=lambda rng: (next(numbers) % 6,),
        mistakes=[(lambda x: x, "It is one too small.")],
    )
    verdict = judge(trial, lambda x: x if x == 3 else x + 1)
    assert verdict.text == "The result differs from the expected one on 1 of 6 inputs."
    assert verdict.example == "x           = 3\nyour result = 3\nexpected    = 4"
    assert judge(trial, lambda x: x).text == "It is one too small."


def raising(W, x):
    y = W @ x
    return y / np.array([1, 2, 3])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda W, x: None, "The result is None. Is the return missing?"),
        (lambda W, x: 3 * W @ x, "The result is 3 times what it should be, on all inputs. A factor is wrong."),
        (lambda W, x: W @ -x, "The result is -1 times what it should be, on all inputs. A factor is wrong."),
        (lambda W, x: W @ x + 1, "The result differs from the expected one on 6 of 6 inputs."),
        (lambda W: W, "product must take the arguments (W, x)."),
        (3, 'Pass the function itself, without calling it: check("trial", product).'),
        (np.ndarray, 'Pass the function itself, without calling it: check("trial", product).'),
    ],
)
def test_general_findings(trial, answer, text):
    verdict = judge(trial, answer)
    assert (verdict.passed, verdict.text) == (False, text)


def test_a_result_that_is_missing_on_some_inputs_is_shown_beside_the_expected_one(register):
    trial = register((lambda n: n), inputs=lambda rng: (int(rng.integers(1, 9)),), draws=40)
    verdict = judge(trial, lambda n: n if n < 5 else None)
    assert verdict.text.startswith("On ")
    assert verdict.text.endswith(" of 40 inputs: The result is None. Is the return missing?")
    assert "your result = None" in verdict.example


def test_a_none_that_can_be_right_is_no_missing_return(register):
    inputs = lambda rng: (int(rng.integers(1, 9)),)  # noqa: E731
    trial = register((lambda n: n if n < 7 else None), inputs=inputs, draws=40)
    assert judge(trial, lambda n: n if n < 5 else None).text.endswith(
        "The result is None, although there is an answer."
    )


def test_what_is_missing_on_some_inputs_is_no_answer_where_others_are_wrong_too(register):
    trial = register((lambda n: n), inputs=lambda rng: (int(rng.integers(1, 9)),), draws=40)
    verdict = judge(trial, lambda n: n + 20 if n < 5 else None)
    assert "Is the return missing?" not in verdict.text


def test_an_error_that_is_often_met_comes_with_advice(register):
    trial = register((lambda x: x.sum()), inputs=lambda rng: (torch.from_numpy(rng.normal(size=3)),), draws=4)
    verdict = judge(trial, lambda x: 1 if x else 0)  # a line that is shown, so apart from what is expected
    assert "Ask `is not None` whether there is one" in verdict.text


def test_a_result_that_lacks_a_property_is_told_so_with_an_example(register):
    def fits(answer, rng):
        """No more than ten fit."""
        return answer(99) <= 10

    trial = register((lambda n: min(n, 10)), properties=[(fits, "")], inputs=lambda rng: (int(rng.integers(11, 19)),))
    verdict = judge(trial, lambda n: n)
    assert verdict.text == "This is not true on every input: No more than ten fit."
    assert "expected    = 10" in verdict.example


def test_an_error_names_its_line(trial):
    line = raising.__code__.co_firstlineno + 2
    text = judge(trial, raising).text
    assert text.startswith(f"Your code stops with ValueError in line {line} (return y / np.array([1, 2, 3])): operands")


def test_an_argument_that_is_changed_is_named_even_if_the_result_is_right(trial):
    def change(W, x):
        result = W @ x
        x *= 2
        return result

    assert judge(trial, change).text == "Your function changes its argument x in place. Work on a copy of x."
    trial.mistakes.append((change, "x was overwritten."))
    assert judge(trial, change).text == "x was overwritten."


def test_a_mistake_that_differs_elsewhere_does_not_hide_a_changed_argument(trial):
    def change(W, x):
        result = W @ x
        x *= 2
        return result

    trial.mistakes.append((lambda W, x: W @ x, "It fails on other inputs."))
    assert judge(trial, change).text == "Your function changes its argument x in place. Work on a copy of x."


def test_a_property_that_fails_on_the_second_try_is_found(register):
    tries = []

    def second(answer, rng):
        """It is even."""
        tries.append(answer(1))
        return len(tries) % 2 == 1

    trial = register((lambda n: 2 * n), properties=[(second, "")], inputs=lambda rng: (int(rng.integers(9, 19)),))
    assert judge(trial, lambda n: 2 * n + n % 3).text == "This is not true on every input: It is even."


def test_an_answer_that_agrees_on_all_inputs_must_have_the_properties_too(register):
    """By luck no input may show what is wrong, and the points of a graded sheet would."""

    def follows_the_sign(answer, rng):
        """The dial may be negative."""
        return answer(-2) == -4

    def stays_small(answer, rng):
        return answer(9) < 20

    inputs = {"inputs": lambda rng: (int(rng.integers(1, 5)),)}
    trial = register((lambda s: 2 * s), properties=[(follows_the_sign, ""), (stays_small, "It explodes.")], **inputs)
    assert judge(trial, lambda s: s + s).passed
    assert judge(trial, lambda s: 2 * abs(s)).text == "On other inputs this is not true: The dial may be negative."
    assert judge(trial, lambda s: 2 * s if s < 5 else 2**s).text == "It explodes."
    assert judge(trial, lambda s: 2 * s if s > 0 else 1 / 0).text.startswith("Your code stops with ZeroDivisionError")


def stub(*arguments):
    raise NotImplementedError("your code here")


@pytest.mark.parametrize("answer", [stub, lambda W, x: ..., lambda W, x: W @ x + ____])  # noqa: F821
def test_stubs_are_not_started(trial, answer):
    assert judge(trial, answer).passed is None


def test_a_missing_forward_is_an_error_and_not_a_stub(trial):
    class Empty(torch.nn.Module):
        pass

    text = judge(trial, lambda W, x: Empty()(x)).text
    assert text.startswith("Your code stops with NotImplementedError in line ")
    assert judge(trial, lambda W, x: undefined_name).text.startswith("Your code stops with NameError")  # noqa: F821


@needs_alarm
class TestTimeLimit:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        monkeypatch.setattr(module, "SECONDS", 0.1)

    def test_slow_mistakes_do_not_prolong_a_check(self, register):
        """What is left is a general finding."""

        def slow(W, x):
            time.sleep(60)

        trial = register(product, inputs=weight_and_input, mistakes=[(slow, "It sleeps.")])
        started = time.monotonic()
        assert judge(trial, lambda W, x: -W @ x).text.startswith("The result is -1 times what it should be")
        assert time.monotonic() - started < 30

    def test_an_endless_property_is_stopped(self, register):
        def two(answer, rng):
            return len(answer(*weight_and_input(rng))) == 2

        trial = register(product, properties=[(two, "No.")])
        assert "was still running after 0.1 s" in judge(trial, lambda W, x: endless()).text


def test_a_large_result_is_shown_where_it_differs_most(register):
    def ones(n):
        """Ones."""
        return np.ones((n, n))

    def wrong(n):
        result = np.ones((n, n))
        result[2, 3] = 7
        return result

    verdict = judge(register(ones, inputs=lambda rng: (int(rng.integers(5, 9)),)), wrong)
    rows = dict(re.split(r" += ", row) for row in verdict.example.splitlines())
    assert int(rows.pop("n")) in range(5, 9)
    assert rows == {"your result[2, 3]": "7", "expected[2, 3]": "1"}


def test_the_smallest_inputs_are_shown(register):
    lengths = iter([5, 9, 2, 7, 8, 6])

    def total(x):
        """The sum."""
        return x.sum()

    verdict = judge(register(total, inputs=lambda rng: (np.ones(next(lengths)),)), lambda x: x.sum() + 1)
    assert verdict.example == "x           = [1. 1.]\nyour result = 3\nexpected    = 2"


def test_what_is_printed_is_shown_once(trial):
    assert judge(trial, lambda W, x: print(W.shape)).printed == "(2, 3)\n"


def test_what_is_printed_while_a_property_fails_is_shown_and_nothing_before(register):
    def answer(fail):
        print(f"fail: {fail}")
        return 1 / 0 if fail == "by an error" else fail

    def solution(fail):
        return False

    properties = [(lambda answer, rng: answer(False) is False, "Never."), (lambda answer, rng: not answer(True), "No.")]
    assert judge(register(solution, properties=properties), answer).printed == "fail: True\n"
    error = (lambda answer, rng: answer("by an error"), "No.")
    assert judge(register(solution, "another", properties=[error]), answer).printed == "fail: by an error\n"


def test_inputs_are_fresh_each_time(register):
    """So that no answer can be memorised."""
    seen = []

    def watch(W, x):
        """W x."""
        seen.append(W[0, 0])
        return W @ x

    trial = register(watch, inputs=weight_and_input)
    judge(trial, product)
    judge(trial, product)
    assert len(seen) == len(set(seen)) == 12


def test_properties_are_tried_in_order(register):
    def larger(answer, rng):
        return answer() > 0

    properties = [(larger, "It is not positive."), (lambda answer, rng: answer() < 9, "It is too large.")]
    trial = register((lambda: 1), properties=properties)
    assert judge(trial, lambda: 5).passed
    assert judge(trial, lambda: -5).text == "It is not positive."
    assert judge(trial, lambda: 10).text == "It is too large."
    assert judge(trial, lambda: None).text.startswith("Your code stops with TypeError")
    assert judge(trial, stub).passed is None
    assert judge(trial, int).text == 'Pass the function itself, without calling it: check("trial", <lambda>).'


# One call


def test_a_call_works_on_copies_and_names_what_it_changed():
    array, tensor, rows, generator = np.ones(3), torch.ones(3), [[1], [2]], torch.Generator().manual_seed(1)

    def change(array, tensor, rows, generator, number):
        array[0] = np.nan
        tensor.mul_(2)
        rows[0].append(3)
        return torch.rand(1, generator=generator), number

    names = ["array", "tensor", "rows", "generator", "number"]
    outcome = call(change, (array, tensor, rows, generator, 5), names)
    assert outcome.changed == {"array", "tensor", "rows"}
    assert outcome.value[1] == 5
    assert array.tolist() == tensor.tolist() == [1, 1, 1]
    assert rows == [[1], [2]]
    assert torch.equal(torch.rand(1, generator=generator), outcome.value[0])  # the copy drew, not the generator


def test_arguments_that_are_only_read_are_not_changed():
    arguments = (np.array([np.nan, 1]), torch.ones(2, requires_grad=True), {"a": {1}}, object())
    assert call(lambda *_: None, arguments, list("abcd")).changed == frozenset()


def test_output_is_captured_and_errors_are_values_but_for_the_learners_own_interruption(capsys):
    def talk(error):
        print("a")
        print("b", file=sys.stderr)
        raise error

    for error in (SystemExit(3), GeneratorExit(), MemoryError(), RecursionError(), StopIteration()):
        outcome = call(talk, (error,), ["error"])
        assert (type(outcome.error), outcome.value, outcome.printed) == (type(error), None, "a\n")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(KeyboardInterrupt):
        call(talk, (KeyboardInterrupt(),), ["error"])


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
def test_what_does_not_end_is_stopped(function, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.05)
    started = time.monotonic()
    with pytest.raises(TimeUp):
        limited(lambda: call(function, (), []))
    assert time.monotonic() - started < 30  # and not at all
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@needs_alarm
def test_the_handler_of_others_comes_back(monkeypatch):
    rings = []
    before = signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
    monkeypatch.setattr(module, "SECONDS", 0.05)
    try:
        assert limited(lambda: 7) == 7
        with pytest.raises(TimeUp):
            limited(endless)
        with pytest.raises(ZeroDivisionError):
            limited(lambda: 1 / 0)
        assert rings == []
        signal.raise_signal(signal.SIGALRM)
        assert rings == [1]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_in_another_thread_there_is_no_limit():
    results = []
    thread = threading.Thread(target=lambda: results.append(limited(lambda: 7)))
    thread.start()
    thread.join()
    assert results == [7]


def test_output_torchs_random_state_and_gradients_stay_as_they_were(trial):
    def disturb():
        torch.manual_seed(1)
        torch.set_grad_enabled(False)
        sys.stdout = sys.stderr = None  # as they are left if the alarm rings while they are put back

    def state():
        return torch.get_rng_state().tolist(), torch.is_grad_enabled(), sys.stdout, sys.stderr

    before = state()
    for answer in (lambda W, x: disturb() or W @ x, lambda W, x: disturb() or 1 / 0):
        judge(trial, answer)
        assert state() == before
    with module.untouched():
        disturb()
    assert state() == before


def test_the_file_of_functions_classes_and_other_callables():
    class Here:
        def f(self): ...

    class Decorated:
        @torch.no_grad()
        def f(self): ...

    assert file_of(endless) == file_of(Here) == file_of(Decorated) == __file__
    assert file_of(print) is file_of(type("Empty", (), {})) is None


# Values


M = np.arange(6.0).reshape(2, 3)


EQUAL = [
    (None, None),
    (3, np.int64(3)),
    (10**30, 10**30),
    (2, 2.0),
    (torch.tensor(2.0), 2.0),
    (0.1 + 0.2, 0.3),
    (torch.tensor(M).float() / 3, M / 3),
    (torch.tensor(M).bfloat16(), M),
    (torch.tensor(M, requires_grad=True), M),
    (np.array([1e6, 1e-3]), np.array([1e6, 0.0])),
    (np.array([np.nan, 1]), np.array([np.nan, 1])),
    ([1, "a", M], (1, "a", torch.tensor(M))),
    ({"a": M, "b": [True]}, {"b": [True], "a": torch.tensor(M)}),
]
UNEQUAL = [
    *((0, None), (True, 1), (1, True), (3.0, 3), ("3", 3)),
    *((number + 1, number) for number in (2**63, 2**60)),  # which floats do not tell apart
    (1.0003, 1.0),
    (np.ones((2, 1)), np.ones(2)),
    (1.0, np.ones(2)),
    ([0.0, 1.0], np.array([0.0, 1.0])),
    ((1, 2), (2, 1)),
    ({1}, {1, 2}),
    ({"a": 1}, {"a": 2}),
    (np.array([None, 1]), M[0, :2]),  # whose comparison is an array
]


@pytest.mark.parametrize(("value", "expected"), EQUAL)
def test_equal_values(value, expected):
    assert same(value, expected)
    assert difference(value, expected) is None


@pytest.mark.parametrize(("value", "expected"), UNEQUAL)
def test_unequal_values(value, expected):
    assert not same(value, expected)


@pytest.mark.parametrize(
    ("value", "expected", "sentence"),
    [
        ("x", M, "The result is of type str, but it should be an array of shape (2, 3)."),
        ([[1, 2], [3]], M, "The result is of type list, but it should be an array of shape (2, 3)."),
        (M.T, M, "The result is transposed: its shape is (3, 2), but it should be (2, 3)."),
        (M[0], M, "The result has the shape (3,), but it should have (2, 3)."),
        (M, 1.0, "The result is an array of shape (2, 3), but it should be a number."),
        (0, M, "The result is a number, but it should be an array of shape (2, 3)."),
        (2.5, 2, "The result consists of floats, but whole numbers are expected."),
        (M > 1, M, "The result consists of True or False, but floats are expected."),
        (M / np.array([1, 1, np.nan]), M, "The result holds NaN."),
        (np.inf, 1.0, "The result holds infinity."),
        (3, "x", "The result is a number, but it should be of type str."),
        (3, (1, 2), "The result is a number, but it should be of type tuple."),
        ((1, 2), (1, 2, 3), "The result has 2 items, but it should have 3."),
        ((1, M.T), (1, M), "Item 1 of the result is transposed: its shape is (3, 2), but it should be (2, 3)."),
        ({"a": 1, "b": 2}, {"a": 1}, "The result has the keys ['a', 'b'], but it should have ['a']."),
        ({"a": None}, {"a": 1}, "The entry 'a' is None. Is the return missing?"),
        (1, {"a": 1}, "The result is a number, but it should be of type dict."),
        (1, {1, 2}, "The result is a number, but it should be of type set."),
        (M + 1, M, None),
        (4, 3, None),
        ("x", "y", None),
    ],
)
def test_the_most_telling_difference(value, expected, sentence):
    assert not same(value, expected)
    assert difference(value, expected) == sentence


@pytest.mark.parametrize(
    ("value", "expected", "ratio"),
    [
        (3 * M, M, 3),
        (-M, M, -1),
        (torch.tensor(M) / 4, M, 0.25),
        (6, 3, 2),
        (M, M, None),
        (M + 1, M, None),
        (M, 0 * M, None),
        (0 * M, M, None),
        (M.T, M, None),
        ("x", M, None),
        (np.nan * M, M, None),
        (10**12, 10**11, 10),
        (M[0], M, None),
        (3j * M, 1j * M, 3),
        (M + 2j, M, None),
    ],
)
def test_factors(value, expected, ratio):
    assert factor(value, expected) == (None if ratio is None else pytest.approx(ratio))


def test_short_texts():
    assert SHORT.repr((1, [M[0], "a"], {"b": None})) == "(1, [[0. 1. 2.], 'a'], {'b': None})"
    assert len(SHORT.repr("x" * 1000)) < 50
