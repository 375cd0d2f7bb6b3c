"""Tasks from tables and arrays: what is read, how it is split, and what is refused."""

import builtins
import gzip

import numpy as np
import pandas
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits, load_iris

from lora_lab import LoRA, fit
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import cross_entropy, from_arrays, from_pairs, from_table, mean_squared_error
from lora_lab.tasks.instruction import Pair

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
    with pytest.raises(ValueError, match=r"has no column None, but .*; rename the right one, or .*, answer="):
        from_table(chatter, table, prompt="text", answer=None)


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
        with pytest.raises(ValueError, match="needs the library pyarrow; install it with pip install pyarrow"):
            from_table(chatter, path, **COLUMNS)
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        from_table(chatter, path, **COLUMNS)
    FRAME.to_parquet(path)
    assert from_table(chatter, path, **COLUMNS).pairs == from_table(chatter, FRAME, **COLUMNS).pairs


def test_columns_may_decide_groups_and_the_split(chatter):
    frame = FRAME.assign(
        writer=[f"w{i // 5}" for i in range(30)], fold=["train"] * 20 + ["validation"] * 5 + ["test"] * 5
    )
    task = from_table(chatter, frame, **COLUMNS, group="writer")
    parts = [{pair.group for pair in task.pairs[part]} for part in task.pairs]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 6
    task = from_table(chatter, frame, **COLUMNS, part="fold")
    assert [len(task.pairs[part]) for part in ("train", "validation", "test")] == [20, 5, 5]
    with pytest.raises(ValueError, match="Row 1 of table has the part 'w0', not one of train, validation, test"):
        from_table(chatter, frame, **COLUMNS, part="writer")


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
    with pytest.raises(ValueError, match="Row 5 of table has nothing in the column 'label'; fill or remove it"):
        from_table(chatter, frame, **COLUMNS)


REFUSED_FILES = {
    "one column": (b"prompt\na\n", "'answer'"),
    "zeros": (bytes(100_000), "'prompt'"),
    "gzip": (gzip.compress(b"prompt,answer"), "cannot be read"),
    "utf-16": ("prompt,answer\na,b\n".encode("utf-16"), "UTF-8"),
    "bytes": (b"prompt,answer\n\xff\xfe,x\n", "UTF-8"),
    "ragged": (b"prompt,answer\na,b,c,d\n" + b"a,b,c,d,e\n", "as many cells"),
    "blank": (b"\n" * 100_000, "No columns"),
    "empty": (b"", "No columns"),
}


@pytest.mark.parametrize(("content", "named"), REFUSED_FILES.values(), ids=REFUSED_FILES)
def test_files_that_are_no_tables_are_refused_in_a_short_sentence(chatter, tmp_path, content, named):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.csv.*{named}") as raised:
        from_table(chatter, tmp_path / "x.csv")
    assert len(str(raised.value)) < 700


def test_a_column_or_a_file_that_is_not_there_is_named(chatter, tmp_path):
    for column in (["text"], 5, None, "texts"):
        with pytest.raises(ValueError, match="prompt="):
            from_table(chatter, FRAME, prompt=column, answer="label")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        from_table(chatter, tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="xlsx"):
        from_table(chatter, tmp_path / "mine.xlsx")


# Arrays


def test_classes_become_numbers_and_each_part_has_them_all():
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    task = from_arrays(X, names)
    assert task.loss is cross_entropy
    assert [len(task.parts[part]) for part in ("train", "validation", "test")] == [120, 15, 15]
    for part in ("train", "validation", "test"):
        assert task.parts[part].targets.bincount().tolist() == [len(task.parts[part]) // 3] * 3
    rows = {tuple(row): name for row, name in zip(np.float32(X).tolist(), y.tolist(), strict=True) if True}
    for inputs, targets in ((task.parts[part].inputs, task.parts[part].targets) for part in ("train", "test")):
        assert [rows[tuple(row)] for row in inputs.tolist()] == targets.tolist()
    assert torch.equal(task.off_domain.inputs, task.test.inputs)
    assert "off-domain: the test part" in task.about
    assert from_arrays(X, names).fingerprint == task.fingerprint != from_arrays(X, names, seed=1).fingerprint


def test_numbers_are_predicted_in_columns():
    X, y = load_diabetes(return_X_y=True)
    task = from_arrays(X, y + 0.5)
    assert task.loss is mean_squared_error
    assert task.train.targets.shape == (442 - 2 * 44, 1)
    assert from_arrays(X, np.stack([y, -y], 1), kind="regression").test.targets.shape == (44, 2)
    assert from_arrays(X, y).loss is cross_entropy  # its numbers are whole
    assert from_arrays(X, y > 100).train.targets.unique().tolist() == [0, 1]


def test_a_task_of_arrays_trains():
    X, y = load_digits(return_X_y=True)
    task = from_arrays(X / 16, y, off_domain=(1 - X / 16, y))
    assert "off-domain" not in task.about
    history = fit(DigitsMLP(), task, LoRA(8), steps=60, lr=2e-2, batch_size=32)
    assert history.rows[-1]["validation_loss"] < 0.7 * history.rows[0]["validation_loss"]


NAN, X = float("nan"), np.ones((20, 2))
REFUSED = {  # X, y, options, and what must be named
    "lengths": (X, np.arange(19), {}, "19"),
    "few": (np.ones((9, 2)), np.arange(9), {}, "at least 10"),
    "no array": (X, 5, {}, "y has"),
    "flat": (np.ones(20), np.arange(20), {}, "X has shape .20,"),
    "nan": (np.full((20, 2), np.nan), np.arange(20), {}, "X must"),
    "one class": (X, np.zeros(20), {}, "class 0.0"),
    "two columns": (X, np.zeros((20, 2)), {}, r"y has shape \(20, 2\)"),
    "infinite": (X, np.full(20, np.inf), {"kind": "regression"}, "y must"),
    "texts": (X, np.array(["a", "b"] * 10), {"kind": "regression"}, "y must"),
    "missing number": (X, pandas.Series([1, None] * 10, dtype="Int64"), {"kind": "regression"}, "y must"),
    "missing": (X, ["a", None] * 10, {}, "missing"),
    "NaN among texts": (X, ["a", "b", NAN, "c"] * 5, {}, "missing"),
    "missing in pandas": (X, pandas.Series(["a", None] * 10, dtype="string"), {}, "missing"),
    "NaN": (X, [0.0, 1.0, NAN, 1.0] * 5, {"kind": "classification"}, "missing"),
    "mixed": (X, np.array(["a", 1] * 10, dtype=object), {}, "int, str"),
    "kind": (X, np.arange(20), {"kind": "ranking"}, "ranking"),
    "seed": (X, np.arange(20), {"seed": -1}, "seed is -1"),
    "off-domain": (X, np.arange(20) % 2, {"off_domain": (np.ones((2, 2)), [0, 7])}, "class 7"),
}


@pytest.mark.parametrize(("X", "y", "options", "named"), REFUSED.values(), ids=REFUSED)
def test_arrays_that_make_no_task_are_refused(X, y, options, named):
    with pytest.raises(ValueError, match=named):
        from_arrays(X, y, **options)


def test_tensors_that_require_gradients_are_arrays():
    X, y = torch.rand(30, 4, requires_grad=True), torch.arange(30) % 2
    assert len(from_arrays(X, y).train) == len(from_arrays(X.detach(), y).train)


def test_rare_letters_and_numbers_in_a_file_are_text(chatter, tmp_path):
    rows = "\n".join(f"{i}\u2028\x85\x0b\x1e,{i * i}" for i in range(12))
    (tmp_path / "mine.csv").write_text(f"prompt,answer\n{rows}\n", encoding="utf-8")
    task = from_table(chatter, tmp_path / "mine.csv")
    pairs = [pair for part in task.pairs.values() for pair in part]
    assert sorted(pair.answer for pair in pairs) == sorted(str(i * i) for i in range(12))
    assert all(pair.prompt.endswith("\u2028\x85\x0b\x1e") for pair in pairs)


@pytest.mark.parametrize(("text", "says"), [("x</s>", "a special token"), ("\ud83d", "half a character")])
def test_special_tokens_and_half_characters_are_named_by_their_row(chatter, text, says):
    frame = pandas.DataFrame({"prompt": ["a", "b", text, "d"], "answer": ["1", "2", "3", "4"]})
    with pytest.raises(ValueError, match=f"Row 3 of table holds .*{says}"):
        from_table(chatter, frame)
