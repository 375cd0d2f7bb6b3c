"""Tasks: parts that do not leak into each other, fingerprints that tell data apart, and answers that are known."""

import copy
import dataclasses
import functools
from pydoc_data.topics import topics

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lora_lab import LoRA, fit, memory, speed
from lora_lab.models.digits import DigitsMLP
from lora_lab.task import described
from lora_lab.tasks import IGNORE, Examples, Task, cross_entropy, digits, docs, mean_squared_error, planted
from lora_lab.tasks.python_docs import _related
from tests.helpers import ROOT, ByteTokenizer, run_python

PARTS = ("train", "validation", "test", "off_domain")


class Recorder(ByteTokenizer):
    """Keeps what it was asked to encode."""

    def __init__(self):
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return super().encode(text)


@pytest.fixture(scope="module")
def manual():
    """(the task of 64 bytes an example, the text of each part)."""
    recorder = Recorder()
    task = docs(recorder, seq_len=64)
    return task, dict(zip(PARTS, recorder.texts, strict=True))


def one_line(text):
    return " ".join(text.split())


def paragraphs(text):
    """Paragraphs of 60 characters or more."""
    return {paragraph for paragraph in map(one_line, text.split("\n\n")) if len(paragraph) >= 60}


def tiny(**changes):
    def part(n):
        return Examples(torch.arange(3.0 * n).view(n, 3), torch.arange(n))

    return Task(**({"name": "tiny", **{name: part(i + 2) for i, name in enumerate(PARTS)}} | changes))


# Task


def test_parts_are_given_by_name_in_order():
    task = tiny()
    assert tuple(task.parts) == PARTS
    assert all(task.parts[name] is getattr(task, name) for name in PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_an_empty_part_is_named(part):
    empty = Examples(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=f"The {part} part of task 'tiny' is empty"):
        tiny(**{part: empty})


def test_inputs_without_targets_are_refused():
    with pytest.raises(ValueError, match="3 inputs cannot be paired with 2 targets"):
        Examples(torch.zeros(3, 1), torch.zeros(2))


def test_examples_are_indexed_by_rows():
    part = tiny().off_domain
    assert len(part) == 5
    chosen = part[torch.tensor([3, 0])]
    assert chosen.inputs.tolist() == [[9.0, 10.0, 11.0], [0.0, 1.0, 2.0]]
    assert chosen.targets.tolist() == [3, 0]
    assert part[1:3].targets.tolist() == [1, 2]


def other_loss(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("field", ["inputs", "targets"])
def test_fingerprint_differs_when_any_one_value_does(part, field):
    task = tiny()
    changed = copy.deepcopy(task)
    getattr(changed.parts[part], field).view(-1)[-1] += 1
    assert changed.fingerprint != task.fingerprint
    getattr(changed.parts[part], field).view(-1)[-1] -= 1
    assert changed.fingerprint == task.fingerprint


def test_fingerprint_differs_with_order_part_shape_dtype_name_and_loss():
    task = tiny()
    part = task.train
    others = [
        tiny(train=part[torch.tensor([1, 0])]),
        tiny(train=task.validation, validation=part),
        tiny(train=Examples(part.inputs.reshape(2, 1, 3), part.targets)),
        tiny(train=Examples(part.inputs.view(torch.int32), part.targets)),
        tiny(train=part[:1]),
        tiny(name="other"),
        tiny(loss=other_loss),
    ]
    assert len({each.fingerprint for each in (task, *others)}) == 8
    assert tiny().fingerprint == task.fingerprint


def test_fingerprint_is_that_of_the_values_not_of_their_layout_in_memory():
    inputs = torch.arange(12.0).view(3, 4).T
    assert not inputs.is_contiguous()
    one, other = (
        tiny(test=Examples(each, torch.arange(4)))
        for each in (inputs, inputs.clone(memory_format=torch.contiguous_format))
    )
    assert one.fingerprint == other.fingerprint


def test_fingerprint_is_the_same_in_every_build_and_process():
    script = (
        "from lora_lab.tasks import digits, docs\n"
        "class Bytes:\n    encode = lambda self, text: list(text.encode())\n"
        "print(docs(Bytes(), 64).fingerprint, digits('adapt', seed=3).fingerprint)"
    )
    done = run_python(script, PYTHONHASHSEED="7")
    torch.manual_seed(8)
    for _ in range(2):
        assert done.stdout.split() == [docs(ByteTokenizer(), 64).fingerprint, digits("adapt", seed=3).fingerprint]


def test_description_gives_sizes_shapes_units_source_and_fingerprint():
    task = tiny(about="numbers in a row")
    lines = task.describe().splitlines()
    assert lines[0] == "tiny: numbers in a row"
    assert [line.split() for line in lines[1:5]] == [
        [name, str(n), "examples", "of", "3,", str(n), "examples"] for name, n in zip(PARTS, (2, 3, 4, 5), strict=True)
    ]
    assert lines[5].split() == ["fingerprint", task.fingerprint]


def test_tokens_count_where_the_target_is_not_ignored_and_examples_always():
    part = Examples(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 0]]))
    assert tiny(unit="tokens").counted(part) == 3
    assert tiny().counted(part) == 2


def test_limited_keeps_the_first_examples_and_all_other_parts():
    task = tiny(train=tiny().off_domain)
    fewer = task.limited(2)
    assert torch.equal(fewer.train.inputs, task.train.inputs[:2])
    assert torch.equal(fewer.train.targets, task.train.targets[:2])
    assert all(fewer.parts[name] is task.parts[name] for name in PARTS[1:])
    assert (fewer.name, fewer.loss, fewer.unit) == (task.name, task.loss, task.unit)
    assert fewer.fingerprint != task.fingerprint
    assert task.limited(5).fingerprint == task.fingerprint


def test_limited_draws_by_seed():
    task = digits("adapt")
    first, again, other = (task.limited(20, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, task.limited(20).fingerprint}) == 3
    rows = {(tuple(x.tolist()), int(y)) for x, y in zip(task.train.inputs, task.train.targets, strict=True)}
    drawn = {(tuple(x.tolist()), int(y)) for x, y in zip(first.train.inputs, first.train.targets, strict=True)}
    assert len(drawn) == 20
    assert drawn <= rows


@pytest.mark.parametrize("n_train", [0, -1, 3])
def test_limited_says_how_many_there_are(n_train):
    with pytest.raises(ValueError, match=f"n_train is {n_train}, but task 'tiny' has 1 to 2"):
        tiny().limited(n_train)


# Losses


def test_cross_entropy_is_the_mean_over_counted_targets_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5).bfloat16()
    targets = torch.tensor([[1, IGNORE, 4], [IGNORE, 0, 2]])
    log_chances = torch.log_softmax(logits.double(), dim=-1)
    places = [(0, 0, 1), (0, 2, 4), (1, 1, 0), (1, 2, 2)]
    expected = -sum(float(log_chances[place]) for place in places) / 4
    found = cross_entropy(lambda inputs: logits, None, targets)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-6)
    classes = cross_entropy(lambda inputs: logits[:, 0], None, torch.tensor([1, 3]))
    assert float(classes) == pytest.approx(-float(log_chances[0, 0, 1] + log_chances[1, 0, 3]) / 2, rel=1e-6)


def test_mean_squared_error_is_the_mean_over_all_numbers():
    found = mean_squared_error(lambda x: 2 * x, torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
    assert float(found) == (4 + 9) / 2


# docs


def test_targets_are_the_inputs_one_token_ahead_and_rows_are_cut_from_the_text(manual):
    task, texts = manual
    for part, examples in task.parts.items():
        data = texts[part].encode()
        rows = (len(data) - 1) // 64
        assert examples.inputs.shape == examples.targets.shape == (rows, 64)
        assert torch.equal(examples.inputs[:, 1:], examples.targets[:, :-1])
        expected = sorted((data[i * 64 : i * 64 + 64], data[i * 64 + 1 : i * 64 + 65]) for i in range(rows))
        pairs = zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True)
        assert sorted((bytes(inputs), bytes(targets)) for inputs, targets in pairs) == expected
        first = [bytes(row) for row in examples.inputs[:20].tolist()]
        assert first != [data[i * 64 : i * 64 + 64] for i in range(20)]  # in random order
    assert task.unit == "tokens"
    assert task.counted(task.train) == task.train.targets.numel()


def test_every_page_of_the_manual_is_in_one_part_only(manual):
    _, texts = manual
    pages = set(topics.values())
    found = {page: [part for part in PARTS if page in texts[part]] for page in pages}
    assert all(len(parts) == 1 for parts in found.values())
    sizes = {part: sum(len(page) for page in pages if found[page] == [part]) for part in PARTS}
    assert sizes["off_domain"] == 0
    assert sizes["train"] > 5 * sizes["validation"] > 0
    assert sizes["test"] > 0.03 * sizes["train"]
    assert sum(sizes.values()) + 2 * (len(pages) - 3) == sum(len(texts[part]) for part in PARTS[:3])


@pytest.mark.parametrize(
    ("held_out", "read"), [("validation", "train"), ("test", "train"), ("test", "validation"), ("train", "validation")]
)
def test_no_paragraph_of_one_part_is_in_the_pages_of_another(manual, held_out, read):
    _, texts = manual
    unseen, seen = paragraphs(texts[held_out]), one_line(texts[read])
    assert len(unseen) >= 50
    assert [paragraph for paragraph in unseen if paragraph in seen] == []


def test_a_paragraph_that_is_shared_would_be_found(manual):
    _, texts = manual
    pages = sorted(set(topics.values()))
    shared = [page for page in pages if any(paragraphs(page) & paragraphs(other) for other in pages if other != page)]
    assert len(shared) >= 2  # so cutting by page alone would leak
    assert all(page in texts["train"] or page in texts["validation"] or page in texts["test"] for page in shared)


def test_pages_that_quote_each_other_form_one_group_even_by_way_of_a_third():
    quote, other = "a sentence of more than sixty characters, which several pages have " * 2, "another of them " * 8
    wrapped = quote.replace(" ", "\n")
    pages = [
        f"first\n\n{quote}",
        "alone\n\nshort",
        f"third\n\n{other}",
        f"{wrapped}\n\n{other}",
        "alone too",
    ]
    assert _related(pages) == [[pages[0], pages[2], pages[3]], [pages[1]], [pages[4]]]
    assert _related(["x\n\nshort", "y\n\nshort"]) == [["x\n\nshort"], ["y\n\nshort"]]


def test_a_large_group_of_related_pages_is_for_training_and_a_small_one_stays_whole(monkeypatch):
    def related(letter, n):
        quote = f"a paragraph of more than sixty characters, which all pages of {letter} quote"
        return {f"{letter}{i}": f"{letter}{i} begins\n\n{quote}\n\nand ends" for i in range(n)}

    alone = {letter: f"{letter} stands alone " * 9 for letter in "acefg"}
    pages = alone | related("b", 8) | related("d", 7)
    monkeypatch.setattr("pydoc_data.topics.topics", pages)
    recorder = Recorder()
    docs(recorder, seq_len=8)
    train, validation, test, _ = recorder.texts
    # Groups 1, 6, ... are for validation and 3, 8, ... for testing, in the order of names.
    assert {name for name, page in pages.items() if page in validation} == {"g"}
    assert {name for name, page in pages.items() if page in test} == set(related("d", 7))
    assert {name for name, page in pages.items() if page in train} == {*"acef", *related("b", 8)}


def test_off_domain_text_is_about_data_sets(manual):
    _, texts = manual
    assert "iris" in texts["off_domain"].lower()
    assert "wine" in texts["off_domain"].lower()
    assert len(paragraphs(texts["off_domain"])) > 50
    assert not paragraphs(texts["off_domain"]) & set().union(*(paragraphs(texts[part]) for part in PARTS[:3]))


@pytest.mark.parametrize("seq_len", [1, 0, -5])
def test_examples_of_less_than_two_tokens_are_refused(seq_len):
    with pytest.raises(ValueError, match=f"seq_len is {seq_len}, .*at least 2"):
        docs(ByteTokenizer(), seq_len)


def test_examples_longer_than_a_part_are_refused():
    with pytest.raises(ValueError, match="The validation part of task 'docs' is empty"):
        docs(ByteTokenizer(), 200_000)


# digits


@pytest.fixture(scope="module")
def pictures():
    """Each upright picture's 64 pixels -> its place in scikit-learn's data."""
    found = {tuple(picture): i for i, picture in enumerate((load_digits().data / 16).tolist())}
    assert len(found) == 1797  # no two are equal
    return found


def upright(inputs):
    """Moved pictures back up: all but the last row, which is lost."""
    return [tuple(picture[8:]) for picture in inputs.tolist()]


def test_parts_of_digits_share_no_picture_and_use_every_one(pictures):
    before, after = digits("pretrain"), digits("adapt")
    cut = {picture[:56]: i for picture, i in pictures.items()}
    assert len(cut) == 1797
    labels = load_digits().target
    places = {}
    for part in PARTS[:3]:
        places["pretrain", part] = [pictures[tuple(picture)] for picture in before.parts[part].inputs.tolist()]
        places["adapt", part] = [cut[picture] for picture in upright(after.parts[part].inputs)]
    used = [place for part in places.values() for place in part]
    assert sorted(used) == list(range(1797))
    assert [len(part) for part in places.values()] == [700, 500, 100, 200, 100, 197]
    for (name, part), rows in places.items():
        task = before if name == "pretrain" else after
        assert task.parts[part].targets.tolist() == labels[rows].tolist()


def test_pictures_to_adapt_to_are_moved_down_by_exactly_one_row():
    train = digits("adapt").train.inputs.view(-1, 8, 8)
    assert torch.equal(train[:, 0], torch.zeros(500, 8))
    assert train[:, 1].abs().sum() > 0
    assert 0 <= train.min() < train.max() == 1
    assert digits("pretrain").train.inputs.view(-1, 8, 8)[:, 0].abs().sum() > 0


def test_off_domain_digits_are_those_of_the_other_kind_and_not_trained_on(pictures):
    before, after = digits("pretrain"), digits("adapt")
    known = {tuple(picture) for picture in after.off_domain.inputs.tolist()}
    assert known <= pictures.keys()
    assert not known & {tuple(picture) for picture in before.train.inputs.tolist()}
    assert torch.equal(before.off_domain.inputs, after.validation.inputs)
    trained = {tuple(picture) for picture in after.train.inputs.tolist()}
    assert not trained & {tuple(picture) for picture in before.off_domain.inputs.tolist()}


def test_digits_are_split_by_seed_and_not_by_the_global_generator():
    torch.manual_seed(1)
    first = digits("adapt", seed=5).fingerprint
    torch.manual_seed(2)
    assert digits("adapt", seed=5).fingerprint == first
    assert digits("adapt", seed=6).fingerprint != first
    assert digits("pretrain", seed=5).fingerprint != first


def split_as_before(part, seed=0):
    """The task of 500 moved pictures, with the split that it has always had."""
    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    as_is = torch.tensor(data.images, dtype=torch.float32)[order] / 16  # (1797, 8, 8)
    moved = torch.cat([torch.zeros(1797, 1, 8), as_is[:, :-1]], dim=1)
    labels = torch.tensor(data.target)[order]

    def cut(pictures, first, last):
        return Examples(pictures[first:last].flatten(1), labels[first:last])

    if part == "pretrain":
        rows = {"train": (as_is, 0, 700), "validation": (as_is, 700, 800), "test": (as_is, 800, 900)}
        rows["off_domain"] = (moved, 1400, 1600)
    else:
        rows = {"train": (moved, 900, 1400), "validation": (moved, 1400, 1600), "test": (moved, 1600, 1797)}
        rows["off_domain"] = (as_is, 700, 800)
    return Task(f"digits-{part}", **{name: cut(*own) for name, own in rows.items()})


@pytest.mark.parametrize("part", ["pretrain", "adapt"])
def test_digits_are_split_as_before_unless_another_size_is_asked_for(part):
    for seed in (0, 3):
        assert digits(part, seed).fingerprint == split_as_before(part, seed).fingerprint
        assert digits(part, seed, n_train=500).fingerprint == split_as_before(part, seed).fingerprint
        assert digits(part, seed, n_train=501).fingerprint != split_as_before(part, seed).fingerprint
    assert split_as_before(part, 0).fingerprint != split_as_before(part, 3).fingerprint


@pytest.mark.parametrize(
    ("n_train", "as_is"),
    [(1, (1199, 100, 100)), (1000, (200, 100, 100)), (1024, (188, 94, 94)), (1200, (100, 50, 50))],
)
def test_more_digits_to_train_on_leave_fewer_as_they_are_and_no_picture_is_in_two_parts(pictures, n_train, as_is):
    before, after = digits("pretrain", n_train=n_train), digits("adapt", n_train=n_train)
    cut = {picture[:56]: i for picture, i in pictures.items()}
    labels = load_digits().target
    places = [[pictures[tuple(row)] for row in before.parts[part].inputs.tolist()] for part in PARTS[:3]]
    places += [[cut[row] for row in upright(after.parts[part].inputs)] for part in PARTS[:3]]
    assert [len(part) for part in places] == [*as_is, n_train, 200, 197]
    assert sorted(place for part in places for place in part) == list(range(1797))
    for rows, examples in zip(places, [*before.parts.values()][:3] + [*after.parts.values()][:3], strict=True):
        assert examples.targets.tolist() == labels[rows].tolist()
    assert torch.equal(after.off_domain.inputs, before.validation.inputs)
    assert torch.equal(before.off_domain.inputs, after.validation.inputs)
    assert not after.train.inputs[:, :8].any()
    assert after.train.inputs[:, 8:].any()


@pytest.mark.parametrize("n_train", [0, -3, 1201])
@pytest.mark.parametrize("part", ["pretrain", "adapt"])
def test_digits_say_how_many_can_be_trained_on(part, n_train):
    with pytest.raises(ValueError, match=f"n_train is {n_train}, but it must be from 1 to 1,200"):
        digits(part, n_train=n_train)
    assert len(digits("adapt", n_train=1200).train) == 1200


def test_digits_say_which_parts_there_are():
    with pytest.raises(ValueError, match="part is 'train', but it must be 'pretrain'"):
        digits("train")


# planted


def one_layer():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 12))


def least_squares(examples):
    """The weight (12, 20) and bias (12,) that explain the answers best, and what they leave unexplained."""
    inputs = F.pad(examples.inputs.double(), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(inputs, examples.targets.double()).solution
    return solution[:-1].T, solution[-1], examples.targets.double() - inputs @ solution


@pytest.mark.parametrize("rank", [1, 4])
def test_the_hidden_update_has_exactly_the_rank_and_the_size_of_the_weight(rank):
    model = one_layer()
    task = planted(model, rank=rank, noise=0.1)
    weight, bias, rest = least_squares(task.validation)
    sizes = torch.linalg.svdvals(weight - model[0].weight.detach().double())
    assert sizes[rank - 1] > 0.05 * sizes[0]
    assert sizes[rank:].max() < 1e-5 * sizes[0]
    assert float(sizes.norm()) == pytest.approx(float(model[0].weight.detach().norm()), rel=1e-4)
    torch.testing.assert_close(bias, model[0].bias.double(), rtol=0, atol=1e-5)
    assert rest.abs().max() < 1e-4


def test_noise_is_in_the_training_answers_only():
    model = one_layer()
    task, clean = planted(model, rank=2, noise=0.3), planted(model, rank=2, noise=0.0)
    for part in PARTS[1:]:
        assert torch.equal(task.parts[part].targets, clean.parts[part].targets)
    assert torch.equal(task.train.inputs, clean.train.inputs)
    noise = task.train.targets - clean.train.targets
    everything = torch.cat([clean.parts[part].targets for part in PARTS[:3]])
    assert float(noise.std()) == pytest.approx(0.3 * float(everything.std()), rel=0.05)
    assert abs(float(noise.mean())) < 0.02 * float(everything.std())
    assert least_squares(clean.train)[2].abs().max() < 1e-4
    assert least_squares(task.train)[2].std() > 0.2 * float(everything.std())


def test_off_domain_answers_are_the_models_own_three_times_as_far_out():
    model = one_layer()
    task = planted(model, rank=2)
    with torch.no_grad():
        assert torch.equal(task.off_domain.targets, model(task.off_domain.inputs))
        assert not torch.allclose(task.validation.targets, model(task.validation.inputs), atol=0.1)
    assert float(task.off_domain.inputs.std()) == pytest.approx(3.0, rel=0.05)
    assert float(task.train.inputs.std()) == pytest.approx(1.0, rel=0.05)


def test_parts_of_planted_share_no_input():
    task = planted(one_layer(), n_train=40)
    assert [len(part) for part in task.parts.values()] == [40, 256, 256, 256]
    rows = [tuple(row) for part in task.parts.values() for row in part.inputs.tolist()]
    assert len(set(rows)) == len(rows)


def test_planted_touches_the_target_layers_only_and_leaves_the_model_alone():
    model = DigitsMLP(width=16).train()
    before = copy.deepcopy(model.state_dict())
    task = planted(model, rank=3, noise=0.0, targets=["head"])
    assert model.training is True
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = task.validation.inputs
    with torch.no_grad():
        hidden = F.relu(model.hidden2(F.relu(model.hidden1(inputs))))
        assert not torch.allclose(model(inputs), task.validation.targets, atol=1e-2)
    assert least_squares(Examples(hidden, task.validation.targets))[2].abs().max() < 1e-4
    everywhere = planted(model, rank=3, noise=0.0)
    assert least_squares(Examples(hidden, everywhere.validation.targets))[2].abs().max() > 1e-2


def test_planted_repeats_by_seed_and_leaves_the_global_generator_alone():
    model = one_layer()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = planted(model, seed=4).fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert planted(model, seed=4).fingerprint == first
    assert planted(model, seed=5).fingerprint != first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"noise": -0.1}, "noise is -0.1"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ["head"]}, "'head' matches no module"),
        ({"n_train": 0}, "The train part of task 'planted-rank4' is empty"),
    ],
)
def test_planted_says_what_is_wrong(options, says):
    with pytest.raises(ValueError, match=says):
        planted(one_layer(), **options)


def test_answers_of_planted_carry_no_graph():
    task = planted(one_layer())
    assert not any(part.targets.requires_grad for part in task.parts.values())


# Losses that are no plain function


def focal(model, inputs, targets, gamma=0.0, weights=None):
    losses = F.cross_entropy(model(inputs), targets, reduction="none", weight=weights)  # (batch,)
    return (losses * (1 - (-losses).exp()) ** gamma).mean()  # ()


@dataclasses.dataclass
class Focal:
    """It can be called, compares by its field, and so cannot be hashed."""

    gamma: float

    def __call__(self, model, inputs, targets):
        return focal(model, inputs, targets, self.gamma)


class Held:
    """It says nothing of what it holds."""

    def __init__(self, gamma):
        self.gamma = gamma

    def __call__(self, model, inputs, targets):
        return focal(model, inputs, targets, self.gamma)


UNUSUAL = {
    "partial": functools.partial(focal, gamma=2.0),
    "partial of a partial": functools.partial(functools.partial(focal), weights=torch.ones(10)),
    "lambda": lambda model, inputs, targets: focal(model, inputs, targets, 2.0),
    "dataclass": Focal(2.0),
    "object": Held(2.0),
    "method": Held(2.0).__call__,
}
LETTERS = functools.partial(focal, weights=set("abcdefgh"))
EACH = pytest.mark.parametrize("loss", UNUSUAL.values(), ids=UNUSUAL)


def test_fingerprints_are_those_that_stored_runs_carry():
    # Written out, so that no change of the code can make the results of older folders strangers unnoticed.
    halves = {name: Examples(part.inputs.bfloat16(), part.targets) for name, part in tiny().parts.items()}
    found = {
        "cross_entropy": tiny(),
        "mean_squared_error": tiny(loss=mean_squared_error),
        "other_loss": tiny(loss=other_loss),
        "lambda": tiny(loss=lambda model, inputs, targets: model(inputs).sum()),
        "bfloat16": Task("half", **halves),
    }
    assert {what: task.fingerprint for what, task in found.items()} == {
        "cross_entropy": "96d5469ed1bc10ae",
        "mean_squared_error": "e30365c45710cd68",
        "other_loss": "390607d40681d1fb",
        "lambda": "c49a08b970177b4f",
        "bfloat16": "060343cc71b0c078",
    }


def test_a_partials_arguments_are_part_of_the_fingerprint():
    long = torch.zeros(5000)  # torch prints only the ends of it
    longer = long.clone()
    longer[2500] = 1
    losses = [
        focal,
        functools.partial(focal),
        functools.partial(other_loss),
        functools.partial(focal, gamma=1.0),
        functools.partial(focal, gamma=2.0),
        functools.partial(focal, weights=long),
        functools.partial(focal, weights=longer),
        functools.partial(focal, weights=[long]),
        functools.partial(focal, weights={"a": longer}),
        functools.partial(focal, weights=long.numpy()),
        functools.partial(focal, weights=longer.numpy()),
        functools.partial(focal, weights=focal),
        functools.partial(focal, weights=Held(1.0)),
        functools.partial(focal, weights=Focal(1.0)),
        functools.partial(focal, weights=Focal(2.0)),
        Focal(1.0),
        Focal(2.0),
        Held(1.0),
    ]
    assert len({tiny(loss=loss).fingerprint for loss in losses}) == len(losses)
    one, other = functools.partial(focal, gamma=1, weights=None), functools.partial(focal, weights=None, gamma=1)
    assert tiny(loss=one).fingerprint == tiny(loss=other).fingerprint


def test_what_a_plain_object_holds_and_what_a_lambda_does_are_no_part_of_it():
    def lambdas():
        return [lambda model, inputs, targets: model(inputs).sum(), lambda model, inputs, targets: model(inputs).mean()]

    for one, other in (lambdas(), (Held(1.0), Held(2.0))):
        assert tiny(loss=one).fingerprint == tiny(loss=other).fingerprint


def test_the_fingerprint_of_an_unusual_loss_is_the_same_in_another_process():
    # Addresses and the order of sets differ between processes.
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.tasks.test_tasks import *\n"
        "print(*(tiny(loss=loss).fingerprint for loss in [*UNUSUAL.values(), LETTERS]))"
    )
    done = run_python(script, ROOT)
    assert done.stdout.split() == [tiny(loss=loss).fingerprint for loss in [*UNUSUAL.values(), LETTERS]]


def test_a_description_has_neither_addresses_nor_modules_in_it():
    assert described(Held(1.0)) == "Held"  # a script's module has another name where it is imported
    assert described(Focal(focal)) == "Focal(gamma=<function focal>)"
    assert described(functools.partial(focal, gamma=[1, functools])) == "partial([focal], {'gamma': [1, functools]})"


def classes():
    """Pictures of noise in ten classes, for the digits' net."""

    def part(n, seed):
        generator = torch.Generator().manual_seed(seed)
        return Examples(torch.randn(n, 64, generator=generator), torch.randint(0, 10, (n,), generator=generator))

    return Task("noise", *(part(8, seed) for seed in range(4)))


@EACH
def test_any_callable_trains_as_a_loss(loss, tmp_path):
    def run(loss, **options):
        model = DigitsMLP(width=8)
        data = dataclasses.replace(classes(), loss=loss)
        return model, fit(model, data, LoRA(rank=2), steps=3, lr=0.05, batch_size=4, **options)

    def plain(model, inputs, targets):  # the same in a function
        return loss(model, inputs, targets)

    (model, history), (twin, expected) = run(loss, checkpoint_dir=tmp_path), run(plain)
    assert history.curve("train_loss") == expected.curve("train_loss")
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    assert run(loss, checkpoint_dir=tmp_path)[1] == history  # it knows its checkpoint again
    assert f"fingerprint {history.task['fingerprint']}" in dataclasses.replace(classes(), loss=loss).describe()


@EACH
def test_any_callable_serves_where_memory_and_time_are_asked_for(loss):
    model, batch = DigitsMLP(width=8), (classes().train.inputs, classes().train.targets)
    bill = memory.predict(model, LoRA(rank=2), batch=batch, loss=loss)
    assert bill.peak_bytes > sum(p.numel() * p.element_size() for p in model.parameters())
    assert memory.measure(model, LoRA(rank=2), batch=batch, loss=loss).peak_bytes > 0
    times = speed.step_time(model, {"lora": LoRA(rank=2)}, batch=batch, loss=loss, rounds=3, progress=False)
    assert times.median_s("lora") > 0
