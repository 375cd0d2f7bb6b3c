"""Histories made by hand: their curves, their file, and files that are refused."""

import dataclasses
import json
import math

import pytest

from lora_lab.history import COLUMNS, History


def handmade(validation):
    rows = [
        {**dict.fromkeys(COLUMNS), "step": i, "validation_loss": v, "seconds": s, "tokens": 10 * i}
        for i, (v, s) in enumerate(zip(validation, (0.0, 4.0, 1.0, 2.0, 1.0), strict=False))
    ]
    return History({"name": "t"}, {"name": "full"}, {"steps": len(rows) - 1}, 1, 2, 3, rows)


def test_best_step_is_that_of_the_lowest_validation_loss():
    assert handmade([3.0, 2.0, None, 1.5, 1.8]).best_step == 3
    assert handmade([1.0, 2.0, None, 1.5, 1.8]).best_step == 0


def test_curve_skips_steps_without_a_value():
    assert handmade([3.0, 2.0, None, 1.5]).curve("validation_loss") == ([0, 1, 3], [3.0, 2.0, 1.5])
    assert handmade([3.0]).curve("train_loss") == ([], [])


def trained(validation, train):
    """A history made by hand, with training losses from step 1 on."""
    history = handmade(validation)
    for row, loss in zip(history.rows[1:], train, strict=True):
        row["train_loss"] = loss
    return history


def test_the_gap_is_the_validation_loss_less_the_mean_training_loss_since_the_evaluation_before():
    history = trained([6.0, None, 4.75, None, 3.25], [5.0, 4.0, 3.5, 1.5])
    assert history.curve("gap") == ([2, 4], [4.75 - 4.5, 3.25 - 2.5])
    assert trained([6.0, None, 4.75, None, 3.25], [9.0, 4.0, 3.5, 1.5]).curve("gap")[1] == [4.75 - 6.5, 0.75]
    assert trained([6.0, 4.0, 3.0], [5.0, 4.5]).curve("gap") == ([1, 2], [-1.0, -1.5])
    assert trained([6.0, None, 5.0, None], [4.0, 4.0, 1.0]).curve("gap") == ([2], [1.0])


def test_speeds_are_medians_over_the_steps_without_row_zero():
    history = handmade([1.0, None, None, None])
    assert history.step_seconds == 2.0  # of 4, 1, 2
    assert history.tokens_per_second == 15.0  # of 10/4, 20/1, 30/2


def test_a_frame_has_one_row_a_step_and_numbers_in_every_column():
    frame = handmade([3.0, None, 2.0]).frame()
    kinds = {name: dtype.kind for name, dtype in frame.dtypes.items()}
    assert kinds == dict.fromkeys(COLUMNS, "f") | {"step": "i", "tokens": "i"}
    assert frame["step"].tolist() == [0, 1, 2]
    assert frame["validation_loss"].notna().tolist() == [True, False, True]


def row(step, **changes):
    losses = {"train_loss": 1.0, "validation_loss": None, "off_domain_loss": None}
    return {"step": step, **losses, "lr": 0.1, "grad_norm": 2, "seconds": 0.5, "tokens": 4} | changes


def test_a_history_may_lack_what_was_not_evaluated_and_have_a_norm_beyond_all_numbers(tmp_path):
    first = row(0, train_loss=None, lr=None, grad_norm=None, validation_loss=2, seconds=0.0, tokens=0)
    history = History({}, {}, {}, 0, 0, 0, [first, row(1, grad_norm=math.inf), row(2, off_domain_loss=1e308)])
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == history
    assert History.from_dict(dataclasses.asdict(history)) == history


def stored(**changes):
    """What a file holds of a history, changed."""
    return dataclasses.asdict(History({}, {}, {}, 0, 0, 0, [row(0), row(1)])) | changes


REFUSED = [  # the content, what must be named
    ([], r"The history is \[\]"),
    ({}, "total_parameters"),
    (stored(colour=1), "entries"),
    (stored(task="digits"), "task is 'digits'"),
    (stored(method=None), "method is None"),
    (stored(trainable_parameters=1.5), r"trainable_parameters is 1\.5"),
    (stored(total_parameters=-1), "total_parameters is -1"),
    (stored(optimizer_bytes=True), "optimizer_bytes is True"),
    (stored(optimizer_bytes=10**400), "optimizer_bytes is 10"),
    (stored(task={"name": 5}), "task.name is 5"),
    (stored(rows={"0": {}}), "rows is"),
    (stored(rows=[row(0), row(2)]), "Row 1"),
    (stored(rows=[row(0), row(1.5)]), r"Row 1: step is 1\.5"),
    (stored(rows=[row(0), []]), "rows.1"),
    (stored(rows=[row(0), {}]), "Row 1 lacks the entry 'step'"),
    (stored(rows=[row(0, colour=1)]), "Row 0"),
    (stored(rows=[row(0), row(1, lr=None)]), "Row 1"),
    *[
        (stored(rows=[row(0, **{name: value})]), f"Row 0: {name} is")
        for name, values in {
            "seconds": [None, -1.0],
            "tokens": ["4", True],
            "validation_loss": [math.nan],
            "off_domain_loss": [math.inf],
            "grad_norm": [-math.inf, math.nan],
            "train_loss": [10**400],
        }.items()
        for value in values
    ],
]


@pytest.mark.parametrize(("content", "named"), REFUSED)
def test_what_is_no_history_is_told_in_a_sentence_with_the_file(tmp_path, content, named):
    path = tmp_path / "history.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"history\.json holds no History: .*{named}") as caught:
        History.load(path)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 500
    path.write_text(json.dumps(stored()))
    assert History.load(path).rows == [row(0), row(1)]
