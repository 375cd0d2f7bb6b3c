"""The tiny model, tokenizer and data that are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import nn

from lora_lab import Llama, LlamaConfig, save_model
from lora_lab.models.llama import rotary_frequencies
from lora_lab.models.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
HERE = "here"  # the working folder of a case, in its own
SECRET = "the user's own"  # content of files that nothing may change
TEXT = "the cat, 12 of them"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, "th", "the", "<s>", "</s>"]
MERGES = [("t", "h"), ("th", "e")]
BOS, EOS = len(TOKENS) - 2, len(TOKENS) - 1
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def tokenizer() -> Tokenizer:
    """Bytes, two merges and two special tokens."""
    backend = Backend(models.BPE({token: i for i, token in enumerate(TOKENS[:-2])}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS[-2:]])
    return Tokenizer(backend, bos_id=BOS, eos_id=EOS, chat_template=TEMPLATE)


def llama(seed: int = 0) -> Llama:
    """A random model that knows the tokens."""
    return Llama(CONFIG, seed=seed).eval()


def model_folder(folder: Path, seed: int = 0) -> Path:
    """The model and its tokenizer in Hugging Face's files."""
    return save_model(llama(seed), folder, tokenizer())


@torch.no_grad()
def complaints(model: nn.Module, tokens: Tokenizer | None = None) -> Iterator[str]:
    """What is wrong with a model that was loaded, as a user would notice it, or would not."""
    if not all(bool(torch.isfinite(value).all()) for value in model.parameters() if value.is_floating_point()):
        yield "weights are not finite"
    if isinstance(model, Llama):
        turns = rotary_frequencies(model.config)
        if not bool(torch.isfinite(turns).all()) or bool((turns < 0).any()):
            yield "positions are no finite numbers, or turn backwards, so that attention gives zeros"
    ids = [1, 5, 9, 200] if tokens is None else tokens.encode(TEXT, add_special_tokens=True)
    if tokens is not None:
        if not ids or max(ids) >= model.config.vocab_size:
            yield "a token has no row in the embedding"
            return
        if tokens.decode(tokens.encode(TEXT)) != TEXT:
            yield "text is lost between encoding and decoding"
        for token in (tokens.eos_id, tokens.bos_id, tokens.pad_id):
            if token is not None and not (isinstance(token, int) and 0 <= token < model.config.vocab_size):
                yield "a special token has no row in the embedding"
    outputs = model(torch.tensor([ids]))
    logits = getattr(outputs, "logits", outputs)  # transformers' or ours
    if not bool(torch.isfinite(logits).all()):
        yield "logits are not finite"
    if isinstance(model, Llama):
        answer = model.generate(torch.tensor(ids), 2, None if tokens is None else tokens.eos_id).tolist()
        if tokens is not None:
            tokens.decode(answer)
    if tokens is not None and tokens.chat_template is not None:
        tokens.chat([{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}])


def same_tensors(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names and numbers."""
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
