"""Answers that nobody planned: right ones in other forms pass and have all points, wrong ones in some cases do not."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.course.exercise import EXERCISES, close
from lora_lab.course.judge import judge
from lora_lab.course.sheets import points
from lora_lab.models.digits import DigitsMLP

pytestmark = pytest.mark.usefixtures("quantiles_once")
SEEDS = (1, 2, 3)
SOLUTIONS = {name: exercise.solution for name, exercise in EXERCISES.items()}
MyLoRALinear = SOLUTIONS["MyLoRALinear"]


def lost(name, answer):
    """How many points an answer lacks, with each seed."""
    return [len(EXERCISES[name].points) - points(answer, EXERCISES[name].points, seed) for seed in SEEDS]


def solved(name, kind):
    """The solution with a result of another kind."""
    return name, lambda *arguments: kind(SOLUTIONS[name](*arguments))


def best_rank_by_torch(M, r):
    U, S, Vh = torch.linalg.svd(torch.from_numpy(M), full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


class Functional(MyLoRALinear):
    """Dropout as a function, a scaled B, the scaling in a buffer, and a merge that adds up by hand."""

    def __init__(self, base, rank, alpha, dropout=0.0, generator=None):
        super().__init__(base, rank, alpha, dropout, generator)
        del self.scaling
        self.register_buffer("scaling", torch.tensor(alpha / rank), persistent=False)

    def forward(self, x):
        x_dropped = F.dropout(x, self.dropout.p, self.training)
        return self.base(x) + x_dropped @ self.lora_A.T @ (self.scaling * self.lora_B).T

    @torch.no_grad()
    def merged(self):
        outputs, inputs = self.base.weight.shape
        plain = nn.Linear(inputs, outputs, bias=self.base.bias is not None)
        plain.weight.copy_(self.base.weight + self.scaling * self.lora_B @ self.lora_A)
        if self.base.bias is not None:
            plain.bias.copy_(self.base.bias)
        return plain


class Double(MyLoRALinear):
    """A and B in double precision beside a base in single precision."""

    def __init__(self, base, rank, alpha, dropout=0.0, generator=None):
        super().__init__(base, rank, alpha, dropout, generator)
        self.lora_A = nn.Parameter(self.lora_A.detach().double())
        self.lora_B = nn.Parameter(self.lora_B.detach().double())

    def forward(self, x):
        update = self.scaling * (self.dropout(x).double() @ self.lora_A.T @ self.lora_B.T)
        return self.base(x) + update.float()

    @torch.no_grad()
    def merged(self):
        plain = copy.deepcopy(self.base)
        plain.weight += (self.scaling * (self.lora_B @ self.lora_A)).float()
        return plain


def clinic(build, steps):
    def repair(pretrained, loss_of):
        model = copy.deepcopy(pretrained).requires_grad_(False)
        for name in ("hidden1", "hidden2"):
            setattr(model, name, MyLoRALinear(model.get_submodule(name), 4, 8))
        optimizer = build([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(steps):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()  # none is left at the end
        return model, optimizer

    return "repair", repair


def forward(update):
    return "forward", lambda x, W, A, B, alpha: x @ W.T + update(A, B, x, alpha / A.shape[0])


def one_line(update):
    return "one_line", lambda W, A, B, x, s: W @ x + update(A, B, x, s)


RIGHT = [
    ("best_rank", best_rank_by_torch),
    ("terms_for", lambda S, share: int(np.argmax(np.cumsum(S**2) >= share * np.cumsum(S**2)[-1])) + 1),
    ("terms_for", lambda S, share: min(len(S), int(np.sum(np.cumsum(S**2) / np.sum(S**2) < share)) + 1)),
    solved("start", lambda pair: tuple(map(nn.Parameter, pair))),
    solved("choose", np.asarray),
    solved("smallest_enough", lambda rank: rank and np.int64(rank)),
    solved("best_setup", lambda row: row and list(row)),
    *(solved(name, kind) for name in ("longest", "seeds_needed", "intruders") for kind in (np.int64, torch.tensor)),
    ("MyLoRALinear", Functional),
    ("MyLoRALinear", Double),
    clinic(torch.optim.SGD, 1),
    clinic(torch.optim.AdamW, 1),
    clinic(torch.optim.AdamW, 100),
    forward(lambda A, B, x, s: s * (x @ A.T @ B.T)),
    forward(lambda A, B, x, s: s * (B @ (A @ x.mT)).mT),
    forward(lambda A, B, x, s: F.linear(F.linear(x * s, A), B)),
    forward(lambda A, B, x, s: torch.einsum("...i,ri,or->...o", x, A, B) * s),
    ("forward", lambda x, W, *rest: SOLUTIONS["forward"](x, W.detach(), *rest)),  # W is frozen
    one_line(lambda A, B, x, s: s * B @ A @ x),
    one_line(lambda A, B, x, s: (s * x) @ A.T @ B.T),
    one_line(lambda A, B, x, s: B.matmul(A.matmul(x)).mul(s)),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_of_another_form_passes_and_has_all_points(name, answer):
    for _ in range(3):
        verdict = judge(EXERCISES[name], answer)
        assert verdict.passed, verdict.text
    assert lost(name, answer) == [0, 0, 0]


def split_with_siblings(groups, seed):
    """The first row of each group that judges is for training."""
    training, *others = SOLUTIONS["split"](groups, seed)
    first = {groups.index(groups[row]) for part in others for row in part}
    return [[*training, *first], *([row for row in part if row not in first] for part in others)]


def frozen_without_grad(x, W, A, B, alpha):
    with torch.no_grad():
        frozen = x @ W.T
    return frozen + alpha / len(A) * (x @ A.T @ B.T)


def choose_by_the_test_where_level(validation, test):
    return max(validation, key=lambda rate: (np.mean(validation[rate]), np.mean(test.get(rate, 0))))


CUT = "a detach, no_grad or new Parameter cuts it."
WRONG = [
    (
        "best_setup",
        lambda bill, *rest: SOLUTIONS["best_setup"]([row for row in bill if row[3] == 16] or bill, *rest),
        "",
    ),
    ("best_setup", lambda bill, *rest: SOLUTIONS["best_setup"]([row for row in bill if row[2]] or bill, *rest), ""),
    ("split", split_with_siblings, ""),
    ("choose", choose_by_the_test_where_level, ""),
    ("smallest_enough", lambda table, margin: min((r for r in table if table[r][1] < 1), default=None), ""),
    ("dora_length", lambda x, *others: SOLUTIONS["dora_length"](torch.eye(7), *others), ""),
    *((*one_line(lambda A, B, x, s, f=f: f(s) * (B @ (A @ x))), "") for f in (abs, lambda s: s * s, lambda s: -s)),
    ("forward", lambda x, *others: SOLUTIONS["forward"]((x + x.detach()) / 2, *others), CUT),
    ("forward", lambda x, W, *rest: SOLUTIONS["forward"](x.detach(), W, *rest), CUT),
    ("forward", lambda x, W, A, B, alpha: SOLUTIONS["forward"](x, W, A, B.detach(), alpha), CUT),
    ("forward", frozen_without_grad, CUT),
]


@pytest.mark.parametrize(("name", "answer", "said"), WRONG)
def test_an_answer_that_is_wrong_in_some_cases_only_is_refused_and_loses_a_point(name, answer, said):
    verdict = judge(EXERCISES[name], answer)
    assert verdict.passed is False
    assert said in verdict.text
    assert min(lost(name, answer)) > 0


def test_the_solution_never_needs_more_terms_than_there_are():
    rng = np.random.default_rng(0)
    spectra = [np.sort(rng.uniform(0, 1, 12))[::-1] for _ in range(500)]
    assert max(SOLUTIONS["terms_for"](S, 1.0) for S in spectra) == 12


FAULTS = {
    "The optimiser does not hold the adapters.": False,
    "The shapes agree, but the base does not.": False,
    "No layer has an adapter.": True,
    "The adapters are frozen as well.": True,
    "The loss has no graph to go backward through.": True,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_two_of_the_clinics_faults_raise_nothing_and_three_stop_with_one_message(fault):
    pretrained, inputs, targets = DigitsMLP(width=8), torch.randn(16, 64), torch.randint(10, (16,))
    script = next(answer for answer, sentence in EXERCISES["repair"].mistakes if sentence.startswith(fault))
    raises = pytest.raises(RuntimeError, match="does not require grad") if FAULTS[fault] else nullcontext()
    with raises:
        script(pretrained, lambda model: F.cross_entropy(model(inputs), targets))


def test_a_layer_is_judged_after_each_method():
    class Half(MyLoRALinear):
        def merged(self):
            raise NotImplementedError("your code here")

    assert "merged is still open" in judge(EXERCISES["MyLoRALinear"], Half).text


def test_close_knows_shapes_kinds_and_nan():
    assert close(torch.ones(2, requires_grad=True), np.ones(2))
    assert close(1 + 1e-6, 1)
    assert not close(1.01, 1)
    for wrong in (1.0, np.ones((1, 2)), [True, True], ["1", "1"], np.full(2, np.nan), None, np.ones(2) * 1j):
        assert not close(wrong, np.ones(2)), wrong
