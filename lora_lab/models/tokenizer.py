"""Text to token ids and back, and conversations to text, by the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from typing_extensions import TypedDict

from lora_lab.models.chat_template import render
from lora_lab.system.files import atomic_files, finish_save, read_json, write_json
from lora_lab.system.schema import Count, check
from lora_lab.system.wording import shortened

# Of newer folders; it has precedence over the one in tokenizer_config.json.
TEMPLATE = "chat_template.jinja"
# How text is split before byte pairs are merged, by the name in a GGUF file (as llama.cpp defines them).
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit is a word
_GPT2, _BYTES = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex) for regex in (True, False))
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"), _BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"), _BYTES]),
}
_GGML = "tokenizer.ggml."  # begins the entries of a tokenizer in a GGUF file's header
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
_ROLES = ("system", "user", "assistant")


class _Token(TypedDict):
    content: str


class _NamedTemplate(TypedDict):
    name: str
    template: str


class _Settings(TypedDict, total=False):
    """What is read of a tokenizer_config.json."""

    eos_token: str | _Token | None
    bos_token: str | _Token | None
    pad_token: str | _Token | None
    chat_template: str | list[_NamedTemplate] | None


@dataclass(eq=False, repr=False)
class Tokenizer:
    """A byte-level tokenizer with the few special tokens that training and chatting need.

    Args:
        backend: the tokenizer of the ``tokenizers`` library.
        eos_id, bos_id, pad_id: ids of the tokens that end a text, begin a text, and pad a batch (None: no such token).
        chat_template: the model's Jinja template for conversations (None: the model has none).
    """

    backend: Backend
    eos_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.pad_id is None:
            self.pad_id = self.eos_id

    @property
    def control_tokens(self) -> list[str]:
        """The tokens that structure a conversation.

        These are the special tokens that end or begin a text, stand in the chat template, or are named after a role,
        because some templates put those together (``"<|" + role + "|>"``). In some tokenizers, as DeepSeek's, the
        tokens of roles are not special ones; then they count if they stand in the template.
        """
        ends = {self._token(self.eos_id), self._token(self.bos_id)}

        def structures(token: AddedToken) -> bool:
            text, in_template = token.content, token.content in (self.chat_template or "")
            of_role = not text.isalnum() and any(role in text.lower() for role in _ROLES)
            return (text in ends or in_template or of_role) if token.special else (in_template and of_role)

        return sorted(t.content for t in self.backend.get_added_tokens_decoder().values() if structures(t))

    def _token(self, i: int | None) -> str | None:
        """Return the token of an id as it is written in a text; None if there is none."""
        return None if i is None else self.backend.id_to_token(i)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of ``text``; ``add_special_tokens`` prepends those that the model expects first.

        What stands for a special token in the text becomes that token, as in transformers: see :meth:`check_text`.

        Raises:
            ValueError: the text holds half a character.
        """
        return self.backend.encode(_check_characters(text), add_special_tokens=add_special_tokens).ids

    def check_text(self, text: str, allow_special: bool = False) -> None:
        """Check that a user's text contains no control tokens and no invalid characters.

        Args:
            allow_special: whether it may hold what stands for a special token.

        Raises:
            ValueError: it holds half a character, or one of the :attr:`control_tokens`, which would end a turn or begin
                another one in the middle of the text.
        """
        _check_characters(text, "A text")
        if allow_special:
            return
        for token in self.control_tokens:
            if (place := text.find(token)) >= 0:
                raise ValueError(
                    f"A text holds {token!r}, which the model reads as a special token and not as text: "
                    f"{_around(text, place)}; remove or rewrite it, or allow it in a .txt file (allow_special=True)."
                )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens included, so that ``decode(encode(text)) == text``.

        A byte that the vocabulary lacks is lost. SmolLM2 lacks six control characters (04, 06, 13, 14, 16 and
        1D in hexadecimal) and Unicode's planes 4 to 11, in which no character is assigned.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ``ids`` in parts, each as soon as its letters are complete.

        All parts together are ``decode(ids)``.
        """
        read, shown = [], ""
        for token in ids:
            read.append(token)
            complete = self.decode(read).rstrip("\ufffd")  # the rest of a letter may follow
            if len(complete) > len(shown):
                yield complete[len(shown) :]
                shown = complete
        if rest := self.decode(read)[len(shown) :]:
            yield rest

    def chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation in the format that the model was trained on.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]``.
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            ValueError: the model has no chat template; a message is no dictionary; the template refuses the messages,
                fails, or takes more time or memory than a text can need; or as for :meth:`check_text`.
        """
        if self.chat_template is None:
            raise ValueError(
                'This tokenizer has no chat template; pass plain text, a .txt file or lines of {"text": ...}.'
            )
        check(messages, Sequence[dict[str, Any]], "messages")
        self.check_text("\n".join(str(text) for message in messages for text in message.values()))
        variables = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        variables |= {"eos_token": self._token(self.eos_id) or "", "bos_token": self._token(self.bos_id) or ""}
        try:
            return render(self.chat_template, variables)
        except Exception as error:  # a template is a program, which can raise whatever Python does
            reason = shortened(str(error) or type(error).__name__).removesuffix(".")
            raise ValueError(f"The chat template refuses these messages: {reason}.") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as Hugging Face reads them."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        tokens = {"eos_token": self.eos_id, "bos_token": self.bos_id, "pad_token": self.pad_id}
        config |= {name: self.backend.id_to_token(i) for name, i in tokens.items() if i is not None}
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
            ValueError: one of the files is damaged.
        """
        folder = Path(folder)
        finish_save(folder)  # if one was killed
        backend = _read_backend(folder / "tokenizer.json")
        path = folder / "tokenizer_config.json"
        settings = check(read_json(path) if path.is_file() else {}, _Settings, str(path))
        ids = {}
        for name in ("eos", "bos", "pad"):
            token = settings.get(f"{name}_token") or ""  # a text, or {"content": text}
            text = token["content"] if isinstance(token, dict) else token
            ids[f"{name}_id"] = backend.token_to_id(_check_characters(text, str(path)))  # None if there is none
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, with names
            template = {each["name"]: each["template"] for each in template}.get("default")
        path = folder / TEMPLATE
        if path.is_file():
            template = _check_characters(path.read_bytes().decode(errors="surrogateescape"), str(path))
        return cls(backend, chat_template=template, **ids)

    @classmethod
    def from_gguf(cls, fields: dict) -> Tokenizer:
        """Build it from the tokens and merges in a GGUF file's header.

        Args:
            fields: the header, key -> value.

        Raises:
            ValueError: the file's tokenizer is of a kind that is not built here.
        """
        ggml = {key.removeprefix(_GGML): value for key, value in fields.items()}
        kind, pre = ggml.get("model"), ggml.get("pre", "gpt-2")
        if kind != "gpt2" or pre not in list(PRE_TOKENIZERS):  # a list, because pre may be anything
            raise ValueError(
                f"The GGUF file's tokenizer ({kind!r:.80}, {pre!r:.80}) is not 'gpt2' with one of {[*PRE_TOKENIZERS]}; "
                "load the model's Hugging Face folder instead."
            )
        ids = {name: ggml.get(f"{name}_token_id") for name in ("eos", "bos", "padding")}
        check(ids, dict[str, Count | None], "The GGUF file's header")
        template = check(fields.get("tokenizer.chat_template"), str | None, "The GGUF file's chat template")
        try:
            backend = _backend(ggml, pre, ids)
            _try_out(backend)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"The GGUF file's tokenizer cannot be built ({shortened(str(error))}); copy or download it again."
            ) from None
        return cls(backend, ids["eos"], ids["bos"], ids["padding"], template)

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """Return a GGUF header's entries from which :meth:`from_gguf` and llama.cpp build the same tokenizer.

        Qwen2's puts a text into Unicode's NFC first, which :meth:`from_gguf` does too, but llama.cpp does not: of a
        text that is not in NFC, such as a letter and its accent in two characters, llama.cpp's tokens differ.

        Args:
            vocab_size: rows of the model's embedding. Ids without a token become unused tokens, such as "[PAD260]".

        Raises:
            ValueError: the tokenizer has more tokens than that, has no token that ends a text, or does what a header
                cannot state.
        """
        vocabulary, added = self.backend.get_vocab(), self.backend.get_added_tokens_decoder()
        largest = max(vocabulary.values(), default=0)
        if largest >= vocab_size:
            raise ValueError(
                f"The tokenizer has a token of id {largest}, but the model has only {vocab_size} tokens; pass the "
                "model's own tokenizer."
            )
        if self.eos_id is None:
            raise ValueError("No token ends a text, and llama.cpp would take another one for it; set tokenizer.eos_id.")
        tokens = [f"[PAD{i}]" for i in range(vocab_size)]
        types = [_UNUSED] * vocab_size
        for token, i in vocabulary.items():
            tokens[i], types[i] = token, _NORMAL
            if i in added:
                types[i] = _CONTROL if added[i].special else _USER_DEFINED
        merges = json.loads(self.backend.to_str())["model"].get("merges", [])
        entries = {
            "model": "gpt2",
            "tokens": tokens,
            "token_type": types,
            "merges": [" ".join(merge) for merge in merges],
            "add_space_prefix": False,
            "add_bos_token": self.encode("a", add_special_tokens=True) != self.encode("a"),
            "eos_token_id": self.eos_id,
            "bos_token_id": self.bos_id,
            "padding_token_id": self.pad_id,
        }
        header = {_GGML + name: value for name, value in entries.items() if value is not None}
        if self.chat_template:
            header["tokenizer.chat_template"] = self.chat_template
        for pre in PRE_TOKENIZERS:  # the header is the one that gives the same tokenizer
            made = header | {f"{_GGML}pre": pre}
            if merges and _gives(made, self.backend):
                return made
        raise ValueError(
            "A GGUF file cannot hold this tokenizer; lora-lab export ADAPTER --merged --out FOLDER writes what "
            "llama.cpp's convert_hf_to_gguf.py reads."
        )


def _read_backend(path: Path) -> Backend:
    """Return the tokenizer in a tokenizer.json.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} lacks the file {path.name}; make it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        # Not by its path, which the library cannot read if a folder's name is not UTF-8.
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
        backend.no_truncation()  # some folders contain the limits of their last training run
        backend.no_padding()
        _try_out(backend)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics are not even that
        raise ValueError(f"{path} is not a tokenizer file ({shortened(str(error))}); copy it anew.") from None
    return backend


def _check_characters(text: str, what: str = "The text") -> str:
    """Return a text that holds no half of a character; ``what`` it is stands in the message of the ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds {text[error.start]!r}, which is half a character (a lone surrogate) or an undecoded byte: "
            f"{_around(text, error.start)}; write the whole character, or remove it."
        ) from None
    return text


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - 30) : place + 30])


def _try_out(backend: Backend) -> None:
    """Encode and decode some letters, for some damage shows only then.

    Raises:
        ValueError: they become very many tokens, or are lost where most bytes have a token.
        Exception: whatever the library raises.
    """
    letters = "a " + bytes(range(33, 127)).decode()  # all that ASCII prints
    ids = backend.encode(letters, add_special_tokens=False).ids
    if len(ids) > 10 * len(letters):
        raise ValueError(f"it makes {len(ids):,} tokens of {len(letters)} letters")
    decoded = backend.decode(ids, skip_special_tokens=False)
    # A tokenizer may put a space first, and a normaliser may change capitals on purpose.
    unchanged = decoded.lstrip().lower().startswith(letters.lower())
    by_bytes = "ByteLevel" in f"{backend.pre_tokenizer!r} {backend.decoder!r}"
    bytes_known = sum(backend.token_to_id(byte) is not None for byte in pre_tokenizers.ByteLevel.alphabet())
    if by_bytes and bytes_known > 128 and not unchanged:
        raise ValueError(f"it loses letters: {letters!r} comes back as {decoded!r:.200}")


def _backend(ggml: dict[str, Any], pre: str, ids: dict[str, int | None]) -> Backend:
    """Return the tokenizer of a GGUF file's header.

    Args:
        ggml: the header's entries, without "tokenizer.ggml." before their names.
        pre: the name of its pre-tokenizer.
        ids: of the tokens "eos", "bos" and "padding"; None: there is no such token.

    Raises:
        Exception: an entry is missing or damaged, an id is no token's, or the library refuses the tokens or merges.
    """
    tokens = ggml["tokens"]
    typed = list(zip(tokens, ggml["token_type"], strict=True))
    for name, i in ids.items():
        if i is not None and i >= len(tokens):
            raise ValueError(f"{name}_token_id is {i}, but there are only {len(tokens)} tokens")
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    # Llama 3 does not split a word that is a token, whatever the merges would make of it.
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = PRE_TOKENIZERS[pre], decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in typed if kind == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == _USER_DEFINED])
    # llama.cpp puts the begin token before a Llama 3 text unless the file forbids it.
    bos_id = ids["bos"]
    if ggml.get("add_bos_token", pre == "llama-bpe") and bos_id is not None:
        bos = tokens[bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return backend


def _gives(header: dict[str, Any], original: Backend) -> bool:
    """Return whether the tokenizer that is built from a header makes the same tokens of every text.

    All settings are compared but for those of places in the text and of training runs. What stands before a text is
    compared by an example.
    """
    try:
        built = Tokenizer.from_gguf(header).backend
    except ValueError:
        return False
    ignored = {"trim_offsets", "vocab", "post_processor", "truncation", "padding", "fuse_unk", "normalized"}
    if set(pre_tokenizers.ByteLevel.alphabet()) <= original.get_vocab(with_added_tokens=False).keys():
        ignored.add("unk_token")  # which is never used where every byte has a token

    def settings(backend: Backend) -> Any:
        return json.loads(
            backend.to_str(), object_hook=lambda part: {k: v for k, v in part.items() if k not in ignored and v}
        )

    first, second = (backend.encode("a", add_special_tokens=True).ids for backend in (built, original))
    same_ids = original.get_vocab().items() <= built.get_vocab().items()
    return same_ids and first == second and settings(built) == settings(original)
