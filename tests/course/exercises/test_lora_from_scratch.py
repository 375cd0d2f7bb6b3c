"""Lesson 03's exercises: right answers of other kinds pass, and the clinic's faults do what the lesson states."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.course.exercise import EXERCISES
from lora_lab.course.exercises import lora_from_scratch
from lora_lab.course.exercises.lora_from_scratch import MyLoRALinear
from lora_lab.course.judge import judge
from lora_lab.models.digits import DigitsMLP


def passes(name, answer):
    verdict = judge(EXERCISES[name], answer)
    assert verdict.passed, verdict.text


def run(**faults):
    """The clinic's script with these faults: the error that it raises, or None."""
    torch.manual_seed(0)
    pretrained = DigitsMLP(width=8)
    inputs, targets = torch.randn(16, 64), torch.randint(10, (16,))
    script = lora_from_scratch._faulty(**faults)
    try:
        script(pretrained, lambda model: F.cross_entropy(model(inputs), targets))
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("fault", [{"early": True}, {"stranger": True}])
def test_two_of_the_five_faults_raise_no_error(fault):
    assert run() is None
    assert run(**fault) is None


@pytest.mark.parametrize("fault", [{"targets": ()}, {"frozen": True}, {"no_graph": True}])
def test_three_of_the_five_faults_stop_in_backward_with_the_same_message(fault):
    assert "does not require grad" in run(**fault)


class Functional(MyLoRALinear):
    """Dropout as a function, B A formed, the scaling in a buffer, and a merge that adds up by hand."""

    def __init__(self, base, rank, alpha, dropout=0.0, generator=None):
        super().__init__(base, rank, alpha, dropout, generator)
        del self.scaling
        self.register_buffer("scaling", torch.tensor(alpha / rank), persistent=False)

    def forward(self, x):
        x_dropped = F.dropout(x, self.dropout.p, self.training)
        return self.base(x) + x_dropped @ (self.scaling * (self.lora_B @ self.lora_A)).T

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


@pytest.mark.parametrize("layer", [Functional, Double])
def test_other_layers_that_are_right_pass(layer):
    for _ in range(5):
        passes("MyLoRALinear", layer)


@pytest.mark.parametrize(("build", "steps"), [(torch.optim.SGD, 1), (torch.optim.AdamW, 1), (torch.optim.AdamW, 300)])
def test_the_clinic_accepts_the_learners_own_layer_and_any_number_of_steps(build, steps):
    def repair(pretrained, loss_of):
        model = copy.deepcopy(pretrained).requires_grad_(False)
        for name in ("hidden1", "hidden2"):
            setattr(model, name, MyLoRALinear(model.get_submodule(name), 4, 8))
        optimizer = build([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        return model, optimizer

    for _ in range(5 if steps == 1 else 1):
        passes("repair", repair)


@pytest.mark.parametrize(
    "update",
    [
        lambda A, B, x, s: s * (x @ A.T @ B.T),
        lambda A, B, x, s: s * (B @ (A @ x.T)).T,
        lambda A, B, x, s: F.linear(F.linear(x * s, A), B),
        lambda A, B, x, s: torch.einsum("ni,ri,or->no", x, A, B) * s,
    ],
)
def test_any_form_of_the_forward_line_passes(update):
    passes("forward", lambda x, W, A, B, alpha: x @ W.T + update(A, B, x, alpha / A.shape[0]))


def without_grad(x, W, A, B, alpha):
    with torch.no_grad():
        frozen = x @ W.T
    return frozen + alpha / len(A) * (x @ A.T @ B.T)


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        (lambda x, W, A, B, alpha: x @ W.detach().T + alpha / len(A) * (x @ A.T @ B.T), None),  # W is frozen
        (lambda x, W, A, B, alpha: (x @ W.T).detach() + alpha / len(A) * (x @ A.T @ B.T), "x"),
        (lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x.detach() @ A.T @ B.T), "x"),
        (lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ A.T @ B.T.detach()), "B"),
        (without_grad, "x"),
    ],
)
def test_the_gradients_of_the_forward_line_reach_all_but_the_frozen_weight(cut, name):
    verdict = judge(EXERCISES["forward"], cut)
    assert verdict.passed if name is None else f"the gradient of {name} is not" in verdict.text


@pytest.mark.parametrize(
    "update",
    [
        lambda A, B, x, s: s * B @ A @ x,
        lambda A, B, x, s: (s * x) @ A.T @ B.T,
        lambda A, B, x, s: B.matmul(A.matmul(x)).mul(s),
    ],
)
def test_any_form_of_the_one_line_passes(update):
    passes("one_line", lambda W, A, B, x, s: W @ x + update(A, B, x, s))


@pytest.mark.parametrize("wrong", [abs, lambda s: s * s, lambda s: -s])
def test_the_scaling_may_be_negative(wrong):
    assert judge(EXERCISES["one_line"], lambda W, A, B, x, s: W @ x + wrong(s) * (B @ (A @ x))).passed is False


def test_a_layer_is_judged_after_each_method():
    class Half(MyLoRALinear):
        def merged(self):
            raise NotImplementedError("your code here")

    assert "merged is still open" in judge(EXERCISES["MyLoRALinear"], Half).text
