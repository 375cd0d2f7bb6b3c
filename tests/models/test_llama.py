"""The Llama against transformers' own: logits, padding, caching, generation, and every variant of its shape."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from transformers import RepetitionPenaltyLogitsProcessor

from lora_lab import Llama, load_pretrained
from lora_lab.models import llama, reading
from lora_lab.models.llama import KeyValueCache, LlamaConfig, rotary_frequencies
from tests.helpers import enlarge, logits, random_ids

PROMPTS = ["Once upon a time", "def fibonacci(n):\n", "The capital of France is"]
NEW = 32


# Logits


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (4, 1), (1, 2), (4, 2), (1, 17), (4, 17), (4, 128), (1, 300)])
def test_logits_are_bit_identical_to_transformers(smollm2, hf_smollm2, length, batch):
    model, _ = smollm2
    ids = random_ids(batch, length, 49152, seed=length)
    ours = logits(model, ids)
    assert ours.shape == (batch, length, 49152)
    assert torch.equal(ours, logits(hf_smollm2, ids))


@pytest.mark.parametrize("text", [*PROMPTS, "こんにちは、世界! 👋", " "])
def test_logits_of_texts_are_bit_identical_to_transformers(smollm2, hf_smollm2, text):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode(text)])
    assert torch.equal(logits(model, ids), logits(hf_smollm2, ids))


def test_logits_differ_when_one_token_or_one_weight_differs(smollm2, hf_smollm2):
    model, _ = smollm2
    ids = random_ids(1, 9, 49152)
    theirs = logits(hf_smollm2, ids)
    other_ids = ids.clone()
    other_ids[0, 4] += 1
    ours = logits(model, other_ids)
    assert torch.equal(ours[:, :4], theirs[:, :4])  # causal: what is before it is as it was
    assert (ours[:, 4:] != theirs[:, 4:]).any(dim=-1).all()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[29].self_attn.k_proj.weight[0, 0] += 0.1
    assert not torch.equal(logits(changed, ids), theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_transformers_and_the_unpadded_prompts(smollm2, hf_smollm2, side):
    model, tokenizer = smollm2
    rows = [tokenizer.encode(prompt) for prompt in (*PROMPTS, "A somewhat longer prompt than the other three, so")]
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), tokenizer.pad_id), torch.zeros(len(rows), longest, dtype=torch.long)
    places = []
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
        places.append(place)
    assert len(set(map(len, rows))) > 1
    ours, theirs = logits(model, ids, attention_mask=mask), logits(hf_smollm2, ids, attention_mask=mask)
    unmasked = logits(model, ids)
    assert ours.isfinite().all()  # the padded positions too
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        assert (ours[i, place] - theirs[i, place]).abs().max() <= 1e-5
        alone = logits(model, torch.tensor([row]))[0]
        torch.testing.assert_close(ours[i, place], alone, rtol=0, atol=2e-4)
        if side == "left" and len(row) < longest:
            assert (unmasked[i, place] - alone).abs().max() > 0.1  # so the mask does something


# Caching and generation


@pytest.fixture(scope="module")
def continuations(smollm2):
    model, tokenizer = smollm2
    prompts = [torch.tensor(tokenizer.encode(prompt)) for prompt in PROMPTS]
    return [(prompt, model.generate(prompt, NEW)) for prompt in prompts]


@pytest.mark.slow
def test_greedy_generation_equals_transformers_token_for_token(continuations, hf_smollm2):
    for prompt, ours in continuations:
        theirs = hf_smollm2.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
        )
        assert len(ours) == NEW
        assert ours.tolist() == theirs[0, len(prompt) :].tolist()
    assert len({tuple(ours.tolist()) for _, ours in continuations}) == len(PROMPTS)


@pytest.mark.slow
def test_cached_generation_equals_the_argmax_of_one_pass_without_cache(smollm2, continuations):
    model, _ = smollm2
    for prompt, written in continuations:
        full = logits(model, torch.cat((prompt, written))[None])[0]
        assert full[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == written.tolist()


@pytest.fixture(scope="module")
def tiny(tiny_config):
    """A tiny model with weights large enough that its attention matters."""
    return enlarge(Llama(tiny_config, seed=3).eval(), 15)


def test_generation_ends_before_the_stop_token(tiny):
    prompt = random_ids(1, 4)[0]
    written = tiny.generate(prompt, 20).tolist()
    stop = written[12]
    first = written.index(stop)
    assert first > 0
    assert tiny.generate(prompt, 20, stop=stop).tolist() == written[:first]
    unused = next(token for token in range(260) if token not in written)
    assert tiny.generate(prompt, 20, stop=unused).tolist() == written
    assert tiny.generate(prompt, 5).tolist() == written[:5]
    assert tiny.generate(prompt, 0).tolist() == []
    assert len(tiny.generate(random_ids(1, 126)[0], 2)) == 2  # as far as the context reaches


def test_prefill_in_chunks_of_a_padded_batch_equals_one_pass(tiny):
    ids, mask = random_ids(2, 12), torch.ones(2, 12)
    mask[0, :5] = 0
    whole = logits(tiny, ids, attention_mask=mask)
    cache = KeyValueCache()
    parts = [(0, 4), (4, 9), (9, 10), (10, 12)]
    read = [logits(tiny, ids[:, a:b], attention_mask=mask[:, :b], cache=cache) for a, b in parts]
    torch.testing.assert_close(torch.cat(read, dim=1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-4)
    assert (logits(tiny, ids)[0, 5:] - whole[0, 5:]).abs().max() > 0.1


def test_sampling_repeats_by_seed_and_follows_the_temperature(tiny):
    prompt = random_ids(1, 4)[0]
    draw = [tiny.generate(prompt, 20, temperature=1.5, seed=seed).tolist() for seed in (0, 0, 1)]
    assert draw[0] == draw[1]
    assert draw[0] != draw[2]
    greedy = tiny.generate(prompt, 20).tolist()
    assert draw[0] != greedy
    for temperature in (1e-4, 1e-6, 1e-300):
        assert tiny.generate(prompt, 20, temperature=temperature, seed=5).tolist() == greedy


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repeated_tokens_are_penalised_as_in_transformers(tiny, penalty):
    ids = random_ids(1, 9)  # (1, 9)
    rule = RepetitionPenaltyLogitsProcessor(penalty)
    signs = set()
    for _ in range(30):
        scores = logits(tiny, ids)[:, -1]  # (1, 260)
        signs |= set(scores[0, ids[0]].sign().tolist())
        ids = torch.cat((ids, rule(ids, scores).argmax(-1, keepdim=True)), dim=1)
    assert signs == {-1.0, 1.0}  # so both branches of the rule counted
    written = tiny.generate(ids[0, :9], 30, repetition_penalty=penalty)
    assert written.tolist() == ids[0, 9:].tolist()
    plain = tiny.generate(ids[0, :9], 30)
    assert plain.tolist() != written.tolist()
    assert tiny.generate(ids[0, :9], 30, repetition_penalty=1.0).tolist() == plain.tolist()


def test_sampling_draws_from_the_penalised_logits(tiny):
    prompt = random_ids(1, 100)[0]
    logits_before = logits(tiny, prompt[None])[:, -1]  # (1, 260)
    scores = RepetitionPenaltyLogitsProcessor(3.0)(prompt[None], logits_before.clone())  # (1, 260)
    assert {-1.0, 1.0} <= set(logits_before[scores != logits_before].sign().tolist())
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.multinomial(torch.softmax(scores[0] / 20.0, dim=-1), 1, generator=generator)  # (1,)
        assert torch.equal(tiny.generate(prompt, 1, temperature=20.0, seed=seed, repetition_penalty=3.0), expected)


REFUSED = [
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": -1}, "temperature is -1"),
    *(
        ({"repetition_penalty": penalty}, f"repetition_penalty is {penalty}")
        for penalty in (0.0, -1.0, math.nan, math.inf)
    ),
    ({"seed": 10**20}, "seed is 100000000000000000000"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"ids": torch.tensor([], dtype=torch.long)}, r"is \[\]"),
    ({"ids": torch.tensor([[1, 2]])}, r"is \[\[1, 2\]\]"),
    ({"ids": torch.tensor(1)}, "is 1,"),
    ({"ids": torch.tensor([1, 260])}, "260"),
    ({"ids": torch.tensor([-1, 2])}, "-1"),
    *(
        ({"ids": torch.arange(length), "max_new_tokens": new}, f"{length} tokens and max_new_tokens is {new}, .* 128")
        for length, new in ((126, 3), (1, 100_000), (128, 1))
    ),
]


@pytest.mark.parametrize(("change", "named"), REFUSED)
def test_a_prompt_or_a_number_that_cannot_be_is_refused(tiny, change, named):
    with pytest.raises(ValueError, match=named):
        tiny.generate(**{"ids": torch.tensor([1, 2]), "max_new_tokens": 3, **change})


@pytest.mark.parametrize(
    "change", [{"vocab_size": 0}, {"num_hidden_layers": -1}, {"num_key_value_heads": 3}, {"head_dim": 7}]
)
def test_impossible_shapes_are_refused(tiny_config, change):
    with pytest.raises(ValueError, match=str(*change)):
        dataclasses.replace(tiny_config, **change)


def test_generation_leaves_the_model_and_the_global_generator_as_they_were(tiny):
    for training in (True, False):
        model = copy.deepcopy(tiny).train(training)
        before = torch.random.get_rng_state()
        model.generate(torch.tensor([1, 2]), 3, temperature=1.0)
        assert model.training is training
        assert torch.equal(torch.random.get_rng_state(), before)


def test_an_interrupted_generation_leaves_the_model_in_its_mode(tiny):
    model = copy.deepcopy(tiny).train()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    model.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(torch.tensor([1, 2]), 3)
    assert model.training  # or dropout would be off in all later training


# Names, head, shape, initial weights


def test_tied_head_and_embedding_stay_one_tensor(smollm2, tiny):
    model, _ = smollm2
    copied = copy.deepcopy(tiny).to(torch.bfloat16)
    for each in (model, tiny, copied):
        assert each.get_output_embeddings() is each.lm_head
        assert each.lm_head.weight is each.model.embed_tokens.weight
    ids = random_ids(1, 5)
    before = logits(copied, ids)
    with torch.no_grad():
        copied.model.embed_tokens.weight[7] += 1
    assert (logits(copied, ids)[..., 7] != before[..., 7]).any()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_initial_weights_repeat_by_seed_and_leave_the_global_generator_alone(tiny_config):
    before = torch.random.get_rng_state()
    first, again, other = (Llama(tiny_config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert name.endswith("norm.weight") or not torch.equal(value, other[name])


def test_initial_weights_are_normal_with_deviation_0_02_beside_zero_biases_and_unit_norms(tiny_config):
    config = dataclasses.replace(tiny_config, hidden_size=128, attention_bias=True, mlp_bias=True)
    for name, value in Llama(config).state_dict().items():
        if name.endswith("norm.weight"):
            assert (value == 1).all()
        elif name.endswith("bias"):
            assert (value == 0).all()
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(value.mean().item()) < 0.002


# Variants of the shape, on tiny random models that transformers made and saved

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


NO_ROPE = {"rope_parameters": None}
VARIANTS = [  # what differs from the plain shape, and what takes it back: other entries of the config, or no biases
    ({}, {}),
    ({"tie_word_embeddings": False}, {}),
    ({"attention_bias": True}, "bias"),
    ({"mlp_bias": True}, "bias"),
    ({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}, "bias"),
    ({"head_dim": 20}, {}),
    ({"num_key_value_heads": 1}, {}),
    ({"num_key_value_heads": 4}, {}),
    ({"rms_norm_eps": 0.1}, {"rms_norm_eps": 1e-6}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}}, NO_ROPE),
    ({"rope_parameters": LLAMA3, "head_dim": 64}, NO_ROPE),
]


@pytest.mark.parametrize(("changes", "undone"), VARIANTS, ids=[", ".join(changes) for changes, _ in VARIANTS])
def test_variants_are_bit_identical_to_transformers_and_matter(tiny_hf, hf_folder, changes, undone):
    theirs = tiny_hf(**changes)
    folder = hf_folder(theirs)
    ours, _ = load_pretrained(folder, device="cpu")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for batch, length in ((1, 1), (2, 50), (3, 100)):
        ids = random_ids(batch, length)
        assert torch.equal(logits(ours, ids), logits(theirs, ids))
    if undone == "bias":
        for name, parameter in ours.named_parameters():
            parameter.data *= not name.endswith("bias")
    elif undone:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | undone))
        ours, _ = load_pretrained(folder, device="cpu")
    assert bool((logits(ours, ids) - logits(theirs, ids)).abs().max() > 1e-3) is bool(undone)


def test_gradients_equal_those_of_transformers(tiny_hf, hf_folder):
    theirs = tiny_hf(tie_word_embeddings=False, attention_bias=True)
    ours, _ = load_pretrained(hf_folder(theirs), device="cpu")
    ids = random_ids(2, 30)
    for model in (ours, theirs):
        out = model(ids)
        out = out if isinstance(out, torch.Tensor) else out.logits
        nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert expected[name].grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


# Checkpointing


def passes(model):
    """How often each block computes, as a list that grows while the model is used."""
    counts = [0] * len(model.model.layers)

    def counted(index):
        def add(module, args):
            counts[index] += 1

        return add

    for index, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(counted(index))
    return counts


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padded"])
def test_checkpointing_gives_the_same_logits_and_gradients_bit_for_bit(tiny, masked):
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    found = []
    for again in (False, True):
        model = copy.deepcopy(tiny).train()
        if again:
            model.gradient_checkpointing_enable()
        counts = passes(model)
        out = model(ids, mask if masked else None)
        out.square().mean().backward()
        assert counts == ([2, 2] if again else [1, 1])  # once more in the backward pass
        found.append((out, [parameter.grad for parameter in model.parameters()]))
    (plain, gradients), (checkpointed, twins) = found
    assert torch.equal(plain, checkpointed)
    assert all(map(torch.equal, gradients, twins))
    assert all(float(gradient.norm()) > 0 for gradient in gradients)


def test_blocks_are_computed_again_in_training_only(tiny, monkeypatch):
    ids = random_ids(1, 5)
    model = copy.deepcopy(tiny)
    model.gradient_checkpointing_enable()
    for mode in (True, False):
        model.train(mode)
        counts = passes(copied := copy.deepcopy(model))
        copied(ids).sum().backward()
        assert counts == ([2, 2] if mode else [1, 1])
    model.train()
    counts = passes(model)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(llama, "checkpoint", None)  # nor is it called
        model(ids)
    assert counts == [1, 1]
    model(ids, cache=KeyValueCache()).sum().backward()
    assert counts == [2, 2]
    written = model.generate(ids[0], 3)
    assert counts == [5, 5]
    assert torch.equal(written, tiny.generate(ids[0], 3))


def test_a_rope_theta_that_is_a_large_whole_number_is_a_number():
    config = LlamaConfig(16, 8, 16, 1, 2, 1, 4, rope_theta=10**30)
    assert torch.isfinite(rotary_frequencies(config)).all()


@pytest.mark.parametrize(("limit", "expected"), [(reading.SMALL_BYTES, [2, 1, 1]), (0, [2, 2, 2])])
def test_single_tokens_of_a_small_model_are_read_by_one_thread(tiny_config, monkeypatch, limit, expected):
    monkeypatch.setattr(reading, "SMALL_BYTES", limit)
    model, seen = Llama(tiny_config).eval(), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model.generate(torch.tensor([1, 2, 3]), 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == expected
