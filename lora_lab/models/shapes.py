"""Shapes of well-known models, for questions that need no weights: size, memory, FLOPs.

A :class:`lora_lab.Llama` of any of them is built in no memory on torch's device "meta".

References: SmolLM2: Ben Allal et al. 2025, arXiv 2502.02737; Llama 3: Grattafiori et al. 2024, 2407.21783;
Qwen2.5: Yang et al. 2024, 2412.15115.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lora_lab.models.llama import LlamaConfig, RopeScaling


@dataclass(frozen=True)
class KnownModel:
    """A model's shape, and where to check it.

    Args:
        config: the shape, as the base model's config.json gives it.
        parameters: number of parameters of the published model, a tied head counted once.
        source: the name of the model's card, where config and count are published.
        note: differences to know about.
        extra_parameters: parameters of our Llama that the published model does not have.
    """

    config: LlamaConfig
    parameters: int
    source: str
    note: str = ""
    extra_parameters: int = 0


# What the models of a family share.
_SMOLLM2 = partial(LlamaConfig, vocab_size=49152, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True)
_LLAMA3 = partial(
    LlamaConfig,
    vocab_size=128256,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500_000.0,
)
_LLAMA32 = partial(
    LlamaConfig,
    vocab_size=128256,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    tie_word_embeddings=True,
)
_QWEN25 = partial(LlamaConfig, rms_norm_eps=1e-6, rope_theta=1_000_000.0, attention_bias=True)
_O_BIAS = "Biases on q, k and v only, while our Llama has one on o too:"
TABLE: dict[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        _SMOLLM2(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rope_theta=100_000.0,
        ),
        parameters=134_515_008,
        source="HuggingFaceTB/SmolLM2-135M, config.json",
    ),
    "smollm2-360m": KnownModel(
        _SMOLLM2(
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=32,
            num_attention_heads=15,
            num_key_value_heads=5,
            rope_theta=100_000.0,
        ),
        parameters=361_821_120,
        source="HuggingFaceTB/SmolLM2-360M, config.json",
    ),
    "smollm2-1.7b": KnownModel(
        _SMOLLM2(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=32,
            rope_theta=130_000.0,
        ),
        parameters=1_711_376_384,
        source="HuggingFaceTB/SmolLM2-1.7B, config.json",
    ),
    "llama-3.2-1b": KnownModel(
        _LLAMA32(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            head_dim=64,
        ),
        parameters=1_235_814_400,
        source="meta-llama/Llama-3.2-1B, config.json",
    ),
    "llama-3.2-3b": KnownModel(
        _LLAMA32(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            head_dim=128,
        ),
        parameters=3_212_749_824,
        source="meta-llama/Llama-3.2-3B, config.json",
    ),
    "llama-3-8b": KnownModel(
        _LLAMA3(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        parameters=8_030_261_248,
        source="meta-llama/Meta-Llama-3-8B, config.json",
        note="Llama 3.1 8B differs only in its positions: 131072, scaled by a factor of 8.",
    ),
    "llama-3-70b": KnownModel(
        _LLAMA3(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
        ),
        parameters=70_553_706_496,
        source="meta-llama/Meta-Llama-3-70B, config.json",
        note="Llama 3.1 70B differs only in its positions: 131072, scaled by a factor of 8.",
    ),
    "qwen2.5-0.5b": KnownModel(
        _QWEN25(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        ),
        parameters=494_032_768,
        source="Qwen/Qwen2.5-0.5B, config.json",
        note=f"{_O_BIAS} 21,504 parameters more.",
        extra_parameters=21_504,
    ),
    "qwen2.5-1.5b": KnownModel(
        _QWEN25(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            head_dim=128,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
        ),
        parameters=1_543_714_304,
        source="Qwen/Qwen2.5-1.5B, config.json",
        note=f"{_O_BIAS} 43,008 parameters more.",
        extra_parameters=43_008,
    ),
    "qwen2.5-7b": KnownModel(
        _QWEN25(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            head_dim=128,
            max_position_embeddings=131072,
        ),
        parameters=7_615_616_512,
        source="Qwen/Qwen2.5-7B, config.json",
        note=f"{_O_BIAS} 100,352 parameters more.",
        extra_parameters=100_352,
    ),
}


def names() -> list[str]:
    """The models of the table, by family and then by size."""
    return list(TABLE)


def config(name: str) -> LlamaConfig:
    """The shape of a well-known model.

    Args:
        name: one of :func:`names`, such as "llama-3-8b".

    Raises:
        ValueError: the table has no such model.
    """
    return _row(name).config


def source(name: str) -> str:
    """Where a model's shape can be checked; see also its note in :data:`TABLE`.

    Raises:
        ValueError: the table has no such model.
    """
    return _row(name).source


def _row(name: str) -> KnownModel:
    if name not in TABLE:
        raise ValueError(f"No shape is known by the name {name!r}; use one of: {', '.join(TABLE)}.")
    return TABLE[name]
