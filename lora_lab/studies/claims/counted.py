"""Verdicts by counting: parameters, bytes and FLOPs. They come out the same on every machine.

Each function compares the claim's number with one that it counts, on a model without weights (torch's "meta" device)
or by the arithmetic that the source describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import product

import torch

from lora_lab.costs import flops
from lora_lab.costs.bill import GIB
from lora_lab.costs.fake import build_on_meta
from lora_lab.costs.repeated import last_blocks
from lora_lab.inject import LoRAConfig, inject, lora_layers
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models import shapes
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.studies.claims.deciding import STANDS, UNTESTABLE, Answer, Cases, Claim, Result, decides, near

QV, ATTENTION = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = (*ATTENTION, *MLP)
ADAPTED = {"all layers": ALL, "query and value matrices": QV}
# Touvron et al. 2023, arXiv 2307.09288, and the model's config.json; Llama 1's 7B has the same matrices.
# (vocabulary, width, the MLP's width, layers, heads, heads of keys and values, a head's width)
LLAMA_2_7B = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
# Touvron et al. 2023, arXiv 2302.13971, table 2; the feed-forward's width is in its config.json.
LLAMA_65B = LlamaConfig(32000, 8192, 22016, 80, 64, 64, 128)
# GPT-3's parameters: Hu et al. 2021, table 4; its width and layers: Brown et al. 2020, arXiv 2005.14165, table 2.1.
GPT3_PARAMETERS, GPT3_WIDTH, GPT3_LAYERS = 175_255_800_000, 12288, 96
GPT3_ADAPTER = 2 * GPT3_LAYERS * 4 * 2 * GPT3_WIDTH  # of rank 4 on its query and value matrices, which are square
HALF, FLOAT32 = 2, 4  # bytes of a weight in 16 bits and in 32
ADAM = 16  # bytes of a trained weight in float32, with its gradient and Adam's two averages
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # with double quantisation: Dettmers et al. 2023, section 3


def rank_of_equal_memory(config: LlamaConfig, gradients: bool) -> int:
    """The lowest rank at which LoRA's weights, Adam moments and gradients (float32) exceed full fine-tuning's.

    Where they are held, at the end of the backward pass, full fine-tuning also holds two copies of the gradient of a
    head that is the embedding, while they are added.
    """
    trained_bytes, copies = (ADAM, 2 * config.tie_word_embeddings) if gradients else (ADAM - FLOAT32, 0)
    saved = (trained_bytes - FLOAT32) * parameters(config) + copies * FLOAT32 * config.vocab_size * config.hidden_size
    return saved // (trained_bytes * adapter_size(config, ALL)) + 1


@cache
def adapter_size(config: LlamaConfig, targets: Sequence[str]) -> int:
    """Trained parameters for each rank of LoRA, counted on a model of that shape."""
    model = build_on_meta(partial(Llama, config))
    with torch.device("meta"):
        inject(model, LoRAConfig(rank=1, targets=list(targets)))
    return sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in lora_layers(model).values())


@cache
def parameters(config: LlamaConfig) -> int:
    """All parameters of a model of that shape, a tied head counted once."""
    return sum(parameter.numel() for parameter in build_on_meta(partial(Llama, config)).parameters())


@cache
def step_flops(name: str, method: Method, tokens: int = 512) -> Mapping[str, int]:
    """FLOPs of a training step by part of a known model: one sequence of so many tokens."""
    with torch.device("meta"):
        model = Llama(shapes.config(name))
        method.prepare(model, 0)
    return flops.closed_form(model, tokens, tokens)


def flop_ratio(name: str, rank: int, tokens: int = 512) -> float:
    """FLOPs of a step of LoRA on all linear layers, in units of full fine-tuning's."""
    lora, full = (step_flops(name, method, tokens) for method in (LoRA(rank), FullFineTuning()))
    return sum(lora.values()) / sum(full.values())


# Parameters


@decides("two-percent-of-the-parameters")
def two_percent(claim: Claim) -> Cases:
    """Rank 8 on all linear layers and on two, on three shapes."""
    for (layers, targets), name in product(ADAPTED.items(), ("smollm2-135m", "llama-3-8b", "llama-3-70b")):
        share, case = _share(name, targets, 8), {"the adapted layers": layers, "the width of the model": name}
        yield near(share, claim.stated, 0.25), f"{layers}: {share:.2f} % of {name}", case


def _share(name: str, targets: Sequence[str], rank: int) -> float:
    """The parameters of an adapter, in per cent of those of a known model."""
    config = shapes.config(name)
    return 100 * rank * adapter_size(config, targets) / parameters(config)


@decides("two-l-d-r-parameters", on="whether the matrices are square")
def parameter_formula(claim: Claim) -> Cases:
    """The paper's formula against a count, on square matrices and on those of grouped queries."""
    square, grouped = LLAMA_2_7B, shapes.config("smollm2-135m")
    for name, config in (("Llama 2 7B", square), ("SmolLM2-135M", grouped)):
        formula = 2 * 2 * config.num_hidden_layers * config.hidden_size
        counted = adapter_size(config, QV)
        yield formula == counted, f"{name}, q and v: {formula:,} r by the formula, {counted:,} r counted"


@decides("adapters-are-small")
def adapters_are_small(claim: Claim) -> Cases:
    """The share of the model that an adapter adds, by rank, adapted layers and model."""
    for name, (layers, targets), rank in product(("smollm2-135m", "llama-3-8b"), ADAPTED.items(), (8, 64, 192)):
        share = _share(name, targets, rank)
        case = {"the rank": rank, "the adapted layers": layers, "the width of the model": name}
        yield share < claim.stated, f"{layers} of {name}, rank {rank}: {share:.1f} %", case


@decides("attention-256-mlp-128", on="whether the output layer is adapted too, which the text does not say")
def parameters_of_targets(claim: Claim) -> Cases:
    """Llama 3.1 8B: the paper's four counts, without and with an adapter on the output layer."""
    config = shapes.config("llama-3-8b")
    head = config.hidden_size + config.vocab_size
    setups = ((ATTENTION, 256), (MLP, 128), (MLP, 256), (ALL, 256))
    for words, extra in (("blocks alone", 0), ("with the output layer", head)):
        sizes = [rank * (adapter_size(config, targets) + extra) for targets, rank in setups]
        same = all(near(size / 1e9, printed, 0.03) for size, printed in zip(sizes, claim.values, strict=True))
        yield same, f"{words} {', '.join(f'{size / 1e9:.3f}' for size in sizes)} billion"


@decides("vera-lora-count")
def lora_beside_vera(claim: Claim) -> Answer:
    """Rank 64 on all linear layers of Llama 7B."""
    count = 64 * adapter_size(LLAMA_2_7B, ALL) / 1e6
    return near(count, claim.stated, 0.005), f"{count:.1f} million, counted"


# Bytes


@decides("checkpoint-10000-times-smaller")
def checkpoint_size(claim: Claim) -> Answer:
    """The ratio of two files in one precision is that of their parameters."""
    ratio = GPT3_PARAMETERS / GPT3_ADAPTER
    text = f"{ratio:,.0f} times: {GPT3_ADAPTER:,} parameters of {GPT3_PARAMETERS:,}; it holds for GPT-3's width only"
    return near(ratio, claim.stated), text


@decides("checkpoint-ratio-elsewhere")
def checkpoint_elsewhere(claim: Claim) -> Cases:
    """The paper's settings, rank 4 on q and v, and rank 8 on all layers, on models that are in use."""
    models = ("smollm2-135m", "llama-3-8b", "llama-3-70b")
    for (rank, layers), name in product(((4, "query and value matrices"), (8, "all layers")), models):
        ratio = 100 / _share(name, ADAPTED[layers], rank)
        case = {"the rank with the adapted layers": layers, "the width of the model": name}
        yield ratio >= claim.stated, f"{name}, rank {rank} on {layers}, {ratio:,.0f} times", case


@decides("hundred-models-354-gb")
def hundred_models(claim: Claim) -> Answer:
    """One base in 16 bits and a hundred adapters of rank 4."""
    total = HALF * (GPT3_PARAMETERS + 100 * GPT3_ADAPTER) / 1e9
    return near(total, claim.stated, 0.02), f"{total:.0f} GB, and 35 TB as full copies"


@decides("gpt3-needs-1-2-tb")
def full_fine_tuning_of_gpt3(claim: Claim) -> Result:
    """What full fine-tuning with Adam holds, by the usual ways of storing it; and the weights alone, for LoRA."""
    schemes = {"float32": ADAM, "mixed precision": ADAM, "all in 16 bits": 4 * HALF}
    needed = {name: size * GPT3_PARAMETERS / 1e12 for name, size in schemes.items()}
    texts = ", ".join(f"{size:.2f} TB with {name}" for name, size in needed.items())
    derived = any(near(size, claim.stated) for size in needed.values())
    each = 1e12 * claim.stated / GPT3_PARAMETERS
    reason = "" if derived else "; no usual precision gives it, but that does not refute what they measured"
    weights = f"the weights alone, in 16 bits, take {HALF * GPT3_PARAMETERS / 1e9:.1f} GB"
    text = f"{texts}; 1.2 TB is {each:.2f} bytes a weight{reason}; {weights}"
    return Result(STANDS if derived else UNTESTABLE, text)


@decides("full-7b-112-gb-lora-15")
def memory_of_7b(claim: Claim) -> Answer:
    """16 bytes for each trained parameter, and a frozen base in 16 bits; ranks are stated beside it."""
    base, each = parameters(LLAMA_2_7B), adapter_size(LLAMA_2_7B, ALL)
    full, lora = ADAM * base / 1e9, (HALF + ADAM / 100) * base / 1e9
    ranks = ", ".join(f"rank {rank} {(HALF * base + ADAM * rank * each) / 1e9:.1f} GB" for rank in (16, 64, 256))
    (stated_full,) = claim.values
    text = f"{full:.1f} and {lora:.1f} GB; 1 % is rank {base / 100 / each:.0f} on all linear layers; {ranks}"
    return near(full, stated_full) and near(lora, claim.stated), f"Llama 2 7B: {text}"


@decides("quiz-8b-in-6-gb")
def quiz_8b(claim: Claim) -> Answer:
    """The frozen weights alone, before adapters, gradients and activations."""
    base = HALF * parameters(shapes.config("llama-3-8b")) / 1e9
    text = f"the frozen weights alone take {base:.1f} GB in 16 bits; 6 GB needs 4 bits, which is QLoRA"
    return base <= claim.stated, text


@decides("double-quantisation-0-37-bits")
def double_quantisation(claim: Claim) -> Answer:
    """The bits that a block's scale takes for each weight, before and after."""
    saved = 4 + 32 / 64 - NF4_BITS
    return near(saved, claim.stated, 0.02), f"{saved:.3f} bits a parameter"


@decides("qlora-65b-in-48-gb", on="the adapters, at 16 bytes a number")
def qlora_65b(claim: Claim) -> Cases:
    """LLaMA 65B in NF4, and 16 bytes for each number of an adapter: small as in their example, and of rank 64.

    A GPU of "48 GB" has 48 GiB.
    Activations are one sequence of 512 tokens: the inputs of all blocks in 16 bits, as with checkpointing; the logits
    in float32 three times (they, their logarithms and their gradients); of the block that is computed again ten tensors
    of the model's width and four of the MLP's; and its largest matrix in 16 bits.
    """
    example, rank_64 = round(0.002 * parameters(LLAMA_65B)), 64 * adapter_size(LLAMA_65B, ALL)
    width, inner = LLAMA_65B.hidden_size, LLAMA_65B.intermediate_size
    of_blocks = HALF * (LLAMA_65B.num_hidden_layers * width + 10 * width + 4 * inner)
    activations = 512 * (of_blocks + 3 * FLOAT32 * LLAMA_65B.vocab_size) + HALF * width * inner
    for count, words in ((example, "0.2 % of the weights, as in their example"), (rank_64, "rank 64 on all layers")):
        total = (_nf4_bytes(LLAMA_65B) + ADAM * count + activations) / GIB
        yield total < claim.stated, f"adapters of {words}: {total:.1f} GiB with 512 tokens"
    (stated_full,) = claim.values
    full = ADAM * parameters(LLAMA_65B) / GIB
    yield full > stated_full, f"full fine-tuning: {full:,.0f} GiB before activations"


@decides("qlora-4-times-less-than-lora")
def qlora_against_lora(claim: Claim) -> Cases:
    """Weights and adapters alone: activations are the same in both and only make the ratio less."""
    models = {name: shapes.config(name) for name in ("llama-3.2-1b", "llama-3-8b", "llama-3-70b")}
    for (name, config), rank in product({**models, "llama-65b": LLAMA_65B}.items(), (1, 16)):
        adapters = ADAM * rank * adapter_size(config, ALL)
        ratio = (HALF * parameters(config) + adapters) / (_nf4_bytes(config) + adapters)
        words, case = f"{name} rank {rank} {ratio:.2f} times", {"the model": name, "the rank": rank}
        yield near(ratio, claim.stated), words, case


def _nf4_bytes(config: LlamaConfig) -> float:
    """Bytes of the weights under QLoRA: its linear layers in NF4, all else in 16 bits."""
    linear = linear_weights(config)
    return HALF * (parameters(config) - linear) + NF4_BITS / 8 * linear


def linear_weights(config: LlamaConfig) -> int:
    """The weights of the layers that QLoRA quantises: all linear ones but the output layer."""
    width, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    each = 2 * width * config.head_dim * heads + 3 * width * config.intermediate_size
    return config.num_hidden_layers * each


# FLOPs


@decides("two-percent-of-the-compute")
def two_percent_of_compute(claim: Claim) -> Answer:
    """A step at rank 8, whose adapters are about 2 % of SmolLM2-135M."""
    ratio = 100 * flop_ratio("smollm2-135m", 8)
    return near(ratio, claim.stated, 0.5), f"{ratio:.0f} % of the FLOPs, 512 tokens"


@decides("two-thirds-of-the-flops")
def two_thirds(claim: Claim) -> Cases:
    """By rank and tokens in a sequence, on a narrow and a wide model."""
    for name, tokens, rank in product(("smollm2-135m", "llama-3-8b"), (512, 2048), (1, 16, 64, 256)):
        ratio = flop_ratio(name, rank, tokens)
        case = {"the rank": rank, "the model's shape": name, "the length of the text": tokens}
        yield 2 / 3 <= ratio < 0.75, f"{name} rank {rank}, {tokens:,} tokens {ratio:.2f}", case


@decides("never-more-flops-than-full", on="the rank", always=True)
def never_more(claim: Claim) -> Cases:
    """Where 3 P = M + E: the rank above which LoRA has more FLOPs than full fine-tuning."""
    ratios = {rank: flop_ratio("smollm2-135m", rank) for rank in (8, 64, 146, 148, 256)}
    return [(ratio <= 1, f"rank {rank} {ratio:.3f}") for rank, ratio in ratios.items()]


@decides("last-block-a-third", on="whether attention and the output layer are counted")
def last_block(claim: Claim) -> Cases:
    """Adapters in the last of SmolLM2's 30 blocks: FLOPs in units of full fine-tuning's."""
    name = "smollm2-135m"
    block = last_blocks(build_on_meta(partial(Llama, shapes.config(name))), 1)
    lora, full = (step_flops(name, method) for method in (LoRA(8, targets=tuple(block)), FullFineTuning()))
    matrices, step = lora[flops.LAYERS] / full[flops.LAYERS], sum(lora.values()) / sum(full.values())
    yield near(matrices, claim.stated, 0.05), f"the blocks' matrices alone {matrices:.2f}"
    yield near(step, claim.stated, 0.05), f"the whole step of 512 tokens {step:.2f}"


_CHECKPOINTING = "method and width: LoRA has no weight gradients that the second pass would be small beside"


@decides("checkpointing-costs-a-third", on=_CHECKPOINTING)
def checkpointing(claim: Claim) -> Cases:
    """The second forward pass of the blocks, as a share of the step without it."""
    for name in ("smollm2-135m", "llama-3-8b"):
        for label, method, passes in (("full", FullFineTuning(), 3), ("LoRA r=8", LoRA(8), 2)):
            counts = step_flops(name, method)
            others = counts.get(flops.ATTENTION, 0) + counts.get(flops.ADAPTERS, 0)
            again = counts[flops.LAYERS] / passes + others / 3
            more = 100 * again / sum(counts.values())
            yield near(more, claim.stated, 0.2), f"{name}, {label} +{more:.0f} %"


@decides("25-percent-faster-gpt3", on="what is called a speedup")
def speedup_of_gpt3(claim: Claim) -> Cases:
    """Footnote 5's two throughputs, as time and as throughput."""
    full, lora = claim.values  # tokens/s on a V100
    gains = {"% less time a token": 100 * (1 - full / lora), "% more tokens a second": 100 * (lora / full - 1)}
    return [(near(gain, claim.stated, 0.05), f"{gain:.1f} {words}") for words, gain in gains.items()]
