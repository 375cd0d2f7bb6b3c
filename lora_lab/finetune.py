"""``lora-lab finetune``: train a model on a task or on your own data, and evaluate it before and after.

run("sentiment", LoRA(rank=8, alpha=16), "runs/sentiment")
run("mine.jsonl", LoRA(rank=8, alpha=16), "runs/mine")        # {"prompt": ..., "answer": ...} on each line
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lab import checkpoint
from lora_lab.adapters.peft_format import CARD, CONFIG, WEIGHTS, find_variant, is_free, save_adapter
from lora_lab.history import History
from lora_lab.inject import lora_layers
from lora_lab.methods import ContinueLoRA, FullFineTuning, LoRA, Method
from lora_lab.models.pretrained import FILES, NAMES, SMOLLM2, check_separate, load_pretrained, save_model
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system import files
from lora_lab.system.device import pick_device
from lora_lab.system.distributed import current_processes
from lora_lab.system.provenance import machine_info
from lora_lab.system.schema import Size, check
from lora_lab.system.wording import count_noun, shortened
from lora_lab.task import Task
from lora_lab.tasks import PairTask, task_of
from lora_lab.tasks.generate import answers
from lora_lab.tasks.metrics import METRICS, score, trivial
from lora_lab.tasks.named import check_name
from lora_lab.train import TrainConfig, evaluate, fit, new_history
from lora_lab.variants import LORA_METHODS

CHECKPOINTS = "checkpoint"  # the folder of checkpoints in it
SHOWN = 3  # answers printed before and after
_SAVED = ("result.json", "history.json", *FILES, CONFIG, WEIGHTS)  # a folder with one of them is in use


def make_method(name: str, rank: int, alpha: float | None = None) -> Method:
    """Return a method by name, with alpha twice the rank by default.

    Raises:
        ValueError: there is no method of that name, or ``rank`` or ``alpha`` is invalid.
    """
    if name == FullFineTuning.name:
        return FullFineTuning()
    if name not in LORA_METHODS:
        raise ValueError(f"method is {name!r}, but it must be one of {FullFineTuning.name}, {', '.join(LORA_METHODS)}.")
    return LORA_METHODS[name](rank, 2 * rank if alpha is None else alpha)


def run(
    task: str,
    method: Method,
    out: str | Path,
    *,
    steps: int = 200,
    lr: float | None = None,
    model: str = SMOLLM2,
    device: str | None = None,
    checkpoint_every: int | None = None,
    allow_special: bool = False,
    overwrite: bool = False,
    **training: Any,
) -> dict[str, Any]:
    """Train, print progress, save the results in ``out``, and return the content of its ``result.json``.

    All files appear at once: the adapter (or the whole model, if the method trains weights of its own),
    ``history.json``, and ``result.json`` with losses and scores before and after. Of several processes rank 0 saves.

    Args:
        task, allow_special: as for :func:`lora_lab.tasks.task_of`.
        method: what is trained.
        out: a folder without a model, an adapter or results of an earlier run.
        lr: peak learning rate; defaults to 1e-4 for full fine-tuning and 1e-3 otherwise.
        model, device: as for :func:`lora_lab.load_pretrained`.
        checkpoint_every: steps between checkpoints in ``out``/checkpoint, from which the same call goes on if it was
            stopped; the last one is removed when the results are saved. None for no checkpoints.
        overwrite: replace what an earlier run has saved in ``out``. A checkpoint is continued all the same.
        steps, **training: as for :class:`lora_lab.train.TrainConfig`; 64 examples of each part are evaluated.

    Raises:
        ValueError: an argument has a wrong value, ``out`` holds a model where an adapter is to be saved or the reverse,
            or its checkpoint is damaged or of another run.
        FileExistsError: ``out`` holds results, a model or an adapter, or another run saves there.
        KeyboardInterrupt: at Ctrl-C; during the training its message says how the run can go on.
        OSError: ``out`` cannot be written to, which is checked before the model is loaded.
    """
    check_name(task)
    lr = lr if lr is not None else 1e-4 if isinstance(method, FullFineTuning) else 1e-3
    seldom: Any = {"eval_every": max(1, steps // 4), "eval_examples": 64}  # each is as slow as several steps
    config = TrainConfig(steps=steps, lr=lr, **(seldom | training))
    every, out = check(checkpoint_every, Size | None, "checkpoint_every"), files.as_path(out, "out")
    checkpoints = out / CHECKPOINTS if every else None
    with _hold(out, model, method, overwrite):
        chosen, why = pick_device(device)
        net, tokenizer = load_pretrained(model, device=chosen)
        data = task_of(task, tokenizer, allow_special)
        print(_describe_start(why, data))
        checkpoint.check_belongs(checkpoints, new_history(data, method, config, net), net)  # before the evaluations
        history, losses = _train(net, data, method, config, checkpoints, every)
        about = {"name": data.name, "fingerprint": data.fingerprint, "about": data.about}
        result = {"task": about, "method": history.method, "settings": history.settings}
        result |= {"machine": machine_info(chosen)} | losses
        print(f"\n{make_table(result)}")
        if current_processes().rank == 0:
            files.save_or_rescue(
                lambda folder: save_run(folder, net, tokenizer, history, name_base(model), result), out
            )
            checkpoint.remove(checkpoints)
    print(f"\nSaved in {out}")
    return result


def save_run(
    folder: Path,
    net: nn.Module,
    tokenizer: Tokenizer,
    history: History,
    base: str = SMOLLM2,
    result: dict[str, Any] | None = None,
) -> None:
    """Save the adapter, or the whole model, with the history of its training and a result.json, in one transaction.

    Args:
        folder: where to; what an earlier run saved there is replaced. A card that somebody else wrote stays.
        net, tokenizer, history: what was trained, and how.
        base: what an adapter's config says of its base.
        result: the content of result.json.
    """
    with files.atomic_files(folder) as temporary:
        if lora_layers(net):
            save_adapter(net, temporary, base=base, history=history)
            if not is_free(folder):
                (temporary / CARD).unlink()
        else:
            save_model(net, temporary, tokenizer)
        history.save(temporary / "history.json")
        if result:
            files.write_json(temporary / "result.json", result)


@contextmanager
def _hold(out: Path, model: str, method: Method, overwrite: bool) -> Iterator[None]:
    """Hold the folder of the results for the block, if they can be saved there and nothing would be lost."""
    if files.as_path(model, "model").is_dir() and Path(model).resolve() == out.resolve():
        raise ValueError(f"{out} holds the model that is to be trained, which must stay as it is; name another folder.")
    if current_processes().rank != 0:
        yield
        return
    with files.hold_folder(out):
        files.check_replaceable(out / "result.json", ("method", "settings", "before", "after"))
        saved = [name for name in _SAVED if (out / name).exists()]
        if saved and not overwrite:
            raise FileExistsError(
                f"{out} holds {saved[0]} already; name another folder (--out), or pass --overwrite to replace what an "
                "earlier run saved there."
            )
        check_separate(out, "adapter" if isinstance(method, LoRA | ContinueLoRA) else "model")
        if isinstance(method, LoRA) and method.layer:
            find_variant(method.name, method.layer(nn.Linear(1, 1), 1, 1.0))
        yield


def _train(
    net: nn.Module, data: Task, method: Method, config: TrainConfig, checkpoints: Path | None, every: int | None
) -> tuple[History, dict[str, Any]]:
    """Train the model, in place, and return the history, and evaluations before and after."""
    limit = config.eval_examples
    result = {"before": _evaluate(net, data, limit)}
    print(f"{method}: {config.steps} steps of {config.batch_size} examples at learning rate {config.lr:g}")
    if (before := checkpoint.read_history(checkpoints)) is not None:
        print(f"Going on from step {before.rows[-1]['step']}, with the checkpoint in {checkpoints}")
    with checkpoint.advise(checkpoints):
        history = fit(net, data, method, config, checkpoint_dir=checkpoints, checkpoint_every=every)
        result["after"] = _evaluate(net, data, limit)
    if isinstance(data, PairTask) and data.metric in METRICS:
        result["trivial"] = score(data, trivial(data)[:limit])
    return history, result


def _describe_start(why: str, data: Task) -> str:
    """Return the device and the reason for it, how many processes there are, and the data."""
    text, processes = f"Device: {why}\n", current_processes().world_size
    if processes > 1:
        text += f"{processes} processes, {count_noun(torch.get_num_threads(), 'thread')} each\n"
    text += f"\n{data.describe()}\n"
    return f"{text}\n{data.preview(1)}\n" if isinstance(data, PairTask) else text


def name_base(model: str) -> str:
    """Return what an adapter's config says of its base: the absolute path of a folder or a file, or else the name."""
    return str(Path(model).resolve()) if model not in NAMES and Path(model).exists() else model


def _evaluate(net: nn.Module, data: Task, limit: int | None) -> dict[str, Any]:
    """Return losses in nats; for prompts and answers also scores on the test part, and some of the predictions."""
    parts = ("validation", "test", "off_domain")
    result: dict[str, Any] = {f"{part}_loss": evaluate(net, data, part, limit=limit) for part in parts}
    if isinstance(data, PairTask):
        predictions = answers(net, data, limit=limit if data.metric in METRICS else SHOWN)
        if data.metric in METRICS:
            result |= score(data, predictions)
        result["samples"] = [
            {"prompt": pair.prompt, "reference": pair.answer, "prediction": prediction}
            for pair, prediction in zip(data.pairs["test"], predictions[:SHOWN], strict=False)
        ]
    return result


def make_table(result: dict[str, Any]) -> str:
    """Return losses and scores before and after, and some predictions, as text."""
    import pandas

    columns = {column: dict(result[column]) for column in ("before", "after", "trivial") if column in result}
    before, after = (columns[column].pop("samples", []) for column in ("before", "after"))
    frame = pandas.DataFrame(columns, index=pandas.Index(list(columns["before"])))
    frame.index = frame.index.str.replace("_loss", " loss")
    lines = [frame.to_string(float_format="{:.3f}".format, na_rep="", col_space=9)]
    for old, new in zip(before, after, strict=True):
        texts = {"prompt": old["prompt"], "reference": old["reference"]}
        texts |= {"before": old["prediction"], "after": new["prediction"]}
        lines += ["", *(f"{name:<11}{shortened(text)}" for name, text in texts.items())]
    return "\n".join(lines)
