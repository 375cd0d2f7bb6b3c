"""The command ``lora-lab``: each function of :mod:`lora_lab.commands` is a command, with its arguments as options."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from io import TextIOWrapper
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lora_lab import __version__, commands

# Waiting threads yield their cores; set before torch starts its threads. While another process is busy, spinning
# threads make small matrix multiplications several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
COMMANDS = {
    name: function
    for name, function in vars(commands).items()
    if inspect.isfunction(function) and function.__module__ == commands.__name__ and not name.startswith("_")
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command, and return its exit status: 0, 1 after an error, 2 for wrong options, 130 after Ctrl-C."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a letter
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(arguments)
    if not arguments:
        parser.print_help()
        return 0
    options = vars(parser.parse_args(arguments))
    try:
        run(COMMANDS[options.pop("command")], options)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print(f"{'; '.join(['lora-lab: stopped', *map(str, interrupt.args)])}.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as after | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python itself flushes at its end
        return 141
    except (ValueError, RuntimeError, OSError, MemoryError, ModuleNotFoundError) as error:
        print(f"lora-lab: {error}", file=sys.stderr)
        return 1
    return 0


def run(command: Callable[..., Any], options: dict[str, Any]) -> None:
    """Run a command; with ``--json`` its result is all that standard output gets, and standard error the rest.

    Raises:
        ValueError: torchrun has started this process, and the command is another than ``finetune``.
    """
    processes, as_json = nullcontext(), options.pop("json", False)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if command is not commands.finetune:
            raise ValueError("torchrun is for lora-lab finetune; start this command without torchrun.")
        from lora_lab.system.distributed import process_group

        processes = process_group()
    arguments = inspect.signature(command).parameters.values()
    first = [options.pop(each.name) for each in arguments if each.name in options and each.kind is each.POSITIONAL_ONLY]
    with processes, redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = command(*first, **options)
    if as_json:
        from lora_lab.system.schema import json_text

        print(json_text(result))


def make_parser(arguments: list[str]) -> argparse.ArgumentParser:
    """Return the parser of all commands, with the options of the one that the arguments name."""
    parser = argparse.ArgumentParser("lora-lab", description="Put LoRA's claims to the test on your own machine.")
    parser.add_argument("--version", action="version", version=f"lora-lab {__version__}")
    added = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, function in COMMANDS.items():
        summary = read_docstring(function)[""]
        command = added.add_parser(name, help=summary[0].lower() + summary[1:].rstrip("."), description=summary)
        if name in arguments:
            add_options(command, function)
    return parser


def add_options(parser: argparse.ArgumentParser, function: Callable[..., Any]) -> None:
    """Add an option for each argument of a function; those before ``/`` are positional."""
    hints, texts = get_type_hints(function), read_docstring(function)
    for name, argument in inspect.signature(function).parameters.items():
        hint, default = hints[name], argument.default
        if NoneType in get_args(hint):  # ... | None
            hint = get_args(hint)[0]
        if hint is bool:
            kind: Any = {"action": "store_true"}
        elif get_origin(hint) is Literal:
            kind = {"choices": get_args(hint)}
        elif get_origin(hint) is tuple:
            kind = {"type": get_args(hint)[0], "nargs": "+", "action": "extend"}
        else:
            kind = {"type": hint}
        kind["default"] = argparse.SUPPRESS  # what is not given is left to the function
        if argument.kind is argument.POSITIONAL_ONLY:
            parser.add_argument(name, help=texts[name], nargs=None if default is argument.empty else "?", **kind)
            continue
        text = texts[name]
        if default not in (None, (), argument.empty) and default is not False:
            text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
        parser.add_argument(f"--{name.replace('_', '-')}", required=default is argument.empty, help=text, **kind)
    if hints["return"] is not NoneType:
        parser.add_argument("--json", action="store_true", help="print the result as JSON, and all else to stderr")


def read_docstring(function: Callable[..., Any]) -> dict[str, str]:
    """Return the help text of each argument; "" is the command's own."""
    summary, _, rest = (inspect.getdoc(function) or "").partition("\n")
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", rest.partition("Args:\n")[2], re.MULTILINE)
    return {"": summary} | {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}
