"""Exercises of lesson 09: one base, many tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_lab.course.exercise import Probe, exercises_of, normal
from lora_lab.lora import LoRALinear
from lora_lab.task import IGNORE
from lora_lab.tasks.datasets import cldr_names
from lora_lab.tasks.metrics import translation

exercise = exercises_of("09_many_tasks")
Split = Callable[[list[str], int], Sequence[Sequence[int]]]


# A split without siblings


def _groups(rng: np.random.Generator, count: int) -> list[str]:
    """The group of each row: ``count`` groups of two or three rows each, in random order."""
    names = [f"text-{number}" for number in rng.choice(1000, count, replace=False)]
    rows = [name for name in names for _ in range(int(rng.integers(2, 4)))]
    return [str(name) for name in rng.permutation(rows)]


def _seeds(rng: np.random.Generator) -> list[int]:
    return [int(seed) for seed in rng.choice(10_000, 2, replace=False)]


def _parts_of_groups(split: Split, groups: list[str], seed: int) -> list[set[str]]:
    """The groups in each part."""
    return [{groups[row] for row in part} for part in split(list(groups), seed)]


def _three_lists_of_rows(split: Split, rng: np.random.Generator) -> bool:
    groups = _groups(rng, 20)
    parts = split(list(groups), _seeds(rng)[0])
    return (
        isinstance(parts, list | tuple)
        and len(parts) == 3
        and all(isinstance(part, list | tuple | set | np.ndarray) for part in parts)
        and all(isinstance(row, int | np.integer) and 0 <= row < len(groups) for part in parts for row in part)
    )


def _each_row_once(split: Split, rng: np.random.Generator) -> bool:
    groups = _groups(rng, int(rng.integers(20, 40)))
    return sorted(row for part in split(list(groups), _seeds(rng)[0]) for row in part) == list(range(len(groups)))


def _no_siblings(split: Split, rng: np.random.Generator) -> bool:
    groups = _groups(rng, int(rng.integers(20, 40)))
    parts = _parts_of_groups(split, groups, _seeds(rng)[0])
    return sum(map(len, parts)) == len(set(groups))


def _no_part_is_empty(split: Split, rng: np.random.Generator) -> bool:
    return all(len(part) > 0 for part in split(_groups(rng, int(rng.integers(3, 7))), _seeds(rng)[0]))


def _most_are_for_training(split: Split, rng: np.random.Generator) -> bool:
    groups = _groups(rng, int(rng.integers(30, 40)))
    train, validation, test = _parts_of_groups(split, groups, _seeds(rng)[0])
    return len(train) >= 0.65 * len(set(groups)) and len(validation) > 1 < len(test)


def _seed_decides(split: Split, rng: np.random.Generator) -> bool:
    groups, (first, second) = _groups(rng, 30), _seeds(rng)
    return _parts_of_groups(split, groups, first) != _parts_of_groups(split, groups, second)


def _seed_repeats(split: Split, rng: np.random.Generator) -> bool:
    groups, (seed, _) = _groups(rng, 30), _seeds(rng)
    return _parts_of_groups(split, groups, seed) == _parts_of_groups(split, groups, seed)


def _order_of_rows_is_free(split: Split, rng: np.random.Generator) -> bool:
    groups, (seed, _) = _groups(rng, 70), _seeds(rng)  # so many that the order of a set depends on that of its rows
    other = [str(name) for name in rng.permutation(groups)]
    return _parts_of_groups(split, groups, seed) == _parts_of_groups(split, other, seed)


def _rows_of(groups: list[str], *parts: Sequence[str]) -> list[list[int]]:
    return [[row for row, group in enumerate(groups) if group in part] for part in parts]


def _shuffled(items: Sequence[Any], seed: int | None) -> list[Any]:
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _split_rows(groups, seed):
    rows, tenth = _shuffled(range(len(groups)), seed), len(groups) // 10
    return rows[2 * tenth :], rows[:tenth], rows[tenth : 2 * tenth]


def _split_rounding_down(groups, seed):
    names, tenth = _shuffled(sorted(set(groups)), seed), len(set(groups)) // 10
    return _rows_of(groups, names[2 * tenth :], names[:tenth], names[tenth : 2 * tenth])


def _cut(groups, names):
    tenth = max(1, len(names) // 10)
    return _rows_of(groups, names[2 * tenth :], names[:tenth], names[tenth : 2 * tenth])


def _split_losing_some(groups, seed):
    names, tenth = _shuffled(sorted(set(groups)), seed), max(1, len(set(groups)) // 10)
    return _rows_of(groups, names[: 7 * tenth], names[-2 * tenth : -tenth], names[-tenth:])


def _split_in_thirds(groups, seed):
    names = _shuffled(sorted(set(groups)), seed)
    third = len(names) // 3
    return _rows_of(groups, names[2 * third :], names[:third], names[third : 2 * third])


def _two_parts(groups, seed):
    return split(groups, seed)[:2]


def _training_on_all(groups, seed):
    return [list(range(len(groups))), *split(groups, seed)[1:]]


def _tenth_for_training(groups, seed):
    train, validation, test = split(groups, seed)
    return validation, train, test


def _names_of_groups(groups, seed):
    return [sorted({groups[row] for row in part}) for part in split(groups, seed)]


@exercise(
    "split",
    probes=[
        Probe(
            _three_lists_of_rows,
            "The result must be three lists of row numbers: training, validation, test.",
            (_names_of_groups, _two_parts),
        ),
        Probe(
            _each_row_once,
            "Some rows are in no part, or in two. Each row belongs to exactly one.",
            (_split_losing_some, _training_on_all),
        ),
        Probe(
            _no_siblings,
            "Some test texts have a sibling in training. Split the groups, not the rows.",
            (_split_rows,),
        ),
        Probe(
            _no_part_is_empty,
            "With few groups a part stays empty. Give validation and test one group at least.",
            (_split_rounding_down,),
        ),
        Probe(
            _most_are_for_training,
            "Too little is left to learn from. Validation and test get about a tenth of the groups each.",
            (_split_in_thirds, _tenth_for_training),
        ),
        Probe(
            _seed_decides,
            "Every seed gives the same split. Shuffle the groups with the seed before you cut.",
            (
                lambda groups, seed: _cut(groups, sorted(set(groups))),
                lambda groups, seed: _cut(groups, _shuffled(sorted(set(groups)), 0)),
            ),
        ),
        Probe(
            _seed_repeats,
            "One seed gives a different split each time. Draw from a generator that starts at the seed.",
            (lambda groups, seed: _cut(groups, _shuffled(sorted(set(groups)), None)),),
        ),
        Probe(
            _order_of_rows_is_free,
            "The same texts in another order are split differently. Sort the groups before you shuffle.",
            (
                lambda groups, seed: _cut(groups, _shuffled(list(dict.fromkeys(groups)), seed)),
                lambda groups, seed: _cut(groups, _shuffled(list(set(groups)), seed)),
            ),
        ),
    ],
    hints=[
        "Shuffle the names of the groups, cut that list in three, and then look up which rows are in each part.",
        "sorted(set(groups)) has each name once, whatever the order of the rows; random.Random(seed) can shuffle it.",
        "A tenth is max(1, count // 10) groups; the rows of a part are those whose group is in it.",
    ],
    minutes=8,
    difficulty=1,
    praise="No test text has a sibling in training now, so the score is a score on new texts.",
)
def split(groups, seed):
    """Each row is in one part, each group too; no part is empty; seed and groups alone decide which."""
    names = sorted(set(groups))
    random.Random(seed).shuffle(names)
    tenth = max(1, len(names) // 10)
    parts = names[2 * tenth :], names[:tenth], names[tenth : 2 * tenth]
    return [[row for row, group in enumerate(groups) if group in part] for part in parts]


# The loss on the answer alone


def conversation(rng: np.random.Generator) -> tuple[list[int], int]:
    """Different token ids of a prompt and its answer, and where the answer begins."""
    start, answer = int(rng.integers(4, 7)), int(rng.integers(3, 6))
    return [int(token) for token in rng.choice(np.arange(10, 99), start + answer, replace=False)], start


@exercise(
    "labels",
    inputs=conversation,
    mistakes={
        "The prompt counts, too, so the model is paid for repeating the question. Use IGNORE there.": (
            lambda ids, start: ids[1:]
        ),
        "Each label is the token itself. It has to be the next token, which the model is to predict.": (
            lambda ids, start: [IGNORE] * start + ids[start:],
            lambda ids, start: [IGNORE] * start + ids[start:-1],
        ),
        "The end of the turn is left out, so the model will never learn to stop.": (
            lambda ids, start: [IGNORE] * (start - 1) + ids[start:-1],
            lambda ids, start: [IGNORE] * (start - 1) + ids[start:-1] + [IGNORE],
        ),
        "The prompt's labels are token 0. Where a label does not count, write tasks.IGNORE, which is -100.": (
            lambda ids, start: [0] * (start - 1) + ids[start:]
        ),
        "What does not count is None, and a loss needs numbers. Use tasks.IGNORE, which is -100.": (
            lambda ids, start: [None] * (start - 1) + ids[start:]
        ),
        "The first token of the answer is left out. It is the label of the prompt's last token.": (
            lambda ids, start: [IGNORE] * start + ids[start + 1 :]
        ),
        "The last token of the prompt counts. It is given, so the label before it is IGNORE.": (
            lambda ids, start: [IGNORE] * (start - 2) + ids[start - 1 :]
        ),
        "The answer is ignored, and the prompt is learned. It is the other way round.": (
            lambda ids, start: ids[1:start] + [IGNORE] * (len(ids) - start)
        ),
    },
    hints=[
        "The model reads ids[:-1], so there are len(ids) - 1 labels; without IGNORE they are ids[1:].",
        "The label at the prompt's last token is the answer's first token, so start - 1 labels are IGNORE.",
        "[IGNORE] * n is a list of n of them; ids[start:] is the answer with the end of the turn.",
    ],
    minutes=8,
    difficulty=2,
    praise="One token off, and a model learns to repeat questions or never to stop; the loss looks fine in both cases.",
)
def labels(ids, start):
    """For each token that is read, the label is the next one if that is part of the answer, and IGNORE otherwise."""
    return [IGNORE] * (start - 1) + ids[start:]


# Switch without a trace


def _case(rng: np.random.Generator) -> tuple[LoRALinear, torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """A layer with an adapter of rank 2, another one of rank 3 for it, its alpha, and inputs (4, 6)."""
    base = nn.Linear(6, 5, bias=False)
    base.weight.data = normal(rng, 5, 6)
    layer = LoRALinear(base, rank=2, alpha=5.0)
    with torch.no_grad():
        layer.lora_A.copy_(normal(rng, 2, 6))
        layer.lora_B.copy_(normal(rng, 5, 2))
    return layer, normal(rng, 3, 6), normal(rng, 5, 3), float(rng.choice([7.0, 8.0, 11.0])), normal(rng, 4, 6)


def _base_is_unchanged(switch: Callable[..., Any], rng: np.random.Generator) -> bool:
    layer, A, B, alpha, _ = _case(rng)
    before, first = layer.base.weight.clone(), (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
    switch(layer, A, B, alpha)
    switch(layer, *first, 5.0)
    return torch.equal(layer.base.weight, before)


def _former_adapter_is_gone(switch: Callable[..., Any], rng: np.random.Generator) -> bool:
    layer, A, B, alpha, x = _case(rng)
    before = layer(x)
    switch(layer, A, B, alpha)
    return not torch.equal(layer(x), before)


def _factors_are_the_new_ones(switch: Callable[..., Any], rng: np.random.Generator) -> bool:
    layer, A, B, alpha, _ = _case(rng)
    switch(layer, A, B, alpha)
    return all(
        torch.equal(part, new) if part.shape == new.shape else False
        for part, new in ((layer.lora_A, A), (layer.lora_B, B))
    )


def _alpha_is_the_new_one(switch: Callable[..., Any], rng: np.random.Generator) -> bool:
    layer, A, B, alpha, _ = _case(rng)
    switch(layer, A, B, alpha)
    return layer.alpha != 5.0


def _scaling_is_alpha_by_rank(switch: Callable[..., Any], rng: np.random.Generator) -> bool:
    layer, A, B, alpha, x = _case(rng)
    switch(layer, A, B, alpha)
    expected = x @ layer.base.weight.T + alpha / len(A) * (x @ A.T) @ B.T  # (4, 5)
    return torch.allclose(layer(x), expected, atol=1e-4)


def _can_be_trained(switch: Callable[..., Any], rng: np.random.Generator) -> bool:
    layer, A, B, alpha, _ = _case(rng)
    switch(layer, A, B, alpha)
    return all(isinstance(part, nn.Parameter) and part.requires_grad for part in (layer.lora_A, layer.lora_B))


def _stored_adapter_is_a_copy(switch: Callable[..., Any], rng: np.random.Generator) -> bool:
    layer, A, B, alpha, _ = _case(rng)
    stored = A.clone(), B.clone()
    switch(layer, A, B, alpha)
    with torch.no_grad():  # as a training step would
        layer.lora_A.add_(1)
        layer.lora_B.add_(1)
    return torch.equal(A, stored[0]) and torch.equal(B, stored[1])


@torch.no_grad()
def _add_to_the_base(layer, A, B, alpha):
    layer.base.weight += alpha / len(A) * B @ A


@torch.no_grad()
def _subtract_and_add(layer, A, B, alpha):
    layer.base.weight += layer.delta()
    layer.base.weight -= layer.delta()
    switch_adapter(layer, A, B, alpha)


def _replace_half(layer, A, B, alpha):
    layer.lora_A = nn.Parameter(torch.cat([layer.lora_A[:1], A[1:]]))
    layer.lora_B, layer.alpha = nn.Parameter(B.clone()), alpha


def _stack(layer, A, B, alpha):
    layer.lora_A = nn.Parameter(torch.cat([layer.lora_A, A]))
    layer.lora_B = nn.Parameter(torch.cat([layer.lora_B, B], dim=1))
    layer.alpha = alpha


def _average(layer, A, B, alpha):
    switch_adapter(
        layer, (A + layer.lora_A.detach().mean(0)) / 2, (B + layer.lora_B.detach().mean(1)[:, None]) / 2, alpha
    )


def _divided_alpha(layer, A, B, alpha):
    switch_adapter(layer, A, B, alpha / len(A))


def _factors_alone(layer, A, B, alpha):
    layer.lora_A, layer.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())


def _no_parameters(layer, A, B, alpha):
    del layer.lora_A, layer.lora_B
    layer.lora_A, layer.lora_B, layer.alpha = A.clone(), B.clone(), alpha


def _frozen(layer, A, B, alpha):
    switch_adapter(layer, A, B, alpha)
    layer.requires_grad_(False)


def _without_copies(layer, A, B, alpha):
    layer.lora_A, layer.lora_B, layer.alpha = nn.Parameter(A), nn.Parameter(B), alpha


@exercise(
    "switch_adapter",
    probes=[
        Probe(
            _base_is_unchanged,
            "The base changed, and rounding alone keeps it from coming back. Leave layer.base as it is.",
            (_subtract_and_add, _add_to_the_base),
        ),
        Probe(
            _former_adapter_is_gone,
            "The layer still computes with the former adapter. Give it the new A and B.",
            (lambda layer, A, B, alpha: None,),
        ),
        Probe(
            _factors_are_the_new_ones,
            "The former adapter is still in the layer. Replace all of A and all of B.",
            (_replace_half, _stack, _average),
        ),
        Probe(
            _alpha_is_the_new_one,
            "The scaling is still of the former alpha. Set layer.alpha as well.",
            (_factors_alone,),
        ),
        Probe(
            _scaling_is_alpha_by_rank,
            "The scaling is wrong. The layer divides alpha by the rank itself, so store alpha as it is.",
            (_divided_alpha,),
        ),
        Probe(
            _can_be_trained,
            "The new A and B cannot be trained later. Make each an nn.Parameter, which requires a gradient.",
            (_no_parameters, _frozen),
        ),
        Probe(
            _stored_adapter_is_a_copy,
            "The layer shares memory with the stored adapter, so training would change that. Copy A and B.",
            (_without_copies,),
        ),
    ],
    hints=[
        "An adapter is three things: layer.lora_A, layer.lora_B and layer.alpha. Nothing else has to change.",
        "The rank may differ, so copying into the old tensors can fail: make new nn.Parameters.",
        "nn.Parameter(A.clone()) is the new layer.lora_A; do the same with B, and do not forget alpha.",
    ],
    minutes=10,
    difficulty=2,
    praise="W0 was never written to, so switching a thousand times leaves no trace.",
)
def switch_adapter(layer, A, B, alpha):
    """The layer computes with the new adapter, whatever its rank, and its base is the same bit for bit."""
    layer.lora_A, layer.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    layer.alpha = alpha


# Beat the score


def _answered(answer: Callable[[str], str], rng: np.random.Generator) -> tuple[list[str], list[str], list[str]]:
    """250 English names, drawn anew, their French names, and the answers."""
    names = cldr_names("fr")
    english = [str(name) for name in rng.choice(sorted(names), 250, replace=False)]
    return english, [names[name] for name in english], [answer(name) for name in english]


def _gain(answer: Callable[[str], str], rng: np.random.Generator) -> float:
    """The chrF of the answers minus that of the English names in lower case."""
    english, french, answers = _answered(answer, rng)
    small = translation([name.lower() for name in english], french)
    return translation(answers, french)["chrf"] - small["chrf"]


def _answers_are_texts(answer: Callable[[str], str], rng: np.random.Generator) -> bool:
    return all(isinstance(answer(str(name)), str) for name in rng.choice(sorted(cldr_names("fr")), 5))


def _answers_are_no_leak(answer: Callable[[str], str], rng: np.random.Generator) -> bool:
    _, french, answers = _answered(answer, rng)
    return sum(map(str.__eq__, answers, french)) < 0.25 * len(french)  # rules reach a tenth


def _answers_differ(answer: Callable[[str], str], rng: np.random.Generator) -> bool:
    return len(set(_answered(answer, rng)[2])) > 50


def _case_is_lower(answer: Callable[[str], str], rng: np.random.Generator) -> bool:
    answers = "".join(_answered(answer, rng)[2])
    return answers == answers.lower() or _gain(answer, rng) > -3


def _score_is_beaten(answer: Callable[[str], str], rng: np.random.Generator) -> bool:
    return _gain(answer, rng) > 1


def _from_a_list(name):
    names = cldr_names("fr")
    return names[name] if len(name) % 5 < 2 else name.lower()


@exercise(
    "guess_french",
    probes=[
        Probe(
            _answers_are_texts,
            "The result must be a string, your guess at the French name.",
            (lambda name: None, lambda name: name.split()),
        ),
        Probe(
            _answers_are_no_leak,
            "Over a quarter of the answers are exactly right, so they were looked up. That is a leak of the test.",
            (lambda name: cldr_names("fr")[name], _from_a_list),
        ),
        Probe(
            _answers_differ,
            "Many names get the same answer, which scores below the English names. Begin with the name itself.",
            (lambda name: "franc français", lambda name: name[:1]),
        ),
        Probe(
            _case_is_lower,
            "French writes languages and currencies in lower case, and chrF counts capitals. Change the case.",
            (lambda name: name, lambda name: name.upper()),
        ),
        Probe(
            _score_is_beaten,
            "This scores about as much as the English name in lower case. Look at endings and at word order.",
            (lambda name: name.lower(), lambda name: name.lower().replace("y", "i")),
        ),
    ],
    hints=[
        "name.lower() gives the score to beat. Then look at ten pairs, and at what happens to endings such as -ian.",
        'An adjective follows its noun: "Malian Franc" is "franc malien". Reverse two words.',
        'words = name.lower().replace("ian", "ien").split(), reversed if there are two, and joined with a space.',
    ],
    minutes=10,
    difficulty=2,
    praise="Your rules know hardly a word of French and use no language model. That is how little this score asks for.",
    draws=2,
)
def guess_french(name):
    """The chrF of the answers is above that of the English names in lower case, by more than a point."""
    words = name.lower().replace("ian", "ien").replace("islands", "îles").split()
    return " ".join(reversed(words)) if len(words) == 2 else " ".join(words)
