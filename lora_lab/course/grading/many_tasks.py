"""Hidden tests of lesson 09: one base, many tasks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lora_lab.course.grading.invariant import Reflection, close, invariant_of, provided_for


@provided_for("switch_adapter")
def adapted_layer(rng):
    """A layer with an adapter of rank 2 that does something, and another adapter, of rank 3."""
    from lora_lab.lora import LoRALinear

    layer, A, B = LoRALinear(nn.Linear(6, 5), 2, 5.0), *(torch.from_numpy(rng.normal(size=s)) for s in ((3, 6), (5, 3)))
    nn.init.normal_(layer.lora_B)
    return layer, A.float(), B.float()


@invariant_of("switch_adapter")
def computes_with_the_new_one(switch_adapter, rng):
    """The layer computes its base plus the new adapter, of another rank and another alpha."""
    layer, A, B = adapted_layer(rng)
    x = torch.from_numpy(rng.normal(size=(4, 6))).float()
    switch_adapter(layer, A, B, 11.0)
    return close(layer(x), layer.base(x) + 11 / 3 * x @ A.T @ B.T)


@invariant_of("switch_adapter")
def leaves_the_base(switch_adapter, rng):
    """After a switch there and back the base is the same bit for bit, and in between the layer was another."""
    layer, A, B = adapted_layer(rng)
    before, first = copy.deepcopy(layer.base), [layer.lora_A.detach().clone(), layer.lora_B.detach().clone()]
    x = torch.from_numpy(rng.normal(size=(4, 6))).float()
    outputs = [layer(x)]
    for factors, alpha in (((A, B), 11.0), (first, 5.0)):
        switch_adapter(layer, *factors, alpha)
        outputs.append(layer(x))
    same = all(torch.equal(one, other) for one, other in zip(before.parameters(), layer.base.parameters(), strict=True))
    return same and close(outputs[2], outputs[0]) and not close(outputs[1], outputs[0])


@invariant_of("switch_adapter")
def can_be_trained_afterwards(switch_adapter, rng):
    """The new factors are parameters that are trained, and training them does not change what was passed."""
    layer, A, B = adapted_layer(rng)
    stored = A.clone(), B.clone()
    switch_adapter(layer, A, B, 11.0)
    for factor in (layer.lora_A, layer.lora_B):
        if not (isinstance(factor, nn.Parameter) and factor.requires_grad):
            return False
        factor.data.add_(1)  # as a training step would
    return layer.lora_A.shape == A.shape and torch.equal(A, stored[0]) and torch.equal(B, stored[1])


@invariant_of("labels")
def ignores_the_prompt(labels, rng):
    """There is a label for each token that is read, and before the answer each is -100."""
    for size, start in ((9, 4), (12, 5), (7, 2)):
        ids = rng.choice(range(10, 99), size, replace=False).tolist()
        result = list(labels(list(ids), start))
        if len(result) != size - 1 or result[: start - 1] != [-100] * (start - 1):
            return False
    return True


@invariant_of("labels")
def predicts_the_answer_and_its_end(labels, rng):
    """From the last token of the prompt on, each label is the next token, up to the end of the turn."""
    for size, start in ((9, 4), (12, 5), (7, 2)):
        ids = rng.choice(range(10, 99), size, replace=False).tolist()
        if list(labels(list(ids), start))[start - 1 :] != ids[start:]:
            return False
    return True


@invariant_of("split")
def has_each_row_once(split, rng):
    """Each row is in exactly one of three parts, no group is in two, and no part is empty, also with four groups."""
    for count in (4, 25, 40):
        groups = [f"text-{i}" for i in rng.permutation([i for i in range(count) for _ in range(2 + i % 2)])]
        parts = [list(part) for part in split(list(groups), int(rng.integers(99)))]
        names = [{groups[row] for row in part} for part in parts]
        if (
            len(parts) != 3
            or sorted(row for part in parts for row in part) != list(range(len(groups)))
            or not all(parts)
        ):
            return False
        if sum(map(len, names)) != count:
            return False
    return True


@invariant_of("split")
def leaves_most_for_training(split, rng):
    """Of all rows about eight tenths are for training, and validation and test share the others."""
    for count in (30, 50):
        groups = [f"text-{i}" for i in rng.permutation([i for i in range(count) for _ in range(2 + i % 2)])]
        parts = [list(part) for part in split(list(groups), int(rng.integers(99)))]
        shares = [len(part) / len(groups) for part in parts]
        covered = sorted(row for part in parts for row in part) == list(range(len(groups)))
        if not (covered and 0.65 < shares[0] < 0.9 and 0.04 < shares[1] < 0.2 and 0.04 < shares[2] < 0.2):
            return False
    return True


@invariant_of("split")
def follows_seed_and_groups(split, rng):
    """The seed and the groups alone decide: again the same, not in another order of the rows, but with another seed."""
    groups = [f"text-{i}" for i in rng.permutation([i for i in range(70) for _ in range(2)])]
    cases = [(groups, 3), (groups, 3), ([str(name) for name in rng.permutation(groups)], 3), (groups, 4)]
    parts = [[{rows[row] for row in part} for part in split(list(rows), seed)] for rows, seed in cases]
    return parts[0] == parts[1] == parts[2] != parts[3] and len({*parts[0][0]}) > 1


@invariant_of("guess_french")
def writes_guesses_of_its_own(guess_french, rng):
    """The guesses differ from each other and mostly from the names, and few are exactly right, as none is looked up."""
    from lora_lab.tasks.datasets import cldr_names

    names = cldr_names("fr")
    english = [str(name) for name in rng.choice(sorted(names), 250, replace=False)]
    guesses = [guess_french(name) for name in english]
    right = sum(names[name] == guess for name, guess in zip(english, guesses, strict=True))
    changed = sum(guess != name for name, guess in zip(english, guesses, strict=True))
    return {*map(type, guesses)} == {str} and len({*guesses}) > 50 and changed > 125 and right < 62


@invariant_of("guess_french")
def beats_the_english_names(guess_french, rng):
    """Their chrF is more than a point above that of the English names in lower case."""
    import sacrebleu

    from lora_lab.tasks.datasets import cldr_names

    names = cldr_names("fr")
    english = [str(name) for name in rng.choice(sorted(names), 250, replace=False)]
    guesses = [[guess_french(name) for name in english], [name.lower() for name in english]]
    scores = [sacrebleu.corpus_chrf(each, [[names[name] for name in english]]).score for each in guesses]
    return bool(scores[0] > scores[1] + 1)


Reflection(
    "09_many_tasks",
    question="A colleague fine-tunes an adapter on pairs from a manual; the loss on the test answers falls to a "
    "third, and she reports that *the model knows the manual now*. In five to eight sentences: what else "
    "could have made the loss fall, which baselines and which split would you ask for, and what could an "
    "adapter have taught at all?",
    rubric=(
        "The answer says that the loss can fall because the form of the answers was learned.",
        "It names a baseline that knows nothing, such as one answer for all, and the model asked well "
        "without training.",
        "It says what a split by rows lets through.",
        "It names a test that would show knowledge, and says what result would convince.",
    ),
    expected="The form of the answers, their length and their first words make the loss fall without any "
    "knowledge. Baselines: one answer for all, a bag of words, the untrained model with examples in its "
    "prompt. A split by rows puts variants of one text on both sides, so groups must stay together. "
    "Knowledge shows in questions on new texts, or in other words, where the score is above all of these "
    "by more than its error.",
)
