"""Text to token ids and back, and conversations to text, by the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import Field
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from typing_extensions import TypedDict

from lora_lab.models.chat_template import render
from lora_lab.system.files import atomic_files, read_json, repair, write_json
from lora_lab.system.schema import Count, check
from lora_lab.system.wording import short_repr, shortened

TEMPLATE = "chat_template.jinja"  # of newer folders; it has precedence over the one in tokenizer_config.json
# How text is split before byte pairs are merged, by the name in a GGUF file (as llama.cpp defines them).
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit is a word
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
} | {
    name: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for name, words in (("llama-bpe", _LLAMA3_WORDS), ("qwen2", _QWEN2_WORDS))
}
# What is done to a text first, by our own entry in a GGUF file's header, which has none for it. Of Qwen2's files that
# lack the entry it is Unicode's NFC.
_NORMALIZER = "lora_lab.normalizer"
_GGUF_IDS = {"eos_id": "eos", "bos_id": "bos", "pad_id": "padding"}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # llama.cpp's types of tokens; 1 is a normal one
_LETTERS = "a " + "".join(map(chr, range(33, 127)))
_MOST_TOKENS = 10  # that a letter becomes; bytes of UTF-8 are at most four
_ROLES = ("system", "user", "assistant")
# What is read of a GGUF file's header.
_Header = TypedDict(
    "_Header",
    {
        "tokenizer.ggml.tokens": Required[Annotated[list[str], Field(min_length=1)]],
        "tokenizer.ggml.merges": Required[list[str]],
        "tokenizer.ggml.token_type": Required[list[int]],
        "tokenizer.ggml.add_bos_token": bool,
        "tokenizer.chat_template": str,
        "tokenizer.ggml.eos_token_id": Count | None,
        "tokenizer.ggml.bos_token_id": Count | None,
        "tokenizer.ggml.padding_token_id": Count | None,
    },
    total=False,
)


class _Word(TypedDict, total=False):
    content: Required[str]


class _NamedTemplate(TypedDict):
    name: str
    template: str


class _Settings(TypedDict, total=False):
    """What is read of a tokenizer_config.json."""

    eos_token: str | _Word | None
    bos_token: str | _Word | None
    pad_token: str | _Word | None
    chat_template: str | list[_NamedTemplate] | None


class Tokenizer:
    """A byte-level tokenizer with the few special tokens that training and chatting need.

    Args:
        backend: the tokenizer of the ``tokenizers`` library.
        eos_id, bos_id, pad_id: ids of the tokens that end a text, begin a text, and pad a batch (None: no such token).
        chat_template: the model's Jinja template for conversations (None: the model has none).
    """

    def __init__(
        self,
        backend: Backend,
        eos_id: int | None = None,
        bos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.eos_id, self.bos_id = eos_id, bos_id
        self.pad_id = pad_id if pad_id is not None else eos_id
        self.chat_template = chat_template

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja template for conversations; it may be set."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        """Set the template."""
        self._chat_template = check(template, str | None, "chat_template")
        self.__dict__.pop("control_tokens", None)  # which depend on it

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens, as they are written in a text, with their ids."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @cached_property
    def control_tokens(self) -> list[str]:
        """The tokens that structure a conversation.

        These are the special tokens that end or begin a text, stand in the chat template, or are named after a role,
        because some templates put those together (``"<|" + role + "|>"``). In some tokenizers, as DeepSeek's, the
        tokens of roles are not special ones; then they count if they stand in the template.
        """
        template, tokens = self.chat_template or "", []
        ends = {self.backend.id_to_token(token) for token in (self.eos_id, self.bos_id) if token is not None}
        for token in self.backend.get_added_tokens_decoder().values():
            text, in_template = token.content, token.content in template
            of_role = not text.isalnum() and any(role in text.lower() for role in _ROLES)
            if (text in ends or in_template or of_role) if token.special else (in_template and of_role):
                tokens.append(text)
        return sorted(tokens)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; ``add_special_tokens`` prepends those that the model expects first (often none).

        What stands for a special token in the text becomes that token, as in transformers: see :meth:`check_text`.

        Raises:
            ValueError: the text holds half a character.
        """
        _check_characters(text, "The text")
        add_special_tokens = check(add_special_tokens, bool, "add_special_tokens")
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def check_text(self, text: str, what: str = "A text", allow_special: bool = False) -> None:
        """Check that a user's text contains no control tokens and no invalid characters.

        Args:
            what: the text is, for the message.
            allow_special: whether it may hold what stands for a special token.

        Raises:
            ValueError: it holds half a character, or one of the :attr:`control_tokens`, which would end a turn or begin
                another one in the middle of the text.
        """
        _check_characters(text, what)
        if allow_special:
            return
        for token in self.control_tokens:
            if (place := text.find(token)) >= 0:
                raise ValueError(
                    f"{what} holds {token!r}, which the model reads as a special token and not as text: "
                    f"{_around(text, place)}; remove or rewrite it (in a text for next-token prediction "
                    "allow_special=True allows it)."
                )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included, so that ``decode(encode(text)) == text``.

        A byte that the vocabulary lacks is lost. SmolLM2 lacks six control characters (04, 06, 13, 14, 16 and
        1D in hexadecimal) and Unicode's planes 4 to 11, in which no character is assigned.

        Raises:
            ValueError: an id is negative, or too large for any vocabulary, or is no whole number.
        """
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise ValueError(f"ids is {short_repr(ids)}, but it must be a list of token ids.")
        try:
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        except OverflowError:
            wrong = next(i for i in ids if not 0 <= i < 2**32)
            raise ValueError(f"ids holds {shortened(str(wrong))}, which is no token's id.") from None
        except (TypeError, ValueError):
            raise ValueError(f"ids is {short_repr(ids)}, but it must be a list of token ids.") from None

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ``ids`` in parts, each as soon as its letters are complete; together they are ``decode(ids)``."""
        read: list[int] = []
        shown = ""
        for token in ids:
            read.append(token)
            complete = self.decode(read).rstrip("\ufffd")  # the rest of a letter may follow
            if len(complete) > len(shown):
                yield complete[len(shown) :]
                shown = complete
        if rest := self.decode(read)[len(shown) :]:
            yield rest

    def chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation in the format that the model was trained on.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]``.
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            ValueError: the model has no chat template; the template refuses the messages, fails, or takes more time or
                memory than a text can need; or as for :meth:`check_text`.
        """
        if self.chat_template is None:
            raise ValueError(
                "This tokenizer has no chat template; pass plain text to the model instead, to train on a .txt file or "
                'on lines of {"text": ...}.'
            )
        for message in check(messages, Sequence[Mapping[str, Any]], "messages"):
            for text in message.values():
                self.check_text(str(text))
        tokens = {
            name: self.backend.id_to_token(token) if token is not None else ""
            for name, token in (("eos_token", self.eos_id), ("bos_token", self.bos_id))
        }
        variables = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **tokens}
        try:
            return render(self.chat_template, variables)
        except Exception as error:  # a template is a program, which can raise whatever Python does
            reason = shortened(str(error) or type(error).__name__).removesuffix(".")
            raise ValueError(f"The chat template refuses these messages: {reason}.") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as Hugging Face reads them."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name in ("eos", "bos", "pad"):
            token = getattr(self, f"{name}_id")
            if token is not None:
                config[f"{name}_token"] = self.backend.id_to_token(token)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        with atomic_files(folder, remove=[TEMPLATE]) as temporary:  # an older template would be read first
            (temporary / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
            write_json(temporary / "tokenizer_config.json", config)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a folder's tokenizer.json (and tokenizer_config.json, chat_template.jinja if there).

        Raises:
            FileNotFoundError: tokenizer.json is missing.
            ValueError: it cannot be read.
        """
        folder = Path(folder)
        repair(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{folder} lacks the file tokenizer.json; make it with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )
        try:
            # Not by its path, which the library cannot read if a folder's name is not UTF-8.
            backend = Backend.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
            backend.no_truncation()  # some folders contain the limits of their last training run
            backend.no_padding()
            _try_out(backend)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exception, and its panics are not even that
            reason = shortened(str(error))
            raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer file ({reason}); copy it anew.") from None
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        check(config, _Settings, str(path))
        ids = {}
        for name in ("eos", "bos", "pad"):
            token = config.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            try:
                ids[f"{name}_id"] = backend.token_to_id(token) if token else None
            except UnicodeEncodeError:
                raise ValueError(f"{path}: {name}_token is {token!r:.80}, which holds half a character.") from None
        template = config.get("chat_template")
        if (folder / TEMPLATE).is_file():
            try:
                template = (folder / TEMPLATE).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{folder / TEMPLATE} is not a text in UTF-8 ({error}); copy it anew.") from None
        if isinstance(template, list):  # several named templates
            template = {each["name"]: each["template"] for each in template}.get("default")
        return cls(backend, chat_template=template, **ids)

    @classmethod
    def from_gguf(cls, fields: dict) -> Tokenizer:
        """Build it from the tokens and merges in a GGUF file's header.

        Args:
            fields: the header, key -> value.

        Raises:
            ValueError: the file's tokenizer is of a kind that is not built here.
        """
        kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2" or pre not in list(PRE_TOKENIZERS):  # a list, because pre may be anything
            raise ValueError(
                f"lora_lab cannot build the GGUF file's tokenizer ({kind!r:.80}, {pre!r:.80}), only 'gpt2' with one of "
                f"{list(PRE_TOKENIZERS)}; load the model's Hugging Face folder instead."
            )
        check(fields, _Header, "The GGUF file's header")
        tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        ids = {name: fields.get(f"tokenizer.ggml.{long}_token_id") for name, long in _GGUF_IDS.items()}
        if len(types) != len(tokens) or any(i is not None and i >= len(tokens) for i in ids.values()):
            raise ValueError(
                f"The GGUF file's header has {len(tokens):,} tokens, but {len(types):,} types of tokens, and the ids "
                f"{ids}; copy or download it again."
            )
        try:
            backend = _backend(fields, pre, ids["bos_id"])
            _try_out(backend)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"The GGUF file's tokenizer cannot be built ({shortened(str(error))}); copy or download it again."
            ) from None
        return cls(backend, chat_template=fields.get("tokenizer.chat_template"), **ids)

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """The entries of a GGUF file's header from which :meth:`from_gguf` and llama.cpp build the same tokenizer.

        Qwen2's puts a text into Unicode's NFC first, which :meth:`from_gguf` does too, but llama.cpp does not: of a
        text that is not in NFC, such as a letter and its accent in two characters, llama.cpp's tokens differ.

        Args:
            vocab_size: rows of the model's embedding. Ids without a token become unused tokens, such as "[PAD260]".

        Raises:
            ValueError: the tokenizer has more tokens than that, has no token that ends a text, or does what a header
                cannot state.
        """
        vocabulary = self.backend.get_vocab()
        if (largest := max(vocabulary.values(), default=0)) >= vocab_size:
            raise ValueError(
                f"The tokenizer has a token of id {largest}, but the model only {vocab_size} tokens; pass the model's "
                "own tokenizer."
            )
        if self.eos_id is None:
            raise ValueError(
                "The tokenizer has no token that ends a text, and llama.cpp would take another one for it; set "
                "tokenizer.eos_id."
            )
        state = json.loads(self.backend.to_str())
        words, first = _gguf_words(state), self._first_tokens()
        added = self.backend.get_added_tokens_decoder()
        tokens = [f"[PAD{i}]" for i in range(vocab_size)]
        types = [_UNUSED] * vocab_size
        for token, i in vocabulary.items():
            tokens[i], types[i] = token, 1
            if i in added:
                types[i] = _CONTROL if added[i].special else _USER_DEFINED
        entries: dict[str, Any] = {
            "model": "gpt2",
            "pre": words,
            "tokens": tokens,
            "token_type": types,
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]],
            "add_space_prefix": False,
            "add_bos_token": bool(first),
        }
        for name, long in _GGUF_IDS.items():
            if (token := getattr(self, name)) is not None:
                entries[f"{long}_token_id"] = token
        header = {f"tokenizer.ggml.{name}": value for name, value in entries.items()}
        if words == "qwen2":
            header[_NORMALIZER] = (state["normalizer"] or {}).get("type", "none")
        return header | ({"tokenizer.chat_template": self.chat_template} if self.chat_template else {})

    def _first_tokens(self) -> list[int]:
        """The token that begins every text, if the tokenizer puts one there."""
        plain, whole = self.encode("a"), self.encode("a", add_special_tokens=True)
        if whole == plain:
            return []
        if self.bos_id is None or whole != [self.bos_id, *plain]:
            raise _not_in_gguf(f"turns 'a' into the tokens {whole}, where at most bos_id={self.bos_id} may stand first")
        return [self.bos_id]


def _check_characters(text: str, what: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} is a {type(text).__name__}, but it must be a str.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds {text[error.start]!r}, which is half a character (a lone surrogate) or a byte that could "
            f"not be decoded: {_around(text, error.start)}; write the whole character, or remove it."
        ) from None


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - 30) : place + 30])


def _try_out(backend: Backend) -> None:
    """Encode and decode a short text, for some damage shows only then.

    Raises:
        ValueError: the text becomes very long, or letters of it are lost where most bytes have a token.
        Exception: whatever the library raises.
    """
    text = _LETTERS + "\u00e9\U0001f600"
    ids = backend.encode(text, add_special_tokens=False).ids
    if len(ids) > _MOST_TOKENS * len(text):
        raise ValueError(f"it makes {len(ids):,} tokens of {len(text)} letters")
    decoded = backend.decode(ids, skip_special_tokens=False)
    # A normalizer may change letters on purpose, such as capitals and accents, and a tokenizer may put a space first.
    expected, came_back = (_LETTERS.lower(), decoded.lower()) if backend.normalizer else (text[:-1], decoded)
    unchanged = came_back.lstrip().startswith(expected)
    by_bytes = "ByteLevel" in f"{backend.pre_tokenizer!r} {backend.decoder!r}"
    bytes_known = sum(backend.token_to_id(byte) is not None for byte in pre_tokenizers.ByteLevel.alphabet())
    if by_bytes and bytes_known > 128 and not unchanged:
        raise ValueError(f"it loses letters: {text!r} comes back as {decoded!r:.200}")


def _backend(fields: dict[str, Any], pre: str, bos_id: int | None) -> Backend:
    """The tokenizer of a GGUF file's header."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    # Llama 3 does not split a word that is a token, whatever the merges would make of it.
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    if fields.get(_NORMALIZER, "NFC" if pre == "qwen2" else "none") == "NFC":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False) for i, t in enumerate(types) if t == _CONTROL]
    )
    backend.add_tokens([AddedToken(tokens[i], normalized=False) for i, t in enumerate(types) if t == _USER_DEFINED])
    # llama.cpp puts the begin token before a Llama 3 text unless the file forbids it.
    if fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and bos_id is not None:
        bos = tokens[bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return backend


def _gguf_words(state: dict[str, Any]) -> str:
    """The name that GGUF has for the tokenizer's splitting of a text into words.

    Args:
        state: the tokenizer.json.

    Raises:
        ValueError: GGUF has none, or another part of the tokenizer does what a header cannot state.
    """
    model = state["model"]
    if model["type"] != "BPE" or (state["decoder"] or {}).get("type") != "ByteLevel":
        raise _not_in_gguf(f"is of type {model['type']}, where byte pairs of bytes (BPE, ByteLevel) are expected")
    words = _without_offsets(json.dumps(state["pre_tokenizer"]))
    name = next((name for name, each in PRE_TOKENIZERS.items() if _without_offsets(each.__getstate__()) == words), None)
    if name is None:
        raise _not_in_gguf(f"splits a text into words by another rule than {list(PRE_TOKENIZERS)}")
    if bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise _not_in_gguf(f"sets ignore_merges to {model.get('ignore_merges')}, which {name!r} does not")
    # Qwen2's NFC is accepted, though llama.cpp leaves it out: nearly all texts are in NFC already.
    if state["normalizer"] not in (None, {"type": "NFC"} if name == "qwen2" else None):
        raise _not_in_gguf(f"changes a text before it is split (normalizer {state['normalizer'].get('type')})")
    # A token for unknown characters is never used if every byte has a token.
    unused = {"unk_token"} if set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys() else set()
    for option in {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"} - unused:
        if model.get(option):
            raise _not_in_gguf(f"sets {option} to {model[option]!r}")
    if not model["merges"]:
        raise _not_in_gguf("has no merges")
    for token in state["added_tokens"]:
        if options := [option for option in ("lstrip", "rstrip", "single_word") if token[option]]:
            raise _not_in_gguf(f"sets {options[0]} for the token {token['content']!r}")
    return name


def _without_offsets(state: str | bytes) -> Any:
    """The settings of a tokenizer's part, without those that only move the places of tokens in the text."""
    return json.loads(state, object_hook=lambda entries: {k: v for k, v in entries.items() if k != "trim_offsets"})


def _not_in_gguf(what: str) -> ValueError:
    return ValueError(
        f"The tokenizer {what}, which a GGUF file cannot hold here; save the model as a Hugging Face folder "
        "(lora-lab export ADAPTER --merged --out FOLDER), which llama.cpp's convert_hf_to_gguf.py reads."
    )
