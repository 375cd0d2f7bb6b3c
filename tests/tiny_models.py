"""Small random models that several test files build: of transformers, and one of plain torch."""

import copy
import functools
from collections.abc import Callable

import torch
import transformers as hf
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import nn

from lora_lab import LoRAConfig, inject
from lora_lab.models.tokenizer import PRE_TOKENIZERS, Tokenizer
from tests.helpers import ROOT, randomise, randomise_all

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


# Relatives of a Llama: (config, model, llama.cpp's architecture, its word splitting, settings).
RELATIVES = {
    "Llama": (hf.LlamaConfig, hf.LlamaForCausalLM, "llama", "llama-bpe", {"attention_bias": True}),
    "Mistral": (hf.MistralConfig, hf.MistralForCausalLM, "llama", "gpt-2", {"sliding_window": 96, "head_dim": 16}),
    "Qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, "qwen2", "qwen2", {"tie_word_embeddings": True}),
    "Qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, "qwen3", "qwen2", {"head_dim": 32}),
}


def relative(kind: str, seed: int = 0, **changes: object) -> nn.Module:
    """A random one that knows the tokens of :func:`trained_tokenizer`; all its parameters are random."""
    config, model, _, _, settings = RELATIVES[kind]
    sizes = {"vocab_size": 610, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
    settings = SHAPE | sizes | {"tie_word_embeddings": False, "rope_theta": 5000.0} | settings | changes
    return randomise_all(model(config(**settings)).eval(), seed)


@functools.cache
def trained_tokenizer(words: str) -> Tokenizer:
    """600 byte pairs of the documentation, split into words by a rule of GGUF's, and three tokens that were added."""
    backend = Backend(models.BPE(ignore_merges=words == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = PRE_TOKENIZERS[words], decoders.ByteLevel()
    if words == "qwen2":
        backend.normalizer = normalizers.NFC()
    special = [AddedToken(token, special=True, normalized=False) for token in ("<|endoftext|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    backend.train_from_iterator([path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md"))], trainer)
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    return Tokenizer(backend, eos_id=1, chat_template=template)


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


def phi() -> nn.Module:
    """Attention and MLP side by side, a head with a bias, and rotary embeddings of half of each head."""
    return hf.PhiForCausalLM(hf.PhiConfig(**SHAPE, tie_word_embeddings=False))


def olmo2() -> nn.Module:
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**SHAPE))


def mistral() -> nn.Module:
    """Its layers look back four tokens only."""
    return hf.MistralForCausalLM(hf.MistralConfig(**SHAPE, sliding_window=4))


def mixtral() -> nn.Module:
    """The weights of all experts of a layer are one parameter of three dimensions."""
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SHAPE, **experts, head_dim=8))


def mamba() -> nn.Module:
    """A state-space model: no attention, no positions, and no cache of keys and values."""
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    return hf.MambaForCausalLM(hf.MambaConfig(**shape, state_size=4))


def mamba2() -> nn.Module:
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    return hf.Mamba2ForCausalLM(
        hf.Mamba2Config(**shape, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
    )


def bert_config(**changes: int) -> hf.BertConfig:
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = {"num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 3}
    return hf.BertConfig(**(shape | without | config | changes))


def bert() -> nn.Module:
    """A class for each text."""
    return hf.BertForSequenceClassification(bert_config())


def bert_tokens() -> nn.Module:
    """A class for each token."""
    return hf.BertForTokenClassification(bert_config())


def t5() -> nn.Module:
    shape = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0))


def vit() -> nn.Module:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.ViTForImageClassification(hf.ViTConfig(**shape, **without, image_size=16, patch_size=4, num_labels=3))


def whisper() -> nn.Module:
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in [("layers", 1), ("attention_heads", 2), ("ffn_dim", 24)]
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 40}
    sizes = {"num_mel_bins": 8, "d_model": 16, "max_source_positions": 10, "max_target_positions": 16, "dropout": 0.0}
    config = hf.WhisperConfig(**sides, **tokens, **sizes, suppress_tokens=None, begin_suppress_tokens=None)
    return hf.WhisperForConditionalGeneration(config)


@functools.cache
def original(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with random numbers everywhere, biases and norms too."""
    return randomise_all(make().eval(), seed=3, size=0.25)


def fresh(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of it that may be changed."""
    return copy.deepcopy(original(make)).to(dtype)


class Pictures(nn.Module):
    """A convolution, an embedding and two linear layers: every kind of weight that stands the usual way round."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.patches = nn.Conv2d(1, 6, 4, stride=4)
        self.places = nn.Embedding(4, 6)
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.patches(x.view(-1, 1, 8, 8)).flatten(2).mT + self.places(torch.arange(4))
        return self.head(torch.relu(self.hidden(seen)).sum(1))


PICTURES = ["patches", "places", "hidden", "head"]


def pictures(seed=1, rank=2, alpha=3.0, targets=PICTURES, **options):
    """A net of that kind with random adapters."""
    model = Pictures()
    inject(model, LoRAConfig(rank, alpha, targets=targets), **options)
    return randomise(model, seed)
