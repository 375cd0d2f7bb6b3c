"""Hidden tests of lesson 02: why one fine-tunes, and how to do it fairly."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lora_lab.course.grading.invariant import Reflection, invariant_of


@invariant_of("head_start")
def begins_at_the_pretrained_weights(head_start, rng):
    """The result is another net with the weights of the pre-trained one."""
    old = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    new = head_start(old, lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)))
    same = [torch.equal(one, other) for one, other in zip(new.parameters(), old.parameters(), strict=True)]
    return new is not old and len(same) == 4 and all(same)


@invariant_of("head_start")
def has_the_buffers_too(head_start, rng):
    """It has the buffers of the pre-trained net too, such as the means of a normalisation."""
    old, means = nn.BatchNorm1d(6), torch.from_numpy(rng.normal(size=6)).float()
    old.get_buffer("running_mean").copy_(means)
    new = head_start(old, lambda: nn.BatchNorm1d(6))
    return new is not old and torch.equal(new.running_mean, means)


@invariant_of("head_start")
def leaves_the_original_alone(head_start, rng):
    """It is trained from there without moving the original."""
    old = nn.Linear(5, 4)
    before = old.weight.detach().clone()
    new = head_start(old, lambda: nn.Linear(5, 4))
    with torch.no_grad():
        new.weight += 1
    return torch.equal(old.weight, before) and torch.equal(new.weight, before + 1)


@invariant_of("choose")
def is_best_in_validation(choose, rng):
    """Of all rates the result has the highest mean accuracy in validation."""
    for _ in range(12):
        rates = rng.uniform(1e-4, 1e-1, 6).tolist()
        validation, test = ({rate: rng.uniform(0.5, 1, 3).tolist() for rate in rates} for _ in range(2))
        if choose(validation, test) != rates[int(np.argmax([sum(validation[rate]) for rate in rates]))]:
            return False
    return True


@invariant_of("choose")
def does_not_ask_the_test(choose, rng):
    """The result is one of the rates, not always the largest, and other test accuracies do not change it."""
    rates, results = rng.uniform(1e-4, 1e-1, 6).tolist(), []
    for _ in range(8):
        validation = {rate: rng.uniform(0.5, 1, 3).tolist() for rate in rates}
        tests = [{rate: rng.uniform(0.5, 1, 3).tolist() for rate in rates} for _ in range(6)]
        results.append({float(choose(validation, test)) for test in tests})
    return all(len(result) == 1 and result <= set(rates) for result in results) and any(
        max(rates) not in r for r in results
    )


@invariant_of("only")
def trains_all_of_the_layer(only, rng):
    """Every parameter of the named layer trains, also if everything was frozen before."""
    model = nn.ModuleDict({"body": nn.Linear(4, 3), "head": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))})
    model.requires_grad_(False)
    only(model, "head")
    return all(tensor.requires_grad for tensor in model["head"].parameters())


@invariant_of("only")
def trains_nothing_else(only, rng):
    """Something trains, and nothing outside the named layer does, even where a name is similar."""
    layers = {name: nn.Linear(3, 3) for name in ("body", "head", "heads")}
    model = nn.ModuleDict(layers | {"side": nn.ModuleDict({"head": nn.Linear(3, 2)})})
    only(model, "head")
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    return bool(trained) and trained <= {"head.weight", "head.bias"}


Reflection(
    "02_why_fine_tune",
    question="A paper reports that its method beats full fine-tuning by two points of accuracy. Both were run "
    "with one learning rate, chosen as the best on the test set, and with one seed. In five to eight "
    "sentences: what would you ask the authors to run again, and which results would convince you?",
    rubric=(
        "The answer says that each method needs a rate of its own, chosen from several.",
        "It says why the test set must not choose, and what chooses instead.",
        "It asks for several seeds, and says how large a difference must be beside their scatter.",
        "It says what would make the reader give up the claim.",
    ),
    expected="Each method has its best rate, so one common rate compares how well it suits them. A choice on the "
    "test set makes the score too good; validation data choose. With several seeds, the same for both "
    "methods, the differences pair up, and their mean must be larger than its error. If the interval "
    "holds zero, two points were luck.",
)
