"""The control with nothing to learn: what is drawn, and that a training on it learns nothing."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from lora_lab import FullFineTuning, LoRA, evaluate, fit, spectra
from lora_lab.ablation.studies import pretrained_digits
from lora_lab.analysis.spectra import DrawnLabels
from lora_lab.models.llama import Llama
from lora_lab.task import IGNORE
from lora_lab.tasks import digits

pytestmark = pytest.mark.usefixtures("one_thread")


def gain(task, seed):
    """How far the loss on the task's labels falls in a training on others."""
    model, own = pretrained_digits(), digits()
    before = evaluate(model, own, "validation")
    fit(model, task, FullFineTuning(), steps=150, lr=3e-3, batch_size=32, seed=seed, progress=False)
    return before - evaluate(model, own, "validation")


def test_nothing_is_learned_from_the_bases_own_labels():
    own, control = digits(), spectra.null(digits(), pretrained_digits())
    assert gain(own, 0) > 1
    assert gain(control, 0) < 0.1 * gain(own, 0)


def test_no_model_predicts_the_labels_better_than_the_base():
    base, task = pretrained_digits(), digits()
    control = spectra.null(task, base)
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    def loss(model):
        torch.manual_seed(0)
        return sum(control.loss(model, task.train.inputs, task.train.targets).item() for _ in range(20)) / 20

    entropy = torch.distributions.Categorical(logits=base(task.train.inputs)).entropy().mean().item()
    assert loss(base) == pytest.approx(entropy, rel=0.05)
    assert loss(other) > loss(base) + 0.01


@torch.no_grad()
def test_labels_follow_the_temperature():
    base, task = pretrained_digits(), digits()
    torch.manual_seed(0)
    uniform = DrawnLabels(base, math.inf)(base, task.train.inputs, task.train.targets)
    expected = -F.log_softmax(base(task.train.inputs), -1).mean()
    assert uniform.item() == pytest.approx(expected.item(), rel=0.1)
    assert uniform > 2 * DrawnLabels(base)(base, task.train.inputs, task.train.targets)


def test_targets_that_do_not_count_stay_so(tiny_config):
    base = Llama(tiny_config, seed=3)
    ids = torch.randint(tiny_config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[:, :6] = IGNORE
    torch.manual_seed(1)
    loss = DrawnLabels(base)(base, ids[:, :-1], targets)
    torch.manual_seed(1)
    scores = base(ids[:, :-1])
    labels = torch.multinomial(scores.flatten(0, 1).softmax(-1), 1).view(2, 8)
    assert loss.item() == pytest.approx(F.cross_entropy(scores[:, 6:].flatten(0, 1), labels[:, 6:].flatten()).item())


def test_the_base_is_copied_and_a_run_is_repeatable():
    base = pretrained_digits()
    control, model = spectra.null(digits(), base), copy.deepcopy(base)
    losses = []
    for start in (model, base):  # the second run trains what the control was made of
        history = fit(start, control, LoRA(2, 4), steps=5, lr=1e-2, batch_size=8, seed=1, progress=False)
        losses.append([row["train_loss"] for row in history.rows[1:]])
    assert losses[0] == losses[1]
    assert not any(parameter.requires_grad for parameter in control.loss.base.parameters())


def test_an_evaluation_repeats_and_takes_nothing_from_what_training_draws():
    base, task = pretrained_digits(), digits()
    control, state = spectra.null(task, base), torch.get_rng_state()
    with torch.no_grad():
        first, again = (control.loss(base, task.train.inputs, task.train.targets).item() for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    training = [control.loss(base, task.train.inputs, task.train.targets).item() for _ in range(2)]
    assert training[0] != training[1]


def test_the_control_does_not_change_with_how_often_it_is_evaluated():
    base = pretrained_digits()
    ends = []
    for every in (1, 4):
        options = {"steps": 4, "lr": 1e-2, "batch_size": 8, "seed": 1, "eval_every": every, "progress": False}
        history = fit(copy.deepcopy(base), spectra.null(digits(), base), LoRA(2, 4), **options)
        ends.append(history.rows[-1]["validation_loss"])
    assert ends[0] == ends[1]
