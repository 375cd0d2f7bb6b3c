"""Prose page by page: nothing twice, parts that share no page, and blocks of rows that are pages."""

import pytest
import torch

from lora_lab.tasks import pages
from lora_lab.tasks.pages import Page, corpora, cut_pages, docstrings, paged_task, read_pages
from tests.helpers import ByteTokenizer

SENTENCE = "Return the {} of an array along the axis that is given, as a new array of the same type."


def spell(number):
    """A word for a number: digits do not tell paragraphs apart."""
    return "".join(3 * "abcdefghij"[int(digit)] for digit in str(number))


def page(name, words):
    return Page(name, "\n\n".join(SENTENCE.format(word) for word in words))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An installation with the packages "numpy", "known" and "other", of which the last two are what is read."""
    folder = tmp_path / "site"
    for package, words in {"numpy": "sum mean", "known": "sum product", "other": "product median norm"}.items():
        for word in words.split():
            path = folder / package / f"{word}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = SENTENCE.format(word)
            path.write_text(f'raise ImportError("It was imported.")\ndef {word}():\n    """{text}\n\n    {text}"""\n')
    monkeypatch.setattr(pages, "_SITE", folder)
    monkeypatch.setattr(pages, "READ", ("known", "other"))
    monkeypatch.setattr(pages, "_is_held_out", lambda name: name.startswith("known"))
    monkeypatch.setattr(pages, "readmes", lambda: iter([page("readmes: x", ["readme"])]))
    monkeypatch.setattr(pages, "manual", lambda: iter([page("manual: y", ["rule"])]))
    corpora.cache_clear()
    yield folder
    corpora.cache_clear()


def test_docstrings_are_parsed_from_files_and_tests_and_broken_files_are_left_out(site):
    (site / "other/tests").mkdir()
    for name in ("tests/norm.py", "test_norm.py"):
        (site / "other" / name).write_text(f'"""{SENTENCE}"""')
    (site / "other/broken.py").write_text("def")
    (site / "alone.py").write_text(f'"""{SENTENCE}"""\nshort = "not long enough"')
    found = list(docstrings("other"))
    assert [each.name for each in found] == [f"other: other/{word}.py" for word in ("median", "norm", "product")]
    assert [each.text.count("\n") for each in found] == [2, 2, 2]
    assert list(docstrings("alone")) == [Page("alone: alone.py", SENTENCE)]
    assert list(docstrings("other", lambda name: name.endswith("norm.py"))) == [found[1]]


def test_no_paragraph_occurs_twice_in_what_is_learned_tuned_on_and_held_out(site):
    kinds = corpora() | {"read": read_pages()}
    words = {kind: [text.split()[2] for _, text in texts] for kind, texts in kinds.items()}
    assert words == {
        "numpy": ["mean", "sum"],
        "manual": ["rule"],
        "readmes": ["readme"],
        "known": ["product"],  # numpy has the sum
        "read": ["median", "norm"],  # and the files that are held out have the product
    }
    assert all(text.count("Return") == 1 for texts in kinds.values() for _, text in texts)


def test_a_file_that_is_held_out_is_not_read_even_where_its_paragraphs_are_too_short_to_be_told_apart(site):
    short = "\n\n".join(f"Return the {word}." for word in ("sum", "mean", "product", "median", "norm", "trace", "rank"))
    (site / "known/short.py").write_text(f'"""{short}"""')
    assert short in [text for _, text in corpora()["known"]]
    assert short not in [text for _, text in read_pages()]


def test_paragraphs_that_differ_in_numbers_alone_are_the_same_and_tables_are_no_prose():
    table = Page("a: b", "\n".join(f"{i:>12}  0x{i:08x}  {i * i:>12}  ->  {i / 7:.12f}" for i in range(40)))
    other = Page("a: c", SENTENCE.format("sum") + " It has 3 axes at most.")
    again = Page("a: d", SENTENCE.format("sum") + " It has 45 axes at most.\n\n" + SENTENCE.format("minimum"))
    kept = list(pages._without_repeats([table, other, again], set()))
    assert kept == [other, Page("a: d", SENTENCE.format("minimum"))]


# The task


@pytest.fixture(scope="module")
def many():
    return [page(f"p: {i}", [f"{spell(i)} part {spell(k)}" for k in range(2 + 6 * (i % 3))]) for i in range(60)]


@pytest.fixture(scope="module")
def task(many):
    options = {"name": "some", "about": "", "seq_len": 16, "held_out": 10, "per_page": 12}
    return paged_task(ByteTokenizer(), many[:40], many[40:], **options)


def texts_of(examples, per_page):
    """The text of each block of rows, with the last target."""
    blocks = zip(examples.inputs.split(per_page), examples.targets.split(per_page), strict=True)
    return [bytes([*inputs.flatten().tolist(), targets[-1, -1].item()]).decode() for inputs, targets in blocks]


def test_a_block_of_rows_is_the_beginning_of_a_page(many, task):
    for part, among in (("validation", many[:40]), ("test", many[:40]), ("off_domain", many[40:])):
        found = texts_of(task.parts[part], 12)
        assert len(found) == len(set(found)) == 10
        assert all(
            len(text) == 12 * 16 + 1 and sum(each.text.startswith(text) for each in among) == 1 for text in found
        )
        assert torch.equal(task.parts[part].inputs[:, 1:], task.parts[part].targets[:, :-1])


def test_no_page_is_in_two_parts_and_what_is_not_held_out_is_learned(many, task):
    held = {*texts_of(task.validation, 12), *texts_of(task.test, 12)}
    assert len(held) == 20
    learned = [each.text for each in many[:40] if not any(each.text.startswith(text) for text in held)]
    assert len(task.train) == (len("\n\n".join(learned)) - 1) // 16


def test_a_paragraph_that_shares_a_sentence_with_a_held_out_page_is_not_learned(many):
    shared = "It is the same as the one of the module before it in every respect."
    pages = [Page(name, f"{text}\n\n{shared} {name.replace(' ', '')}") for name, text in many[:40]]
    options = {"name": "some", "about": "", "seq_len": 16, "held_out": 10, "per_page": 12}
    learned = paged_task(ByteTokenizer(), pages, many[40:], **options).train.inputs.flatten().tolist()
    assert b"array" in bytes(learned)  # rows of 16 letters are in random order, so words are looked for
    assert b"module" not in bytes(learned)


def test_the_order_of_the_pages_does_not_decide_which_are_held_out(many, task):
    options = {"name": "some", "about": "", "seq_len": 16, "held_out": 10, "per_page": 12}
    again = paged_task(ByteTokenizer(), many[:40][::-1], many[40:], **options)
    assert torch.equal(again.test.inputs, task.test.inputs)
    renamed = [Page(name + "!", text) for name, text in many[:40]]
    assert not torch.equal(paged_task(ByteTokenizer(), renamed, many[40:], **options).test.inputs, task.test.inputs)


def test_too_few_long_pages_are_refused(many):
    with pytest.raises(ValueError, match=r"'some' has \d+ pages of 192 tokens; lower held_out or per_page\."):
        paged_task(ByteTokenizer(), many[:40], many, name="some", about="", seq_len=16, held_out=21, per_page=12)


def test_pages_are_cut_in_their_order_and_short_ones_left_out(many):
    cut = cut_pages(ByteTokenizer(), many, 16, 12, limit=3)
    assert texts_of(cut, 12) == [each.text[:193] for each in many if len(each.text) > 192][:3]
