"""Models of transformers, trained and measured: against loops written by hand, peft, and torch's own counters."""

import copy
import math
import warnings
from collections import namedtuple

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.falcon.modeling_falcon import FalconLinear

import lora_lab as ll
from lora_lab import FullFineTuning, LoRA, evaluate, fit, inject, lora_layers, memory, merge, spectra
from lora_lab.ablation import Trial, ablate
from lora_lab.costs.cost_model import CostModel
from lora_lab.costs.flops import flops
from lora_lab.costs.timing import step_time
from lora_lab.inject import LoRAConfig
from lora_lab.methods import AsItIs
from lora_lab.task import logits
from lora_lab.tasks import IGNORE, Examples, Pair, Task, from_pairs, mean_squared_error
from lora_lab.tasks.generate import answers, log_likelihoods, reply
from lora_lab.variants import DoRA
from tests.helpers import enlarge, randomise_all
from tests.tiny_models import SHAPE, bert, falcon, fresh, gemma3, gpt2, llama, mamba, original, phi, qwen3

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_heap")

VOCABULARY, LENGTH, STEPS, BATCH, LR = 40, 8, 6, 4, 0.003
FAMILIES = {"Llama": llama, "Qwen3": qwen3, "Gemma 3": gemma3, "GPT-2": gpt2}
EVERY = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
AND_FALCON = pytest.mark.parametrize("make", [*FAMILIES.values(), falcon], ids=[*FAMILIES, "Falcon"])
METHODS = pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=4)], ids=["full", "LoRA"])


def rows(count, seed):
    """Tokens of which each is the one before plus one, and every third target not to be counted."""
    starts = torch.randint(3, VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(seed))
    tokens = 3 + (starts + torch.arange(LENGTH + 1)) % (VOCABULARY - 3)
    targets = tokens[:, 1:].clone()
    targets[:, ::3] = IGNORE
    return Examples(tokens[:, :-1].contiguous(), targets)


def linear_layers(make):
    """The names of all layers that multiply by a matrix, but the head."""
    model = original(make)
    kinds, head = (nn.Linear, hf.pytorch_utils.Conv1D), model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]


TASK = Task("counting", rows(STEPS * BATCH, 0), rows(8, 1), rows(10, 2), rows(8, 3), unit="tokens")
ONE = TASK.train.inputs[:BATCH], TASK.train.targets[:BATCH]


def by_hand(model, examples):
    """The loss as one writes it with transformers alone: its own defaults, and torch's mean."""
    found = model(input_ids=examples.inputs).logits.float()
    return F.cross_entropy(found.transpose(1, 2), examples.targets)


def run(model, method, **options):
    return fit(model, TASK, method, steps=STEPS, lr=LR, batch_size=BATCH, seed=5, schedule="constant", **options)


def trained(make, method, **options):
    """A model after a run, and its training losses."""
    model = fresh(make)
    history = run(model, method, **options)
    return model, history.curve("train_loss")[1]


# fit and evaluate


@pytest.mark.slow
@AND_FALCON
@METHODS
def test_losses_are_those_of_a_loop_written_by_hand_and_fall(make, method):
    theirs = fresh(make)
    if method.name == "lora":
        inject(theirs, method, seed=5)
    theirs.train()
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    expected = []
    for batch in torch.randperm(len(TASK.train), generator=torch.Generator().manual_seed(5)).view(STEPS, BATCH):
        loss = by_hand(theirs, TASK.train[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        expected.append(loss.item())
    model = fresh(make)
    history = run(model, method, warmup=0)
    assert history.curve("train_loss")[1] == pytest.approx(expected, abs=1e-6, rel=1e-6)
    first, *_, last = history.curve("validation_loss")[1]
    assert last < first - 0.01
    with torch.no_grad():
        assert last == pytest.approx(float(by_hand(theirs.eval(), TASK.validation)), rel=1e-5)
    assert not model.training


@EVERY
def test_evaluation_is_the_mean_over_the_counted_targets(make):
    model = fresh(make)
    with torch.no_grad():
        expected = float(by_hand(model, TASK.test))
    assert evaluate(model, TASK, "test", batch_size=3) == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, TASK, "test", limit=3) != pytest.approx(expected, rel=1e-5)


@EVERY
def test_an_object_a_tuple_and_a_tensor_are_read_alike(make):
    model = fresh(make)
    with torch.no_grad():
        expected = model(ONE[0]).logits
        for wrapped in (model, lambda inputs: model(inputs).to_tuple(), lambda inputs: model(inputs).logits):
            assert torch.equal(logits(wrapped, ONE[0]), expected)
        assert len(model(ONE[0]).to_tuple()) > 1


def test_a_traced_module_and_a_tuple_with_named_entries_are_read_too():
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    Named = namedtuple("Named", ["loss", "logits"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        assert torch.equal(logits(torch.jit.trace(layer, x), x), layer(x))
        assert torch.equal(logits(lambda inputs: Named(inputs.sum(), layer(inputs)), x), layer(x))


def test_a_model_without_a_head_is_refused_in_one_sentence():
    with pytest.raises(TypeError, match=r"^A LlamaModel returned a BaseModelOutputWithPast"):
        evaluate(fresh(llama).model, TASK)


def test_a_regression_is_read_too():
    config = hf.BertConfig(**SHAPE, num_labels=1)
    model = hf.BertForSequenceClassification(config).eval()
    part = Examples(TASK.test.inputs, torch.linspace(-1, 1, len(TASK.test))[:, None])
    task = Task("sizes", part, part, part, part, loss=mean_squared_error)
    with torch.no_grad():
        expected = float((model(part.inputs).logits - part.targets).square().mean())
    assert evaluate(model, task) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in peft"])
def test_no_cache_is_built_and_the_models_setting_stays(wrapped, monkeypatch):
    grown = []
    plain = hf.DynamicCache.update
    monkeypatch.setattr(hf.DynamicCache, "update", lambda *args, **more: grown.append(args[0]) or plain(*args, **more))
    model, method = fresh(llama), LoRA(rank=4)
    if wrapped:
        model, method = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])), AsItIs()
    memory.measure(model, method, ONE)
    memory.predict(model, method, batch=ONE)
    run(model, method)
    evaluate(model, TASK)
    assert grown == []
    assert model.config.use_cache is True
    model(ONE[0])
    assert len(grown) == 2  # by itself it fills one in each of its two layers


class Caching(nn.Module):
    def forward(self, x, use_cache=True):
        return x + 1 if use_cache else x


def test_a_compiled_model_is_told_to_build_no_cache_too():
    assert logits(Caching(), torch.zeros(2)).tolist() == [0, 0]
    assert logits(torch.compile(Caching(), backend="eager"), torch.zeros(2)).tolist() == [0, 0]


# Bytes, products and seconds


CHECKPOINTING, HALF = {"gradient_checkpointing": True}, {"dtype": torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "method", "options"),
    [
        *((make, method, {}) for make in FAMILIES.values() for method in (FullFineTuning(), LoRA(rank=4))),
        (falcon, LoRA(rank=4), {}),
        (llama, LoRA(rank=4), CHECKPOINTING),
        (gpt2, FullFineTuning(), CHECKPOINTING),
        (qwen3, LoRA(rank=4), HALF),
    ],
)
def test_the_predicted_bill_is_the_measured_one(make, method, options):
    batch = tuple(part.repeat(4, 2) for part in ONE)
    predicted = memory.predict(original(make), method, batch=batch, **options)
    measured = memory.measure(original(make), method, batch, **options)
    assert predicted.parts == {part: size for part, size in measured.parts.items() if part != memory.Part.REST}
    assert predicted.moment == measured.moment
    # Each of two checkpoints keeps the random generator's state, which no operation makes: a fixed number of bytes.
    fixed = 2 * torch.get_rng_state().nbytes if options is CHECKPOINTING else 0
    assert measured.peak_bytes - fixed == pytest.approx(predicted.peak_bytes, rel=1e-3)


def test_the_largest_batch_fits_and_one_more_does_not():
    budget = memory.predict(original(llama), LoRA(rank=4), 3, LENGTH).peak_bytes + 100
    size, bill = memory.largest(original(llama), LoRA(rank=4), budget, seq_len=LENGTH)
    assert (size, bill.peak_bytes) == (3, budget - 100)


@pytest.mark.slow
@AND_FALCON
@METHODS
def test_flops_are_those_that_torch_counts_in_a_real_step(make, method):
    model = fresh(make)
    if method.name == "lora":
        inject(model, method)
    model.train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        by_hand(model, Examples(*ONE)).backward()
    found = flops(original(make), method, BATCH, LENGTH)
    assert found.total == counter.get_total_flops() > 0
    assert found.part("attention") > 0
    assert found.part("head") > 0


@pytest.mark.parametrize("make", [qwen3, gpt2])
def test_steps_are_timed_and_priced(make):
    ways = {"full": FullFineTuning(), "LoRA": LoRA(rank=4)}
    times = step_time(original(make), ways, BATCH, LENGTH, rounds=1, progress=False)
    assert all(times.median_s(name) > 0 for name in ways)
    assert times.tokens == BATCH * LENGTH
    price = CostModel(lambda _: 1e-6, {"forward": (0.0, 1e-6), "backward": (0.0, 1e-6)})
    predicted = price.predict(original(make), ways, BATCH, LENGTH)
    assert predicted.ratio("LoRA") > 1  # where all operations cost the same, it has more of them
    assert predicted.seconds["LoRA"]["adapters"] > 0


# Ablations


@pytest.mark.parametrize("make", [llama, gemma3, gpt2])
def test_two_ranks_are_packed_where_they_can_be_and_end_as_fit_does(make):
    options = {"lr": LR, "steps": 4, "batch_size": BATCH, "eval_every": 2}
    table = ablate(original(make), TASK, [Trial(LoRA(rank), **options) for rank in (2, 4)], progress=False)
    assert set(table["engine"]) == ({"separate"} if make is gpt2 else {"pack of 2"})
    for rank, own in table.groupby("rank"):
        model = fresh(make)
        history = fit(model, TASK, LoRA(int(rank)), **options)
        steps, losses = history.curve("validation_loss")
        assert own["step"].tolist() == steps
        assert own["validation_loss"].tolist() == pytest.approx(losses, rel=1e-5)
        assert own["test_loss"].tolist()[-1] == pytest.approx(evaluate(model, TASK, "test"), rel=1e-5)


# What comes of it


@AND_FALCON
def test_peft_reads_what_was_trained_and_merging_keeps_it(make, tmp_path):
    model, _ = trained(make, LoRA(rank=4))
    ll.save_adapter(model, tmp_path)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(fresh(make), tmp_path).eval()
        expected = theirs(ONE[0]).logits
        torch.testing.assert_close(model(ONE[0]).logits, expected, rtol=1e-5, atol=1e-5)
        assert (expected - original(make)(ONE[0]).logits).abs().max() > 0.01
        assert merge(model) == linear_layers(make)
        torch.testing.assert_close(model(ONE[0]).logits, expected, rtol=1e-5, atol=1e-5)
    kinds = {name: type(module) for name, module in original(make).named_modules()}
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_an_adapter_fits_its_classifier_if_the_model_was_saved_with_its_new_head(tmp_path):
    """The recipe of docs/programs.md."""
    parts = [Examples(rows(16, seed).inputs, torch.arange(16) % 2) for seed in range(4)]
    task = Task("classes", *parts)
    fresh(bert).save_pretrained(tmp_path / "with head")
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path / "with head")
    fit(model, task, LoRA(rank=4), steps=STEPS, lr=LR, batch_size=BATCH)
    assert "classifier" in lora_layers(model)
    ll.save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "with head"))
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path / "with head")
    ll.load_adapter(again, tmp_path / "adapter")
    assert evaluate(again, task) == evaluate(model, task)
    merge(model)
    model.save_pretrained(tmp_path / "tuned")
    whole = hf.BertForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert evaluate(whole, task) == pytest.approx(evaluate(again, task), rel=1e-5)


@EVERY
@METHODS
def test_a_model_in_bfloat16_trains_and_a_tied_head_stays_tied(make, method):
    model = fresh(make, torch.bfloat16)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is (make in (qwen3, gemma3))
    losses = run(model, method).curve("validation_loss")[1]
    assert losses[-1] < losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    kept = {torch.bfloat16, torch.float32} if method.name == "lora" else {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == kept
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied


@EVERY
def test_checkpointing_gives_the_same_losses_and_no_warning(make):
    model, on = fresh(make), []

    def note(row):
        on.append(any(getattr(module, "gradient_checkpointing", False) for module in model.modules()))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = run(model, LoRA(rank=4), gradient_checkpointing=True, on_row=note).curve("train_loss")[1]
    note(None)
    assert on == [True] * (STEPS + 1) + [False]  # and off again
    assert losses == pytest.approx(trained(make, LoRA(rank=4))[1], rel=1e-6)


@EVERY
def test_what_was_trained_is_diagnosed_and_its_spectra_reported(make):
    model, _ = trained(make, LoRA(rank=4))
    found = ll.diagnose(model, base=original(make))
    assert found.ok
    assert [finding.status for finding in found.findings if finding.check in ("update", "base")] == ["ok", "ok"]
    table = spectra.report(None, model)
    assert table["layer"].tolist() == list(lora_layers(model))
    assert table["norm"].tolist() == pytest.approx([float(x.delta().norm()) for x in lora_layers(model).values()])


@AND_FALCON
def test_extracted_adapters_of_a_change_of_rank_two_give_the_tuned_model(make):
    tuned, generator = fresh(make), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in linear_layers(make):
            weight = tuned.get_submodule(name).weight
            left, right = (torch.randn(size, 2, generator=generator) for size in weight.shape)
            weight += 0.1 * left @ right.T
        cut = fresh(make)
        errors = ll.extract(cut, tuned, 2)
        expected = tuned(ONE[0]).logits
        assert (cut(ONE[0]).logits - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (original(make)(ONE[0]).logits - expected).abs().max() > 0.1
    assert max(errors.values()) < 1e-5


# What they answer


def speaking(make):
    """A model of that family with room for the tiny tokenizer's texts, and logits that are far apart."""
    config = copy.deepcopy(original(make).config)
    config.update({"vocab_size": 260, "max_position_embeddings": 128, "eos_token_id": 259, "pad_token_id": 0})
    return enlarge(randomise_all(type(original(make))(config).eval(), seed=2), 3)


@pytest.fixture
def plain(tiny_tokenizer):
    """The tiny tokenizer with a chat template that adds nothing to the texts."""
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


SPEAKERS = pytest.mark.parametrize("make", [llama, gpt2, gemma3, phi, mamba])


@pytest.mark.slow
@SPEAKERS
@torch.no_grad()
def test_answers_are_those_of_transformers_own_generate_with_padding_on_the_left(make, plain):
    model = speaking(make)
    task = from_pairs(plain, [Pair("x" * (5 * i % 14) + chr(97 + i), "abc") for i in range(12)])
    prompts = [task.prompt_ids(pair) for pair in task.pairs["train"]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 259, "pad_token_id": 259}
    expected = [
        plain.decode([token for token in row if token != 259]).strip()
        for row in model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()
    ]
    assert answers(model, task, "train", max_new_tokens=8, batch_size=len(prompts)) == expected
    assert answers(model, task, "train", max_new_tokens=8, batch_size=2) == expected
    assert [reply(model, plain, pair.prompt, max_new_tokens=8) for pair in task.pairs["train"]] == expected
    assert len(set(expected)) > 1
    unmasked = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, longest:]
    assert [plain.decode(row).strip() for row in unmasked.tolist()] != expected


@SPEAKERS
def test_each_token_is_read_once_where_there_is_a_cache_of_keys_and_values(make, plain):
    model, lengths = speaking(make), []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    assert reply(model, plain, "abcd", max_new_tokens=4)
    assert lengths == ([4, 5, 6, 7] if make is mamba else [4, 1, 1, 1])


@pytest.mark.slow
@SPEAKERS
@torch.no_grad()
def test_a_class_is_chosen_by_the_log_likelihood_that_transformers_computes(make, plain):
    model, labels = speaking(make), [chr(97 + i) + chr(122 - i) for i in range(20)]
    pairs = [Pair("x" * (5 * i % 14) + chr(65 + i), labels[i % 20]) for i in range(30)]
    task = from_pairs(plain, pairs, metric="classification")
    expected = []
    for pair in task.pairs["train"]:
        scores = []
        for label in labels:
            prompt, answer = task.prompt_ids(pair), plain.encode(label)
            found = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(float(found[range(len(answer)), answer].sum()))
        expected.append(labels[scores.index(max(scores))])
    best = log_likelihoods(model, task, task.pairs["train"], labels, 7).argmax(1)
    assert [labels[i] for i in best] == expected
    assert len(set(expected)) > 1


# Falcon, whose linear layers derive from nn.Linear


def test_every_linear_layer_of_falcon_is_adapted_by_every_method_and_keeps_its_class():
    names = [name for name, module in original(falcon).named_modules() if isinstance(module, FalconLinear)]
    assert len(names) == 8
    for method in (LoRA(rank=4), DoRA(rank=4)):
        model, losses = trained(falcon, method)
        assert losses[-1] < losses[0]
        assert list(lora_layers(model)) == names
        before = [layer.base.weight.clone() for layer in lora_layers(model).values()]
        layers = list(lora_layers(model).values())
        merge(model)
        assert all(type(model.get_submodule(name)) is FalconLinear for name in names)
        assert all(map(torch.equal, before, [layer.base.weight for layer in layers]))
        assert not any(torch.equal(model.get_submodule(n).weight, w) for n, w in zip(names, before, strict=True))
        own = [p for name in names for p in model.get_submodule(name).parameters()]
        assert not any(p.requires_grad for p in own)
        assert len(own) == 16  # biases too


def test_in_bfloat16_a_merged_layer_of_falcon_rounds_as_falcon_does():
    layer = FalconLinear(64, 48, dtype=torch.bfloat16)
    plain = nn.Linear(64, 48, dtype=torch.bfloat16)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = nn.Sequential(copy.deepcopy(layer))
    inject(model, LoRAConfig(rank=2))
    merge(model)  # B is zero still
    assert torch.equal(model(x), layer(x))
    assert not torch.equal(plain(x), layer(x))
