"""Small random models of transformers that several test files build."""

import functools
from collections.abc import Callable

import torch
import transformers as hf
from torch import nn

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, tie_word_embeddings=False))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True))


def gemma3() -> nn.Module:
    """Its layers look back four tokens only."""
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4))


def gpt2(tied: bool = False) -> nn.Module:
    shape = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "tie_word_embeddings": tied}
    without = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **without, bos_token_id=1, eos_token_id=2))


def falcon() -> nn.Module:
    """Its linear layers are of a class of their own, derived from nn.Linear, with biases here."""
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    without = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = hf.FalconConfig(**shape, **without, bias=True, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    return hf.FalconForCausalLM(config)


@functools.cache
def original(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with random numbers everywhere, biases and norms too."""
    model = make().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.25)
    return model
