"""Exercises of lesson 02: why one fine-tunes, and how to do it fairly."""

import copy
from collections import OrderedDict

import numpy as np  # for the solution
import torch
from torch import nn

from lora_lab.course.exercise import Exercise, Reflection

# A fair start

head_start = Exercise(
    "head_start",
    hints=[
        "make() gives a new model of the same shape, whose weights are random.",
        "pretrained.state_dict() holds all weights and buffers by name.",
        "load_state_dict copies the numbers of a state dict into a model's own tensors; return the model afterwards.",
    ],
    praise="Each run now begins at the same weights, and no run can spoil the start of the next.",
)


def started(head_start, rng):
    """A pre-trained net, with buffers as after some training, what it held before, and the learner's net."""
    inputs, width = rng.choice(range(3, 9), 2, replace=False).tolist()

    def make():
        layers = {"body": nn.Linear(inputs, width), "norm": nn.BatchNorm1d(width), "head": nn.Linear(width, 2)}
        return nn.Sequential(OrderedDict(layers))

    pretrained = make()
    for tensor in (*pretrained.buffers(), *pretrained.parameters()):
        tensor.detach().copy_(torch.as_tensor(rng.uniform(1, 9, tensor.shape)))
    vars(pretrained)["trained_by"] = "full"  # training leaves a mark, and refuses a net that has one
    before = copy.deepcopy(pretrained.state_dict())
    return pretrained, before, head_start(pretrained, make)


def holds(net, state, names):
    """Whether a net has these entries of a state dict."""
    return all(torch.equal(net.state_dict()[name], state[name]) for name in names)


def stops_otherwise(function, text):
    """Whether a call does not stop with an error that says this."""
    try:
        function()
    except (TypeError, AttributeError) as error:
        return text not in str(error)
    return True


@head_start.must(
    "make is a function. Call it, net = make(), and it returns a new net.",
    ("make()", "make"),
)
def calls_make(head_start, rng):
    return stops_otherwise(lambda: started(head_start, rng), "'function' object has no attribute")


@head_start.must(
    "load_state_dict wants a dict of tensors by name: give it pretrained.state_dict().",
    ("pretrained.state_dict()", "pretrained"),
    ("pretrained.state_dict()", "pretrained.parameters()"),
)
def loads_a_dict(head_start, rng):
    return stops_otherwise(lambda: started(head_start, rng), "state_dict to be dict-like")


@head_start.must(
    "The result is no model. Return the new net; load_state_dict and state_dict do not return one.",
    "return pretrained.state_dict()",
    "return make().load_state_dict(pretrained.state_dict())",
)
def is_a_net(head_start, rng):
    return isinstance(started(head_start, rng)[2], nn.Module)


@head_start.must(
    "This is the pre-trained model itself, so training yours would train the original. Copy it.",
    "return pretrained",
)
def is_another_net(head_start, rng):
    pretrained, _, net = started(head_start, rng)
    return net is not pretrained


@head_start.must(
    "This copies the whole object, with the mark that training left on it. Fill a net from make() with its numbers.",
    "return copy.deepcopy(pretrained)",
    "return copy.copy(pretrained)",
)
def carries_no_mark(head_start, rng):
    return not hasattr(started(head_start, rng)[2], "trained_by")


@head_start.must(
    "The pre-trained model has changed. Copy from it into the new one, not the other way round.",
    ("net.load_state_dict(pretrained.state_dict())", "pretrained.load_state_dict(net.state_dict())"),
)
def leaves_the_original(head_start, rng):
    pretrained, before, _ = started(head_start, rng)
    return holds(pretrained, before, before)


@head_start.must(
    "Some layers keep their random weights, such as the head. Load all of the pre-trained ones.",
    ("pretrained.state_dict()", "{k: v for k, v in pretrained.state_dict().items() if 'head' not in k}, strict=False"),
)
def loads_each_layer_or_none(head_start, rng):
    pretrained, before, net = started(head_start, rng)
    same = [holds(net, before, [name]) for name, _ in pretrained.named_parameters()]
    return all(same) or not any(same)


@head_start.must(
    "These are random weights, which is training from scratch. Load the pre-trained ones into the new model.",
    "return make()",
)
def begins_at_the_pretrained_weights(head_start, rng):
    """The result is another net with the weights of the pre-trained one."""
    pretrained, before, net = started(head_start, rng)
    fresh = net is not pretrained and not hasattr(net, "trained_by")
    return fresh and holds(net, before, dict(pretrained.named_parameters()))


@head_start.must(
    "The weights are there, but the buffers are not, such as running means. A state dict holds both.",
    ("pretrained.state_dict()", "dict(pretrained.named_parameters()), strict=False"),
)
def has_the_buffers_too(head_start, rng):
    """It has the buffers of the pre-trained net too, such as the means of a normalisation."""
    pretrained, before, net = started(head_start, rng)
    return net is not pretrained and holds(net, before, dict(pretrained.named_buffers()))


@head_start.must(
    "The new net is frozen: no training step can change it. Leave requires_grad as make() sets it.",
    ("return net", "return net.requires_grad_(False)"),
)
def can_be_trained(head_start, rng):
    return all(tensor.requires_grad for tensor in started(head_start, rng)[2].parameters())


@head_start.must(
    "The tensors are shared: the original moved after a step of yours. Copy the numbers, not the tensors.",
    ("state_dict())", "state_dict(), assign=True)"),
)
def leaves_the_original_alone(head_start, rng):
    """It is trained from there without moving the original."""
    pretrained, before, net = started(head_start, rng)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)  # as a training step would
    return holds(pretrained, before, before) and all(tensor.requires_grad for tensor in net.parameters())


# Choosing a rate


def validation_and_test(rng):
    """Rate -> the accuracy of each of three seeds, in validation and in the test; no two means are equal."""
    rates = rng.choice([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], 4, replace=False).tolist()
    right = np.zeros((2, 4, 3), int)  # (parts, rates, seeds)
    while any(len(set(means)) < 4 for means in right.sum(-1).tolist()):
        right = rng.integers(50, 100, right.shape)
    return tuple(dict(zip(rates, (part / 100).tolist(), strict=True)) for part in right)


BEST = "max(validation, key=lambda rate: np.mean(validation[rate]))"
choose = Exercise(
    "choose",
    inputs=validation_and_test,
    wrong={
        "You chose on the test data, which is there to judge. Choose by the validation dict alone.": [
            ("np.mean(validation[rate])", "np.mean(test[rate])"),
            ("np.mean(validation[rate])", "np.mean([*validation[rate], *test[rate]])"),
            ("np.mean(validation[rate])", "-abs(np.mean(validation[rate]) - np.mean(test[rate]))"),
        ],
        "One lucky seed chose. Take the mean over the seeds of each rate first.": ("np.mean(", "max("),
        "One unlucky seed chose. Take the mean over the seeds of each rate first.": ("np.mean(", "min("),
        "You let the seeds vote. Take the mean over the seeds of each rate, and the rate with the best mean.": """
            seeds = range(len(next(iter(validation.values()))))
            wins = [max(validation, key=lambda rate: validation[rate][seed]) for seed in seeds]
            return max(validation, key=wins.count)
        """,
        "This is the best median. The mean counts every seed: np.mean(validation[rate]).": ("np.mean(", "np.median("),
        "Only the first seed chose. Take the mean over all seeds of each rate.": (
            [("np.mean(validation[rate])", "validation[rate][0]"), ("np.mean(validation[rate])", "validation[rate]")]
        ),
        "This is the last rate that beat the start. A loop that keeps the best must keep its mean as well.": """
            best, most = None, 0.0
            for rate, accuracies in validation.items():
                if np.mean(accuracies) > most:
                    best = rate
            return best
        """,
        "Only the last seed chose. Take the mean over all seeds of each rate.": (
            ("np.mean(validation[rate])", "validation[rate][-1]")
        ),
        "This is the worst rate. Accuracy is better when it is higher; only a loss is better when it is lower.": (
            ("max(", "min(")
        ),
        "This is the highest rate. Return the one with the best accuracy.": "return max(validation)",
        "This is the lowest rate. Return the one with the best accuracy.": "return min(validation)",
        "This is the position of the best rate in the dict. Return the rate itself.": (
            (BEST, f"[*validation].index({BEST})")
        ),
        "This is the accuracy of the best rate. Return the rate itself.": (
            "return float(max(np.mean(accuracies) for accuracies in validation.values()))"
        ),
        "This is the test accuracy of the best rate. Return the rate itself.": f"return float(np.mean(test[{BEST}]))",
    },
    hints=[
        "np.mean(validation[rate]) is how good a rate is, over its seeds.",
        "max(validation, key=...) returns the key of the dict for which a function is largest.",
        "The test dict is not needed here: it judges later what you have chosen.",
    ],
    praise="The test data was not used to choose, so it can still judge the rate that you chose.",
)


@choose.must()
def is_best_in_validation(choose, rng):
    """Of all rates the result has the highest mean accuracy in validation."""
    validation, test = validation_and_test(rng)
    return choose(validation, test) == max(validation, key=lambda rate: sum(validation[rate]))


@choose.must()
def does_not_ask_the_test(choose, rng):
    """The result is one of the rates, not always the largest, whatever the test accuracies, or without any."""
    validation, test = validation_and_test(rng)
    mirrored = dict(zip(validation, [*validation.values()][::-1], strict=True))  # another of the four rates is best
    tests, level = (validation, mirrored, test, {}), {rate: [0.5, 0.5] for rate in validation}
    results = [{float(choose(table, each)) for each in tests} for table in (validation, mirrored, level)]
    return results[0] != results[1] and all(len(each) == 1 and each <= {*validation} for each in results)


# Training one layer

LAYER = "for key, each in model.named_parameters():\n    each.requires_grad_({})"
only = Exercise(
    "only",
    hints=[
        "requires_grad_ of a model sets the switch of all its parameters at once.",
        "model.get_submodule(name) is the layer of that name.",
        "A layer has requires_grad_ too: freeze everything first, then make one layer trainable.",
    ],
    praise="This is PartialFineTuning. LoRA uses the same switch: the old parameters frozen, the new ones trained.",
)


def switched(only, rng, frozen=False):
    """A net after the call, and the names of what trains in it, with "head" in place of the layer's name.

    Some of its other names begin or end like the layer's.
    """
    name = str(rng.choice(["head", "top", "out"]))
    layers = {
        "body": nn.Linear(4, 3),
        f"{name}s_norm": nn.LayerNorm(3),
        name: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)),
        "side": nn.ModuleDict({name: nn.Linear(3, 2)}),
    }
    net = nn.ModuleDict(layers)
    net.register_parameter("position", nn.Parameter(torch.zeros(3)))
    net.requires_grad_(not frozen)
    only(net, name)
    return net, {key.replace(name, "head", 1) for key, tensor in net.named_parameters() if tensor.requires_grad}


HEAD = ["head.0.bias", "head.0.weight", "head.2.bias", "head.2.weight"]


@only.must(
    "model.name is a layer that is called name. Take the layer with get_submodule(name).",
    ("model.get_submodule(name)", "model.name"),
)
def asks_for_the_layer_by_its_name(only, rng):
    return stops_otherwise(lambda: switched(only, rng), "has no attribute 'name'")


@only.must(
    "layer.requires_grad = True does nothing to the parameters inside. Call layer.requires_grad_(True).",
    (".requires_grad_(True)", ".requires_grad = True"),
    "model.requires_grad = False",
)
def sets_no_attribute_instead(only, rng):
    net, trained = switched(only, rng)
    return sorted(trained) == HEAD or not any("requires_grad" in vars(layer) for layer in net.modules())


@only.must(
    "The named layer may hold others, such as head.0. Your loop comes to these later, and freezes them again.",
    "for each, module in model.named_modules():\n    module.requires_grad_(each == name)",
)
def reaches_what_is_inside(only, rng):
    plain = nn.ModuleDict({"body": nn.Linear(4, 3), "head": nn.Linear(3, 2)})
    only(plain, "head")
    return switched(only, rng)[1] or not plain["head"].weight.requires_grad


@only.must(
    "Nothing is left to train. Every parameter of the named layer must keep requires_grad = True.",
    ("model.get_submodule(name).requires_grad_(True)", ""),
    LAYER.format("key == name"),
)
def trains_something(only, rng):
    return switched(only, rng)[1]


@only.must(
    "Other layers still train. Set requires_grad = False for every parameter outside the named layer.",
    LAYER.format("True"),
    "return model",
)
def freezes_something(only, rng):
    return "body.weight" not in switched(only, rng)[1]


@only.must(
    "A parameter that is in no layer still trains: the model's own, such as position. Freeze the whole model first.",
    "for each, child in model.named_children():\n    child.requires_grad_(each == name)",
)
def freezes_what_is_in_no_layer(only, rng):
    return "position" not in switched(only, rng)[1]


@only.must(
    "A layer whose name only begins like that one trains as well. Match the whole name, not a part of it.",
    LAYER.format("name in key"),
    LAYER.format("key.startswith(name)"),
)
def matches_the_whole_name(only, rng):
    return "heads_norm.weight" not in switched(only, rng)[1]


@only.must(
    "A layer of that name inside another layer trains as well. The name is the whole path from the model.",
    LAYER.format("name in key.split('.')"),
)
def trains_nothing_else(only, rng):
    """Something trains, and nothing outside the named layer does, even where a name is similar."""
    trained = switched(only, rng)[1]
    return trained and trained <= set(HEAD)


@only.must(
    "A part of the named layer is frozen. It may have a bias, and layers inside it; all of it trains.",
    LAYER.format("key.startswith(f'{name}.') and key.endswith('.weight')"),
    LAYER.format("key.startswith(f'{name}.0.')"),
)
def trains_all_of_it(only, rng):
    return sorted(switched(only, rng)[1]) == HEAD


@only.must(
    "A layer inside another is called by its whole path, such as block.1. model.get_submodule(name) finds it.",
    LAYER.format("key.split('.')[0] == name"),
)
def finds_a_layer_by_its_path(only, rng):
    """A layer inside another is found by its path."""
    net = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "head": nn.Linear(2, 2)})
    only(net, "block.1")
    return {key for key, tensor in net.named_parameters() if tensor.requires_grad} == {"block.1.weight", "block.1.bias"}


@only.must(
    "A layer that was frozen before stays frozen. Set requires_grad = True for each of its parameters.",
    LAYER.format("each.requires_grad and key.startswith(f'{name}.')"),
)
def trains_all_of_the_layer(only, rng):
    """Every parameter of the named layer trains, also if everything was frozen before."""
    return set(HEAD) <= switched(only, rng, frozen=True)[1]


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
