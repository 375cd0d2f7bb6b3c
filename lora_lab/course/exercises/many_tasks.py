"""Exercises of lesson 09: one base, many tasks."""

import copy

import torch
from torch import nn

from lora_lab.course.exercise import Exercise, Reflection, close, normal
from lora_lab.lora import LoRALinear

# Switch without a trace

SET_ALPHA, SET_FACTORS = "layer.alpha = alpha", "layer.lora_A, layer.lora_B = ("
MERGE_AND_UNMERGE = "W = layer.base.weight.data\n    W += layer.delta()\n    W -= layer.delta()\n    "

switch_adapter = Exercise(
    "switch_adapter",
    hints=[
        "An adapter is three things: layer.lora_A, layer.lora_B and layer.alpha. Nothing else has to change.",
        "The rank may differ, so copying into the old tensors can fail: make new nn.Parameters.",
        "nn.Parameter(A.clone()) is the new layer.lora_A; do the same with B, and do not forget alpha.",
    ],
    praise="W0 was never written to, so switching a thousand times leaves no trace.",
)


def switched(switch_adapter, rng):
    """A layer before and after a switch from rank 2 and alpha 5 to rank 3; the new A, B and alpha, and their copies.

    The copies were made before the switch.
    """
    layer = LoRALinear(nn.Linear(6, 5), 2, 5.0)
    layer.lora_B.data.copy_(normal(rng, 5, 2))
    before = copy.deepcopy(layer)
    new = normal(rng, 3, 6), normal(rng, 5, 3), float(rng.choice([7.0, 8.0, 11.0]))
    stored = copy.deepcopy(new)
    switch_adapter(layer, *new)
    return before, layer, new, stored


def switched_back(switch_adapter, rng):
    """Such a layer, and what is left of it after a switch there and back."""
    before, layer, *_ = switched(switch_adapter, rng)
    switch_adapter(layer, before.lora_A.detach().clone(), before.lora_B.detach().clone(), 5.0)
    return before, layer


def said_no(answer, rng, words):
    """Whether a switch stops with an error of torch that has these words in it."""
    try:
        switched(answer, rng)
    except (TypeError, RuntimeError) as error:
        return words in str(error)
    return False


@switch_adapter.must(
    "A layer takes nothing but parameters as lora_A and lora_B. Wrap each: nn.Parameter(A.clone()).",
    ("nn.Parameter(A.clone())", "A.clone()", "nn.Parameter(B.clone())", "B.clone()"),
)
def wraps_the_factors(switch_adapter, rng):
    return not said_no(switch_adapter, rng, "cannot assign")


@switch_adapter.must(
    "The new adapter has another rank, so it does not fit into the old A and B. Make new nn.Parameters.",
    "layer.lora_A.data.copy_(A)\nlayer.lora_B.data.copy_(B)\nlayer.alpha = alpha",
    "layer.lora_A.data[:] = A\nlayer.lora_B.data[:] = B\nlayer.alpha = alpha",
)
def makes_room_for_another_rank(switch_adapter, rng):
    return not any(said_no(switch_adapter, rng, words) for words in ("must match", "expanded size"))


@switch_adapter.must(
    "The shapes are those of another factor. lora_A reads the input: (rank, in); lora_B writes: (out, rank).",
    "layer.lora_A, layer.lora_B, layer.alpha = nn.Parameter(B.clone()), nn.Parameter(A.clone()), alpha",
    (".clone()", ".T.clone()"),
)
def keeps_the_shapes(switch_adapter, rng):
    _, layer, (A, B, _), _ = switched(switch_adapter, rng)
    shapes = (layer.lora_A.shape[1], layer.lora_B.shape[0])
    return shapes == (A.shape[1], B.shape[0])


@switch_adapter.must(
    "The base changed, and rounding alone keeps it from coming back. Leave layer.base as it is.",
    (SET_FACTORS, MERGE_AND_UNMERGE + SET_FACTORS),
    "layer.base.weight.data += alpha / len(A) * B @ A",
)
def leaves_the_base(switch_adapter, rng):
    before, layer = switched_back(switch_adapter, rng)
    return torch.equal(layer.base.weight, before.base.weight)


@switch_adapter.must("The layer still computes with the former adapter. Give it the new A and B.", "pass")
def switches_there_and_back(switch_adapter, rng):
    """After a switch there and back the base is the same bit for bit, and in between the layer was another."""
    before, layer = switched_back(switch_adapter, rng)
    pairs = zip(layer.base.parameters(), before.base.parameters(), strict=True)
    old, new, *_ = switched(switch_adapter, rng)
    x = normal(rng, 4, 6)
    return all(torch.equal(*pair) for pair in pairs) and not close(new(x), old(x))


@switch_adapter.must(
    "The scaling is in A or B. The layer multiplies by alpha / rank itself, so store A and B as they are.",
    ("A.clone()", "A * (alpha / len(A))"),
    ("B.clone()", "B * (alpha / len(A))", SET_ALPHA, "pass"),
)
def leaves_the_scaling_to_the_layer(switch_adapter, rng):
    _, layer, (A, B, _), _ = switched(switch_adapter, rng)
    pairs = (layer.lora_A, A), (layer.lora_B, B)
    ratios = [part / given for part, given in pairs if part.shape == given.shape]
    return not any(close(ratio, ratio.mean().expand_as(ratio)) and not close(ratio.mean(), 1.0) for ratio in ratios)


@switch_adapter.must(
    "The former adapter is still in the layer. Replace all of A and all of B.",
    ("A.clone()", "torch.cat([layer.lora_A[:1], A[1:]])"),
    ("A.clone()", "torch.cat([layer.lora_A, A])", "B.clone()", "torch.cat([layer.lora_B, B], dim=1)"),
    ("A.clone()", "(A + layer.lora_A.mean(0)) / 2", "B.clone()", "(B + layer.lora_B.mean(1)[:, None]) / 2"),
)
def replaces_the_factors(switch_adapter, rng):
    _, layer, (A, B, _), _ = switched(switch_adapter, rng)
    return torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B)


@switch_adapter.must("The scaling is still of the former alpha. Set layer.alpha as well.", (SET_ALPHA, "pass"))
def replaces_alpha(switch_adapter, rng):
    return switched(switch_adapter, rng)[1].alpha != 5.0


@switch_adapter.must(
    "The scaling is wrong. The layer divides alpha by the rank itself, so store alpha as it is.",
    (SET_ALPHA, "layer.alpha = alpha / len(A)"),
)
def computes_with_the_new_one(switch_adapter, rng):
    """The layer computes its base plus the new adapter, of another rank and another alpha."""
    _, layer, (A, B, alpha), _ = switched(switch_adapter, rng)
    x = normal(rng, 4, 6)
    return close(layer(x), layer.base(x) + alpha / 3 * x @ A.T @ B.T)


@switch_adapter.must(
    "The new A and B cannot be trained later. Make each an nn.Parameter, which requires a gradient.",
    "del layer.lora_A, layer.lora_B\nlayer.lora_A, layer.lora_B, layer.alpha = A.clone(), B.clone(), alpha",
    (SET_ALPHA, f"{SET_ALPHA}\n    layer.requires_grad_(False)"),
)
def makes_parameters(switch_adapter, rng):
    _, layer, *_ = switched(switch_adapter, rng)
    return all(isinstance(part, nn.Parameter) and part.requires_grad for part in (layer.lora_A, layer.lora_B))


@switch_adapter.must(
    "The layer shares memory with the stored adapter, so training would change that. Copy A and B.",
    (".clone()", ""),
)
def can_be_trained_afterwards(switch_adapter, rng):
    """The new factors are parameters that are trained, and training them does not change what was passed."""
    _, layer, new, stored = switched(switch_adapter, rng)
    for factor in (layer.lora_A, layer.lora_B):
        factor.data.add_(1)  # as a training step would
    kept = torch.equal(new[0], stored[0]) and torch.equal(new[1], stored[1])
    return layer.lora_A.shape == new[0].shape and kept and makes_parameters(switch_adapter, rng)


# Merge or switch?

QUANTISED, MERGED = "return 'merge, then quantise' if bits == 4 else 'merge'", "return 'merge'"


def facts(rng):
    """How many tasks there are, whether the base is wanted again, and the bits of a weight."""
    return int(rng.choice([1, 1, 1, 2, 5])), bool(rng.random() < 0.4), int(rng.choice([4, 4, 16, 32]))


merge_or_switch = Exercise(
    "merge_or_switch",
    inputs=facts,
    draws=256,
    wrong={
        "Several tasks are merged. A merged model serves one: with more, switch.": (
            ("tasks > 1 or base_again", "base_again")
        ),
        "The base is wanted again, and subtracting does not bring it back. Then switch.": (
            ("tasks > 1 or base_again", "tasks > 1")
        ),
        "One reason is enough. Switch for several tasks, and also if the base is wanted again.": (" or ", " and "),
        "Weights of 4 bits swallow a merge. Merge into the full weights, then quantise.": (QUANTISED, MERGED),
        "You never merge. An adapter beside the weights costs time in each pass, so merge the only one.": (
            "return 'switch'"
        ),
        "You never switch. With several tasks, or if the base is wanted again, keep the adapters beside it.": (
            QUANTISED
        ),
        "16 bits hold a merge well enough. Only weights of 4 bits need it before they are quantised.": (
            ("bits == 4", "bits < 32")
        ),
        "It is the other way round: only weights of 4 bits need the merge before they are quantised.": (
            ("bits == 4", "bits != 4")
        ),
        "4 bits do not decide it alone. Ask first about several tasks and about the base.": (
            "if bits == 4:\n    return 'merge, then quantise'\nreturn 'switch' if tasks > 1 or base_again else 'merge'"
        ),
    },
    hints=[
        "First ask what forbids a merge: a second task, or somebody who wants the base back.",
        "If nothing forbids it, the bits decide into what you merge.",
        'if tasks > 1 or base_again, it is "switch"; otherwise 4 bits ask for "merge, then quantise".',
    ],
    praise="You can now say in one line what to do with an adapter, and why.",
)


@merge_or_switch.must()
def keeps_several_tasks_apart(merge_or_switch, rng):
    """Several tasks are switched, whatever the bits, and one alone is merged in 16 or 32 bits."""
    tasks, bits = int(rng.integers(2, 9)), int(rng.choice([4, 16, 32]))
    return merge_or_switch(tasks, False, bits) == "switch" and merge_or_switch(1, False, max(bits, 16)) == "merge"


@merge_or_switch.must()
def brings_the_base_back(merge_or_switch, rng):
    """If the base is wanted again, one task is switched too, and otherwise it is merged."""
    bits = int(rng.choice([16, 32]))
    return merge_or_switch(1, True, bits) == "switch" and merge_or_switch(1, False, bits) == "merge"


@merge_or_switch.must()
def merges_before_it_quantises(merge_or_switch, rng):
    """In 4 bits the one task is merged first and quantised then; in 16 and in 32 bits it is merged."""
    answers = [merge_or_switch(1, False, bits) for bits in (4, 16, 32)]
    return answers == ["merge, then quantise", "merge", "merge"]


Reflection(
    "09_many_tasks",
    question="A company serves thirty customers with one language model in 4 bits, and has an adapter for each of "
    "them. A colleague wants to merge each adapter into a copy of the model. In five to eight sentences: what "
    "would that cost, what would go wrong, what do you propose instead, and what would you measure first?",
    rubric=(
        "The answer counts the copies: thirty models against one model and thirty small files.",
        "It says that a merge into weights of 4 bits rounds much of a small update away.",
        "It proposes to keep the base and to switch, or to give each request of a batch its own adapter.",
        "It names a measurement that could change the plan, such as the time of a pass with an adapter beside it.",
    ),
    expected="Thirty merged copies take the room of thirty models, where one base and thirty adapters take little "
    "more than one. Four bits have sixteen levels in a block, and an update of a few per cent rounds away in "
    "part or almost wholly; subtracting does not bring the base back either. Keep one base, and switch, or serve "
    "mixed batches where each row has its own A and B. First measure the time of a pass with and without an "
    "adapter, the time of a switch, and each customer's score after the change.",
)
