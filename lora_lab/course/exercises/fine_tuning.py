"""Exercises of lesson 02: why one fine-tunes, and how to do it fairly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_lab.course.exercise import Probe, exercises_of

exercise = exercises_of("02_why_fine_tune")


# A fair start


def _net(rng: np.random.Generator) -> Callable[[], nn.Module]:
    """A function that makes nets of one shape, each with random weights; they have buffers, too."""
    inputs, width = (int(size) for size in rng.choice(np.arange(3, 9), 2, replace=False))
    return lambda: nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def _head_start(answer: Callable[..., Any], rng: np.random.Generator) -> tuple[nn.Module, dict[str, torch.Tensor], Any]:
    """A pre-trained net, a copy of what it held before, and the learner's net."""
    make = _net(rng)
    pretrained = make()
    for buffer in pretrained.buffers():  # as they are after some training
        buffer.copy_(torch.as_tensor(rng.uniform(1, 9, buffer.shape)))
    before = copy.deepcopy(pretrained.state_dict())
    return pretrained, before, answer(pretrained, make)


def _is_a_net(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return isinstance(_head_start(answer, rng)[2], nn.Module)


def _is_another_net(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    pretrained, _, net = _head_start(answer, rng)
    return net is not pretrained


def _same_state(net: nn.Module, state: Mapping[str, torch.Tensor], names: Sequence[str]) -> bool:
    return all(torch.equal(net.state_dict()[name], state[name]) for name in names)


def _leaves_the_original(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    pretrained, before, _ = _head_start(answer, rng)
    return _same_state(pretrained, before, [*before])


def _has_the_weights(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    pretrained, before, net = _head_start(answer, rng)
    return _same_state(net, before, [name for name, _ in pretrained.named_parameters()])


def _has_the_buffers(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    pretrained, before, net = _head_start(answer, rng)
    return _same_state(net, before, [name for name, _ in pretrained.named_buffers()])


def _shares_nothing(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    pretrained, before, net = _head_start(answer, rng)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)  # as a training step would
    return _same_state(pretrained, before, [*before])


def _wrong_direction(pretrained: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    net = make()
    pretrained.load_state_dict(net.state_dict())
    return net


def _parameters_alone(pretrained: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    net = make()
    net.load_state_dict(dict(pretrained.named_parameters()), strict=False)
    return net


def _with_shared_tensors(pretrained: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    net = make()
    net.load_state_dict(pretrained.state_dict(), assign=True)
    return net


@exercise(
    "head_start",
    probes=[
        Probe(
            _is_a_net,
            "The result is no model. Return the new net; load_state_dict and state_dict do not return one.",
            (
                lambda pretrained, make: pretrained.state_dict(),
                lambda pretrained, make: make().load_state_dict(pretrained.state_dict()),
            ),
        ),
        Probe(
            _is_another_net,
            "This is the pre-trained model itself, so training yours would train the original. Copy it.",
            (lambda pretrained, make: pretrained,),
        ),
        Probe(
            _leaves_the_original,
            "The pre-trained model has changed. Copy from it into the new one, not the other way round.",
            (_wrong_direction,),
        ),
        Probe(
            _has_the_weights,
            "These are random weights, which is training from scratch. Load the pre-trained ones into the new model.",
            (lambda pretrained, make: make(),),
        ),
        Probe(
            _has_the_buffers,
            "The weights are there, but the buffers are not, such as running means. A state dict holds both.",
            (_parameters_alone,),
        ),
        Probe(
            _shares_nothing,
            "The tensors are shared: the original moved after a step of yours. Copy the numbers, not the tensors.",
            (_with_shared_tensors,),
        ),
    ],
    hints=[
        "make() gives a new model of the same shape, whose weights are random.",
        "pretrained.state_dict() holds all weights and buffers by name.",
        "load_state_dict copies the numbers of a state dict into a model's own tensors; return the model afterwards.",
    ],
    minutes=6,
    difficulty=1,
    praise="Each run now begins at the same weights, and no run can spoil the start of the next.",
    draws=2,
)
def head_start(pretrained, make):
    """The result has the pre-trained weights and buffers, shares no memory with them, and the original is unchanged."""
    net = make()
    net.load_state_dict(pretrained.state_dict())
    return net


# Choosing a rate

Scores = Mapping[float, Sequence[float]]


def _by_mean(scores: Scores) -> dict[float, float]:
    return {rate: float(np.mean(values)) for rate, values in scores.items()}


def _best(means: Mapping[float, float]) -> float:
    return max(means, key=lambda rate: means[rate])


def _of_both(validation: Scores, test: Scores) -> float:
    return _best({rate: float(np.mean([*validation[rate], *test[rate]])) for rate in validation})


def validation_and_test(rng: np.random.Generator) -> tuple[Scores, Scores]:
    """Rate -> the accuracy of each of three seeds, twice; different rules of choosing lead to different rates."""
    rates = [float(rate) for rate in rng.choice([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], 6, replace=False)]
    while True:
        validation, test = ({rate: rng.uniform(0.5, 1, 3).round(3).tolist() for rate in rates} for _ in range(2))
        chosen = [
            _best(_by_mean(validation)),
            _best(_by_mean(test)),
            _of_both(validation, test),
            max(rates, key=lambda rate: max(validation[rate])),
            max(rates, key=lambda rate: validation[rate][0]),
            min(rates, key=lambda rate: np.mean(validation[rate])),
        ]
        if len(set(chosen)) >= 5 and chosen.count(chosen[0]) == 1:
            return validation, test


@exercise(
    "choose",
    inputs=validation_and_test,
    mistakes={
        "You chose on the test data, which is there to judge. Choose by the validation dict alone.": (
            lambda validation, test: _best(_by_mean(test)),
            _of_both,
        ),
        "One lucky seed chose. Take the mean over the seeds of each rate first.": (
            lambda validation, test: max(validation, key=lambda rate: max(validation[rate]))
        ),
        "Only the first seed chose. Take the mean over all seeds of each rate.": (
            lambda validation, test: max(validation, key=lambda rate: validation[rate][0])
        ),
        "This is the worst rate. Accuracy is better when it is higher; only a loss is better when it is lower.": (
            lambda validation, test: min(validation, key=lambda rate: np.mean(validation[rate]))
        ),
        "This is the highest rate. Return the one with the best accuracy.": lambda validation, test: max(validation),
        "This is the position of the best rate in the dict. Return the rate itself.": (
            lambda validation, test: [*validation].index(_best(_by_mean(validation)))
        ),
        "This is the accuracy of the best rate. Return the rate itself.": (
            lambda validation, test: max(_by_mean(validation).values())
        ),
        "This is the test accuracy of the best rate. Return the rate itself.": (
            lambda validation, test: _by_mean(test)[_best(_by_mean(validation))]
        ),
    },
    hints=[
        "np.mean(validation[rate]) is how good a rate is, over its seeds.",
        "max(validation, key=...) returns the key of the dict for which a function is largest.",
        "The test dict is not needed here: it judges later what you have chosen.",
    ],
    minutes=8,
    difficulty=2,
    praise="The test data was not used to choose, so it can still judge the rate that you chose.",
    draws=10,
)
def choose(validation, test):
    """The result is the rate whose mean validation accuracy is highest, whatever the test dict holds."""
    return max(validation, key=lambda rate: np.mean(validation[rate]))


# Training one layer


def _after(answer: Callable[..., Any], rng: np.random.Generator, frozen: bool = False) -> tuple[nn.Module, str]:
    """A net after the call, with names that begin or end like the layer's, and that layer's name."""
    name = str(rng.choice(["head", "top", "out"]))
    net = nn.ModuleDict(
        {
            "body": nn.Linear(4, 3),
            f"{name}s_norm": nn.LayerNorm(3),
            name: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)),
            "side": nn.ModuleDict({name: nn.Linear(3, 2)}),
        }
    )
    net.requires_grad_(not frozen)
    answer(net, name)
    return net, name


def _frozen_except(answer: Callable[..., Any], rng: np.random.Generator, frozen: bool = False) -> set[str]:
    """The names of the parameters that train after the call, with "head" for the layer's name."""
    net, name = _after(answer, rng, frozen)
    trained = {parameter for parameter, tensor in net.named_parameters() if tensor.requires_grad}
    return {parameter.replace(name, "head", 1) for parameter in trained}


HEAD = {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}


def _no_attribute_instead(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    """Whether the answer is right, or at least sets no attribute of a layer where it means the parameters."""
    net, _ = _after(answer, rng)
    return not any("requires_grad" in vars(layer) for layer in net.modules()) or _frozen_except(answer, rng) == HEAD


def _something_trains(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return bool(_frozen_except(answer, rng))


def _something_is_frozen(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return "body.weight" not in _frozen_except(answer, rng)


def _not_by_substring(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return "heads_norm.weight" not in _frozen_except(answer, rng)


def _not_inside_others(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return "side.head.weight" not in _frozen_except(answer, rng)


def _all_of_it(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return _frozen_except(answer, rng) == HEAD


def _if_it_was_frozen(answer: Callable[..., Any], rng: np.random.Generator) -> bool:
    return _frozen_except(answer, rng, frozen=True) == HEAD


def _set_where(condition: Callable[[str, str], bool]) -> Callable[[nn.Module, str], None]:
    """A wrong answer: a parameter trains where the condition on its name and the layer's holds."""

    def only(model: nn.Module, name: str) -> None:
        for parameter, tensor in model.named_parameters():
            tensor.requires_grad_(condition(parameter, name))

    return only


def _by_attribute(model: nn.Module, name: str) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = False
    setattr(model.get_submodule(name), "requires_grad", True)  # noqa: B010  # as type checkers know no such attribute


def _freeze_others(model: nn.Module, name: str) -> None:
    for parameter, tensor in model.named_parameters():
        if not parameter.startswith(f"{name}."):
            tensor.requires_grad_(False)


@exercise(
    "only",
    probes=[
        Probe(
            _no_attribute_instead,
            "layer.requires_grad = True does nothing to the parameters inside. Call layer.requires_grad_(True).",
            (_by_attribute, lambda model, name: setattr(model, "requires_grad", False)),
        ),
        Probe(
            _something_trains,
            "Nothing is left to train. Every parameter of the named layer must keep requires_grad = True.",
            (_set_where(lambda parameter, name: False), _set_where(lambda parameter, name: parameter == name)),
        ),
        Probe(
            _something_is_frozen,
            "Other layers still train. Set requires_grad = False for every parameter outside the named layer.",
            (_set_where(lambda parameter, name: True), lambda model, name: model),
        ),
        Probe(
            _not_by_substring,
            "A layer whose name only begins like that one trains as well. Match the whole name, not a part of it.",
            (
                _set_where(lambda parameter, name: name in parameter),
                _set_where(lambda parameter, name: parameter.startswith(name)),
            ),
        ),
        Probe(
            _not_inside_others,
            "A layer of that name inside another layer trains as well. The name is the whole path from the model.",
            (_set_where(lambda parameter, name: name in parameter.split(".")),),
        ),
        Probe(
            _all_of_it,
            "A part of the named layer is frozen. It may have a bias, and layers inside it; all of it trains.",
            (
                _set_where(lambda parameter, name: parameter.startswith(f"{name}.") and parameter.endswith(".weight")),
                _set_where(lambda parameter, name: parameter.startswith(f"{name}.0.")),
            ),
        ),
        Probe(
            _if_it_was_frozen,
            "A layer that was frozen before stays frozen. Set requires_grad = True for each of its parameters.",
            (_freeze_others,),
        ),
    ],
    hints=[
        "requires_grad_ of a model sets the switch of all its parameters at once.",
        "model.get_submodule(name) is the layer of that name.",
        "A layer has requires_grad_ too: freeze everything first, then make one layer trainable.",
    ],
    minutes=5,
    difficulty=1,
    praise="This is PartialFineTuning. LoRA uses the same switch: the old parameters frozen, the new ones trained.",
    draws=2,
)
def only(model, name):
    """Exactly the parameters of the named layer train, whatever was frozen before."""
    model.requires_grad_(False)
    model.get_submodule(name).requires_grad_(True)
