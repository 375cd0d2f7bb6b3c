"""Sentences of a grammar: French and English by hand, and that no baseline gets a test sentence right."""

import re

import pytest

from lora_lab.tasks import TASKS, sentences
from lora_lab.tasks.metrics import score, trivial
from lora_lab.tasks.sentences import COMBINATION, SIZES, WORD, Adjective, Noun, Phrase, Sentence, Verb, corpus


@pytest.fixture(scope="module", params=["fr", "en"])
def target(request):
    return request.param


def texts(target, part):
    return [(sentence.english(), sentence.french()) for _, sentence in corpus(target)[part]]


LEXICON = {
    word.english: word
    for word in (
        *(Noun("man", "homme", False), Noun("king", "roi", False), Noun("uncle", "oncle", False)),
        *(Noun("lady", "dame", True), Noun("actress", "actrice", True), Noun("knife", "couteau", False)),
        *(Noun("egg", "œuf", False), Noun("boat", "bateau", False), Noun("box", "boîte", True)),
        Noun("sword", "épée", True),
        Adjective("old", "vieux", "vieille", "vieil", True),
        Adjective("new", "nouveau", "nouvelle", "nouvel", True),
        Adjective("happy", "heureux", "heureuse", "heureux", False),
        Adjective("white", "blanc", "blanche", "blanc", False),
        Adjective("round", "rond", "ronde", "rond", False),
        *(Verb("see", "voit", "voient", "verr"), Verb("look+for", "cherche", "cherchent", "chercher")),
        *(Verb("buy", "achète", "achètent", "achèter"), Verb("wash", "lave", "lavent", "laver")),
    )
}
# Written by hand: what is to be said ("+" for many), in English, in French.
BY_HAND = """
the old man, see, a new egg
The old man sees a new egg.
Le vieil homme voit un nouvel œuf.
the man, not buy, the sword
The man does not buy the sword.
L'homme n'achète pas l'épée.
my old lady, will not buy, my sword
My old lady will not buy my sword.
Ma vieille dame n'achètera pas mon épée.
these+ old lady, look+for, two+ white box
These old ladies look for two white boxes.
Ces vieilles dames cherchent deux boîtes blanches.
this old uncle, look+for, this new knife
This old uncle looks for this new knife.
Ce vieil oncle cherche ce nouveau couteau.
this uncle, will wash, this white egg
This uncle will wash this white egg.
Cet oncle lavera cet œuf blanc.
two+ happy king, will see, the+ new knife
Two happy kings will see the new knives.
Deux rois heureux verront les nouveaux couteaux.
the+ old king, not see, these+ round boat
The old kings do not see these round boats.
Les vieux rois ne voient pas ces bateaux ronds.
a happy actress, wash, my new box
A happy actress washes my new box.
Une actrice heureuse lave ma nouvelle boîte.
my+ actress, buy, a old sword
My actresses buy an old sword.
Mes actrices achètent une vieille épée.
my actress, buy, a egg
My actress buys an egg.
Mon actrice achète un œuf.
this actress, not look+for, the man
This actress does not look for the man.
Cette actrice ne cherche pas l'homme.
"""


def phrase(text):
    determiner, *adjective, noun = text.split()
    adjective = LEXICON[adjective[0]] if adjective else None
    return Phrase(determiner.removesuffix("+"), LEXICON[noun], adjective, determiner.endswith("+"))


def sentence(text):
    subject, verb, thing = text.split(", ")
    *how, verb = verb.split()
    return Sentence(phrase(subject), LEXICON[verb], "will" in how, "not" in how, phrase(thing))


@pytest.mark.parametrize(
    ("said", "english", "french"), list(zip(*[iter(BY_HAND.strip().splitlines())] * 3, strict=True))
)
def test_french_and_english_are_as_written_by_hand(said, english, french):
    assert sentence(said).english() == english
    assert sentence(said).french() == french


def test_a_dictionary_without_grammar_fails_where_grammar_is_needed():
    hard = sentence("the happy actress, not see, the white box")
    assert hard.looked_up("fr") == "Le heureux actrice ne voit pas le blanc boîte."
    assert hard.looked_up("en") == "The actress happy does not see the box white."
    plain = sentence("the king, will see, a new boat")
    assert plain.looked_up("fr") == plain.french() == "Le roi verra un nouveau bateau."


def test_french_obeys_rules_that_know_nothing_of_the_grammar_that_wrote_it():
    for text in {french for each in ("fr", "en") for part in SIZES for _, french in texts(each, part)}:
        assert not re.search(r"(?i)\b(le|la|ne|ma|ce|nouveau) [aeiouhéèêœ]", text), text
        assert not re.search(r"(?i)\b(les|ces|mes|deux) \w+[^sx] ", text), text
        assert not re.search(r"(?i)\b(la|ma|cette|une) (petit|vieux|vieil|nouveau|grand|joli)\b", text), text
        assert text[0].isupper()
        assert text.endswith(".")


def test_english_has_its_articles_plurals_and_verbs():
    for text, _ in (pair for part in SIZES for pair in texts("fr", part)):
        assert not re.search(r"(?i)\ba [aeiou]|\ban [^aeiou]", text), text
        for words in re.findall(r"(?i)\b(?:these|two) (\w+)\W(\w*)", text):
            assert any(word.endswith(("s", "men")) for word in words), text
        assert not re.search(r"mans|knifes|scarfs|ladys|boxs|witchs|washs", text), text


def test_parts_share_no_sentence_and_are_the_same_on_every_call(target):
    parts = {part: set(texts(target, part)) for part in SIZES}
    assert [len(each) for each in parts.values()] == [1000, 100, 160]
    for index in (0, 1):
        assert len({pair[index] for each in parts.values() for pair in each}) == 1260
    corpus.cache_clear()
    assert [set(texts(target, part)) for part in SIZES] == [*parts.values()]


def test_training_has_all_words_but_no_combination_or_word_that_is_new(target):
    pairs = {part: [(kind, each.verb, each.object.noun) for kind, each in corpus(target)[part]] for part in SIZES}
    trained = {(verb, noun) for _, verb, noun in pairs["train"]}
    verbs, nouns = ({each[i] for each in trained} for i in (0, 1))
    for part in ("validation", "test"):
        for kind, verb, noun in pairs[part]:
            assert (verb, noun) not in trained
            assert verb in verbs
            assert (noun in nouns) == (kind == COMBINATION)
    assert {kind for kind, _, _ in pairs["test"]} == {COMBINATION, WORD}
    assert len(trained) > 250  # most of what is not reserved is there


def test_no_baseline_gets_a_test_sentence_right(target, chatter):
    task = sentences(chatter, target)
    references = [pair.answer for pair in task.pairs["test"]]
    sources = [pair.prompt.partition(": ")[2] for pair in task.pairs["test"]]
    by_answer = {
        each.french() if target == "fr" else each.english(): each.looked_up(target)
        for _, each in corpus(target)["test"]
    }
    looked_up = [by_answer[answer] for answer in references]
    learned = {pair.answer for pair in task.pairs["train"]}
    assert score(task, sources)["exact"] == score(task, looked_up)["exact"] == 0
    assert not learned & set(references)
    assert score(task, looked_up)["chrf"] > 50  # which is why chrF cannot decide
    assert score(task, trivial(task))["exact"] < 0.02  # one that was learned is right by luck; the record marks these
    # Outside the test part a dictionary is right at times, so the rule does something.
    solved = [each.looked_up(target) in (each.french(), each.english()) for _, each in corpus(target)["train"]]
    assert 0.05 < sum(solved) / 1000 < 0.6


def test_a_task_is_known_by_its_name_and_another_language_is_refused(target, chatter):
    task = sentences(chatter, target)
    assert TASKS[f"sentences-{target}"].keywords == {"target": target}
    assert (task.name, task.metric, task.licence) == (f"sentences-{target}", "translation", "CC0-1.0")
    with pytest.raises(ValueError, match="target is 'it'"):
        sentences(chatter, "it")
