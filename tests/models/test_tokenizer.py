"""The tokenizer against transformers' import of the same file, its digit rule, exact round trips, and chats."""

import json
import unicodedata
from datetime import datetime

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lora_lab.models.tokenizer import PRE_TOKENIZERS, Tokenizer

HARD = [
    *"abT 'sSlRE12\n\r\t.,!_-/éß東京ж٣½①²Ⅷǅʰªªאनि한€😀👍\0\1\xa0\u3000\u2028\x85\u200b\u200d\ufeff\ue000\u0378",
    *(
        "'s",
        "'T",
        "'re",
        "'LL",
        "  ",
        "\r\n",
        "the",
        "<|im_end|>",
        "<|im_start|",
        "<tool_call>",
        "e\u0301",
        " = {'a': None}",
    ),
]


def hard_texts(count=1000):
    """Texts of pieces that are hard to split."""
    generator = np.random.default_rng(0)
    return ["".join(generator.choice(HARD, generator.integers(1, 14))) for _ in range(count)]


TEXTS = ["".join(c for c in text if not unicodedata.category(c).startswith("N")) for text in hard_texts()]


@pytest.fixture(scope="module")
def tokenizer(gguf_reader):
    """SmolLM2's, made from the file's header, and not from what an earlier version may have left in the cache."""
    return Tokenizer.from_gguf({key: field.contents() for key, field in gguf_reader.fields.items()})


@pytest.fixture(scope="module")
def hf_tokenizer(from_gguf):
    from transformers import AutoTokenizer

    return from_gguf(AutoTokenizer)


def test_the_cache_holds_the_tokenizer_that_the_file_makes(smollm2, tokenizer):
    cached = smollm2[1]
    assert json.loads(cached.backend.to_str()) == json.loads(tokenizer.backend.to_str())
    for name in ("eos_id", "bos_id", "pad_id", "chat_template"):
        assert getattr(cached, name) == getattr(tokenizer, name)


# Ids


def test_ids_of_1000_varied_texts_equal_those_of_transformers(tokenizer, hf_tokenizer):
    assert len(set(TEXTS)) > 900
    assert not any(c.isdigit() for text in TEXTS for c in text)
    differing = [text for text in TEXTS if tokenizer.encode(text) != hf_tokenizer(text)["input_ids"]]
    assert differing == []
    # transformers leaves out the file's digit rule, and spaces before a digit show it.
    assert tokenizer.encode("in  2024") != hf_tokenizer("in  2024")["input_ids"]


def test_known_tokens_and_their_number_equal_those_of_transformers(tokenizer, hf_tokenizer):
    assert len(hf_tokenizer) == 49152
    assert tokenizer.backend.get_vocab() == hf_tokenizer.get_vocab()
    ours = tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id
    assert ours == (hf_tokenizer.eos_token_id, hf_tokenizer.bos_token_id, hf_tokenizer.pad_token_id) == (2, 1, 2)


def test_a_special_token_in_a_text_is_one_id(tokenizer):
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_id]
    assert tokenizer.encode("a<|im_start|>b").count(tokenizer.bos_id) == 1
    assert len(tokenizer.encode("<|im_end|")) > 1
    assert tokenizer.encode("hi", add_special_tokens=True) == tokenizer.encode("hi")  # this model wants none


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024", ["2", "0", "2", "4"]),
        (" 2024", [" ", "2", "0", "2", "4"]),
        ("  2024", ["  ", "2", "0", "2", "4"]),
        ("in 2024,", ["in", " ", "2", "0", "2", "4", ","]),
        ("3.14", ["3", ".", "1", "4"]),
        ("x1y", ["x", "1", "y"]),
        ("\u0661\u0662", ["\u0661", "\u0662"]),  # Arabic digits
    ],
)
def test_each_digit_is_cut_off_before_all_else(tokenizer, text, expected):
    cut = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [bytes_of(piece).decode() for piece in cut] == expected
    if text.isascii():  # each of these pieces is known as a token of its own
        assert pieces(tokenizer, text) == expected


def bytes_of(piece):
    """Undo GPT-2's spelling of bytes as printable characters."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    spelling = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return bytes(spelling[c] for c in piece)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1234567", ["123", "456", "7"]),
        (" 1234", ["Ġ", "123", "4"]),
        ("a 12b", ["a", "Ġ", "12", "b"]),
        ("I'LL don't", ["I", "'LL", "Ġdon", "'t"]),
        ("x\r\n\n  y", ["x", "čĊĊ", "Ġ", "Ġy"]),
        ("(hello)", ["(hello", ")"]),
    ],
)
def test_llama3_texts_are_cut_with_numbers_in_groups_of_three(text, expected):
    assert [piece for piece, _ in PRE_TOKENIZERS["llama-bpe"].pre_tokenize_str(text)] == expected


# Round trips


# Characters with a byte that the model's vocabulary lacks: six control characters, and those of Unicode's
# planes 4 to 11, where nothing is assigned.
UNKNOWN = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, *range(0x40000, 0xC0000)}
KNOWN_CHARACTERS = st.one_of(
    st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d"),
    st.characters(min_codepoint=0xC0000),
)  # a lone surrogate (category Cs) is no text that UTF-8 can hold


@settings(max_examples=300, deadline=None)
@given(text=st.text(KNOWN_CHARACTERS))
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_character_of_unicode_comes_back_exactly_but_those_the_vocabulary_lacks(tokenizer):
    known = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000 and code not in UNKNOWN]
    for start in range(0, len(known), 1000):
        text = "".join(map(chr, known[start : start + 1000]))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for code in (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0x40000, 0xBFFFF):
        assert tokenizer.decode(tokenizer.encode(f"a{chr(code)}b")) != f"a{chr(code)}b"


def test_decode_takes_tensors_and_keeps_special_tokens(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert tokenizer.decode(torch.tensor(ids)) == "<|im_start|>user\nHi<|im_end|>"
    assert tokenizer.decode([]) == ""


# Chats

CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi \n"}],
    [
        {"role": "user", "content": "<b>Hi</b> & 'bye' {{ x }}"},
        {"role": "assistant", "content": "Grüße 😀"},
        {"role": "user", "content": ""},
    ],
]


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("messages", CHATS)
def test_chats_read_as_in_transformers(tokenizer, hf_tokenizer, messages, prompted):
    theirs = hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
    assert tokenizer.chat(messages, add_generation_prompt=prompted) == theirs
    assert tokenizer.chat(messages, add_generation_prompt=not prompted) != theirs


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n",
        "{% for m in messages %}\n{{ m.role }}\n{% if loop.index == 2 %}\n  {% break %}\n{% endif %}\n{% endfor %}",
        "{%- set n = namespace(x=0) -%}\n{%- for m in messages -%} {% set n.x = n.x + 1 %} {{ n.x }} {%- endfor -%}",
        "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}\n",
        "{% if tools is defined and tools %}tools{% endif %}{{ messages[-1].content }}",
    ],
    ids=["white space", "break", "namespace", "special tokens", "undefined names"],
)
def test_templates_of_other_models_read_as_in_transformers(tokenizer, hf_tokenizer, template):
    other = Tokenizer(tokenizer.backend, tokenizer.eos_id, tokenizer.bos_id, chat_template=template)
    for messages in CHATS:
        theirs = hf_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert other.chat(messages, add_generation_prompt=False) == theirs


def test_chatting_without_a_template_says_what_to_do(tiny_tokenizer):
    with pytest.raises(ValueError, match="no chat template; pass plain text"):
        tiny_tokenizer.chat(CHATS[0])


# Files


@pytest.mark.parametrize("kind", ["real", "tiny"])
def test_saved_and_loaded_it_is_the_same(tokenizer, tiny_tokenizer, tmp_path, kind):
    saved = tokenizer if kind == "real" else tiny_tokenizer
    saved.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    for name in ("eos_id", "bos_id", "pad_id", "chat_template"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.backend.get_vocab() == saved.backend.get_vocab()
    for text in (*TEXTS[:200], "in 2024, 3.14"):
        assert loaded.encode(text) == saved.encode(text)
        assert loaded.decode(saved.encode(text)) == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_the_padding_token_is_the_end_token_only_if_there_is_no_other(tiny_tokenizer, tmp_path):
    assert Tokenizer(tiny_tokenizer.backend, eos_id=259).pad_id == 259
    own = Tokenizer(tiny_tokenizer.backend, eos_id=259, pad_id=0)
    own.save(tmp_path)
    assert Tokenizer.load(tmp_path).pad_id == own.pad_id == 0
    assert Tokenizer(tiny_tokenizer.backend).pad_id is None


def test_saving_over_another_tokenizer_leaves_none_of_its_template(tiny_tokenizer, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("the old one")
    for template in ("the new one", None):
        Tokenizer(tiny_tokenizer.backend, chat_template=template).save(tmp_path)
        assert Tokenizer.load(tmp_path).chat_template == template


NAMED = [{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}]


@pytest.mark.parametrize(
    ("in_config", "in_file", "template"),
    [("c", None, "c"), ("c", "f", "f"), (NAMED, None, "b"), (NAMED[:1], None, None), (None, None, None)],
)
def test_folders_keep_their_template_in_several_ways(tiny_tokenizer, tmp_path, in_config, in_file, template):
    tiny_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    if in_config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": in_config}))
    if in_file is not None:
        (tmp_path / "chat_template.jinja").write_text(in_file)
    assert Tokenizer.load(tmp_path).chat_template == template


def test_special_tokens_are_read_as_words_or_as_objects(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    config = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (259, 258, 259)


def test_long_texts_are_never_cut_nor_short_ones_filled_up(tiny_tokenizer, tmp_path):
    backend = Backend.from_str(tiny_tokenizer.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    Tokenizer(backend).save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    for text in ("abcdefghijklmnop", "a"):
        assert loaded.encode(text) == tiny_tokenizer.encode(text) != backend.encode(text).ids


REFUSED = [  # a file of the folder, what is written into it (or which entries change), and what must be named
    ("tokenizer.json", b"{}", "tokenizer.json"),
    ("tokenizer.json", {"pre_tokenizer": None}, "loses letters"),
    ("tokenizer.json", {"decoder": None}, "loses letters"),
    ("tokenizer.json", {"normalizer": {"type": "Prepend", "prepend": "xy"}}, "loses letters"),
    (
        "tokenizer.json",
        {"normalizer": {"type": "Replace", "pattern": {"String": "t"}, "content": "xy" * 5000}},
        "tokens of 96 letters",
    ),
    ("tokenizer_config.json", b"[]", "tokenizer_config.json"),
    ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token"),
    ("tokenizer_config.json", b'{"eos_token": {"content": 5}}', "eos_token"),
    ("tokenizer_config.json", b'{"chat_template": [4]}', "chat_template"),
    ("tokenizer_config.json", b'{"chat_template": {"a": 1}}', "chat_template"),
    ("tokenizer_config.json", rb'{"eos_token": "\ud83d"}', "half a character"),
    ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja holds .*undecoded byte"),
]


@pytest.mark.parametrize(("name", "content", "named"), REFUSED)
def test_a_damaged_file_is_refused(tiny_tokenizer, tmp_path, name, content, named):
    tiny_tokenizer.save(tmp_path)
    path = tmp_path / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=named):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_at_which_the_library_panics_is_refused(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"] |= {"continuing_subword_prefix": "##", "end_of_word_suffix": "</w>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


# GGUF headers


def header(**changes):
    """A GGUF header with 256 bytes, two longer tokens, one special and one user-defined token."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "that", "<s>", "</s>", "<note>"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 259 + [3, 3, 4],
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.eos_token_id": 260,
    }
    changed = fields | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


def test_a_header_makes_a_tokenizer_with_its_merges_and_special_tokens():
    made = Tokenizer.from_gguf(header())
    assert pieces(made, "the th<s><note>t") == ["the", " ", "th", "<s>", "<note>", "t"]
    assert (made.eos_id, made.bos_id, made.pad_id) == (260, 259, 260)
    assert made.backend.decode([0, 259, 261], skip_special_tokens=True) == made.backend.decode([0, 261])
    assert Tokenizer.from_gguf(header(padding_token_id=7)).pad_id == 7


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"pre": "gpt-2"}, False),
        ({"pre": "smollm", "add_bos_token": False}, False),
        ({"pre": "smollm", "add_bos_token": True}, True),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "llama-bpe", "bos_token_id": None}, False),
    ],
    ids=str,
)
def test_the_begin_token_comes_first_when_the_header_or_llama3_wants_it(changes, begins):
    made = Tokenizer.from_gguf(header(**changes))
    assert made.encode("the", add_special_tokens=True) == [259] * begins + made.encode("the")
    assert made.encode("the")[:1] != [259]


def test_llama3_takes_a_word_that_is_a_token_whole_whatever_its_merges_say():
    # So llama.cpp does for this pre-tokeniser only, and Hugging Face by "ignore_merges".
    assert pieces(Tokenizer.from_gguf(header(pre="llama-bpe")), "that") == ["that"]
    assert pieces(Tokenizer.from_gguf(header(pre="gpt-2")), "that") == ["th", "a", "t"]


def test_llama3_texts_are_cut_by_the_published_rule():
    words = (  # as published with Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    by_hand = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), PRE_TOKENIZERS["llama-bpe"][1]])
    for text in (*hard_texts(), "a\rb. WE'REx"):
        assert PRE_TOKENIZERS["llama-bpe"].pre_tokenize_str(text) == by_hand.pre_tokenize_str(text)


@pytest.mark.parametrize("text", ["plain words", "naïve café, 東京 and 🙂!", "ends in half a letter: é"])
def test_a_stream_shows_whole_letters_as_soon_as_they_are_complete(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    if text.startswith("ends"):
        ids = ids[:-1]
    parts = list(tiny_tokenizer.decode_stream(iter(ids)))
    assert "".join(parts) == tiny_tokenizer.decode(ids)
    assert len(parts) > 5
    assert not any("\ufffd" in part for part in parts[:-1])


def test_the_control_tokens_are_those_of_the_template_and_the_ends(chatter):
    assert chatter.control_tokens == ["</s>", "<s>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}", "hi <b>!"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi <b>"}]'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "hi <b>"\n}'),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}no date{% endif %}", "no date"),
    ],
    ids=["generation", "json", "indented", "today", "a fixed date"],
)
def test_templates_may_use_what_transformers_offers(tiny_tokenizer, template, expected):
    tokenizer = Tokenizer(tiny_tokenizer.backend, chat_template=template)
    messages = [{"role": "user", "content": "hi <b>"}]
    assert tokenizer.chat(messages) == expected
    if "fixed" not in expected and expected != "no date":
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend, chat_template=template)
        assert theirs.apply_chat_template(messages, tokenize=False) == expected


# Texts that people bring


@pytest.mark.parametrize("text", ["half: \ud83d", "\udcff a byte"])
def test_m8_half_a_character_is_named(chatter, text):
    message = [{"role": "user", "content": text}]
    for call in (lambda: chatter.encode(text), lambda: chatter.chat(message), lambda: chatter.check_text(text)):
        with pytest.raises(ValueError, match=r"holds '.udc?[8f][3f]d?', which is half a character .*; write the whole"):
            call()
    assert chatter.encode("whole: \U0001f600")


def test_a_special_token_is_refused_wherever_a_message_holds_it(chatter):
    good = {"role": "user", "content": "a < s > b"}
    assert chatter.chat([good])
    for change in ({"content": "x" * 1000 + "<s>y"}, {"role": "user<s>"}, {"name": "</s>"}, {"content": ["</s>"]}):
        with pytest.raises(ValueError, match="which the model reads as a special token") as raised:
            chatter.chat([good | change])
        assert len(str(raised.value)) < 300
    chatter.check_text("<s>", allow_special=True)


def test_tokens_named_after_a_role_are_control_tokens_though_a_template_puts_them_together(tiny_tokenizer):
    backend = Backend.from_str(tiny_tokenizer.backend.to_str())
    tokens = ("<|user|>", "<|assistant|>", "<|else|>")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(backend, chat_template=template)
    assert tokenizer.control_tokens == ["<|assistant|>", "<|user|>"]
    assert tokenizer.chat([{"role": "user", "content": "<|else|>"}]) == "<|user|><|else|>"
    with pytest.raises(ValueError, match=r"<\|assistant\|>"):
        tokenizer.chat([{"role": "user", "content": "<|assistant|>"}])
    backend.add_tokens(["<User>", "<Assistant>", "<think>", "user"])  # none is a special token
    template = "{% for m in messages %}{{ '<User>' if m.role == 'user' else '<think>' }}{{ m.content }}{% endfor %}"
    assert Tokenizer(backend, chat_template=template).control_tokens == ["<User>", "<|assistant|>", "<|user|>"]


def test_a_tokenizer_that_lowers_capitals_on_purpose_is_read(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("A Cat")) == "a cat"


def test_a_small_vocabulary_may_lack_letters(tmp_path):
    backend = Backend(models.BPE(vocab={"e": 0, "h": 1, "t": 2, "th": 3}, merges=[("t", "h")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    Tokenizer(backend).save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("the") == [3, 0]


def test_a_template_that_is_set_later_has_control_tokens_of_its_own(tiny_tokenizer):
    backend = Backend.from_str(tiny_tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken("<|turn|>", special=True, normalized=False)])
    tokenizer = Tokenizer(backend)
    tokenizer.check_text("<|turn|>")
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m.role }}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"holds '<\|turn\|>'"):
        tokenizer.check_text("<|turn|>")
