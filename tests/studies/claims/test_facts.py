"""The claims as data: what is accepted, and what is refused with which sentence."""

import pytest

from lora_lab.studies.claims.deciding import Claim, read_claims

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


REFUSED = [  # (what is replaced, by what, what must be named)
    ('id = "a-claim"', 'id = "A claim"', "id"),
    ('fair = "yes"', 'fair = "maybe"', "fair"),
    ('kind = "mechanism"', 'kind = "proof"', "kind"),
    ('read = "full text"', 'read = "skimmed"', "read"),
    ("good.", "good", "sentence"),
    ('why = "it is"', "", "why"),
    ('why = "it is"', 'why = " "', "why"),
    ("value = 10000", "value = 9000", "9000"),
    ("value = 10000", "value = 10000\nvalues = [10, 7]", "7.0"),
    ("value = 10000", 'colour = "red"', "colour"),
    ("value = 10000", 'verdict = "stands"', "verdict"),
    ("value = 10000", 'record = "rates"', "rates"),
    ("value = 10000", 'open = "a"\nuntestable = "b"', "untestable"),
    ("value = 10000", 'lesson = "06_which_rank"\nopen = "a"', "lesson"),
    ('id = "a-claim"', "id = ", "line 3"),
]


@pytest.mark.parametrize(("before", "after", "named"), REFUSED)
def test_what_does_not_conform_is_refused_and_named(read, before, after, named):
    assert before in GOOD
    with pytest.raises(ValueError, match=named):
        read(GOOD.replace(before, after))


def test_an_id_is_there_once(read):
    with pytest.raises(ValueError, match="has a claim twice"):
        read(GOOD + GOOD)


def test_the_shipped_claims_conform_and_are_many_of_every_kind():
    claims = read_claims()
    assert len(claims) >= 40
    assert {claim.kind for claim in claims.values()} == {"arithmetic", "mechanism", "small-scale", "at scale"}
    assert {claim.fair for claim in claims.values()} == {"yes", "sign only", "no"}
    assert sum(claim.number != "none given" for claim in claims.values()) > len(claims) / 2
    assert all(len(name) <= 30 for name in claims)  # the first column of the table
    assert len({claim.sentence for claim in claims.values()}) == len(claims)
