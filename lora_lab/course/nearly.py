"""The one change that makes a wrong answer right: many wrong answers are a single slip away.

The learner's code is changed in one place at a time: another operator, number or function, other brackets, two
arguments in each other's place, a part or a line that is left out. The first change that passes is named.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import linecache
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import reduce
from typing import Any

# Functions, methods and keywords that are taken for each other.
FAMILIES = [
    {"min", "max"},
    {"argmin", "argmax"},
    {"any", "all"},
    {"floor", "ceil", "round"},
    {"log", "log2", "log10", "log1p"},
    {"exp", "exp2", "expm1"},
    {"mean", "sum", "median", "std", "var"},
    {"zeros", "ones"},
    {"sorted", "list"},
    {"pdf", "ppf", "cdf"},
]
OPERATORS = [
    [ast.Add, ast.Sub, ast.Mult],
    [ast.Mult, ast.Div, ast.MatMult, ast.FloorDiv],
    [ast.Pow, ast.Mult],
]
COMPARISONS = [ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq]
KNOWN = "requires_grad"  # an attribute that is set, so that a misspelt one raises no error
SHOWN = 10  # characters at least, of code that is shown
LONG = 15  # characters, of a part that would give too much away


Code = ast.FunctionDef | ast.ClassDef


def find_change(
    answer: Any, changes: Callable[[Code], Iterator[str]], passes: Callable[[Any], bool], in_time: Callable[[], bool]
) -> str | None:
    """Return a sentence with the first change that makes an answer right; None if none does, or its code is unknown.

    Args:
        answer: a function or class.
        changes: :func:`slips` or :func:`others`.
        passes: whether another answer is right.
        in_time: whether there is time for one more.
    """
    functions = [answer, *vars(answer).values()] if isinstance(answer, type) else [answer]
    functions = [each.fget if isinstance(each, property) else each for each in functions]
    functions = [inspect.unwrap(each) for each in functions if callable(each)]
    written = [each for each in functions if hasattr(each, "__code__")]
    if not written:
        return None
    file, names = written[0].__code__.co_filename, written[0].__globals__
    try:
        nodes = ast.walk(ast.parse("".join(linecache.getlines(file))))
    except SyntaxError:
        return None
    definitions = (ast.FunctionDef, ast.ClassDef)
    found = [each for each in nodes if isinstance(each, definitions) and each.name == answer.__name__]
    for sentence in changes(found[-1]) if found else ():
        if not in_time():
            return None
        module = ast.fix_missing_locations(ast.Module([found[-1]], []))
        try:
            exec(compile(module, "<one change>", "exec"), scope := {**names})
        except Exception:  # a decorator or a default may fail
            continue
        if passes(scope[answer.__name__]):
            return f"One change makes it right: {sentence}."
    return None


def slips(code: Code, words: Collection[str] = ()) -> Iterator[str]:
    """Yield which slip of the pen is mended, while the code is so; afterwards it is as before.

    Brackets that are missing, ``x == 1 or 2``, ``2 ^ 30``, "b" for "B", a result that is dropped, a comparison or an
    uncalled method that stands alone, a method that is overwritten, and a misspelt ``requires_grad``.

    Args:
        words: texts that inputs are or hold.
    """
    misspelt = [each for each in ast.walk(code) if isinstance(each, ast.Attribute) and _is_nearly(each.attr, KNOWN)]
    if misspelt:
        misspelt.sort(key=lambda each: each.lineno)
        names = [each.attr for each in misspelt]
        for each in misspelt:
            each.attr = KNOWN
        yield f"{KNOWN} in place of {names[0]} in line {misspelt[0].lineno}, which torch does not know"
        for each, name in zip(misspelt, names, strict=True):
            each.attr = name
    own = _names_set(code)
    for block in _blocks(code):
        for i, line in enumerate(block):
            match line:
                case ast.Expr(ast.Call(ast.Attribute(ast.Name(name)))):
                    block[i] = ast.Assign([ast.Name(name, ast.Store())], line.value, lineno=line.lineno)
                    yield f"in line {line.lineno}, {ast.unparse(block[i])}, for the call alone leaves {name} as it is"
                case ast.Expr(ast.Attribute(_, name) as method):
                    block[i] = ast.Expr(ast.Call(method, [], []), lineno=line.lineno)
                    yield f"in line {line.lineno}, {ast.unparse(block[i])}, for without brackets {name} is not called"
                case ast.Expr(ast.Compare(ast.Attribute(ast.Name(owner), name), [ast.Eq()], [right])) if owner in own:
                    target = ast.Attribute(ast.Name(owner, ast.Load()), name, ast.Store())
                    block[i] = ast.Assign([target], right, lineno=line.lineno)
                    yield f"in line {line.lineno}, {ast.unparse(block[i])}, for == only compares"
                case ast.Assign([ast.Attribute(owner, name)], value) if name.endswith("_"):
                    call = ast.Call(ast.Attribute(owner, name, ast.Load()), [value], [])
                    block[i] = ast.Expr(call, lineno=line.lineno)
                    yield f"in line {line.lineno}, {ast.unparse(block[i])}, for {name} is a method, to be called"
            block[i] = line
    yield from _replace_parts(code, [_group, _among, _power, lambda node: _case(node, words)])


def _is_nearly(name: str, known: str) -> bool:
    """Return whether a name is a known one with a letter or two missing, changed or added."""
    return name != known and difflib.SequenceMatcher(None, name, known).ratio() > 0.9 and name != f"{known}_"


def others(code: Code) -> Iterator[str]:
    """Yield all other changes in the same way."""
    if any(isinstance(node, ast.While) for node in ast.walk(code)):  # many of the other changes never end
        yield from _replace_parts(code, [_number])
    blocks = _blocks(code)
    for block in blocks:
        yield from _change_lines(block, blocks)
    body = [node for line in code.body for node in ast.walk(line)]
    parts = [each for each in body if isinstance(each, ast.BinOp | ast.Subscript) and len(ast.unparse(each)) < LONG]
    parts += [ast.Name(name, ast.Load()) for name in sorted(_names_set(code))]
    makers = [_leave_out, _operate, _number, _call, _transpose, lambda node: _other_part(node, parts)]
    yield from _replace_parts(code, makers)


def _replace_parts(code: Code, makers: Sequence[Callable[[ast.expr], Iterator[ast.expr]]]) -> Iterator[str]:
    parents = {child: node for node in ast.walk(code) for child in ast.iter_child_nodes(node)}
    body = [node for line in code.body for node in ast.walk(line)]
    for make in makers:
        for holder, key in _places(body):
            old = holder[key]
            for new in make(old):
                shown = _enclosing(old, parents)
                before = ast.unparse(shown)
                holder[key] = new
                after = ast.unparse(new if shown is old else shown)
                if after != before:
                    yield f"in line {old.lineno}, {after} in place of {before}"
                holder[key] = old


def _blocks(code: Code) -> list[list[ast.stmt]]:
    """Return the lists of lines: of the function, and of each loop and condition in it."""
    lists = [value for node in ast.walk(code) for value in vars(node).values() if value and isinstance(value, list)]
    return [each for each in lists if all(isinstance(line, ast.stmt) for line in each)]


def _names_set(code: Code) -> set[str]:
    """Return the names of arguments and of what is set."""
    nodes = [*ast.walk(code)]
    stored = {each.id for each in nodes if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    return stored | {each.arg for each in nodes if isinstance(each, ast.arg)}


def _places(body: list[ast.AST]) -> Iterator[tuple[Any, Any]]:
    """Yield each place of an expression that is read, as a dict or list and its key or index; never what is set."""
    stored = [node for node in body if isinstance(getattr(node, "ctx", None), ast.Store)]
    set_too = {each for node in stored for each in _walk_set(node)}  # such as self in self.rank = rank
    for node in body:
        if node in set_too:
            continue
        for name, value in ast.iter_fields(node):
            some = enumerate(value) if isinstance(value, list) else [(name, value)]
            for key, each in some:
                if isinstance(each, ast.expr) and isinstance(getattr(each, "ctx", None), ast.Load | None):
                    yield (value if isinstance(value, list) else vars(node)), key


def _walk_set(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a place that is set and its parts, without the index in brackets."""
    yield node
    for name, value in ast.iter_fields(node):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST) and not (isinstance(node, ast.Subscript) and name == "slice"):
                yield from _walk_set(each)


def _enclosing(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> ast.AST:
    """Return the smallest part of the code around a node that is long enough to be recognised."""
    while (isinstance(node, ast.Name) or len(ast.unparse(node)) < SHOWN) and not isinstance(node, ast.stmt):
        above = parents[node]
        if isinstance(above, ast.For | ast.While | ast.If | ast.FunctionDef | ast.ClassDef | ast.comprehension):
            break
        node = above
    return node


# Lines


def _change_lines(block: list[ast.stmt], blocks: list[list[ast.stmt]]) -> Iterator[str]:
    lines = block[:]
    for i, line in enumerate(lines):
        where = f"line {line.lineno}, {ast.unparse(line).splitlines()[0]}"
        match line:
            case ast.AugAssign(target, _, value):
                block[i] = ast.Assign([target], value, lineno=line.lineno)
                yield f"in line {line.lineno}, {ast.unparse(block[i])} in place of {ast.unparse(line)}"
            case ast.Assign([ast.Name() as target], value):
                block[i] = ast.AugAssign(target, ast.Add(), value)
                yield f"in line {line.lineno}, {ast.unparse(block[i])} in place of {ast.unparse(line)}"
        block[i] = line
        if not isinstance(line, ast.FunctionDef | ast.ClassDef):
            block[i] = ast.Pass()
            yield f"leave out {where}"
            block[i] = line
    for outer in blocks:  # the last line of a loop or a condition, moved behind it
        for i, line in enumerate(outer):
            if len(block) > 1 and block in vars(line).values() and not isinstance(line, ast.FunctionDef):
                outer.insert(i + 1, block.pop())
                yield f"line {lines[-1].lineno}, {ast.unparse(lines[-1])}, belongs after its loop or condition"
                block[:] = lines
                del outer[i + 1]
                break


# Expressions: what each may be instead


def _group(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.BinOp(ast.BinOp(a, first, b), second, c):
            yield ast.BinOp(a, first, ast.BinOp(b, second, c))
    match node:
        case ast.BinOp(a, first, ast.BinOp(b, second, c)):
            yield ast.BinOp(ast.BinOp(a, first, b), second, c)
    match node:
        case ast.BinOp(ast.BinOp(a, first, ast.BinOp(b, ast.Pow(), c)), ast.Div(), d):  # a * b ** 1 / 2
            yield ast.BinOp(a, first, ast.BinOp(b, ast.Pow(), ast.BinOp(c, ast.Div(), d)))
    match node:
        case ast.BinOp(ast.BinOp(a, first, b), second, ast.BinOp(c, ast.Pow(), d)):  # a * b / c ** d
            yield ast.BinOp(a, first, ast.BinOp(ast.BinOp(b, second, c), ast.Pow(), d))
    match node:
        case ast.IfExp(test, ast.BinOp(a, operator, b), other):  # a ** b if test else other
            yield ast.BinOp(a, operator, ast.IfExp(test, b, other))
            if isinstance(b, ast.BinOp):
                yield ast.BinOp(a, operator, ast.BinOp(b.left, b.op, ast.IfExp(test, b.right, other)))
        case ast.BinOp(ast.Call(function, [a], []), ast.Div() | ast.Mult() as operator, b):  # sqrt(a) / b
            yield ast.Call(function, [ast.BinOp(a, operator, b)], [])
    match node:
        case ast.IfExp(test, body, ast.BinOp(a, operator, b)):  # a if test else b * c
            yield ast.BinOp(ast.IfExp(test, body, a), operator, b)
    match node:
        case ast.BinOp(a, ast.Add() | ast.Sub() as sign, ast.BinOp() as product):  # a + b + c * d / e
            factor, times_the_rest = _factors(product)
            yield times_the_rest(ast.BinOp(a, sign, factor))
            terms = [a, factor]
            while isinstance(terms[0], ast.BinOp) and isinstance(terms[0].op, ast.Add):
                terms[0:1] = [terms[0].left, terms[0].right]
                summed = reduce(lambda one, other: ast.BinOp(one, sign, other), terms[1:])
                yield ast.BinOp(terms[0], ast.Add(), times_the_rest(summed))


def _among(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.BoolOp(ast.Or(), [ast.Compare(value, [ast.Eq()], [one]), ast.Constant() as other]):
            yield ast.Compare(value, [ast.In()], [ast.Tuple([one, other], ast.Load())])


def _power(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.BinOp(ast.BinOp(a, operator, b), ast.BitXor(), c):  # a * 2 ^ 30
            yield ast.BinOp(a, operator, ast.BinOp(b, ast.Pow(), c))
        case ast.BinOp(a, ast.BitXor(), b):
            yield ast.BinOp(a, ast.Pow(), b)


def _case(node: ast.expr, words: Collection[str]) -> Iterator[ast.expr]:
    match node:
        case ast.Constant(str(text)):
            yield from (ast.Constant(word) for word in sorted({*words}) if word.lower() == text.lower())


def _factors(node: ast.expr) -> tuple[ast.expr, Callable[[ast.expr], ast.expr]]:
    """Return a of a * b / c, and a function that returns the same product of another first factor."""
    match node:
        case ast.BinOp(left, ast.Mult() | ast.Div() | ast.MatMult() as operator, right):
            first, with_first = _factors(left)
            return first, lambda other: ast.BinOp(with_first(other), operator, right)
    return node, lambda other: other


def _operate(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.BinOp(left, operator, right):
            for family in OPERATORS:
                for other in family if type(operator) in family else ():
                    yield ast.BinOp(left, other(), right)
            yield ast.BinOp(right, operator, left)
        case ast.Compare(left, [_], [right]):
            yield from (ast.Compare(left, [other()], [right]) for other in COMPARISONS)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.IfExp(test, body, other):
            yield ast.IfExp(test, other, body)


def _number(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield from (ast.Constant(other) for other in (value + 1, value - 1))
        case ast.Slice(None, upper) if upper is not None:
            yield ast.Slice(ast.UnaryOp(ast.USub(), upper), None)
            yield ast.Slice(upper, None)
        case ast.Slice(lower, None) if lower is not None:
            yield ast.Slice(None, lower)


def _call(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Call(function, arguments, keywords):
            for i, j in itertools.combinations(range(len(arguments)), 2):
                swapped = arguments[:]
                swapped[i], swapped[j] = arguments[j], arguments[i]
                yield ast.Call(function, swapped, keywords)
            for i in range(len(arguments)):
                yield ast.Call(function, arguments[:i] + arguments[i + 1 :], keywords)
            for i in range(len(keywords)):
                yield ast.Call(function, arguments, keywords[:i] + keywords[i + 1 :])
            for i, each in enumerate(arguments):
                if isinstance(each, ast.Name | ast.Call):  # len(d) - 1
                    one_less = ast.BinOp(each, ast.Sub(), ast.Constant(1))
                    yield ast.Call(function, [*arguments[:i], one_less, *arguments[i + 1 :]], keywords)
        case ast.Name(name) | ast.Attribute(_, name):
            for other in sorted({other for family in FAMILIES if name in family for other in family - {name}}):
                is_name = isinstance(node, ast.Name)
                yield ast.Name(other, ast.Load()) if is_name else ast.Attribute(node.value, other, ast.Load())


def _leave_out(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.BinOp(left, _, right):
            yield from (left, right)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.BoolOp(_, [first, second]):
            yield from (first, second)
        case ast.Call(ast.Attribute(value), []):
            yield value
        case ast.Call(ast.Attribute(value, "reshape" | "view")):
            yield from (value, ast.Attribute(value, "T", ast.Load()))
        case ast.Call(_, [argument, *_]) if not isinstance(argument, ast.Constant):  # a condition must not be constant
            yield argument
        case ast.Subscript(value) | ast.Attribute(value, "T"):
            yield value


def _other_part(node: ast.expr, parts: Sequence[ast.expr]) -> Iterator[ast.expr]:
    if isinstance(node, ast.Name):
        yield from (part for part in parts if node not in ast.walk(part))


def _transpose(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Name | ast.Call | ast.Subscript | ast.BinOp):
        yield ast.Attribute(node, "T", ast.Load())
