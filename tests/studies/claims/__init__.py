"""Records for tests, and what they decide."""

from dataclasses import replace
from functools import cache

from lora_lab.studies import records
from lora_lab.studies.claims.deciding import DECIDERS, judge_record, read_claims
from lora_lab.studies.records import Record
from tests.helpers import COMMIT


def make(kind, rows):
    return Record(kind, "A CPU", {"device": "cpu"}, COMMIT, "2026-11-29", "a command", {}, [*rows])


def decide(claim_id, kind, rows):
    """Return the result on a claim from a record with these rows."""
    return judge_record(read_claims()[claim_id], make(kind, rows))


load_all = cache(records.load_all)


def changed(claim_id, change, *beside, folder=None, **facts):
    """Return the result on a claim from its record with changed rows and facts; the record is the one that is shipped.

    Args:
        change: of a list of rows.
        beside: records of a second kind.
        folder: of another record.
    """
    (record,) = load_all(DECIDERS[claim_id].record, folder).values()
    rows = change([dict(row) for row in record.rows])
    record = replace(record, rows=[*rows], facts=record.facts | facts)
    return judge_record(read_claims()[claim_id], record, *beside)


def unchanged(rows):
    return rows


def where(condition, **values):
    """A change of the rows for which a condition holds: values, or functions of the row."""

    def change(rows):
        for row in rows:
            if condition(row):
                row |= {name: value(row) if callable(value) else value for name, value in values.items()}
        return rows

    return change


def every(row):
    return True


def is_lora(row):
    return row["setup"].startswith("LoRA")
