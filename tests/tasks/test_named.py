"""Tasks from files and tables that people have: what is read, how it is split, and what is refused."""

import builtins
import gzip
import json

import numpy as np
import pandas
import pytest
import torch

from lora_lab.tasks import Pair, PairTask, Task, from_jsonl, from_pairs, from_table, from_text, task_of
from lora_lab.tasks.named import StoredExample, parse

USER, ASSISTANT, SYSTEM = ("user", "What is 2 + 2?"), ("assistant", "4"), ("system", "Answer in one word.")
LONGER = (SYSTEM, USER, ASSISTANT, ("user", "And 3 + 3?"), ("assistant", "6"))


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


# The forms of an example


def chat(turns):
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": content} for role, content in turns]


@pytest.mark.parametrize(
    ("entry", "turns"),
    [
        ({"messages": chat(LONGER)}, LONGER),
        ({"messages": chat(LONGER), "prompt": "kept beside it", "prompt_id": 7}, LONGER),
        ({"conversations": sharegpt(LONGER)}, LONGER),
        ({"conversations": chat(LONGER[1:]) and sharegpt(LONGER[1:])}, LONGER[1:]),
        ({"instruction": USER[1], "output": "4"}, (USER, ASSISTANT)),
        ({"instruction": USER[1], "input": "", "output": "4"}, (USER, ASSISTANT)),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, (("user", "Add.\n\n2, 2"), ASSISTANT)),
        ({"prompt": USER[1], "answer": "4"}, (USER, ASSISTANT)),
        ({"prompt": USER[1], "completion": "4"}, (USER, ASSISTANT)),
        ({"prompt": USER[1], "response": "4"}, (USER, ASSISTANT)),
        ({"question": USER[1], "answer": "4"}, (USER, ASSISTANT)),
    ],
    ids=str,
)
def test_each_form_is_recognised_by_its_keys(entry, turns):
    content = Pair(turns[-2][1], turns[-1][1], "g", turns[:-2])
    ignored = {"prompt", "prompt_id"} & entry.keys() if "messages" in entry else set()
    assert parse(entry | {"group": "g", "part": "test"}) == StoredExample(content, "test", frozenset(ignored))
    assert parse(json.dumps(entry)).content == Pair(turns[-2][1], turns[-1][1], "", turns[:-2])


def test_a_text_is_no_conversation_and_other_keys_are_ignored_by_name():
    assert parse({"text": "Once upon a time."}) == StoredExample("Once upon a time.")
    assert parse({"question": "a", "answer": "b", "id": 3, "source": "x"}).ignored == {"id", "source"}
    assert parse({"prompt": "a", "answer": "b", "group": None}).content.group == ""


REFUSED_ENTRIES = [
    ('"text"', "the line is 'text'"),
    ("text", "not JSON .*column 1"),
    ("[" * 100_000, "not JSON .*recursion"),
    ({}, r"keys \[\]"),
    ({"content": "x"}, "'content'"),
    ({"prompt": "a"}, "'prompt'.*prompt and completion"),
    ({"prompt": "a", "answer": None}, "answer is None"),
    ({"prompt": "a", "answer": " "}, "answer is ' '"),
    ({"instruction": " ", "output": "a", "input": "b"}, "instruction"),
    ({"text": ""}, "text is ''"),
    ({"prompt": "a", "answer": "b", "group": 3}, "group is 3"),
    ({"prompt": "a", "answer": "b", "part": "dev"}, "part is 'dev'"),
    ({"messages": "hello"}, "messages is 'hello'"),
    ({"messages": [{"role": "user"}]}, "messages .*0.content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "content is .'x'."),
    ({"conversations": [{"from": 3, "value": "x"}]}, "from is 3"),
    ({"messages": chat([("tool", "x"), ASSISTANT])}, "role is 'tool'"),
    ({"messages": chat([("user", " "), ASSISTANT])}, "messages: 0.content is ' '"),
    ({"conversations": sharegpt([USER])}, "are of user,"),
    *(
        ({"messages": chat(turns)}, f"are of {', '.join(role for role, _ in turns) or 'nobody'}, but")
        for turns in (
            [],
            [SYSTEM],
            [USER, ASSISTANT, USER],
            [ASSISTANT],
            [USER, USER, ASSISTANT],
            [USER, SYSTEM, ASSISTANT],
        )
    ),
]


@pytest.mark.parametrize(("entry", "named"), REFUSED_ENTRIES, ids=str)
def test_what_is_malformed_is_named(entry, named):
    with pytest.raises(ValueError, match=named):
        parse(entry)


# JSON Lines


def conversations(count=30):
    return [((*LONGER[:3], ("user", f"And {i} + {i}?"), ("assistant", str(2 * i)))) for i in range(count)]


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_a_file_of_conversations_becomes_a_task(chatter, tmp_path, form):
    write = {"messages": chat, "conversations": sharegpt}[form]
    lines = [json.dumps({form: write(turns), "id": i}) for i, turns in enumerate(conversations())]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    task = from_jsonl(chatter, tmp_path / "talk.jsonl")
    assert isinstance(task, PairTask)
    assert sum(len(task.pairs[part]) for part in task.pairs) == 30
    assert "without its entries 'id'" in task.about
    pair = task.pairs["train"][0]
    assert pair.before == LONGER[:3]
    text = chatter.decode(task.prompt_ids(pair))
    assert "Answer in one word." in text
    assert text.count("What is 2 + 2?") == 1
    ends = int((task.train.targets[0] == chatter.eos_id).sum())
    assert ends == 2
    shown = [line.split(maxsplit=1)[0] for line in task.preview(1).splitlines()[1:-1]]
    assert shown == ["reads", "learns", "reads", "learns"]


def test_a_file_of_texts_becomes_next_token_prediction(chatter, tmp_path):
    lines = [json.dumps({"text": f"This is text {i}, which says that {i} times {i} is {i * i}."}) for i in range(60)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))
    task = from_jsonl(chatter, path, seq_len=16)
    assert type(task) is Task
    assert task.train.inputs.shape[1] == 16


def test_options_of_a_file_are_those_of_its_form(chatter, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", *({"prompt": f"{i}?", "answer": "yes"} for i in range(20)))
    texts = write(tmp_path / "texts.jsonl", *({"text": f"This is text {i}. " * 12} for i in range(20)))
    task = from_jsonl(chatter, pairs, name="mine", metric="classification", seed=3, licence="ours", max_tokens=99)
    assert (task.name, task.metric, task.licence) == ("mine", "classification", "ours")
    assert task.pairs == from_pairs(chatter, [(f"{i}?", "yes") for i in range(20)], seed=3).pairs
    assert from_jsonl(chatter, texts).train.inputs.shape[1] == 128
    assert from_jsonl(chatter, texts, seq_len=64).train.inputs.shape[1] == 64
    assert from_jsonl(chatter, texts, name="mine", about="ours").describe().startswith("mine: ours; off-domain")
    for path, option in ((texts, {"max_tokens": 5}), (pairs, {"seq_len": 64}), (texts, {"seqlen": 64})):
        with pytest.raises(TypeError, match=next(iter(option))):
            from_jsonl(chatter, path, **option)


def test_a_file_may_bring_its_own_split(chatter, tmp_path):
    parts = ["train"] * 5 + ["validation"] * 2 + ["test"] * 3
    rows = [{"prompt": f"{i}?", "answer": "yes", "part": part} for i, part in enumerate(parts)]
    task = from_jsonl(chatter, write(tmp_path / "mine.jsonl", *rows))
    assert {part: len(own) for part, own in task.pairs.items()} == {"train": 5, "validation": 2, "test": 3}


# Texts


def test_a_text_becomes_a_task_whose_parts_share_no_paragraph(chatter, tmp_path):
    paragraphs = [f"This is paragraph {i}, which says that {i} times {i} is {i * i}." for i in range(60)]
    task = from_text(chatter, write(tmp_path / "book.txt", "\n\n".join(paragraphs)), seq_len=32)
    told = {part: chatter.decode(examples.inputs.flatten().tolist()) for part, examples in task.parts.items()}
    for i, paragraph in enumerate(paragraphs):
        own = {8: "validation", 9: "test"}.get(i % 10, "train")
        mark = f"paragraph {i},"
        assert all(mark not in text for part, text in told.items() if part != own), paragraph
    assert task.unit == "tokens"
    assert task.name == "book"


KIN = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # line ends for str.splitlines


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_separators_of_unicode_are_text_and_no_line_ends(chatter, tmp_path, end):
    rows = [{"prompt": f"{i}{KIN}?", "answer": f"a{KIN}b"} for i in range(9)]
    path = tmp_path / "kin.jsonl"
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    task = from_jsonl(chatter, path)
    assert sum(map(len, task.pairs.values())) == 9
    assert all(pair.answer == f"a{KIN}b" for pair in task.pairs["train"])
    text = tmp_path / "kin.txt"
    text.write_bytes(f"{end}{end}".join(f"{KIN}{i} words." for i in range(60)).encode())
    read = chatter.decode(from_text(chatter, text, seq_len=8).train.inputs.flatten().tolist())
    assert read.count("\x1c") > 40
    assert "\r" not in read


def test_special_tokens_become_tokens_of_texts_only_where_that_is_asked_for(chatter, tmp_path):
    paragraphs = [f"This is paragraph {i}, and some more words, so that it is long enough." for i in range(40)]
    path = write(tmp_path / "text.txt", "\n\n".join([*paragraphs[:3], "Here </s> it is.", *paragraphs[4:]]))
    lines = write(
        tmp_path / "lines.jsonl", *({"text": text} for text in [*paragraphs[:3], "Here </s>", *paragraphs[4:]])
    )
    with pytest.raises(ValueError, match=r"text\.txt .*paragraph 4: .*'</s>'"):
        from_text(chatter, path, seq_len=32)
    with pytest.raises(ValueError, match=r"line 4: .*'</s>'"):
        from_jsonl(chatter, lines, seq_len=32)
    for task in (from_text(chatter, path, seq_len=32, allow_special=True), task_of(str(lines), chatter, True)):
        assert int((task.train.inputs == chatter.eos_id).sum()) == 1


def test_blank_lines_and_marks_of_the_encoding_change_nothing(chatter, tmp_path):
    rows = [json.dumps({"prompt": f"{i}?", "answer": "a"}) for i in range(9)]
    (tmp_path / "x.jsonl").write_bytes("\n".join(rows).encode())
    plain = from_jsonl(chatter, tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(("\r\n" * 9_999).join(rows).encode("utf-8-sig"))
    assert from_jsonl(chatter, tmp_path / "x.jsonl").fingerprint == plain.fingerprint


def test_a_name_of_a_file_that_is_no_text_is_no_obstacle(chatter, tmp_path):
    try:
        path = write(tmp_path / "mine\udcff.jsonl", *({"prompt": f"{i}?", "answer": "a"} for i in range(9)))
    except OSError:
        pytest.skip("the file system has names in UTF-8 only")
    assert len(from_jsonl(chatter, path).fingerprint) == 16


# Tables

FRAME = pandas.DataFrame({"text": [f"Text {i}" for i in range(30)], "label": [i % 3 for i in range(30)], "x": 0.5})
COLUMNS = {"prompt": "text", "answer": "label"}


@pytest.fixture(params=["csv", "tsv", "frame", "dataset"])
def table(request, tmp_path):
    if request.param == "frame":
        return FRAME
    if request.param == "dataset":

        class Dataset:
            def to_pandas(self):
                return FRAME

        return Dataset()
    path = tmp_path / f"mine.{request.param}"
    FRAME.to_csv(path, sep="," if request.param == "csv" else "\t", index=False)
    return path


def test_two_columns_become_prompts_and_answers(chatter, table):
    task = from_table(chatter, table, **COLUMNS, metric="classification")
    expected = from_pairs(
        chatter, [Pair(text, str(label)) for text, label in zip(FRAME.text, FRAME.label, strict=True)]
    )
    assert task.pairs == expected.pairs
    assert torch.equal(task.train.inputs, expected.train.inputs)
    assert task.metric == "classification"
    assert task.name in ("mine", "table", "dataset")


def test_a_parquet_file_is_read_too_or_what_it_needs_is_named(chatter, tmp_path, monkeypatch):
    path = tmp_path / "mine.parquet"
    path.write_bytes(b"PAR1")
    plain = builtins.__import__

    def without(name, *args, **options):
        if name.startswith(("pyarrow", "fastparquet")):
            raise ImportError(name)
        return plain(name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(ValueError, match=r"cannot be read as a table: .*pyarrow"):
            from_table(chatter, path, **COLUMNS)
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        from_table(chatter, path, **COLUMNS)
    FRAME.to_parquet(path)
    assert from_table(chatter, path, **COLUMNS).pairs == from_table(chatter, FRAME, **COLUMNS).pairs


def test_columns_may_decide_groups_and_the_split(chatter):
    task = from_table(chatter, FRAME.assign(group=[f"w{i // 5}" for i in range(30)]), **COLUMNS)
    parts = [{pair.group for pair in task.pairs[part]} for part in task.pairs]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 6
    parts = ["train"] * 20 + ["validation"] * 5 + ["test"] * 5
    task = from_table(chatter, FRAME.assign(part=parts), **COLUMNS)
    assert [len(task.pairs[part]) for part in ("train", "validation", "test")] == [20, 5, 5]


@pytest.mark.parametrize(
    ("empty", "dtype"),
    [
        *((empty, object) for empty in (None, float("nan"), np.float32("nan"), "", "  ", pandas.NaT)),
        *((pandas.NA, dtype) for dtype in (object, "string", "Int64", "category")),
    ],
)
def test_an_empty_cell_is_named_by_its_row(chatter, empty, dtype):
    frame = FRAME.astype({"label": dtype})
    frame.loc[4, "label"] = empty
    with pytest.raises(ValueError, match="table has 1 malformed row: row 5: answer is '"):
        from_table(chatter, frame, **COLUMNS)


def test_rare_letters_and_numbers_in_a_file_are_text(chatter, tmp_path):
    rows = "\n".join(f"{i}\u2028\x85\x0b\x1e,{i * i}" for i in range(12))
    (tmp_path / "mine.csv").write_text(f"prompt,answer\n{rows}\n", encoding="utf-8")
    task = from_table(chatter, tmp_path / "mine.csv")
    pairs = [pair for part in task.pairs.values() for pair in part]
    assert sorted(pair.answer for pair in pairs) == sorted(str(i * i) for i in range(12))
    assert all(pair.prompt.endswith("\u2028\x85\x0b\x1e") for pair in pairs)


# What is refused


def lines(*rows):
    return "\n".join(map(json.dumps, rows)).encode()


GOOD = {"prompt": "x", "answer": "y"}
REFUSED_FILES = {
    "broken.jsonl": (lines(GOOD) + b"\n{", "line 2: not JSON"),
    "early.jsonl": (lines(GOOD) + b'\n{"prompt":"abc","answer":"d"\n', "line 2: not JSON .*column 29"),
    "list.jsonl": (lines(GOOD, [1]), "line 2: the line is .1."),
    "nine.jsonl": (b"?\n" * 9, "9 malformed lines: line 1: .*line 5: .*; and 4 more"),
    "nothing.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n" * 100_000, "is empty"),
    "gzip.jsonl": (gzip.compress(b"{}"), "not UTF-8 .byte 1."),
    "utf-16.jsonl": ("{}".encode("utf-16"), "not UTF-8 .byte 0."),
    "no mark.jsonl": ("{}".encode("utf-16-le"), "zero bytes"),
    "late byte.jsonl": (b"\n" * 100_000 + b"\xff", "not UTF-8 .byte 100000."),
    "array.jsonl": (b'\n [\n {"prompt": "a", "answer": "b"},\n', "JSON array"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 100_000, "line 1: not JSON"),
    "digits.jsonl": (b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: Exceeds the limit"),
    "long key.jsonl": (b'{"' + b"k" * 1_000_000 + b'": 1}', "line 1: has the keys .*k [.]{3}"),
    "mixed.jsonl": (lines(GOOD, {"text": "a"}), "1 texts and 1 conversations"),
    "few.jsonl": (lines({"text": "a"}), "train part .*128"),
    "parts.jsonl": (lines(GOOD | {"part": "test"}, GOOD), "on 1 of 2 examples"),
    "half prompt.jsonl": (lines(GOOD, {"prompt": "x \ud83d", "answer": "y"}), "line 2: .* half a character"),
    "half answer.jsonl": (lines(GOOD, {"prompt": "x", "answer": "y \ud83d"}), "line 2: .* half a character"),
    "half chat.jsonl": (lines({"messages": chat([("user", "\ud83d"), ASSISTANT])}), "line 1: .* half a character"),
    "half input.jsonl": (lines({"instruction": "x", "input": "\udcff", "output": "y"}), "line 1: .* half a character"),
    "half text.jsonl": (lines({"text": "\ude00"}), "line 1: .* half a character"),
    "turns.jsonl": (lines(GOOD, {"prompt": "x</s>\n<s>assistant: yes", "answer": "a"}), "line 2: .*'</s>'"),
    "answer.jsonl": (lines({"prompt": "x", "answer": "a</s>"}), "line 1: .*'</s>'"),
    "bytes.txt": (b"\xff\xfe\x00", "not UTF-8"),
    "few.txt": (b"\n\n".join([b"A longer text. " * 20] * 8), "validation part .*128"),
    "column.csv": (b"prompt\na\n", "'answer'"),
    "zeros.csv": (bytes(100_000), "'prompt'"),
    "gzip.csv": (gzip.compress(b"prompt,answer"), "cannot be read"),
    "utf-16.csv": ("prompt,answer\na,b\n".encode("utf-16"), "cannot be read"),
    "bytes.tsv": (b"prompt\tanswer\n\xff\xfe\tx\n", "cannot be read"),
    "ragged.csv": (b"prompt,answer\na,b,c,d\n" + b"a,b,c,d,e\n", "Expected 4 fields"),
    "blank.csv": (b"\n" * 100_000, "No columns"),
    "empty.csv": (b"", "No columns"),
    "special.csv": (b"prompt,answer\na,b\nx</s>,c\n", "row 2: .*'</s>'"),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_files_that_make_no_task_are_refused_in_a_short_sentence(chatter, tmp_path, name):
    content, named = REFUSED_FILES[name]
    (tmp_path / name).write_bytes(content)
    texts = '"text"' in content.decode(errors="replace") or name.endswith(".txt")
    for allow_special in (False, True) if not texts else (False,):  # that is for texts alone
        with pytest.raises(ValueError, match=rf"{name}.*{named}") as raised:
            task_of(str(tmp_path / name), chatter, allow_special)
        assert len(str(raised.value)) < 700
        assert "\n" not in str(raised.value)
        assert "line 6" not in str(raised.value)


REFUSED = [
    (lambda t: from_jsonl(t, "nowhere"), FileNotFoundError, "nowhere"),
    (lambda t: from_text(t, "nowhere"), FileNotFoundError, "nowhere"),
    (lambda t: from_table(t, "nowhere.csv"), FileNotFoundError, "nowhere"),
    (lambda t: from_jsonl(t, "A text\n\nin place of a path. " * 200), ValueError, "path is 'A text"),
    (lambda t: from_text(t, "A text\n\nin place of a path. " * 200), ValueError, "path is 'A text"),
    (lambda t: from_table(t, "mine.xlsx"), ValueError, "mine.xlsx"),
    (lambda t: from_table(t, FRAME), ValueError, "'prompt'.*prompt="),
    (lambda t: from_table(t, FRAME, prompt=5), ValueError, "column 5.*prompt="),
    (lambda t: from_table(t, FRAME, prompt="text", answer=None), ValueError, "column None.*answer="),
    (lambda t: from_table(t, FRAME.assign(part=["test"] + 29 * [None]), **COLUMNS), ValueError, "on 1 of 30"),
    (lambda t: from_table(t, FRAME.assign(part=0.5), **COLUMNS), ValueError, "30 malformed rows: row 1: part is '0.5'"),
]


@pytest.mark.parametrize(("call", "error", "named"), REFUSED)
def test_what_cannot_be_read_is_named(chatter, call, error, named):
    with pytest.raises(error, match=named) as raised:
        call(chatter)
    assert len(str(raised.value)) < 600
