"""The one change that makes an answer right: found among those of its own code, and named with its line."""

import ast
import itertools
import linecache
import math
import textwrap

import numpy as np
import pytest
import torch

from lora_lab.course.judge import judge
from lora_lab.course.nearly import find_change, others, slips
from tests.course.test_judge import needs_alarm, register  # noqa: F401

VALUES = [2.0, 3.0, 5.0, 7.0, 11.0]


def written(code, **names):
    """The last function or class of some code, which is known by its lines as that of a notebook's cell is."""
    source = textwrap.dedent(code).strip() + "\n"
    file = f"<cell {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names := {"np": np, "torch": torch, "math": math, **names})
    return names[ast.parse(source).body[-1].name]


def passing(**cases):
    """Whether a function returns what is expected of these arguments; a NameError and the like is no."""

    def passes(function):
        try:
            return all(abs(function(*arguments) - expected) < 1e-9 for arguments, expected in cases["on"])
        except Exception:
            return False

    return passes


def error(x):
    return np.std(x, ddof=1) / math.sqrt(len(x))


NUMBERS = [((VALUES,), error(VALUES)), ((VALUES[:3],), error(VALUES[:3]))]
POWERS = [((2.0, 3.0, 9.0), 2 * math.sqrt(3 / 9)), ((5.0, 1.0, 4.0), 2.5)]
BYTES = [((3, 5), 4 * 3 + 16 * 5), ((0, 2), 32)]


@pytest.mark.parametrize(
    ("code", "cases", "said"),
    [
        (
            "def f(x):\n    return np.std(x, ddof=1) / math.sqrt(len(x) - 1)",
            NUMBERS,
            "in line 2, len(x) in place of len(x) - 1",
        ),
        (
            "def f(x):\n    n = len(x)\n    return np.std(x, ddof=0) / math.sqrt(n)",
            NUMBERS,
            "in line 3, np.std(x, ddof=1) in place of np.std(x, ddof=0)",
        ),
        (
            "def f(rate, a, b):\n    return rate * (a / b) ** 1 / 2",
            POWERS,
            "in line 2, rate * (a / b) ** (1 / 2) in place of rate * (a / b) ** 1 / 2",
        ),
        (
            "def f(rate, a, b):\n    return rate * math.pow(0.5, a / b)",
            [((3.0, 4.0, 1.0), 3 * 4**0.5), ((2.0, 9.0, 1.0), 2 * 9**0.5)],
            "in line 2, math.pow(a / b, 0.5) in place of math.pow(0.5, a / b)",
        ),
        (
            "def f(rate, a, b):\n    return rate * math.log2(a / b)",
            [((3.0, 4.0, 1.0), 3 * math.log(4)), ((2.0, 9.0, 1.0), 2 * math.log(9))],
            "in line 2, math.log(a / b) in place of math.log2(a / b)",
        ),
        (
            "def f(x):\n    A = np.array([[v, 2 * v] for v in x])\n    return A[:, 0].sum()",
            [((np.array(VALUES),), 3 * VALUES[0]), ((np.array(VALUES[1:]),), 3 * VALUES[1])],
            "in line 2, np.array([[v, 2 * v] for v in x]).T in place of np.array([[v, 2 * v] for v in x])",
        ),
        (
            "def f(n, names, start):\n    return sum(names[2 * n :]) + sum(names[n:])",
            [((1, [1.0, 2.0, 4.0], 0), 8.0), ((1, [5.0, 1.0, 2.0, 3.0], 0), 10.0)],
            "in line 2, sum(names[2 * n:]) in place of sum(names[n:])",
        ),
        (
            "def f(rate, a, b):\n    return rate * a / b**0.5",
            POWERS,
            "in line 2, rate * (a / b) ** 0.5 in place of rate * a / b ** 0.5",
        ),
        (
            "def f(rate, a, b):\n    return rate * math.sqrt(b / a)",
            POWERS,
            "in line 2, rate / math.sqrt(b / a) in place of rate * math.sqrt(b / a)",
        ),
        (
            "def f(frozen, trained):\n    return 4 * frozen + 4 + 4 + 8 * trained",
            BYTES,
            "in line 2, 4 * frozen + (4 + 4 + 8) * trained in place of 4 * frozen + 4 + 4 + 8 * trained",
        ),
        (
            "def f(frozen, trained):\n    total = 0\n    for n, size in ((frozen, 4), (trained, 16)):\n"
            "        total = n * size\n    return total",
            BYTES,
            "in line 4, total += n * size in place of total = n * size",
        ),
        (
            "def f(frozen, trained):\n    total = 0\n    for n, size in ((frozen, 4), (trained, 16)):\n"
            "        total += n * size\n        return total",
            BYTES,
            "line 5, return total, belongs after its loop or condition",
        ),
        (
            "def f(rate, a, b):\n    return rate * (a / b) ** 0.5 if a == 3 or 1 else rate / 2",
            [*POWERS, ((4.0, 9.0, 1.0), 2.0)],
            "in line 2, a in (3, 1) in place of a == 3 or 1",
        ),
        (
            "def f(rate, a, b):\n    return rate * (a / b) ** 0.5 if b > 3 else 0",
            [*POWERS, ((4.0, 9.0, 1.0), 4.0)],
            "in line 2, rate * (a / b) ** (0.5 if b > 3 else 0) in place of rate * (a / b) ** 0.5 if b > 3 else 0",
        ),
        (
            "def f(frozen, trained):\n    trained = trained + frozen\n    return 4 * frozen + 16 * trained",
            BYTES,
            "leave out line 2, trained = trained + frozen",
        ),
        (
            "def f(rate, a, b):\n    return rate * (a / b) ^ 0.5",
            POWERS,
            "in line 2, rate * (a / b) ** 0.5 in place of rate * (a / b) ^ 0.5",
        ),
        (
            "def f(rate, kind):\n    if kind == 'b':\n        return rate\n    return 2 * rate",
            [((3.0, "B"), 3.0), ((3.0, "both"), 6.0)],
            "in line 2, kind == 'B' in place of kind == 'b'",
        ),
        (
            "def f(rate, a, b):\n    return rate * (math.sqrt(a) / b)",
            POWERS,
            "in line 2, math.sqrt(a / b) in place of math.sqrt(a) / b",
        ),
        (
            "def f(frozen, trained):\n    return 16 if frozen == 3 else 4 * trained",
            [((3, 5), 80), ((2, 5), 20)],
            "in line 2, (16 if frozen == 3 else 4) * trained in place of 16 if frozen == 3 else 4 * trained",
        ),
        (
            "def f(x):\n    x = [*x]\n    x.reverse\n    return x[0]",
            [(([*VALUES],), 11.0), ((VALUES[:2],), 3.0)],
            "in line 3, x.reverse(), for without brackets reverse is not called",
        ),
        (
            "def f(x):\n    x = np.array(x)\n    x[-2:] = 0\n    return x.sum()",
            [((VALUES,), 5.0), ((VALUES[1:],), 8.0)],
            "in line 3, x[2:] = 0 in place of x[-2:] = 0",
        ),
        (
            "def f(x):\n    return np.std(x, ddof=1) / math.pow(len(x), 0.5)",
            [((VALUES,), np.std(VALUES, ddof=1) / 2), ((VALUES[:3],), np.std(VALUES[:3], ddof=1) / math.sqrt(2))],
            "in line 2, math.pow(len(x) - 1, 0.5) in place of math.pow(len(x), 0.5)",
        ),
        (
            "def f(frozen, trained):\n    small = 4 * frozen\n    return small + 16 * frozen",
            BYTES,
            "in line 3, 16 * trained in place of 16 * frozen",
        ),
    ],
)
def test_the_change_is_named_with_its_line(code, cases, said):
    answer, passes = written(code), passing(on=cases)
    words = {each for arguments, _ in cases for each in arguments if isinstance(each, str)}
    some = [lambda code: slips(code, words), others]
    found = [find_change(answer, changes, passes, lambda: True) for changes in some]
    assert next(filter(None, found)) == f"One change makes it right: {said}."


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def f(layer):\n    for p in layer.parameters():\n        p.require_grad = False\n"
            "    layer.bias.require_grad = True",
            "requires_grad in place of require_grad in line 3, which torch does not know",
        ),
        (
            "def f(layer):\n    layer.weight.requires_grad = False\n    layer.alpha == 3",
            "in line 3, layer.alpha = 3, for == only compares",
        ),
    ],
)
def test_what_is_set_in_vain_is_named(code, said):
    def passes(function):
        layer = torch.nn.Linear(2, 2)
        function(layer)
        trains = layer.weight.requires_grad, layer.bias.requires_grad
        return trains == (False, True) and getattr(layer, "alpha", 3 - ("alpha" in code)) == 3

    assert find_change(written(code), slips, passes, lambda: True) == f"One change makes it right: {said}."


def test_nothing_is_said_of_what_no_change_mends_nor_without_code_or_time():
    wrong = written("def f(x):\n    return 17")
    assert find_change(wrong, others, passing(on=NUMBERS), lambda: True) is None
    near = written("def f(x):\n    return np.std(x, ddof=0) / math.sqrt(len(x))")
    assert find_change(near, others, passing(on=NUMBERS), lambda: False) is None
    assert find_change(math.sqrt, others, passing(on=NUMBERS), lambda: True) is None
    exec("def hidden(x):\n    return np.std(x) / math.sqrt(len(x))", names := {"np": np, "math": math})
    assert find_change(names["hidden"], others, passing(on=NUMBERS), lambda: True) is None


SOURCE = """
def f(x, y, *, scale=2):
    '''Text.'''
    total = [0, 1][0]
    for i in range(len(x)):
        if x[i] < y and i != 3 or not scale:
            total += -x[i] * scale ** 2 / (y - 1)
            x.append(y)
        total = total if y > 1 else max(total, y, key=abs)
    return total, [each.T @ x[1:] for each in (x, y)], {'a': x[:2], 'b': y.mean(axis=0)}
"""


def test_a_condition_never_becomes_a_constant():
    code = ast.parse("def f(names):\n    return [name for name in names if name.endswith('lora_A')]").body[0]
    for _ in others(code):
        assert not any(isinstance(test, ast.Constant) for node in ast.walk(code) for test in getattr(node, "ifs", []))


def test_every_change_differs_from_the_code_and_is_taken_back():
    function = ast.parse(SOURCE).body[0]
    before, seen = ast.unparse(function), []
    for sentence in itertools.chain(slips(function), others(function)):
        seen.append(sentence)
        ast.unparse(function)
    assert ast.unparse(function) == before
    assert len({*seen}) > 300


def test_nothing_is_set_that_the_code_itself_does_not_set():
    """A change of ``self.drop = ...`` must not be ``F.drop = ...``, which would outlive the check."""
    code = """
class Layer(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.drop, self.sizes[rank] = nn.Dropout(0.1), base
        self.rank = base.rank

    def forward(self, x):
        for self.last in x:
            x = F.relu(self.drop(x)) @ self.base
        return torch.exp(x)
"""
    layer = ast.parse(code).body[0]

    def targets():
        stored = (node for node in ast.walk(layer) if isinstance(getattr(node, "ctx", None), ast.Store))
        return {ast.unparse(node.value if isinstance(node, ast.Subscript) else node) for node in stored}

    before = targets()
    for _ in itertools.chain(slips(layer), others(layer)):
        assert targets() <= before


@needs_alarm
def test_a_check_names_the_change_after_what_it_knows_and_only_if_all_inputs_and_properties_agree(register):  # noqa: F811
    def mean(x):
        return x.sum() / len(x)

    options = {"inputs": lambda rng: (rng.normal(size=int(rng.integers(3, 9))),), "draws": 8}
    known = register(mean, "known", mistakes=[(lambda x: x.sum(), "The sum is not divided.")], **options)
    near = written("def mean(x):\n    return x.sum() / (len(x) - 1)")
    verdict = judge(known, near)
    assert verdict.text == "One change makes it right: in line 2, len(x) in place of len(x) - 1."
    assert "expected" in verdict.example
    assert judge(known, written("def mean(x):\n    return x.sum()")).text == "The sum is not divided."
    never = register(mean, "never", properties=[(lambda answer, rng: answer is mean, "It is another one.")], **options)
    assert "One change" not in judge(never, near).text


@needs_alarm
def test_a_change_that_never_ends_is_passed_over(register, monkeypatch):  # noqa: F811
    monkeypatch.setattr("lora_lab.course.judge.CHANGE_SECONDS", 0.05)

    def halvings(n):
        return int(n).bit_length()

    exercise = register(halvings, inputs=lambda rng: (int(rng.integers(9, 99)),))
    endless = (
        "def halvings(n):\n    count = 0\n    while n > 1:\n        n = n // 2\n        count += 1\n    return count"
    )
    said = judge(exercise, written(endless)).text
    assert said.startswith("One change makes it right: in line ")
