"""Several examples in one row: the same losses and gradients as in rows of their own, on our Llama and on others."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab import FullFineTuning, Lean, Llama, LoRA, LoRAConfig, evaluate, fit, inject
from lora_lab.ablation import Trial, ablate
from lora_lab.costs.memory import predict
from lora_lab.tasks import IGNORE, Examples, Pair, PairTask, digits, docs, from_pairs, share_rows
from lora_lab.tasks.generate import answers
from lora_lab.tasks.instruction import Padded, row_cross_entropy
from tests.helpers import ByteTokenizer, randomise, randomise_all, snapshot
from tests.tiny_models import bert, falcon, fresh, gemma3, gpt2, llama, qwen3, t5

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 40  # of the small models of transformers
LENGTHS = {
    "train": [5, 12, 3, 9, 1, 7, 7, 10, 2, 4],
    "validation": [6, 11, 2, 8],
    "test": [4, 9, 3],
    "off_domain": [8, 8, 8, 8, 8],
}
FAMILIES = {"Llama": llama, "Qwen3": qwen3, "Gemma 3": gemma3, "GPT-2": gpt2}


def numbers(part):
    """Rows of tokens of those lengths, of which about the last half counts."""
    generator = torch.Generator().manual_seed(len(part))
    longest = max(LENGTHS[part])
    inputs = torch.randint(3, VOCABULARY, (len(LENGTHS[part]), longest), generator=generator)
    targets = torch.full_like(inputs, IGNORE)
    for row, length in enumerate(LENGTHS[part]):
        targets[row, length // 2 : length] = torch.randint(3, VOCABULARY, (length - length // 2,), generator=generator)
        inputs[row, length:] = 0
    return Examples(inputs, targets) if part == "off_domain" else Padded(inputs, targets)


def unshared():
    """A task of numbers, whose texts do not matter."""
    parts = {part: numbers(part) for part in LENGTHS}
    return PairTask("numbers", **parts, unit="tokens", pairs={}, tokenizer=None)


def unequal(count=60):
    """Questions and answers of very different lengths."""
    return [Pair(f"{'very ' * (i % 7)}{i}?", "yes" * (1 + i % 5)) for i in range(count)]


def tokens_of(rows):
    """The (token, target) sequences of the examples in rows, as a list of lists, sorted."""
    sequences = []
    for (ids, positions), targets in zip(rows.inputs.tolist(), rows.targets.tolist(), strict=True):
        for token, position, target in zip(ids, positions, targets, strict=True):
            if position == 0:
                sequences.append([])
            assert position == len(sequences[-1])
            sequences[-1].append((token, target))
    return sorted(sequence for sequence in sequences if any(target != IGNORE for _, target in sequence))


# What is in a row


@pytest.mark.parametrize("length", [12, 13, 20, 500])
def test_every_example_is_in_one_row_and_no_row_is_too_long(length):
    task = share_rows(unshared(), length)
    for part, rows in task.parts.items():
        examples = numbers(part)
        expected = sorted(
            list(zip(ids[:n], targets[:n], strict=True))
            for ids, targets, n in zip(examples.inputs.tolist(), examples.targets.tolist(), LENGTHS[part], strict=True)
        )
        assert tokens_of(rows) == expected
        assert rows.inputs.shape == (len(rows), 2, rows.targets.shape[1])
        assert rows.targets.shape[1] <= length
        assert len(rows) >= sum(LENGTHS[part]) / length
        assert task.count_targets(rows) == unshared().count_targets(examples)
    assert (len(task.train) == 1) is (length == 500)
    assert len(task.train) < len(unshared().train)


def test_rows_are_filled_well_and_cut_to_the_longest_of_a_batch():
    task = share_rows(unshared(), 20)
    lengths = [int(row.nonzero()[-1]) + 1 for row in task.train.targets != IGNORE]
    assert sorted(lengths) == sorted([12 + 7 + 1, 10 + 9, 7 + 5 + 4 + 3, 2])  # the best fit, by hand
    for row, length in enumerate(lengths):
        taken = task.train[row : row + 1]
        assert taken.inputs.shape == (1, 2, length)
        assert taken.targets.shape == (1, length)


def test_the_same_task_has_the_same_rows_and_a_fingerprint_of_its_own():
    task, again, other = share_rows(unshared(), 20), share_rows(unshared(), 20), share_rows(unshared(), 25)
    assert task.fingerprint == again.fingerprint
    assert len({task.fingerprint, other.fingerprint, unshared().fingerprint}) == 3


# Losses and gradients


def by_hand(model, examples):
    """The mean loss over the targets, of one example at a time without any padding, in plain torch."""
    total, count = 0.0, 0
    for ids, targets in zip(examples.inputs, examples.targets, strict=True):
        length = int((targets != IGNORE).nonzero()[-1]) + 1
        output = model(ids[None, :length])
        output = getattr(output, "logits", output)
        total = total + F.cross_entropy(output[0], targets[:length], ignore_index=IGNORE, reduction="sum")
        count += int((targets != IGNORE).sum())
    return total / count


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_rows_equal_separate_examples(model, tolerance, **unmasked):
    """The loss and all gradients are equal up to rounding; without the mask between examples they are others.

    ``unmasked`` are the arguments with which a call of the model lets examples attend to those before them.
    """
    task = share_rows(unshared(), 30)
    rows = task.train
    assert 1 < len(rows) < len(unshared().train)
    loss, expected = row_cross_entropy(model, rows.inputs, rows.targets), by_hand(model, unshared().train)
    gradients, others = gradients_of(model, loss), gradients_of(model, expected)
    assert abs(loss.item() - expected.item()) < tolerance <= 1e-6
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=0, atol=tolerance)
    assert max(float(gradient.abs().max()) for gradient in others.values()) > 1e-2
    mixed = model(rows.inputs[:, 0], **unmasked)
    mixed = F.cross_entropy(getattr(mixed, "logits", mixed).flatten(0, 1), rows.targets.flatten(), ignore_index=IGNORE)
    assert abs(mixed.item() - expected.item()) > 1e-4
    assert max(float((g - others[name]).abs().max()) for name, g in gradients_of(model, mixed).items()) > 1e-3


def ours(config, adapters=False):
    config = dataclasses.replace(config, vocab_size=VOCABULARY)
    model = randomise_all(Llama(config), seed=2, size=0.3).double()
    if adapters:
        inject(model, LoRAConfig(4, 8))
        randomise(model)
    return model


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_on_our_llama_rows_have_the_losses_and_gradients_of_separate_examples(tiny_config, adapters):
    assert_rows_equal_separate_examples(ours(tiny_config, adapters), 1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_on_models_of_transformers_too(make, attention):
    model = fresh(make, torch.float64)
    model.set_attn_implementation(attention)
    assert_rows_equal_separate_examples(model, 1e-6, **without_mask())  # eager attention rounds to float32


def without_mask():
    """The positions of the examples, with a mask of ones, for which transformers does not look for examples."""
    inputs = share_rows(unshared(), 30).train.inputs
    return {"position_ids": inputs[:, 1], "attention_mask": torch.ones_like(inputs[:, 1])}


def test_a_peft_model_is_asked_for_what_it_wraps_takes():
    import peft

    model = peft.get_peft_model(fresh(llama, torch.float64), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert_rows_equal_separate_examples(randomise(model), 1e-12, **without_mask())


def test_what_another_example_of_the_row_holds_changes_no_logit(tiny_config):
    model, task = ours(tiny_config), share_rows(unshared(), 30)
    ids, positions = task.train[:1].inputs.unbind(1)
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    changed = ids.clone()
    changed[:, : starts[1]] = (changed[:, : starts[1]] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = (model(each, position_ids=positions)[0] for each in (ids, changed))
        mixed, others = (model(each)[0] for each in (ids, changed))
    assert torch.equal(before[starts[1] :], after[starts[1] :])
    assert not torch.allclose(before[: starts[1]], after[: starts[1]])
    assert (mixed[starts[1] :] - others[starts[1] :]).abs().max() > 1e-3


# In a run


def run(config, task, rows=False, **options):
    model = ours(config)
    options = {"steps": 5, "lr": 0.02, "batch_size": 10, "eval_every": 2} | options
    return model, fit(model, share_rows(task, 500) if rows else task, LoRA(4, 8), **options)


@pytest.mark.parametrize("lean", [None, Lean(), Lean(checkpoint=True)], ids=["plain", "lean", "lean, checkpointed"])
def test_a_run_on_whole_epochs_in_one_row_is_the_one_on_separate_examples(tiny_config, lean):
    model, history = run(tiny_config, unshared())
    twin, again = run(tiny_config, unshared(), rows=True, batch_size=1, lean=lean)
    for name in ("train_loss", "grad_norm", "validation_loss", "off_domain_loss", "tokens"):
        assert again.curve(name)[1] == pytest.approx(history.curve(name)[1], rel=1e-9)
        assert len(set(history.curve(name)[1])) > 1 or name == "tokens"
    for part in unshared().parts:
        expected = evaluate(model, unshared(), part)
        assert evaluate(twin, share_rows(unshared(), 25), part, batch_size=2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"gradient_checkpointing": True}, {"lean": Lean(threads=2)}])
def test_rows_go_with_every_other_step(tiny_config, options):
    task = share_rows(unshared(), 14)
    assert len(task.train) >= 3
    histories = [run(tiny_config, task, batch_size=3, **each)[1] for each in ({}, options)]
    for name in ("train_loss", "grad_norm", "validation_loss"):
        assert histories[0].curve(name)[1] == pytest.approx(histories[1].curve(name)[1], rel=1e-9)


def test_a_run_on_rows_resumes_bit_for_bit(tiny_config, tmp_path):
    task = share_rows(unshared(), 14)
    whole, history = run(tiny_config, task, batch_size=2)

    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_config, task, batch_size=2, checkpoint_dir=tmp_path, checkpoint_every=2, on_row=stop)
    model, resumed = run(tiny_config, task, batch_size=2, checkpoint_dir=tmp_path)
    assert resumed.curve("train_loss") == history.curve("train_loss")
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))


def test_a_sweep_runs_trials_on_rows_one_by_one(tiny_config):
    task, trials = share_rows(unshared(), 20), [Trial(LoRA(rank), 0.01, steps=2, batch_size=2) for rank in (1, 2)]
    frame = ablate(ours(tiny_config), task, trials, progress=False)
    assert set(frame["engine"]) == {"separate"}
    with pytest.raises(ValueError, match="'row_cross_entropy' cannot be computed for each trial of a pack"):
        ablate(ours(tiny_config), task, trials, engine="packed", progress=False)


def test_the_memory_of_a_step_on_rows_is_predicted(tiny_config):
    peaks = []
    for length in (20, 60):
        rows = share_rows(unshared(), length)
        batch = rows.train.inputs[:2], rows.train.targets[:2]
        peaks.append(predict(ours(tiny_config), LoRA(2), batch=batch, loss=rows.loss).peak_bytes)
    assert 0 < peaks[0] < peaks[1]


# Texts


@pytest.fixture(scope="module")
def texts(chatter):
    return from_pairs(chatter, unequal())


def test_descriptions_previews_limits_and_answers_are_of_the_examples(texts, tiny_config):
    task = share_rows(texts, 300)
    lines = task.describe().splitlines()
    assert lines[: len(texts.describe().splitlines())] == texts.describe().splitlines()
    for part, rows in task.parts.items():
        tokens = sum(int(row.nonzero()[-1]) + 1 for row in texts.parts[part].targets != IGNORE)
        each, padding = len(texts.parts[part]) / len(rows), 1 - tokens / rows.targets.numel()
        assert f"  {part:<11}{len(rows):>6} rows of {each:.1f} examples, {padding:.1%} padding" in lines
    assert lines[-1] == f"  fingerprint {task.fingerprint}"
    *shown, last = task.preview(3).splitlines()
    assert shown == texts.preview(3).splitlines()
    assert last == f"in {len(task.train)} rows of up to 300 tokens, none of which attends to another example"
    few, expected = task.limited(7, seed=3), texts.limited(7, seed=3)
    assert few.pairs["train"] == expected.pairs["train"]
    assert few.fingerprint == share_rows(expected, 300).fingerprint
    model = Llama(tiny_config, seed=3)
    assert answers(model, task, limit=3) == answers(model, texts, limit=3)


# What is refused


REFUSED = [
    (lambda: share_rows(digits()), "'digits-adapt' is a Task"),
    (lambda: share_rows(docs(ByteTokenizer(), seq_len=64)), "'docs' is a Task"),
    (lambda: share_rows(share_rows(unshared())), "'numbers'"),
    (lambda: share_rows(dataclasses.replace(unshared(), loss=by_hand)), "'by_hand'"),
    (lambda: share_rows(unshared(), 11), "length is 11, .* 12 tokens"),
]


@pytest.mark.parametrize(("call", "named"), REFUSED)
def test_tasks_that_cannot_share_rows_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


class Leaky(nn.Module):
    """A causal model that takes positions and does not read them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, position_ids=None):
        return self.model(ids)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fresh(t5), "T5ForConditionalGeneration"),
        (Plain, "Plain"),
        (lambda: Leaky(fresh(llama)), "Leaky"),
        (lambda: Leaky(fresh(llama).bfloat16()), "Leaky"),
        (lambda: Bidirectional(), "Bidirectional"),
    ],
    ids=["encoder-decoder", "no positions", "positions not read", "in half precision", "looks ahead"],
)
def test_models_that_mix_the_examples_of_a_row_are_refused_and_left_alone(make, says):
    task, model = share_rows(unshared(), 30), make().train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"In a {says} the examples of a row would"):
        fit(model, task, FullFineTuning(), steps=1, lr=0.01)
    with pytest.raises(ValueError, match=f"In a {says} the examples of a row would"):
        evaluate(model, task)
    assert snapshot(model) == before


class Bidirectional(nn.Module):
    """BERT's encoder with a head: every token attends to every other."""

    def __init__(self):
        super().__init__()
        self.encoder = fresh(bert).bert
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, ids, position_ids=None):
        return self.head(self.encoder(ids, position_ids=position_ids).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [*FAMILIES.values(), falcon], ids=[*FAMILIES, "Falcon"])
def test_causal_models_are_accepted_in_any_precision(make, dtype):
    model = fresh(make, dtype)
    task = share_rows(unshared(), 30)
    task.check_model(model)
    expected = evaluate(copy.deepcopy(model).float(), unshared())
    assert evaluate(model, task, batch_size=2) == pytest.approx(expected, rel=0.05 if dtype == torch.bfloat16 else 1e-5)
