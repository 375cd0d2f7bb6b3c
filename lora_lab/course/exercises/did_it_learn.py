"""Exercises of lesson 09b: did my model learn the task?"""

import random  # noqa: F401
from functools import lru_cache

import numpy as np

from lora_lab import tasks  # noqa: F401
from lora_lab.course.exercise import Exercise, Reflection, are
from lora_lab.tasks.datasets import cldr_names

# A split without siblings

NAMES, SHUFFLE, TENTH = "sorted(set(groups))", "random.Random(seed).shuffle(names)", "max(1, len(names) // 10)"
ROWS = "[row for row, name in enumerate(groups) if name in part]"
TRAIN, VALIDATION, TEST = "names[2 * tenth:]", "names[:tenth]", "names[tenth:2 * tenth]"

split = Exercise(
    "split",
    hints=[
        "Shuffle the names of the groups, cut that list in three, and then look up which rows are in each part.",
        "sorted(set(groups)) has each name once, whatever the order of the rows; random.Random(seed) can shuffle it.",
        "A tenth is max(1, count // 10) groups; the rows of a part are those whose group is in it.",
    ],
    praise="No test text has a sibling in training now, so the score is a score on new texts.",
)


def siblings(rng, count):
    """The group of each row: so many groups of two or three rows each, in random order."""
    names = [f"text-{number}" for number in rng.choice(1000, count, replace=False)]
    return [str(name) for name in rng.permutation([name for i, name in enumerate(names) for _ in range(2 + i % 2)])]


def seeds(rng):
    """Two different seeds."""
    return rng.choice(10_000, 2, replace=False).tolist()


def names_in(split, groups, seed):
    """The groups in each part."""
    return [{groups[row] for row in part} for part in split(list(groups), seed)]


def cut(split, rng, count):
    """The groups of some rows, the parts that these are cut into, and whether each row is in exactly one part."""
    groups = siblings(rng, count)
    parts = [list(part) for part in split(list(groups), int(rng.integers(10_000)))]
    return groups, parts, sorted(row for part in parts for row in part) == list(range(len(groups)))


@split.must(
    "The result must be three lists of row numbers: training, validation, test.",
    (ROWS, "sorted(part)"),
    (f", {TEST}", ""),
)
def has_three_lists_of_rows(split, rng):
    groups = siblings(rng, 20)
    parts = split(list(groups), seeds(rng)[0])
    three = are(parts, 3, list | tuple | set | np.ndarray)
    return three and all(row in range(len(groups)) for part in parts for row in part)


@split.must(
    "Some rows are in no part. Take every row whose group is in a part; index finds the first only.",
    (TRAIN, "names[3 * tenth:]"),
)
def loses_no_row(split, rng):
    groups, parts, _ = cut(split, rng, int(rng.integers(20, 40)))
    return {*range(len(groups))} <= {row for part in parts for row in part}


@split.must("Some rows are in two parts. Training is what is left after the other two.", (TRAIN, "names"))
def takes_no_row_twice(split, rng):
    return cut(split, rng, int(rng.integers(20, 40)))[2]


@split.must(
    "Some test texts have a sibling in training. Split the groups, not the rows.",
    (NAMES, "list(range(len(groups)))", ROWS, "part"),
)
def parts_no_siblings(split, rng):
    groups = siblings(rng, int(rng.integers(20, 40)))
    return sum(map(len, names_in(split, groups, seeds(rng)[0]))) == len(set(groups))


@split.must(
    "With few groups a part stays empty. Shuffle the groups and cut the list, a group at least for each part.",
    (TENTH, "len(names) // 10"),
)
def has_each_row_once(split, rng):
    """Each row is in exactly one of three parts, no group is in two, and no part is empty, also with four groups."""
    for count in (3, 4, 25):
        groups, parts, once = cut(split, rng, count)
        names = [{groups[row] for row in part} for part in parts]
        if not (once and len(parts) == 3 and all(parts) and sum(map(len, names)) == count):
            return False
    return True


@split.must(
    "Too little is left to learn from. Validation and test get about a tenth of the groups each.",
    ("// 10", "// 3"),
    ("// 10", "// 6"),
    (f"{TRAIN}, {VALIDATION}", f"{VALIDATION}, {TRAIN}"),
)
def leaves_most_for_training(split, rng):
    """Of all rows about eight tenths are for training, and validation and test share the others."""
    groups, parts, once = cut(split, rng, int(rng.integers(30, 50)))
    train, validation, test = (len(part) / len(groups) for part in parts)
    return once and 0.65 < train < 0.9 and 0.05 < validation < 0.15 and 0.05 < test < 0.15


@split.must(
    "Every seed gives the same split. Shuffle the groups with the seed before you cut.",
    (SHUFFLE, "pass"),
    ("Random(seed)", "Random(0)"),
)
def follows_the_seed(split, rng):
    groups, (first, second) = siblings(rng, 30), seeds(rng)
    return names_in(split, groups, first) != names_in(split, groups, second)


@split.must(
    "One seed gives a different split each time. Draw from a generator that starts at the seed.",
    ("Random(seed)", "Random()"),
)
def repeats_itself(split, rng):
    groups, (seed, _) = siblings(rng, 30), seeds(rng)
    return names_in(split, groups, seed) == names_in(split, groups, seed)


@split.must(
    "The same texts in another order are split differently. Sort the groups before you shuffle.",
    (NAMES, "list(dict.fromkeys(groups))"),
    (NAMES, "list(set(groups))"),
)
def follows_seed_and_groups(split, rng):
    """The seed and the groups alone decide: again the same, not in another order of the rows, but with another seed."""
    groups, (seed, other) = siblings(rng, 70), seeds(rng)  # so many that a set's order depends on that of its rows
    cases = (groups, seed), (groups, seed), ([str(name) for name in rng.permutation(groups)], seed), (groups, other)
    parts = [names_in(split, *case) for case in cases]
    return parts[0] == parts[1] == parts[2] != parts[3] and len(parts[0][0]) > 1


# The loss on the answer alone


def conversation(rng):
    """Token ids of a prompt and its answer, some of them in both, and where the answer begins."""
    start, answer = int(rng.integers(4, 7)), int(rng.integers(3, 6))
    return rng.integers(10, 18, start + answer).tolist(), start


labels = Exercise(
    "labels",
    inputs=conversation,
    wrong={
        "The prompt counts, too, so the model is paid for repeating the question. Use IGNORE there.": "return ids[1:]",
        "Each label is the token itself. It has to be the next token, which the model is to predict.": [
            ("(start - 1)", "start"),
            ("(start - 1)", "start", "ids[start:]", "ids[start:-1]"),
        ],
        "The end of the turn is left out, so the model will never learn to stop.": [
            ("ids[start:]", "ids[start:-1]"),
            ("ids[start:]", "ids[start:-1] + [tasks.IGNORE]"),
        ],
        "The prompt's labels are token 0. Where a label does not count, write tasks.IGNORE, which is -100.": (
            ("tasks.IGNORE", "0")
        ),
        "What does not count is None, and a loss needs numbers. Use tasks.IGNORE, which is -100.": (
            ("tasks.IGNORE", "None")
        ),
        "The first token of the answer is left out. It is the label of the prompt's last token.": (
            ("(start - 1)", "start", "ids[start:]", "ids[start + 1:]")
        ),
        "The last token of the prompt counts. It is given, so the label before it is IGNORE.": [
            ("(start - 1)", "(start - 2)", "ids[start:]", "ids[start - 1:]"),
            ("ids[start:]", "ids[start - 1:]"),
        ],
        "You look for a token's value, and a token of the prompt may occur in the answer, too. Go by its position.": [
            "return [token if token in ids[start:] else tasks.IGNORE for token in ids[1:]]",
            "return [token if ids.index(token) >= start else tasks.IGNORE for token in ids[1:]]",
        ],
        "Only the answer has labels. The model reads the prompt too: put an IGNORE for each of its tokens but one.": (
            "return ids[start:]"
        ),
        "The answer is ignored, and the prompt is learned. It is the other way round.": (
            "return ids[1:start] + [tasks.IGNORE] * (len(ids) - start)"
        ),
    },
    hints=[
        "The model reads ids[:-1], so there are len(ids) - 1 labels; without IGNORE they are ids[1:].",
        "The label at the prompt's last token is the answer's first token, so start - 1 labels are IGNORE.",
        "[IGNORE] * n is a list of n of them; ids[start:] is the answer with the end of the turn.",
    ],
    praise="One token off, and a model learns to repeat questions or never to stop; the loss looks fine in both cases.",
)


@labels.must()
def ignores_the_prompt(labels, rng):
    """There is a label for each token that is read, and before the answer each is -100."""
    ids, start = conversation(rng)
    result = list(labels(list(ids), start))
    return len(result) == len(ids) - 1 and result[: start - 1] == [-100] * (start - 1)


@labels.must()
def predicts_the_answer_and_its_end(labels, rng):
    """From the last token of the prompt on, each label is the next token, up to the end of the turn."""
    ids, start = conversation(rng)
    return list(labels(list(ids), start))[start - 1 :] == ids[start:]


# Beat the score

LOWER = "French writes languages and currencies in lower case, and chrF counts capitals. Change the case."

guess_french = Exercise(
    "guess_french",
    hints=[
        "name.lower() gives the score to beat. Then look at ten pairs, and at what happens to endings such as -ian.",
        'An adjective follows its noun: "Malian Franc" is "franc malien". Reverse two words.',
        'words = name.lower().replace("ian", "ien").split(), reversed if there are two, and joined with a space.',
    ],
    praise="Your rules know hardly a word of French and use no language model. That is how little this score asks for.",
)


@lru_cache(maxsize=1)  # a check asks many questions about one list
def guesses(guess_french, rng):
    """250 English names, drawn at random, their French names, and the guesses."""
    names = cldr_names("fr")
    english = rng.choice(sorted(names), 250, replace=False).tolist()
    return english, [names[name] for name in english], [guess_french(name) for name in english]


@lru_cache(maxsize=1)
def gain(guess_french, rng):
    """The chrF of the guesses minus that of the English names in lower case."""
    from sacrebleu import corpus_chrf

    english, french, guessed = guesses(guess_french, rng)
    scores = [corpus_chrf(each, [french]).score for each in (guessed, [name.lower() for name in english])]
    return scores[0] - scores[1]


@guess_french.must("The result must be a string, your guess at the French name.", "return None", "return name.split()")
def writes_texts(guess_french, rng):
    return {*map(type, guesses(guess_french, rng)[2])} == {str}


@guess_french.must(
    "Over a quarter of the answers are exactly right, so they were looked up. That is a leak of the test.",
    "return cldr_names('fr')[name]",
    "return cldr_names('fr')[name] if len(name) % 5 < 2 else name.lower()",
)
def looks_nothing_up(guess_french, rng):
    _, french, guessed = guesses(guess_french, rng)
    return sum(map(str.__eq__, guessed, french)) < 0.25 * len(french)  # rules reach a tenth


@guess_french.must(
    "Many names get the same answer, which scores below the English names. Begin with the name itself.",
    "return 'franc français'",
    "return name[:1]",
)
def tells_names_apart(guess_french, rng):
    return len({*guesses(guess_french, rng)[2]}) > 50


@guess_french.must(LOWER, "return name")
def writes_guesses_of_its_own(guess_french, rng):
    """The guesses differ from each other and mostly from the names, and few are exactly right, as none is looked up."""
    english, french, guessed = guesses(guess_french, rng)
    right, kept = (sum(map(str.__eq__, guessed, names)) for names in (french, english))
    return {*map(type, guessed)} == {str} and len({*guessed}) > 50 and kept < 125 and right < 62


@guess_french.must(LOWER, "return name.upper()")
def writes_small_letters(guess_french, rng):
    guessed = "".join(guesses(guess_french, rng)[2])
    return guessed == guessed.lower() or gain(guess_french, rng) > -3


@guess_french.must(
    "This scores about as much as the English name in lower case. Look at endings and at word order.",
    "return name.lower()",
    "return name.lower().replace('y', 'i')",
)
def beats_the_english_names(guess_french, rng):
    """Their chrF is more than a point above that of the English names in lower case."""
    return gain(guess_french, rng) > 1


Reflection(
    "09b_did_it_learn",
    question="A colleague fine-tunes an adapter on pairs from a manual; the loss on the test answers falls to a "
    "third, and she reports that *the model knows the manual now*. In five to eight sentences: what else "
    "could have made the loss fall, which baselines and which split would you ask for, and what could an "
    "adapter have taught at all?",
    rubric=(
        "The answer says that the loss can fall because the form of the answers was learned.",
        "It names a baseline that knows nothing, such as one answer for all, and the model asked well "
        "without training.",
        "It says what a split by rows lets through.",
        "It names a test that would show knowledge, and says what result would convince.",
    ),
    expected="The form of the answers, their length and their first words make the loss fall without any "
    "knowledge. Baselines: one answer for all, a bag of words, the untrained model with examples in its "
    "prompt. A split by rows puts variants of one text on both sides, so groups must stay together. "
    "Knowledge shows in questions on new texts, or in other words, where the score is above all of these "
    "by more than its error.",
)
