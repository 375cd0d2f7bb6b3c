r"""A Llama written for reading: tokens -> embedding -> blocks -> head.

Each block adds attention, then a gated MLP, to a residual stream:

    x = x + Attention(RMSNorm(x))
    x = x + MLP(RMSNorm(x))

Module names are those of Hugging Face's ``LlamaForCausalLM``, so weights and adapters are
interchangeable with it. Logits in float32 are bit-identical to it on the same machine.

Shapes in the comments follow SmolLM2-135M with a batch of 4 sequences of 128 tokens: width 576,
9 query heads that share 3 key-value heads, heads of width 64, inner width 1536, a vocabulary of 49152 tokens.

References: Touvron et al. 2023, "LLaMA", arXiv 2302.13971, section 2.2; RMSNorm: Zhang and Sennrich
2019, 1910.07467; rotary positions: Su et al. 2021, 2104.09864; grouped queries: Ainslie et al. 2023,
2305.13245; SwiGLU: Shazeer 2020, 2002.05202.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_lab.models.reading import Reader, Sampling, stream
from lora_lab.system.schema import Number, Positive, Seed, Size, check, check_fields
from lora_lab.task import is_encoder_decoder

# Ranges that no Llama leaves. Within them a model without weights is built in a second, no product of sizes overflows,
# and positions are finite.
MOST_LAYERS = 1_000
_Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
_Heads = Annotated[int, Field(ge=1, le=2**16)]
_Width = Annotated[int, Field(ge=1, le=2**24)]
_Scale = Annotated[Number, Field(ge=1)]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary positions beyond the context it was pre-trained on, with Hugging Face's names.

    That context is ``original_max_position_embeddings``. Frequencies with a wavelength above context /
    ``low_freq_factor`` are divided by ``factor``, those below context / ``high_freq_factor`` are unchanged, and those
    between are interpolated.
    """

    factor: _Scale
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"low_freq_factor is {self.low_freq_factor}, but must be below {self.high_freq_factor}.")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, with Hugging Face's names.

    Raises:
        ValueError: the heads do not divide evenly, or a number is not finite or out of the range of real models.
    """

    vocab_size: _Width
    hidden_size: _Width
    intermediate_size: _Width
    num_hidden_layers: _Layers
    num_attention_heads: _Heads
    num_key_value_heads: _Heads
    head_dim: _Heads
    max_position_embeddings: Size = 2048
    rms_norm_eps: Positive = 1e-5
    rope_theta: _Scale = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads is {heads}, but it must be a multiple of num_key_value_heads, {kv_heads}: "
                "each key-value head serves as many query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but it must be even, because positions rotate pairs.")


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """Return the angle, in radians, by which each pair of a head rotates per position: (head_dim / 2,), float32."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")  # (32,) on the CPU: equal everywhere
    exponent = pairs / config.head_dim  # (32,)
    frequencies = 1.0 / float(config.rope_theta) ** exponent  # (32,)
    if (scaling := config.rope_scaling) is None:
        return frequencies  # (32,)
    wavelength = 2 * math.pi / frequencies  # (32,) positions for one full rotation
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    smooth = (context / wavelength - low) / (high - low)  # (32,)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies  # (32,)
    stretched = torch.where(wavelength > context / low, frequencies / scaling.factor, blended)  # (32,)
    return torch.where(wavelength < context / high, frequencies, stretched)  # (32,)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim/2]) by the angle of its position."""
    first, second = x.chunk(2, dim=-1)  # (4, 9, 128, 64) -> 2 x (4, 9, 128, 32)
    turned = torch.cat((-second, first), dim=-1)  # (4, 9, 128, 64)
    return x * cos + turned * sin  # (4, 9, 128, 64)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Split the last dimension: (batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)  # (4, 128, 576) -> (4, 9, 128, 64)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(Q K^T / sqrt(head_dim)) V, heads concatenated: (batch, length, heads * head_dim)."""
    causal = mask is None and query.shape[2] > 1
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True
    )  # (4, 9, 128, 64)
    return mixed.transpose(1, 2).flatten(2)  # (4, 128, 576)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))  # (576,)
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # (4, 128, 576)


class KeyValueCache(dict[int, tuple[Tensor, Tensor]]):
    """Keys and values of past positions, by layer, so that generation runs the model on each token once."""

    @property
    def length(self) -> int:
        """Number of cached positions."""
        return self[0][0].shape[2] if self else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, kv heads, new, head_dim) to the cache of a layer, and return all its keys and values."""
        if layer in self:
            old_key, old_value = self[layer]  # (4, 3, past, 64)
            key = torch.cat((old_key, key), dim=2)  # (4, 3, past + new, 64)
            value = torch.cat((old_value, value), dim=2)  # (4, 3, past + new, 64)
        self[layer] = (key, value)
        return key, value


class Attention(nn.Module):
    """Causal self-attention; several query heads share one key-value head."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * config.head_dim, bias=config.attention_bias)  # 576 -> 576
        self.k_proj = nn.Linear(width, kv_heads * config.head_dim, bias=config.attention_bias)  # 576 -> 192
        self.v_proj = nn.Linear(width, kv_heads * config.head_dim, bias=config.attention_bias)  # 576 -> 192
        self.o_proj = nn.Linear(heads * config.head_dim, width, bias=config.attention_bias)  # 576 -> 576

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        query = split_heads(self.q_proj(x), self.head_dim)  # (4, 128, 576) -> (4, 9, 128, 64)
        key = split_heads(self.k_proj(x), self.head_dim)  # (4, 128, 192) -> (4, 3, 128, 64)
        value = split_heads(self.v_proj(x), self.head_dim)  # (4, 128, 192) -> (4, 3, 128, 64)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)  # (4, 9, 128, 64), (4, 3, 128, 64)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)  # (4, 3, past + 128, 64)
        return self.o_proj(attend(query, key, value, mask))  # (4, 128, 576)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)  # 576 -> 1536
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)  # 576 -> 1536
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)  # 1536 -> 576

    def forward(self, x: Tensor) -> Tensor:
        gated = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (4, 128, 1536)
        return self.down_proj(gated)  # (4, 128, 576)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)  # (4, 128, 576)
        return x + self.mlp(self.post_attention_layernorm(x))  # (4, 128, 576)


class Trunk(nn.Module):
    """Everything except the head: token ids in, last hidden states out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # From an empty matrix, because nn.Embedding's own initialisation takes most of a second on the meta device.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        # Copies by device, not a buffer, which a cast to bfloat16 would round.
        self.frequencies = {torch.device("cpu"): rotary_frequencies(config)}  # (32,)
        self.gradient_checkpointing = False

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        past = cache.length if cache else 0
        new = ids.shape[1]
        x = self.embed_tokens(ids)  # (4, 128) -> (4, 128, 576)
        positions = torch.arange(past, past + new, device=ids.device, dtype=torch.float32)  # (128,)
        angles = positions[:, None] * self.frequencies_on(ids.device)  # (128, 32)
        angles = torch.cat((angles, angles), dim=-1)  # (128, 64)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (128, 64)
        mask = _mask(past, new, attention_mask, ids.device)  # None, or (4 or 1, 1, 128, past + 128)
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for layer in self.layers:
            if checkpointed:  # of the block only x is saved, and the backward pass recomputes it
                x = checkpoint(layer, x, cos, sin, mask, None, use_reentrant=False)  # (4, 128, 576)
            else:
                x = layer(x, cos, sin, mask, cache)  # (4, 128, 576)
        return self.norm(x)  # (4, 128, 576)

    def frequencies_on(self, device: torch.device) -> Tensor:
        """Return the rotary frequencies (32,) on a device, copied once, for each copy makes Python wait for the GPU."""
        if device not in self.frequencies:
            self.frequencies[device] = self.frequencies[torch.device("cpu")].to(device)  # (32,)
        return self.frequencies[device]  # (32,)


class Llama(nn.Module):
    """A causal language model: logits of the next token at every position.

    Its weights are random, from the distribution that Hugging Face uses; :func:`lora_lab.load_pretrained` reads
    pre-trained ones.

    Args:
        config: the shape.
        seed: of the weights; the global random generator is not used.
    """

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        super().__init__()
        seed = check(seed, Seed, "seed")
        self.config = check(config, LlamaConfig, "config")
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws weights too, which are replaced below
            self.model = Trunk(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        if not self.lm_head.weight.is_meta:
            self._initialise(seed)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Return logits (batch, length, vocabulary).

        Args:
            ids: token ids (batch, length), integers.
            attention_mask: (batch, past + length), 1 for tokens and 0 for padding, on either side.
            cache: keys and values of the past positions, which ``ids`` continue; it is extended in place.
        """
        hidden = self.model(ids, attention_mask, cache)  # (4, 128, 576)
        return self.lm_head(hidden)  # (4, 128, 49152)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens, with as many rows as the model knows tokens."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head, which "all-linear" does not adapt."""
        return self.lm_head

    def gradient_checkpointing_enable(self) -> None:
        """Save only the input of each block in training, and recompute the block in the backward pass.

        Reference: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
        """
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Save all that the backward pass needs again, as ``fit`` does at its end."""
        self.model.gradient_checkpointing = False

    def tie(self) -> None:
        """Share one matrix between head and embedding, if the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        # Matrices are normal with standard deviation 0.02, biases 0, norms 1.
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                normal = torch.randn(parameter.shape, generator=generator, device="cpu")  # equal on all devices
                parameter.copy_(normal * 0.02)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        stop: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
    ) -> Tensor:
        """Continue one prompt, and return the new tokens only; ``lora_lab.models.reading.stream`` does so one by one.

        Args:
            ids: the prompt, (length,), at least one token.
            max_new_tokens: maximum number of new tokens.
            stop: a token that ends the text (it is not returned).
            temperature, seed, repetition_penalty: as for :class:`lora_lab.models.reading.Sampling`.

        Returns:
            Token ids (new,), new <= max_new_tokens.

        Raises:
            ValueError: the prompt is empty, not one-dimensional or holds a token that the model does not know; prompt
                and ``max_new_tokens`` together exceed ``max_position_embeddings``; or the temperature or the penalty is
                out of range.
        """
        sampling = Sampling(temperature, seed, repetition_penalty)
        tokens = list(stream(LlamaReader(self), ids, max_new_tokens, stop, sampling))
        return torch.tensor(tokens, dtype=torch.long)  # (new,)


def _mask(past: int, new: int, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Return True where a query may attend to a key; None where causal attention, or one last query, needs no mask."""
    if attention_mask is None and (past == 0 or new == 1):
        return None
    queries = torch.arange(past, past + new, device=device)[:, None]  # (new, 1)
    keys = torch.arange(past + new, device=device)[None]  # (1, past + new)
    allowed = (keys <= queries)[None, None]  # (1, 1, new, past + new)
    if attention_mask is not None:
        real = attention_mask.bool()[:, None, None, :]  # (4, 1, 1, past + new)
        # A padded query attends to itself, because a row without any key would be NaN, and NaN would spread.
        allowed = (allowed & real) | (keys == queries)  # (4, 1, new, past + new)
    return allowed


# Token after token


class LlamaReader(Reader):
    """What a Llama has read, as :class:`lora_lab.models.reading.Reader`.

    Padding on the left shifts positions, but rotary embeddings depend on their differences only.
    """

    def __init__(self, model: Llama, mask: Tensor | None = None) -> None:
        super().__init__(model, mask)
        self.cache = KeyValueCache()

    def branch(self) -> LlamaReader:
        """Return another reader, which shares keys and values, because a cache is extended by new tensors."""
        other = copy.copy(self)
        other.cache = KeyValueCache(self.cache)
        return other

    def repeat(self, mask: Tensor) -> LlamaReader:
        """Return a reader of a batch of texts that all begin with the one text that this one has read, without padding.

        Padding between that beginning and the rest of a text would move them away from each other. So the keys of the
        beginning are rotated by the number of padding positions: rotations add up.

        Args:
            mask: (batch, new) for the tokens that are read next, as for :class:`Reader`.
        """
        past = mask.new_ones(len(mask), self.length)  # (16, past)
        other = LlamaReader(self.model, torch.cat([past, mask], 1))
        other.length = self.length
        padding = (mask == 0).sum(1)[:, None, None, None]  # (16, 1, 1, 1)
        angles = padding * self.model.model.frequencies_on(mask.device).repeat(2)  # (16, 1, 1, 64)
        for layer, (key, value) in self.cache.items():  # (1, 3, past, 64) each
            turned = rotate(key, angles.cos().to(key.dtype), angles.sin().to(key.dtype))  # (16, 3, past, 64)
            other.cache[layer] = turned, value.expand(len(mask), -1, -1, -1)
        return other

    def _compute_logits(self, ids: Tensor, each: bool) -> Tensor:
        hidden = self.model.model(ids, self.mask, self.cache)  # (16, new, 576)
        return self.model.lm_head(hidden if each else hidden[:, -1:])  # (16, 1 or new, 49152)


def reader_of(model: nn.Module, mask: Tensor | None = None) -> Reader:
    """Return a reader that has read nothing yet.

    Args:
        model, mask: as for :class:`Reader`.

    Raises:
        ValueError: the model is not a causal language model of this package or of transformers.
    """
    if isinstance(model, Llama):
        return LlamaReader(model, mask)
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or is_encoder_decoder(model):
        raise ValueError(
            f"Only a causal language model can continue a text, but this is a {type(model).__name__}; use a "
            "lora_lab.Llama or a causal model of transformers, or generate with the model's own library."
        )
    return Reader(model, mask)  # for a model of transformers
