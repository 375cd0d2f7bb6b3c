"""Shapes of well-known models, for questions that need no weights: size, memory, FLOPs.

A :class:`lora_lab.Llama` of any of them is built in no memory on torch's device "meta".

References: SmolLM2: Ben Allal et al. 2025, arXiv 2502.02737; Llama 3: Grattafiori et al. 2024, 2407.21783;
Qwen2.5: Yang et al. 2024, 2412.15115. Each row is the config.json of the card that it names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lora_lab.models.llama import LlamaConfig, RopeScaling


class KnownModel(NamedTuple):
    """A model's shape, and where to check it.

    Args:
        config: the shape, as the base model's config.json gives it.
        parameters: number of parameters of the published model; a tied head is counted once.
        card: the name of the model's card, where config and count are published.
    """

    config: LlamaConfig
    parameters: int
    card: str

    @property
    def extra_parameters(self) -> int:
        """Parameters of our Llama alone: where Qwen2.5 has biases on q, k and v, ours has one on o too."""
        return self.config.num_hidden_layers * self.config.hidden_size if self.config.attention_bias else 0


_COLUMNS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
    "tie_word_embeddings",
)
_ROWS: dict[str, tuple[Any, ...]] = {  # the columns, then the number of parameters and the card
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 8192, 1e5, True, 134_515_008, "HuggingFaceTB/SmolLM2-135M"),
    "smollm2-360m": (960, 2560, 32, 15, 5, 49152, 8192, 1e5, True, 361_821_120, "HuggingFaceTB/SmolLM2-360M"),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152, 8192, 1.3e5, True, 1_711_376_384, "HuggingFaceTB/SmolLM2-1.7B"),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, 131072, 5e5, True, 1_235_814_400, "meta-llama/Llama-3.2-1B"),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, 131072, 5e5, True, 3_212_749_824, "meta-llama/Llama-3.2-3B"),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 8192, 5e5, False, 8_030_261_248, "meta-llama/Meta-Llama-3-8B"),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256, 8192, 5e5, False, 70_553_706_496, "meta-llama/Meta-Llama-3-70B"),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, 32768, 1e6, True, 494_032_768, "Qwen/Qwen2.5-0.5B"),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, 131072, 1e6, True, 1_543_714_304, "Qwen/Qwen2.5-1.5B"),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, 131072, 1e6, False, 7_615_616_512, "Qwen/Qwen2.5-7B"),
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama-3.2": {"rope_scaling": RopeScaling(32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)},
    "qwen2.5": {"rms_norm_eps": 1e-6, "attention_bias": True},
}
# Llama 3.1 8B and 70B differ from Llama 3 only in their positions: 131072, scaled by a factor of 8.
TABLE = {
    name: KnownModel(
        LlamaConfig(
            **dict(zip(_COLUMNS, sizes, strict=True)),
            head_dim=sizes[0] // sizes[3],
            **_OF_FAMILY.get(name.rpartition("-")[0], {}),
        ),
        parameters,
        card,
    )
    for name, (*sizes, parameters, card) in _ROWS.items()
}


def names() -> list[str]:
    """Return the names of the models, by family and then by size."""
    return list(TABLE)


def config(name: str) -> LlamaConfig:
    """Return the shape of a well-known model.

    Args:
        name: one of :func:`names`, such as "llama-3-8b".

    Raises:
        ValueError: the table has no such model.
    """
    if name not in TABLE:
        raise ValueError(f"No shape is known by the name {name!r}; use one of: {', '.join(TABLE)}.")
    return TABLE[name].config
