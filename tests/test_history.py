"""Histories made by hand: their curves, their file, and files that are refused."""

import dataclasses
import json
import math
import sys

import pytest

from lora_lab import History
from lora_lab.history import COLUMNS, is_number


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


def test_before_training_there_is_no_gap():
    assert trained([6.0], []).curve("gap") == ([], [])
    assert trained([6.0, 4.0], [5.0]).curve("gap")[0] == [1]
    assert trained([6.0, 4.0], [5.0]).curve("validation_loss")[0] == [0, 1]


def test_speeds_are_medians_over_the_steps_without_row_zero():
    history = handmade([1.0, None, None, None])
    assert history.step_seconds == 2.0  # of 4, 1, 2
    assert history.tokens_per_second == 15.0  # of 10/4, 20/1, 30/2


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


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "The content is a list, but it must be an object"),
        (None, "The content is a NoneType"),
        ({}, "The content has missing or unknown entries: method, optimizer_bytes, rows, settings, task, total_param"),
        (stored(colour=1, size=2), "The content has missing or unknown entries: colour, size"),
        (stored(**{"x" * 10**6: 1}), r"The content has missing or unknown entries: x+ \.\.\."),
        (stored(task="digits"), "task is 'digits', but it must be an object"),
        (stored(method=None), "method is None"),
        (stored(settings=1), "settings is 1"),
        (stored(trainable_parameters=1.5), "trainable_parameters is 1.5, but it must be a whole number"),
        (stored(total_parameters=-1), "total_parameters is -1"),
        (stored(optimizer_bytes=True), "optimizer_bytes is True"),
        (stored(optimizer_bytes=10**400), "optimizer_bytes is 10+.*, but it must be less than"),
        (stored(task={"name": 5}), "task.name is 5, but it must be a string"),
        (stored(rows={"0": {}}), r"rows is \{'0': \{\}\}, but it must be a list"),
        (stored(rows=[row(0), row(2)]), "Row 1 is of step 2, but rows must be of steps 0, 1, 2"),
        (stored(rows=[row(0), row(1.0)]), "Row 1 is of step 1.0"),
        (stored(rows=[row(0), []]), r"rows.1 is \[\], but it must be an object"),
        (stored(rows=[row(0), {}]), r"Row 1 is \{\}, but it must have the values step, train_loss, validation_loss"),
        (stored(rows=[row(0, colour=1)]), "Row 0 is .*, but it must have the values"),
        (stored(rows=[row(0), row(1, lr=None)]), "Row 1 has None as lr, but it must be a finite number"),
        (stored(rows=[row(0, seconds=None)]), "Row 0 has None as seconds"),
        (stored(rows=[row(0, tokens="4")]), "Row 0 has '4' as tokens"),
        (stored(rows=[row(0, tokens=True)]), "Row 0 has True as tokens"),
        (stored(rows=[row(0, validation_loss=math.nan)]), "Row 0 has nan as validation_loss"),
        (stored(rows=[row(0, off_domain_loss=math.inf)]), "Row 0 has inf as off_domain_loss"),
        (stored(rows=[row(0, grad_norm=-math.inf)]), "Row 0 has -inf as grad_norm"),
        (stored(rows=[row(0, grad_norm=math.nan)]), "Row 0 has nan as grad_norm"),
        (stored(rows=[row(0, train_loss=10**400)]), "Row 0 has 10+.* as train_loss"),
    ],
)
def test_what_is_no_history_is_told_in_a_sentence_with_the_file(tmp_path, content, says):
    path = tmp_path / "history.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"history\.json holds no History \({says}.*\); give a file that") as caught:
        History.load(path)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 500
    path.write_text(json.dumps(stored()))
    assert History.load(path).rows == [row(0), row(1)]


def test_a_file_that_is_no_json_or_is_not_there_is_told(tmp_path):
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(ValueError, match=r"history\.json is not JSON"):
        History.load(tmp_path / "history.json")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*other\.json"):
        History.load(tmp_path / "other.json")


def test_a_number_is_finite_and_no_truth_value():
    largest = sys.float_info.max
    assert all(map(is_number, (0, -1.5, largest, -largest, int(largest))))
    assert not any(map(is_number, (True, None, "1", math.nan, math.inf, 2 * int(largest))))
