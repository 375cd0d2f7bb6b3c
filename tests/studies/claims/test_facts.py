"""The claims as data: what is accepted, and what is refused with which sentence."""

import pytest

from lora_lab.studies.claims.facts import FAIRNESS, KINDS, READINGS, Claim, read_claims

GOOD = """
[[claim]]
id = "a-claim"
sentence = "LoRA is good."
number = "10,000 times"
value = 10000
source = "A paper, section 1"
read = "full text"
kind = "mechanism"
fair = "yes"
why = "it is"
changes = "nothing"
"""


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "claims.toml"
        path.write_text(text, encoding="utf-8")
        return read_claims(path)

    return read


def test_a_claim_is_read_with_what_it_leaves_out(read):
    claim = read(GOOD)["a-claim"]
    assert claim == Claim(
        "a-claim",
        "LoRA is good.",
        "A paper, section 1",
        "full text",
        "mechanism",
        "yes",
        "it is",
        "nothing",
        "10,000 times",
        "none given",
        10000,
    )
    assert (claim.record, claim.lesson, claim.open, claim.untestable) == ("", "", "", "")
    assert claim.cited == "A paper, section 1"


@pytest.mark.parametrize("reading", ["second-hand", "from memory"])
def test_what_was_not_read_in_the_source_is_marked(read, reading):
    claim = read(GOOD.replace("full text", reading))["a-claim"]
    assert claim.cited == f"A paper, section 1 [{reading}]"


@pytest.mark.parametrize("word", ["stands", "falls", "depends", "open"])
def test_a_typed_verdict_is_refused(read, word):
    with pytest.raises(ValueError, match=rf"'a-claim' has the verdict '{word}' typed in; write the function"):
        read(f'{GOOD}verdict = "{word}"\n')


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('id = "a-claim"', 'id = "A claim"', "id of a claim is 'A claim', but it must be lower-case words"),
        ('fair = "yes"', 'fair = "maybe"', "'maybe' as fair, but it must be one of yes, sign only, no"),
        ('kind = "mechanism"', 'kind = "proof"', "'proof' as kind, but it must be one of arithmetic"),
        ('read = "full text"', 'read = "skimmed"', "'skimmed' as read, but it must be one of full text"),
        ("good.", "good", "must end with a dot"),
        ('why = "it is"', "", "lacks why"),
        ('why = "it is"', 'why = " "', "has ' ' as why, but it must be a string"),
        ('why = "it is"', "why = 3", "has 3 as why, but it must be a string"),
        ("value = 10000", "value = 9000", "has the value 9000, which its number does not show"),
        ("value = 10000", "value = 10000\nvalues = [10, 7]", "has the value 7, which its number does not show"),
        ("value = 10000", 'colour = "red"', "unknown entries: colour"),
        ("value = 10000", 'record = "rates"', "waits for the record 'rates' but is not open"),
        ("value = 10000", 'open = "a"\nuntestable = "b"', "has open and untestable; keep one of them"),
        ("value = 10000", 'lesson = "06_which_rank"\nopen = "a"', "has lesson and open; keep one of them"),
        ("[[claim]]", "[[claims]]", "has 'claims', but it must hold [[claim]] only".replace("[", r"\[")),
        ('id = "a-claim"', "id = ", "is not TOML"),
    ],
)
def test_what_does_not_conform_is_refused_in_one_sentence(read, before, after, says):
    assert before in GOOD
    with pytest.raises(ValueError, match=says):
        read(GOOD.replace(before, after))


def test_an_id_is_there_once(read):
    with pytest.raises(ValueError, match="has the claim 'a-claim' twice"):
        read(GOOD + GOOD)


def test_the_shipped_claims_conform_and_are_many_of_every_kind():
    claims = read_claims()
    assert len(claims) >= 40
    assert {claim.kind for claim in claims.values()} == set(KINDS)
    assert {claim.fair for claim in claims.values()} == set(FAIRNESS)
    assert {claim.read for claim in claims.values()} <= set(READINGS)
    assert sum(claim.number != "none given" for claim in claims.values()) > len(claims) / 2
    assert all(len(name) <= 30 for name in claims)  # the first column of the table
    assert len({claim.sentence for claim in claims.values()}) == len(claims)


def test_what_is_returned_is_the_callers_copy():
    read_claims().clear()
    assert read_claims()
