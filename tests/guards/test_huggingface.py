"""Every instrument on families of transformers, each with data of its own kind and the loss that transformers has.

They are causal models, with a mixture of experts and with a state space too, classifiers of texts, tokens and pictures,
and encoder-decoders. The oracles are transformers' losses, peft's adapters and torch's counters.
"""

import copy
import functools
import math
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

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
from lora_lab import FullFineTuning, LoRA, evaluate, fit, inject, lora_layers, memory, merge
from lora_lab.ablation import Trial, ablate
from lora_lab.costs.flops import flops
from lora_lab.inject import LoRAConfig
from lora_lab.methods import AsItIs
from lora_lab.task import logits
from lora_lab.tasks import IGNORE, Examples, Pair, Task, from_pairs, generate, mean_squared_error
from lora_lab.tasks.generate import answers, log_likelihoods, reply
from lora_lab.variants import DoRA
from tests.helpers import enlarge, randomise, randomise_all
from tests.tiny_models import (
    SHAPE,
    bert,
    bert_tokens,
    falcon,
    fresh,
    gemma3,
    gpt2,
    llama,
    mamba,
    mamba2,
    mistral,
    mixtral,
    olmo2,
    original,
    phi,
    qwen3,
    qwen3_moe,
    t5,
    vit,
    whisper,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "frozen_heap"),
    pytest.mark.filterwarnings(
        "ignore:'all-linear' does not reach weights:UserWarning",
        "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
    ),
]

STEPS, BATCH, LR, SEED = 20, 4, 0.003, 5


# Data


def generator(seed):
    return torch.Generator().manual_seed(seed)


def counting(count, seed):
    """Tokens of which each is the one before plus one; every third target is not to be counted."""
    starts = torch.randint(37, (count, 1), generator=generator(seed))
    tokens = 3 + (starts + torch.arange(9)) % 37
    targets = tokens[:, 1:].clone()
    targets[:, ::3] = IGNORE
    return Examples(tokens[:, :-1].contiguous(), targets)


def padded(count, seed):
    """Random tokens, of which the last ones of most rows are padding."""
    ids = torch.randint(3, 40, (count, 8), generator=generator(seed))
    ids[torch.arange(8) >= 8 - torch.arange(count)[:, None] % 4] = 0
    return ids


def classes(count, seed):
    ids = padded(count, seed)
    return Examples(ids, ids[:, 0] % 3)


def tags(count, seed):
    ids = padded(count, seed)
    return Examples(ids, torch.where(ids == 0, IGNORE, ids % 3))


def successors(count, seed):
    ids = padded(count, seed)
    return Examples(ids, torch.where(ids == 0, IGNORE, (ids + 1) % 40)[:, 2:].contiguous())


def pictures(count, seed):
    inputs = torch.randn(count, 3, 16, 16, generator=generator(seed))
    return Examples(inputs, (inputs.mean((1, 2, 3)) > 0).long())


@dataclass(frozen=True)
class Family:
    """A model, its data, why its trials cannot be packed, if so, and which layers peft does not adapt."""

    make: Callable[[], nn.Module]
    rows: Callable[[int, int], Examples]
    refusal: str = ""
    exclude: tuple[str, ...] = ()

    @property
    def method(self):
        return LoRA(rank=4, exclude=self.exclude)

    @property
    def task(self):
        sizes = {"train": STEPS * BATCH, "validation": 8, "test": 8, "off_domain": 8}
        return Task("rows", **{part: self.rows(n, seed) for seed, (part, n) in enumerate(sizes.items())})

    @property
    def batch(self):
        """Large enough that a few bytes, such as the state of the random generator in a checkpoint, do not matter."""
        examples = self.rows(64, 7)
        return examples.inputs, examples.targets


READS = "reads the weight of an adapted layer"
FAMILIES = {
    "Llama": Family(llama, counting),
    "Qwen3": Family(qwen3, counting),
    "Gemma 3": Family(gemma3, counting),
    "GPT-2": Family(gpt2, counting, "Conv1D"),
    "Falcon": Family(falcon, counting, "FalconLinear"),
    "Phi": Family(phi, counting),
    "OLMo 2": Family(olmo2, counting),
    "Mistral": Family(mistral, counting),
    "Mixtral": Family(mixtral, counting),
    "Qwen3 with experts": Family(qwen3_moe, counting),
    "Mamba": Family(mamba, counting, exclude=("x_proj", "dt_proj", "out_proj")),
    "Mamba 2": Family(mamba2, counting, exclude=("out_proj",)),
    "BERT": Family(bert, classes),
    "BERT for tokens": Family(bert_tokens, tags),
    "ViT": Family(vit, pictures),
    "T5": Family(t5, successors, READS),
}
EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
MASKED = pytest.mark.parametrize("family", [FAMILIES[name] for name in ("BERT", "BERT for tokens", "T5")])
EXPERTS = pytest.mark.parametrize("family", [FAMILIES[name] for name in ("Mixtral", "Qwen3 with experts")])


def their_loss(model, examples, masked=True):
    """The loss that transformers computes from labels; for a causal model torch's, since the targets are shifted."""
    name = model.main_input_name
    given = {name: examples.inputs}
    if not model.can_generate() or model.config.is_encoder_decoder:
        given["labels"] = examples.targets
    if name == "input_ids" and masked:
        given["attention_mask"] = (examples.inputs != 0).long()
    outputs = model(**given)
    return (
        outputs.loss if "labels" in given else F.cross_entropy(outputs.logits.flatten(0, 1), examples.targets.flatten())
    )


def run(family, model, **options):
    settings = {"steps": STEPS, "lr": LR, "batch_size": BATCH, "seed": SEED, "schedule": "constant", "warmup": 0}
    return fit(model, family.task, family.method, **(settings | options))


@functools.cache
def trained(family):
    """A model after a run, to be read only, and its training losses."""
    model = fresh(family.make)
    return model, run(family, model).curve("train_loss")[1]


@torch.no_grad()
def scores(model, family):
    examples = family.rows(6, 9)
    return logits(model, examples.inputs, examples.targets)


TASK = FAMILIES["Llama"].task
ONE = TASK.train.inputs[:BATCH], TASK.train.targets[:BATCH]


# What a model returns


@pytest.mark.parametrize("make", [llama, qwen3, gemma3, gpt2])
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
    fit(model, TASK, method, steps=2, lr=LR, batch_size=BATCH)
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


# Training


@pytest.mark.slow
@EVERY
def test_losses_are_those_of_a_plain_loop_with_pefts_adapter_which_can_be_read_back(family, tmp_path):
    start = fresh(family.make)
    inject(start, family.method, seed=SEED)
    ll.save_adapter(start, tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(fresh(family.make), tmp_path / "start", is_trainable=True).train()
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer, losses, train = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0), [], family.task.train
    for batch in torch.randperm(len(train), generator=generator(SEED)).view(STEPS, BATCH):
        loss = their_loss(theirs, train[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    model, found = trained(family)
    assert found == pytest.approx(losses, abs=1e-5)
    assert abs(losses[-1] - their_loss(fresh(family.make), train[batch]).item()) > 1e-3
    theirs.eval().save_pretrained(tmp_path / "theirs")
    read = fresh(family.make)
    ll.load_adapter(read, tmp_path / "theirs")
    torch.testing.assert_close(scores(read, family), scores(theirs, family), rtol=1e-5, atol=1e-5)
    ll.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(fresh(family.make), tmp_path / "ours").eval()
    torch.testing.assert_close(scores(model, family), scores(again, family), rtol=1e-5, atol=1e-5)
    assert (scores(model, family) - scores(original(family.make), family)).abs().max() > 0.01


@MASKED
def test_padding_changes_nothing_but_without_a_mask_it_would(family):
    examples = family.rows(8, 2)
    with torch.no_grad():
        expected = their_loss(original(family.make), examples).item()
        assert abs(their_loss(original(family.make), examples, masked=False).item() - expected) > 1e-3
    task = Task("one", examples, examples, examples, examples)
    assert evaluate(fresh(family.make), task, batch_size=8) == pytest.approx(expected, rel=1e-5)
    more = F.pad(examples.inputs, (0, 3))
    with torch.no_grad():
        wider, narrow = (logits(original(family.make), ids, examples.targets) for ids in (more, examples.inputs))
        length = narrow.shape[1] if narrow.ndim == 3 else None
        torch.testing.assert_close(wider[:, :length], narrow, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_mask_reaches_only_models_in_which_tokens_attend_to_later_ones(family):
    model, given = fresh(family.make), []
    model.register_forward_pre_hook(lambda _, args, more: given.append(more), with_kwargs=True)
    scores(model, family)
    assert len(given) == 1
    assert ("attention_mask" in given[0]) is (family.rows in (classes, tags, successors))
    assert ("decoder_input_ids" in given[0]) is (family.rows is successors)
    assert given[0].get("use_cache", False) is False


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("own", [False, True], ids=["fit's", "own"])
def test_checkpointing_of_fit_or_of_the_model_itself_changes_no_loss(family, own):
    model, on = fresh(family.make), []
    if own:
        model.gradient_checkpointing_enable()

    def look(_):
        on.append(any(getattr(module, "gradient_checkpointing", False) for module in model.modules()))

    losses = run(family, model, steps=3, gradient_checkpointing=not own, on_row=look).curve("train_loss")[1]
    look(None)
    assert on == [True] * 4 + [own]  # what fit has switched on, it switches off again
    assert losses == pytest.approx(trained(family)[1][:3], rel=1e-6)


@EVERY
def test_a_model_in_bfloat16_trains(family):
    losses = run(family, fresh(family.make, torch.bfloat16), steps=3).curve("train_loss")[1]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses == pytest.approx(trained(family)[1][:3], rel=0.1)
    assert losses != pytest.approx(trained(family)[1][:3], rel=1e-6)


def test_whisper_which_has_no_rule_for_what_its_decoder_reads_trains_with_a_loss_of_ones_own():
    inputs, targets = torch.randn(8, 8, 20, generator=generator(1)), counting(8, 1).targets
    part = Examples(inputs, targets)
    with pytest.raises(ValueError, match=r"^A Whisper\w+.* your own loss"):
        evaluate(original(whisper), Task("sounds", part, part, part, part))

    def loss(model, inputs, targets):
        return model(input_features=inputs, labels=targets, use_cache=False).loss

    losses = fit(fresh(whisper), Task("sounds", part, part, part, part, loss=loss), LoRA(rank=4), steps=8, lr=0.01)
    assert losses.curve("validation_loss")[1][-1] < float(loss(original(whisper), inputs, targets)) - 0.01
    predicted = memory.predict(original(whisper), LoRA(rank=4), batch=(inputs, targets), loss=loss)
    measured = memory.measure(original(whisper), LoRA(rank=4), (inputs, targets), loss=loss)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)


def test_an_encoder_decoder_whose_config_names_no_first_token_is_refused_in_one_sentence():
    model = fresh(t5)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        evaluate(model, FAMILIES["T5"].task)


# Bytes, products and seconds


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("how", ["full", "LoRA", "LoRA, own checkpoints, bfloat16"])
def test_the_predicted_peak_is_the_measured_one(family, how):
    model, method = fresh(family.make), FullFineTuning() if how == "full" else family.method
    tolerance = 1e-3
    if "own" in how:
        model.gradient_checkpointing_enable()
        tolerance = 0.03
        if family.make not in (mixtral, qwen3_moe):  # what a product in bfloat16 needs inside is no tensor, but counts
            model.to(torch.bfloat16)
    predicted = memory.predict(model, method, batch=family.batch)
    measured = memory.measure(model, method, family.batch)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=tolerance)
    assert predicted.parts == {part: size for part, size in measured.parts.items() if part != memory.Part.REST}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "BERT for tokens", "ViT", "T5"])
def test_a_batch_that_is_not_given_is_what_the_model_reads(name):
    family = FAMILIES[name]
    inputs, targets = (part[:3] for part in family.batch)
    targets = inputs if family.make is t5 else targets  # as long as the inputs
    model, length = original(family.make), None if family.make is vit else 8
    expected = memory.predict(model, family.method, batch=(inputs, targets)).parts
    assert memory.predict(model, family.method, 3, length).parts == expected


def test_sizes_that_do_not_describe_a_batch_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"^seq_len is 8, but a ViTForImageClassification reads images; leave"):
        memory.predict(original(vit), LoRA(), 4, 8)
    with pytest.raises(ValueError, match=r"^A WhisperFor\w+ reads input_features, whose shape .*; pass inputs and"):
        memory.predict(original(whisper), LoRA(), 4, 8)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("full", [True, False], ids=["full", "LoRA"])
def test_flops_are_those_that_torch_counts_in_a_real_step(family, full):
    model, method, examples = fresh(family.make), FullFineTuning() if full else family.method, family.rows(BATCH, 7)
    if family.make in (mixtral, qwen3_moe):
        model.set_experts_implementation("eager")  # torch's counter does not know the grouped product
    if not full:
        inject(model, method)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        their_loss(model.train(), examples, masked=False).backward()
    found = flops(original(family.make), method, batch=(examples.inputs, examples.targets))
    assert found.total == counter.get_total_flops() > 0
    assert (found.part("adapters") == 0) is full


@EXPERTS
def test_the_peak_with_experts_in_bfloat16_is_predicted_too(family):
    predicted = memory.predict(original(family.make), family.method, batch=family.batch, dtype=torch.bfloat16)
    measured = memory.measure(original(family.make), family.method, family.batch, dtype=torch.bfloat16)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)


@EXPERTS
def test_each_expert_more_has_the_products_of_its_three_matrices_in_both_dtypes(family):
    model, batch = original(family.make), family.batch
    two, half = (flops(model, LoRA(rank=4), batch=batch, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert two.counts == half.counts
    config = copy.deepcopy(model.config)
    config.num_experts_per_tok = 1
    one = flops(lambda: type(model)(config), LoRA(rank=4), batch=batch)
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    # Two FLOPs for each multiply-add, in two layers, in the forward pass and for the gradient of the input.
    assert two.total - one.total == 2 * batch[0].numel() * 2 * 2 * 3 * config.hidden_size * inner


# Ablations


@pytest.mark.slow
@EVERY
def test_two_ranks_are_packed_and_end_as_fit_does_or_are_refused_with_the_reason(family):
    options = {"lr": LR, "steps": 4, "batch_size": BATCH, "eval_every": 4}
    trials = [Trial(LoRA(rank, exclude=family.exclude), **options) for rank in (2, 4)]
    if family.refusal:
        with pytest.raises(ValueError, match=family.refusal):
            ablate(original(family.make), family.task, trials, engine="packed", progress=False)
    table = ablate(original(family.make), family.task, trials, progress=False)
    assert set(table["engine"]) == {"separate" if family.refusal else "pack of 2"}
    for rank, own in table.groupby("rank"):
        history = fit(fresh(family.make), family.task, LoRA(int(rank), exclude=family.exclude), **options)
        assert own["validation_loss"].tolist() == pytest.approx(history.curve("validation_loss")[1], rel=1e-5)
    last = table[table["step"] == 4]["validation_loss"]
    assert last.nunique() == 2


# What comes of it


@EVERY
@torch.no_grad()
def test_merged_extracted_and_resized_adapters_are_the_updates_and_their_best_approximations(family):
    model = trained(family)[0]
    tuned = copy.deepcopy(model)
    merge(tuned)
    torch.testing.assert_close(scores(tuned, family), scores(model, family), rtol=1e-4, atol=1e-5)
    cut = fresh(family.make)
    errors = ll.extract(cut, tuned, 4)
    assert max(errors[name] for name in lora_layers(model)) < 1e-4
    torch.testing.assert_close(scores(cut, family), scores(model, family), rtol=1e-3, atol=1e-4)
    small = copy.deepcopy(model)
    ll.adapters.resize(small, 2)
    for name, layer in lora_layers(model).items():
        left, sizes, right = torch.linalg.svd(layer.delta(), full_matrices=False)
        best = left[:, :2] * sizes[:2] @ right[:2]
        torch.testing.assert_close(lora_layers(small)[name].delta(), best, rtol=1e-3, atol=1e-5)


def test_an_adapter_fits_its_classifier_if_the_model_was_saved_with_its_new_head(tmp_path):
    """The recipe of docs/programs.md."""
    parts = [Examples(counting(16, seed).inputs, torch.arange(16) % 2) for seed in range(4)]
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


@pytest.mark.parametrize("make", [llama, qwen3, gemma3])
@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=4)], ids=["full", "LoRA"])
def test_a_tied_head_stays_tied_in_bfloat16_too(make, method):
    model = fresh(make, torch.bfloat16)
    fit(model, TASK, method, steps=2, lr=LR, batch_size=BATCH)
    kept = {torch.bfloat16, torch.float32} if method.name == "lora" else {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == kept
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is (make is not llama)


def test_adapters_act_on_the_layers_of_mamba_whose_weight_it_reads_without_calling_them_but_cannot_be_packed():
    model, expected = fresh(mamba).train(), fresh(mamba).train()
    names = inject(model, LoRAConfig(rank=2))
    randomise(model)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            expected.get_submodule(name).weight += layer.delta()
    assert {name.rpartition(".")[2] for name in names} == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    family = FAMILIES["Mamba"]
    torch.testing.assert_close(scores(model, family), scores(expected, family), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=READS):
        ablate(original(mamba), family.task, [Trial(LoRA(2), lr=LR, steps=2)], engine="packed", progress=False)


@EXPERTS
def test_experts_stay_frozen_which_a_warning_says(family):
    model = fresh(family.make)
    with pytest.warns(UserWarning, match=r"so they stay frozen: model\.layers\.0\.mlp\.experts\."):
        run(family, model, steps=2)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            assert not parameter.requires_grad
            assert torch.equal(parameter, original(family.make).get_parameter(name))


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
def test_answers_are_those_of_transformers_own_generate_with_padding_on_the_left(make, plain, monkeypatch):
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
    assert answers(model, task, "train", max_new_tokens=8) == expected
    monkeypatch.setattr(generate, "BATCH", 2)
    assert answers(model, task, "train", max_new_tokens=8) == expected
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
    best = log_likelihoods(model, task, task.pairs["train"], labels).argmax(1)
    assert [labels[i] for i in best] == expected
    assert len(set(expected)) > 1


# Falcon, whose linear layers derive from nn.Linear


@pytest.mark.parametrize("method", [LoRA(rank=4), DoRA(rank=4)])
def test_every_linear_layer_of_falcon_is_adapted_by_every_method_and_keeps_its_class(method):
    names = [name for name, module in original(falcon).named_modules() if isinstance(module, FalconLinear)]
    model = fresh(falcon)
    losses = fit(model, TASK, method, steps=6, lr=LR, batch_size=BATCH).curve("validation_loss")[1]
    assert losses[-1] < losses[0]
    assert list(lora_layers(model)) == names
    assert len(names) == 8
    merge(model)
    assert all(type(model.get_submodule(name)) is FalconLinear for name in names)


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
