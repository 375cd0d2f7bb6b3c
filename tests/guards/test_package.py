"""The files around the code say the same as the code: dependencies, versions, targets; and none names a machine."""

import importlib.metadata
import re
import subprocess
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import lora_lab
from tests.helpers import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
IN_CONDA = {"torch": "pytorch"}  # what conda-forge calls a package that pip calls otherwise


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def ranges(requirements):
    """Name -> range, for pip's way of writing requirements."""
    found = [Requirement(text) for text in requirements]
    assert len({canonicalize_name(each.name) for each in found}) == len(found)
    return {canonicalize_name(each.name): each.specifier for each in found}


# Dependencies


@pytest.fixture(scope="module")
def environment():
    """(conda's entries, pip's entries) of environment.yml."""
    entries = yaml.safe_load(read("environment.yml"))["dependencies"]
    (inner,) = (entry["pip"] for entry in entries if isinstance(entry, dict))
    return [entry for entry in entries if isinstance(entry, str)], inner


def test_environment_yml_repeats_the_dependencies_of_pyproject_and_nothing_else(environment):
    conda, inner = environment
    from_conda = ranges(conda)
    assert from_conda.pop("python") == SpecifierSet(PROJECT["requires-python"])
    assert from_conda.pop("pip") == SpecifierSet()
    from_pip = ranges(entry for entry in inner if not entry.startswith("-"))
    assert not from_conda.keys() & from_pip.keys()
    expected = ranges(PROJECT["dependencies"])
    names = {IN_CONDA.get(name, name): name for name in expected}
    assert {names.get(name, name): spec for name, spec in (from_conda | from_pip).items()} == expected


def test_every_import_of_the_package_is_a_dependency():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lora_lab").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, flags=re.MULTILINE))
    known = {"sklearn": "scikit-learn", "pydantic_core": "pydantic"}  # which pins its core to one version
    extras = PROJECT["optional-dependencies"]
    declared = ranges([*PROJECT["dependencies"], *extras["hf"], *extras["teach"]])  # which functions import on demand
    for name in ("torch", "numpy", "safetensors", "tokenizers", "gguf", "filelock", "jinja2", "platformdirs", "psutil"):
        assert name in imported  # so that the search is not blind
    for name, distributions in importlib.metadata.packages_distributions().items():
        if name in imported and name != "lora_lab":
            assert {canonicalize_name(known.get(name, each)) for each in distributions} & declared.keys(), name


# Versions


def test_one_version_is_given_everywhere():
    citation = yaml.safe_load(read("CITATION.cff"))
    newest, date = re.search(r"^## (\S+)(?: \((.+)\))?", read("CHANGELOG.md"), flags=re.MULTILINE).groups()
    assert str(Version(lora_lab.__version__)) == lora_lab.__version__
    assert str(citation["version"]) == newest == lora_lab.__version__
    assert str(citation["date-released"]) == date
    assert "version" in PROJECT["dynamic"]


# Targets and files


def test_the_readme_mentions_every_target_and_no_other():
    readme, targets = read("README.md"), set(re.findall(r"^([a-z-]+):.*## ", read("Makefile"), flags=re.MULTILINE))
    (listed,) = re.findall(r"^make help .*targets: (.+)$", readme, flags=re.MULTILINE)
    assert set(listed.split(", ")) == targets
    used = set(re.findall(r"(?:^|`)make ([a-z][a-z-]+)", readme + read("CONTRIBUTING.md"), flags=re.MULTILINE))
    assert {"demo", "test", "lab"} <= used <= targets


def test_a_wheel_takes_every_file_of_the_package():
    code = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lora_lab").rglob("__init__.py")}
    moved = {"lora_lab.notebooks", "lora_lab.playground", "lora_lab.recorded"}  # from other folders of the checkout
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == code | moved
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    folders = {folder.replace(".", "/"): patterns for folder, patterns in data.items()}
    files = [path.relative_to(ROOT) for path in tracked() if (ROOT / "lora_lab") in path.parents]
    taken = {path for folder, patterns in folders.items() for each in patterns for path in (ROOT / folder).glob(each)}
    assert ROOT / "lora_lab" / "py.typed" in taken
    assert [path for path in files if path.suffix != ".py" and ROOT / path not in taken] == []


# Nothing that belongs to one machine or one registry

HOSTS = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
HOSTS += [".".join(parts) for parts in (("anaconda", "org"), ("anaconda", "com"), ("npmjs", "org"), ("npmjs", "com"))]
FOREIGN = re.compile(
    "|".join(map(re.escape, HOSTS))
    + r"|(?<![\w.~}])/(?:home|root|Users|work|mnt|tmp|opt)/\w"  # a path that starts at a machine's root
    + r"|[A-Za-z]:\\\\?Users"
)


def tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def foreign(text):
    return [match.group() for match in FOREIGN.finditer(text)]


def test_no_tracked_file_names_a_registrys_host_or_a_path_of_one_machine():
    files = tracked()
    assert ROOT / "lora_lab" / "lora.py" in files
    texts = {path: path.read_text(encoding="utf-8", errors="ignore") for path in files if path.is_file()}
    assert {path.name: foreign(text) for path, text in texts.items() if foreign(text)} == {}


def test_such_a_name_would_be_found():
    root = "/"
    assert foreign(f"pip install --index-url https://{HOSTS[0]}/simple") == [HOSTS[0]]
    assert foreign(f"open('{root}home/someone/x')") == [f"{root}home/s"]
    below = f"runs{root}work/x, ~{root}work/y"
    assert foreign(below + ", ${{ github.workspace }}/z, /proc/self/status") == []


def test_nothing_that_is_made_is_tracked():
    suffixes = {".safetensors", ".gguf", ".pyc", ".whl", ".pt", ".bin", ".pkl"}
    # Trained adapters and small models, which are installed with the package.
    shipped = {ROOT / "lora_lab" / wing / "data" for wing in ("adapters", "models")}
    files = tracked()
    made = [path for path in files if path.suffix in suffixes or "__pycache__" in path.parts]
    assert [path for path in made if shipped.isdisjoint(path.parents)] == []
    large = [path for path in files if path.is_file() and path.stat().st_size > 2_000_000]
    assert [path for path in large if path.parent != ROOT / "records" or path.stat().st_size > 5_000_000] == []
