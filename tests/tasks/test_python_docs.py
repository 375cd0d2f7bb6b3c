"""The task docs: parts that share no page and no paragraph; and long texts."""

import re
from pydoc_data.topics import topics

import pytest
import torch

from lora_lab.models.tokenizer import PRE_TOKENIZERS
from lora_lab.tasks import docs, python_docs
from lora_lab.tasks.python_docs import _group_related, windows
from tests.helpers import ByteTokenizer
from tests.tiny_models import trained_tokenizer

PARTS = ("train", "validation", "test", "off_domain")


class Recorder(ByteTokenizer):
    """Keeps what it was asked to encode."""

    def __init__(self):
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return super().encode(text)


@pytest.fixture(scope="module")
def manual():
    """(the task of 64 bytes an example, the text of each part)."""
    recorder = Recorder()
    task = docs(recorder, seq_len=64)
    return task, dict(zip(PARTS, recorder.texts, strict=True))


def one_line(text):
    return " ".join(text.split())


def paragraphs(text):
    """Paragraphs of 60 characters or more."""
    return {paragraph for paragraph in map(one_line, text.split("\n\n")) if len(paragraph) >= 60}


def test_targets_are_the_inputs_one_token_ahead_and_rows_are_cut_from_the_text(manual):
    task, texts = manual
    for part, examples in task.parts.items():
        data = texts[part].encode()
        rows = (len(data) - 1) // 64
        assert examples.inputs.shape == examples.targets.shape == (rows, 64)
        assert torch.equal(examples.inputs[:, 1:], examples.targets[:, :-1])
        expected = sorted((data[i * 64 : i * 64 + 64], data[i * 64 + 1 : i * 64 + 65]) for i in range(rows))
        pairs = zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True)
        assert sorted((bytes(inputs), bytes(targets)) for inputs, targets in pairs) == expected
        first = [bytes(row) for row in examples.inputs[:20].tolist()]
        assert first != [data[i * 64 : i * 64 + 64] for i in range(20)]  # in random order
    assert task.unit == "tokens"
    assert task.count_targets(task.train) == task.train.targets.numel()


def test_every_page_of_the_manual_is_in_one_part_only(manual):
    _, texts = manual
    pages = set(topics.values())
    found = {page: [part for part in PARTS if page in texts[part]] for page in pages}
    assert all(len(parts) == 1 for parts in found.values())
    sizes = {part: sum(len(page) for page in pages if found[page] == [part]) for part in PARTS}
    assert sizes["off_domain"] == 0
    assert not paragraphs(texts["off_domain"]) & set().union(*(paragraphs(texts[part]) for part in PARTS[:3]))
    assert sizes["train"] > 5 * sizes["validation"] > 0
    assert sizes["test"] > 0.03 * sizes["train"]
    assert sum(sizes.values()) + 2 * (len(pages) - 3) == sum(len(texts[part]) for part in PARTS[:3])


@pytest.mark.parametrize(
    ("held_out", "read"), [("validation", "train"), ("test", "train"), ("test", "validation"), ("train", "validation")]
)
def test_no_paragraph_of_one_part_is_in_the_pages_of_another(manual, held_out, read):
    _, texts = manual
    unseen, seen = paragraphs(texts[held_out]), one_line(texts[read])
    assert len(unseen) >= 50
    assert [paragraph for paragraph in unseen if paragraph in seen] == []


def test_a_paragraph_that_is_shared_would_be_found(manual):
    _, texts = manual
    pages = sorted(set(topics.values()))
    shared = [page for page in pages if any(paragraphs(page) & paragraphs(other) for other in pages if other != page)]
    assert len(shared) >= 2  # so cutting by page alone would leak
    assert all(page in texts["train"] or page in texts["validation"] or page in texts["test"] for page in shared)


def test_pages_that_quote_each_other_form_one_group_even_by_way_of_a_third():
    quote, other = "a sentence of more than sixty characters, which several pages have " * 2, "another of them " * 8
    wrapped = quote.replace(" ", "\n")
    pages = [
        f"first\n\n{quote}",
        "alone\n\nshort",
        f"third\n\n{other}",
        f"{wrapped}\n\n{other}",
        "alone too",
    ]
    assert _group_related(pages) == [[pages[0], pages[2], pages[3]], [pages[1]], [pages[4]]]
    assert _group_related(["x\n\nshort", "y\n\nshort"]) == [["x\n\nshort"], ["y\n\nshort"]]


def test_a_large_group_of_related_pages_is_for_training_and_a_small_one_stays_whole(monkeypatch):
    def related(letter, n):
        quote = f"a paragraph of more than sixty characters, which all pages of {letter} quote"
        return {f"{letter}{i}": f"{letter}{i} begins\n\n{quote}\n\nand ends" for i in range(n)}

    alone = {letter: f"{letter} stands alone " * 9 for letter in "acefg"}
    pages = alone | related("b", 8) | related("d", 7)
    monkeypatch.setattr("pydoc_data.topics.topics", pages)
    recorder = Recorder()
    docs(recorder, seq_len=8)
    train, validation, test, _ = recorder.texts
    # Groups 1, 6, ... are for validation and 3, 8, ... for testing, in the order of names.
    assert {name for name, page in pages.items() if page in validation} == {"g"}
    assert {name for name, page in pages.items() if page in test} == set(related("d", 7))
    assert {name for name, page in pages.items() if page in train} == {*"acef", *related("b", 8)}


@pytest.mark.parametrize(
    ("seq_len", "named"), [(1, "seq_len is 1"), (-5, "seq_len is -5"), (200_000, "validation part of task 'docs'")]
)
def test_examples_that_are_too_short_or_too_long_are_refused(seq_len, named):
    with pytest.raises(ValueError, match=named):
        docs(ByteTokenizer(), seq_len)


# Long texts are tokenised in chunks

TEXTS = {
    "manual": "\n\n".join([*topics.values()][:6])[:9000],
    "rare letters": "caf\u0065\u0301, 東京。\u3000字 \n\n\n  x\u2028y\t1234 don't==== <|im_end|> <tool_call>\x0b_a_ 🙂"
    * 60,
    "one word": "x" * 3000,
    "no letters": "= " * 1500,
}


@pytest.mark.parametrize("words", PRE_TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_the_chunks_are_those_of_the_text(monkeypatch, words, text):
    monkeypatch.setattr(python_docs, "_CHUNK", 150)
    tokenizer, text = trained_tokenizer(words), TEXTS[text]
    chunks = [*python_docs._chunks(tokenizer, text)]
    assert "".join(chunks) == text
    assert [i for chunk in chunks for i in tokenizer.encode(chunk)] == tokenizer.encode(text)
    assert len(chunks) > 10 or not re.search(r"\w\W", text)


def test_cut_anywhere_the_tokens_would_be_others():
    tokenizer, text = trained_tokenizer("gpt-2"), TEXTS["manual"]
    chunks = [text[i : i + 150] for i in range(0, len(text), 150)]
    assert [i for chunk in chunks for i in tokenizer.encode(chunk)] != tokenizer.encode(text)


def test_a_tokenizer_that_adds_to_each_text_gets_it_whole(monkeypatch):
    class Adding(ByteTokenizer):
        def encode(self, text):
            return [0, *super().encode(text)]

    monkeypatch.setattr(python_docs, "_CHUNK", 150)
    assert [*python_docs._chunks(Adding(), TEXTS["manual"])] == [TEXTS["manual"]]
    assert len([*python_docs._chunks(ByteTokenizer(), TEXTS["manual"])]) > 10


def test_a_long_text_makes_the_same_examples(monkeypatch):
    tokenizer = trained_tokenizer("smollm")
    whole = windows(tokenizer, [TEXTS["manual"], TEXTS["rare letters"]], 32)
    longest = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: longest.append(len(text)) or encode(text))
    monkeypatch.setattr(python_docs, "_CHUNK", 150)
    in_chunks = windows(tokenizer, [TEXTS["manual"], TEXTS["rare letters"]], 32)
    assert torch.equal(whole.inputs, in_chunks.inputs)
    assert torch.equal(whole.targets, in_chunks.targets)
    assert max(longest) < 400
