"""Shapes of well-known models, for questions that need no weights: how large, how much memory, how many FLOPs.

A :class:`lora_lab.Llama` of any of them is built in no memory on torch's device "meta".

References: SmolLM2: Ben Allal et al. 2025, arXiv 2502.02737; Llama 3: Grattafiori et al. 2024, 2407.21783;
Qwen2.5: Yang et al. 2024, 2412.15115.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_lab.models.llama import LlamaConfig, RopeScaling
from lora_lab.system.renamed import renamed


@dataclass(frozen=True)
class KnownModel:
    """A model's shape and where it can be checked.

    Args:
        config: the shape, as the base model's config.json gives it.
        parameters: how many the published model has, a tied head counted once.
        source: where config and count are published: the name of the model's card.
        note: what else holds, or differs.
        extra_parameters: how many more our Llama has than the published model.
    """

    config: LlamaConfig
    parameters: int
    source: str
    note: str = ""
    extra_parameters: int = 0


_STRETCHED = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
_TIED = {"tie_word_embeddings": True}
_LLAMA3 = {"rope_theta": 500_000.0}
_LLAMA32 = _LLAMA3 | _TIED | {"rope_scaling": _STRETCHED}
_QWEN25 = {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "attention_bias": True}
_O_BIAS = "Biases on q, k and v only, while our Llama puts one on o too:"
# The eight numbers: vocabulary, width, inner width, layers, query heads, key-value heads, numbers a head, positions.
TABLE: dict[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=100_000.0, **_TIED),
        parameters=134_515_008,
        source="HuggingFaceTB/SmolLM2-135M, config.json",
    ),
    "smollm2-360m": KnownModel(
        LlamaConfig(49152, 960, 2560, 32, 15, 5, 64, 8192, rope_theta=100_000.0, **_TIED),
        parameters=361_821_120,
        source="HuggingFaceTB/SmolLM2-360M, config.json",
    ),
    "smollm2-1.7b": KnownModel(
        LlamaConfig(49152, 2048, 8192, 24, 32, 32, 64, 8192, rope_theta=130_000.0, **_TIED),
        parameters=1_711_376_384,
        source="HuggingFaceTB/SmolLM2-1.7B, config.json",
    ),
    "llama-3.2-1b": KnownModel(
        LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 131072, **_LLAMA32),
        parameters=1_235_814_400,
        source="meta-llama/Llama-3.2-1B, config.json",
    ),
    "llama-3.2-3b": KnownModel(
        LlamaConfig(128256, 3072, 8192, 28, 24, 8, 128, 131072, **_LLAMA32),
        parameters=3_212_749_824,
        source="meta-llama/Llama-3.2-3B, config.json",
    ),
    "llama-3-8b": KnownModel(
        LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, **_LLAMA3),
        parameters=8_030_261_248,
        source="meta-llama/Meta-Llama-3-8B, config.json",
        note="Llama 3.1 8B differs only in its positions: 131072, stretched by a factor of 8.",
    ),
    "llama-3-70b": KnownModel(
        LlamaConfig(128256, 8192, 28672, 80, 64, 8, 128, 8192, **_LLAMA3),
        parameters=70_553_706_496,
        source="meta-llama/Meta-Llama-3-70B, config.json",
        note="Llama 3.1 70B differs only in its positions: 131072, stretched by a factor of 8.",
    ),
    "qwen2.5-0.5b": KnownModel(
        LlamaConfig(151936, 896, 4864, 24, 14, 2, 64, 32768, **_QWEN25, **_TIED),
        parameters=494_032_768,
        source="Qwen/Qwen2.5-0.5B, config.json",
        note=f"{_O_BIAS} 21,504 parameters more.",
        extra_parameters=21_504,
    ),
    "qwen2.5-1.5b": KnownModel(
        LlamaConfig(151936, 1536, 8960, 28, 12, 2, 128, 131072, **_QWEN25, **_TIED),
        parameters=1_543_714_304,
        source="Qwen/Qwen2.5-1.5B, config.json",
        note=f"{_O_BIAS} 43,008 parameters more.",
        extra_parameters=43_008,
    ),
    "qwen2.5-7b": KnownModel(
        LlamaConfig(152064, 3584, 18944, 28, 28, 4, 128, 131072, **_QWEN25),
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
    """Where the numbers of a model can be checked; its note in :data:`TABLE` says what else to know.

    Raises:
        ValueError: the table has no such model.
    """
    return _row(name).source


def _row(name: str) -> KnownModel:
    if name not in TABLE:
        raise ValueError(f"No shape is known by the name {name!r}; use one of: {', '.join(TABLE)}.")
    return TABLE[name]


__getattr__ = renamed(__name__, {"shape": "config"})
