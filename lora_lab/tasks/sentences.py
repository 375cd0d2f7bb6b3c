"""Sentences to translate between English and French, from a grammar and a lexicon written for this project (CC0).

    task = sentences(tokenizer, "fr")
    task.pairs["test"][0]    # Pair("Translate into French: The old queen will not hide two blue chairs.",
                             #      "La vieille reine ne cachera pas deux chaises bleues.")

A sentence has a subject, a verb in the present or the future, negated or not, and an object; subject and object have a
determiner and perhaps an adjective. French asks for gender and number in determiners and adjectives, puts most
adjectives after the noun, elides vowels (l'épée, n'achète) and has different verb forms for singular and plural.

The test part separates what can be remembered from what must be put together: its sentences have either a verb with an
object that training never shows together ("new combination"), or an object that training never shows ("new word"). And
it holds only sentences that a dictionary which knows all words and verb forms gets wrong, so that copying, looking up
and repeating what was learned have an exact score of zero. (Word by word with the most frequent translations of the
training part, one or two of 160 are right by luck.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from lora_lab.models.tokenizer import Tokenizer
from lora_lab.tasks.instruction import Pair, PairTask, from_pairs

COMBINATION, WORD = "new combination", "new word"
PROMPTS = {"fr": "Translate into French: ", "en": "Translate into English: "}
SIZES = {"train": {"": 1000}, "validation": {COMBINATION: 100}, "test": {COMBINATION: 100, WORD: 60}}
_RESERVED = 5  # every fifth pair of a verb and an object is not in training

# The lexicon: English, French. A feminine noun ends with " f".
_PEOPLE = """boy garçon, man homme, king roi, brother frère, uncle oncle, father père, knight chevalier,
monk moine, actor acteur, emperor empereur, soldier soldat, girl fille f, woman femme f, queen reine f, sister sœur f,
aunt tante f, princess princesse f, mother mère f, witch sorcière f, lady dame f, niece nièce f, actress actrice f,
empress impératrice f, waitress serveuse f"""
_THINGS = """book livre, hat chapeau, coat manteau, knife couteau, bag sac, basket panier, mirror miroir, violin violon,
cushion coussin, boat bateau, egg œuf, pencil crayon, bottle bouteille f, shirt chemise f, box boîte f, lamp lampe f,
ring bague f, cup tasse f, spoon cuillère f, key clé f, letter lettre f, flower fleur f, chair chaise f, apple pomme f,
clock horloge f, ladder échelle f, plate assiette f, scarf écharpe f, doll poupée f, blanket couverture f"""
_NEW_THINGS = """umbrella parapluie, glove gant, flag drapeau, drum tambour, candle bougie f, sword épée f,
dress robe f, needle aiguille f"""
# English, masculine, feminine, and before a vowel if it differs; those before the semicolon stand before the noun.
_ADJECTIVES = {
    "people": """small petit petite, young jeune jeune, old vieux vieille vieil; rich riche riche,
famous célèbre célèbre, tired fatigué fatiguée, happy heureux heureuse, strong fort forte, sad triste triste""",
    "things": """small petit petite, big grand grande, pretty joli jolie, old vieux vieille vieil,
new nouveau nouvelle nouvel; red rouge rouge, black noir noire, white blanc blanche, green vert verte, blue bleu bleue,
heavy lourd lourde, round rond ronde, broken cassé cassée""",
}
# English, French for one, for many, and the stem of the future.
_VERBS = """see voit voient verr, look+at regarde regardent regarder, look+for cherche cherchent chercher,
find trouve trouvent trouver, buy achète achètent achèter, sell vend vendent vendr, paint peint peignent peindr,
draw dessine dessinent dessiner, wash lave lavent laver, lose perd perdent perdr, show montre montrent montrer,
hide cache cachent cacher, choose choisit choisissent choisir, forget oublie oublient oublier,
admire admire admirent admirer"""
# Determiner -> masculine, feminine, masculine and feminine before a vowel; a single form is for many of either gender.
_ONE = {"the": "le la l' l'", "this": "ce cette cet cette", "my": "mon ma mon mon", "a": "un une un une"}
_MANY = {"the": "les", "these": "ces", "my": "mes", "two": "deux"}
_IRREGULAR = {"man": "men", "woman": "women", "knife": "knives", "scarf": "scarves", "lady": "ladies"}


class Noun(NamedTuple):
    """A noun: English, French, and whether it is feminine."""

    english: str
    french: str
    feminine: bool


class Adjective(NamedTuple):
    """An adjective: English, the French forms for one, and whether it stands before the noun."""

    english: str
    masculine: str
    feminine: str
    before_vowel: str
    before: bool


class Verb(NamedTuple):
    """A verb: English, the French forms for one and for many, and the stem of the future."""

    english: str
    one: str
    many: str
    future: str


class Phrase(NamedTuple):
    """A noun with its determiner, an adjective if there is one, and its number."""

    determiner: str
    noun: Noun
    adjective: Adjective | None
    plural: bool


class Sentence(NamedTuple):
    """Subject, verb and object."""

    subject: Phrase
    verb: Verb
    future: bool
    negative: bool
    object: Phrase

    def english(self) -> str:
        """Return the sentence in English."""
        return _write_sentence([*_english(self.subject), *_english_verb(self), *_english(self.object)])

    def french(self) -> str:
        """Return the sentence in French."""
        return _write_sentence([*_french(self.subject), *_french_verb(self), *_french(self.object)])

    def looked_up(self, target: str) -> str:
        """Return its translation by a dictionary that knows all words and verb forms, and no other grammar.

        Into French, determiners and adjectives are masculine; into English, the words have the order of French.
        """
        if target == "fr":
            return _write_sentence([*_look_up(self.subject), *_french_verb(self), *_look_up(self.object)])
        subject, thing = (_english(phrase, french_order=True) for phrase in (self.subject, self.object))
        return _write_sentence([*subject, *_english_verb(self), *thing])


def sentences(tokenizer: Tokenizer, target: str = "fr") -> PairTask:
    """Return a task of sentences to translate from English into French, or from French into English.

    Args:
        tokenizer: of the model.
        target: "fr" or "en".

    Raises:
        ValueError: ``target`` is neither.
    """
    if target not in PROMPTS:
        raise ValueError(f"target is {target!r}, but it must be one of {', '.join(PROMPTS)}.")
    pairs = {part: [_pair(each, target) for _, each in of_part] for part, of_part in corpus(target).items()}
    return from_pairs(
        tokenizer,
        pairs,
        name=f"sentences-{target}",
        metric="translation",
        about="sentences of a small grammar, between English and French, written for this project",
        licence="CC0-1.0",
    )


def _pair(sentence: Sentence, target: str) -> Pair:
    english, french = sentence.english(), sentence.french()
    return Pair(PROMPTS["fr"] + english, french) if target == "fr" else Pair(PROMPTS["en"] + french, english)


def kinds(target: str) -> dict[str, str]:
    """Return prompt -> the kind of a sentence of the test part."""
    return {_pair(sentence, target).prompt: kind for kind, sentence in corpus(target)["test"]}


@cache
def corpus(target: str) -> dict[str, list[tuple[str, Sentence]]]:
    """Return part -> (kind, sentence) of each of its sentences, the same on every call; the kind is "" in training."""
    generator = random.Random(0)
    used = set()
    parts = {part: [] for part in SIZES}
    for part, counts in SIZES.items():
        for kind, count in counts.items():
            drawn = _draw(generator, kind)
            while count:
                sentence = next(drawn)
                texts = {sentence.english(), sentence.french()}
                solved = sentence.looked_up(target) in texts  # without any grammar
                if not texts & used and not (part == "test" and solved):
                    used |= texts
                    parts[part].append((kind, sentence))
                    count -= 1
    return parts


def _draw(generator: random.Random, kind: str) -> Iterator[Sentence]:
    """Yield sentences of a kind, without end."""
    things = _nouns(_NEW_THINGS if kind == WORD else _THINGS)
    people, verbs = _nouns(_PEOPLE), [Verb(*entry) for entry in _entries(_VERBS)]
    while True:
        verb, thing = generator.randrange(len(verbs)), generator.randrange(len(things))
        reserved = (verb + thing) % _RESERVED == 0
        if kind != WORD and reserved != (kind == COMBINATION):
            continue
        negative = generator.random() < 0.3
        subject = _phrase(generator, generator.choice(people), "people")
        # "I do not see a book" has "de" in French, which no other sentence here has.
        article = () if negative else ("a",)
        target = _phrase(generator, things[thing], "things", ("the", "this", "my", *article))
        yield Sentence(subject, verbs[verb], generator.random() < 0.4, negative, target)


def _phrase(generator: random.Random, noun: Noun, kind: str, one: Sequence[str] = tuple(_ONE)) -> Phrase:
    plural = generator.random() < 0.4
    adjective = generator.choice(_adjectives(kind)) if generator.random() < 0.6 else None
    return Phrase(generator.choice(tuple(_MANY) if plural else one), noun, adjective, plural)


# The lexicon


def _entries(text: str) -> list[list[str]]:
    """Return the words of each entry."""
    return [entry.split() for entry in text.split(",")]


@cache
def _nouns(text: str) -> list[Noun]:
    return [Noun(english, french, bool(feminine)) for english, french, *feminine in _entries(text)]


@cache
def _adjectives(kind: str) -> list[Adjective]:
    return [
        Adjective(english, masculine, feminine, before_vowel[0] if before_vowel else masculine, before)
        for before, text in zip((True, False), _ADJECTIVES[kind].split(";"), strict=True)
        for english, masculine, feminine, *before_vowel in _entries(text)
    ]


# The grammar


def _english(phrase: Phrase, french_order: bool = False) -> list[str]:
    noun = phrase.noun.english
    words = [(_IRREGULAR.get(noun) or _with_s(noun)) if phrase.plural else noun]
    if adjective := phrase.adjective:
        words = [*words, adjective.english] if french_order and not adjective.before else [adjective.english, *words]
    determiner = "an" if phrase.determiner == "a" and words[0][0] in "aeiou" else phrase.determiner
    return [determiner, *words]


def _french(phrase: Phrase) -> list[str]:
    noun, adjective = phrase.noun, phrase.adjective
    words = [_french_noun(phrase)]
    if adjective:
        form = adjective.feminine if noun.feminine else adjective.masculine
        if phrase.plural:
            form = _french_plural(form)
        elif not noun.feminine and adjective.before and _is_vowel(noun.french):
            form = adjective.before_vowel
        words = [form, *words] if adjective.before else [*words, form]
    determiner = _french_determiner(phrase, noun.feminine, before_vowel=_is_vowel(words[0]))
    return [determiner, *words]


def _look_up(phrase: Phrase) -> list[str]:
    """Return French words in the order of English, without gender or elision, but with the number."""
    adjective = [phrase.adjective.masculine] if phrase.adjective else []
    return [_french_determiner(phrase), *adjective, _french_noun(phrase)]


def _french_determiner(phrase: Phrase, feminine: bool = False, before_vowel: bool = False) -> str:
    if phrase.plural:
        return _MANY[phrase.determiner]  # of either gender, before any letter
    return _ONE[phrase.determiner].split()[feminine + 2 * before_vowel]


def _french_noun(phrase: Phrase) -> str:
    return _french_plural(phrase.noun.french) if phrase.plural else phrase.noun.french


def _english_verb(sentence: Sentence) -> list[str]:
    first, *rest = sentence.verb.english.split("+")
    plural = sentence.subject.plural
    if sentence.future:
        return ["will", *["not"] * sentence.negative, first, *rest]
    if sentence.negative:
        return ["do" if plural else "does", "not", first, *rest]
    return [first if plural else _with_s(first), *rest]


def _french_verb(sentence: Sentence) -> list[str]:
    verb, plural = sentence.verb, sentence.subject.plural
    form = verb.future + ("ont" if plural else "a") if sentence.future else verb.many if plural else verb.one
    if not sentence.negative:
        return [form]
    return ["n'" if _is_vowel(form) else "ne", form, "pas"]


def _is_vowel(word: str) -> bool:
    """Return whether the word before it is elided; every h of this lexicon is mute."""
    return word[0] in "aeiouhéèêœ"


def _french_plural(word: str) -> str:
    return word if word[-1] in "sx" else word + ("x" if word.endswith("eau") else "s")


def _with_s(word: str) -> str:
    """Return the plural of a noun, the third person of a verb."""
    return word + ("es" if word.endswith(("s", "x", "sh", "ch")) else "s")


def _write_sentence(words: Sequence[str]) -> str:
    """Return a sentence: joined, nothing after an apostrophe, with a capital and a full stop."""
    text = " ".join(words).replace("' ", "'")
    return f"{text[0].upper()}{text[1:]}."
