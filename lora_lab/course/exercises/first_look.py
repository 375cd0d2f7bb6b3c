"""Exercises of lesson 00: a first look."""

from lora_lab.course.exercise import Exercise, Reflection, close, normal


def layer_and_dial(rng):
    """W (out, in), A (r, in), B (out, r) and x (in), whose sizes all differ, and a scaling s of either sign."""
    inp, out, _ = rng.permutation([6, 7, 8]).tolist()
    rank = int(rng.integers(2, 5))
    s = float(rng.choice([-1, 1])) * rng.uniform(0.3, 0.8)
    return normal(rng, out, inp), normal(rng, rank, inp), normal(rng, out, rank), normal(rng, inp), s


one_line = Exercise(
    "one_line",
    inputs=layer_and_dial,
    wrong={
        "The shapes do not fit. x meets A first, and then B: B @ (A @ x).": ("(B @ (A @ x))", "(A @ B @ x)"),
        "x meets B first, or A is left out. x has as many numbers as A has columns, so it goes through A first.": (
            ("(B @ (A @ x))", "(A @ (B @ x))")
        ),
        "A reads the layer's input x, not its output W @ x. The two paths run side by side.": (
            ("(B @ (A @ x))", "(B @ (A @ (W @ x)))")
        ),
        "W @ x counts in full whatever s is. Only B @ (A @ x) is scaled.": (
            "return (1 - s) * (W @ x) + s * (B @ (A @ x))"
        ),
        "B is skipped. A leaves r numbers, and B turns them into as many as W @ x has.": ("(B @ (A @ x))", "(A @ x)"),
        "The update is a matrix, not a vector. Multiply A by x with @, and B by the result with @.": (
            ("(B @ (A @ x))", "(B @ A)")
        ),
        "* multiplies entry by entry. A matrix times a vector is written with @.": [
            ("B @ (A @ x)", "B * (A @ x)"),
            ("B @ (A @ x)", "B * (A * x)"),
        ],
        "The dial does nothing. Multiply the update by s.": ("s * ", ""),
        "The dial does nothing: the scaling is a fixed number. Multiply the update by s.": ("s * ", "2 * "),
        "The update is added twice or more. Only one path goes through A and B, and s multiplies it once.": [
            ("s * ", "s * s * "),
            ("s * ", "2 * s * "),
        ],
        "The update is divided by the rank. Here s is the whole scaling: multiply by it alone.": (
            ("s * ", "s / len(A) * ")
        ),
        "The frozen path is missing. The update is added to W @ x.": ("W @ x + ", ""),
        "W @ x is scaled as well. s multiplies the update alone.": "return s * (W @ x + B @ (A @ x))",
        "The update is subtracted. It is added to W @ x.": ("x + s", "x - s"),
    },
    hints=[
        "x has two paths: one through W, and one through the two small matrices.",
        "A reads x and leaves r numbers. B turns those r numbers into as many as W @ x has.",
        "What is missing is B times (A times x).",
    ],
    praise="This one line is LoRA: a frozen matrix, two small ones beside it, and a scaling that a dial can turn.",
)


@one_line.must()
def is_the_frozen_matrix_with_the_dial_at_zero(one_line, rng):
    """With s = 0 the result is W x."""
    W, A, B, x, _ = layer_and_dial(rng)
    return close(one_line(W, A, B, x, 0.0), W @ x)


@one_line.must()
def goes_through_A_and_then_B(one_line, rng):
    """What a positive s adds has the direction of B A x."""
    W, A, B, x, s = layer_and_dial(rng)
    added, expected = one_line(W, A, B, x, abs(s)) - W @ x, B @ A @ x
    return close(added / added.norm(), expected / expected.norm())


@one_line.must()
def follows_the_dial(one_line, rng):
    """It is B A x times s, for positive and for negative s."""
    W, A, B, x, s = layer_and_dial(rng)
    return all(close(one_line(W, A, B, x, dial) - W @ x, dial * (B @ A @ x)) for dial in (s, -2 * s))


Reflection(
    "00_first_look",
    question="Explain to somebody who uses chat programs and has never seen a matrix what an adapter is, what "
    "happens to the model when it is switched off, and why its file is small. Five to eight sentences, "
    "without a formula.",
    rubric=(
        "The answer says that the model's own numbers stay as they are.",
        "It says that switching off brings the old model back exactly, and why.",
        "It says why the file is small without claiming that the model itself becomes smaller or faster.",
        "It would be understood by the person whom it is for.",
    ),
    expected="The model's numbers are frozen; two small tables stand beside each of the large ones, and what they "
    "compute is added. Switched off, nothing is added, so the model is the old one, bit for bit. The "
    "file holds the small tables alone. The model has to be there in any case, so it takes no less "
    "memory for its own numbers.",
)
