"""``lora-lab finetune``: a trade, or your own data, taught to a base model, and judged before and after.

run("sentiment", LoRA(rank=8, alpha=16), "runs/sentiment")
run("mine.jsonl", LoRA(rank=8, alpha=16), "runs/mine")        # {"prompt": ..., "answer": ...} on each line
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lora_lab.adapters.peft_format import CONFIG, WEIGHTS, save_adapter
from lora_lab.inject import lora_layers
from lora_lab.methods import DoRA, FullFineTuning, LoRA, LoRAFA, LoRAPlus, Method, PiSSA, RsLoRA
from lora_lab.models.pretrained import FILES, SMOLLM2, load_pretrained, save_model
from lora_lab.system.device import pick_device
from lora_lab.system.files import atomic_files, check_writable, read_json, rescued, settle, write_json
from lora_lab.system.provenance import machine_info
from lora_lab.task import Task
from lora_lab.tasks.datasets import LANGUAGES, sentiment, style, summarise, translate, tweets
from lora_lab.tasks.generate import answers
from lora_lab.tasks.instruction import ChatTokenizer, PairTask, from_jsonl, from_text
from lora_lab.tasks.metrics import METRICS, score, trivial
from lora_lab.tasks.python_docs import docs
from lora_lab.train import evaluate, fit

METHODS = {kind.name: kind for kind in (FullFineTuning, LoRA, RsLoRA, LoRAFA, LoRAPlus, PiSSA, DoRA)}
TASKS: dict[str, Callable[[ChatTokenizer], Task]] = {
    "docs": docs,
    "summarise": summarise,
    **{f"translate-{code}": partial(translate, language=code) for code in LANGUAGES},
    "sentiment": sentiment,
    "tweets": tweets,
    "style": style,
    "style-plain": partial(style, variant="plain"),
}
SHOWN = 3  # answers printed before and after


def task_of(name: str, tokenizer: ChatTokenizer) -> Task:
    """The task of a name in :data:`TASKS`, or of a file: ``.jsonl`` of prompts and answers, ``.txt`` of plain text.

    Raises:
        ValueError: neither, or as for the file.
        FileNotFoundError: there is no such file.
    """
    if name in TASKS:
        return TASKS[name](tokenizer)
    readers = {".jsonl": from_jsonl, ".txt": from_text}
    if (suffix := Path(name).suffix) in readers:
        return readers[suffix](tokenizer, name)
    raise ValueError(
        f"task is {name!r}, but it must be one of {', '.join(TASKS)}, or a file whose name ends in .jsonl or .txt."
    )


def method_of(name: str, rank: int, alpha: float | None = None) -> Method:
    """A method by name; alpha is twice the rank unless given.

    Raises:
        ValueError: there is none of that name, or rank or alpha make no sense.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, but it must be one of {', '.join(METHODS)}.")
    if METHODS[name] is FullFineTuning:
        return FullFineTuning()
    return METHODS[name](rank, 2 * rank if alpha is None else alpha)


def run(
    task: str,
    method: Method,
    out: str | Path,
    *,
    steps: int = 200,
    lr: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    model: str = SMOLLM2,
    device: str | None = None,
    eval_examples: int | None = 64,
) -> dict[str, Any]:
    """Train, print as it goes, and keep what is worth keeping in ``out``.

    Written are the adapter (or the whole model after full fine-tuning), ``history.json``, and ``result.json`` with
    losses and scores before and after, all at once; what an earlier run kept there gives way to them.

    Args:
        task: as for :func:`task_of`.
        method: what is trained.
        out: a folder.
        steps, batch_size, seed: as for :func:`lora_lab.fit`.
        lr: peak learning rate; default 1e-3, and 1e-4 for full fine-tuning.
        model, device: as for :func:`lora_lab.load_pretrained`.
        eval_examples: of each part, for losses and scores; None takes all.

    Returns:
        What result.json holds.

    Raises:
        OSError: ``out`` cannot be written to, which is tried before anything else; or no longer at the end, and then
            the error names another folder, in which everything is.
    """
    out = Path(out)
    check_writable(out)
    chosen, why = pick_device(device)
    net, tokenizer = load_pretrained(model, device=chosen)
    data = task_of(task, tokenizer)
    print(f"Device: {why}\n\n{data.describe()}\n")
    if isinstance(data, PairTask):
        print(f"{data.preview(1)}\n")
    before = _judged(net, data, eval_examples)
    rate = lr if lr is not None else 1e-4 if isinstance(method, FullFineTuning) else 1e-3
    print(f"{method}: {steps} steps of {batch_size} examples at learning rate {rate:g}")
    history = fit(
        net,
        data,
        method,
        steps=steps,
        lr=rate,
        batch_size=batch_size,
        seed=seed,
        eval_every=max(1, steps // 4),  # on a CPU an evaluation takes as long as several steps
        eval_examples=eval_examples,
    )
    after = _judged(net, data, eval_examples)
    result = {
        "task": {"name": data.name, "fingerprint": data.fingerprint, "about": data.about},
        "method": method.settings(),
        "settings": history.settings,
        "machine": machine_info(chosen),
        "before": before,
        "after": after,
    }
    if isinstance(data, PairTask) and data.metric in METRICS:
        result["trivial"] = score(data, trivial(data)[:eval_examples])

    def keep(folder: Path) -> None:
        with atomic_files(folder, remove=_outdated(folder, method, model)) as temporary:
            if lora_layers(net):
                save_adapter(net, temporary, base=model)
            else:
                save_model(net, temporary, tokenizer)
            history.save(temporary / "history.json")
            write_json(temporary / "result.json", result)

    print(f"\n{table(result)}")
    rescued(keep, out)
    print(f"\nKept in {out}")
    return result


def _outdated(folder: Path, method: Method, model: str) -> tuple[str, ...]:
    """What an earlier run kept in the folder, by its result.json, that this one does not write over.

    A model that the new adapter is for stays, as does all that no run has kept there.
    """
    settle(folder)
    try:
        earlier = read_json(folder / "result.json")["method"]["name"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ()
    was_full, is_full = (name == FullFineTuning.name for name in (earlier, method.name))
    if was_full == is_full or (was_full and Path(model).resolve() == folder.resolve()):
        return ()
    return FILES if was_full else (CONFIG, WEIGHTS)


def _judged(net: Any, data: Task, limit: int | None) -> dict[str, Any]:
    """Losses in nats, and on the test part scores and some answers."""
    parts = ("validation", "test", "off_domain")
    found: dict[str, Any] = {f"{part} loss": evaluate(net, data, part, limit=limit) for part in parts}
    if isinstance(data, PairTask):
        said = answers(net, data, limit=limit if data.metric in METRICS else SHOWN)
        if data.metric in METRICS:
            found |= score(data, said)
        pairs = data.pairs["test"]
        found["samples"] = [
            {"prompt": pair.prompt, "wanted": pair.answer, "said": own}
            for pair, own in zip(pairs, said[:SHOWN], strict=False)
        ]
    return found


def table(result: dict[str, Any]) -> str:
    """Losses and scores before and after, and some answers, as text."""
    before, after, without = result["before"], result["after"], result.get("trivial", {})
    lines = [f"{'':<18}{'before':>10}{'after':>10}" + (f"{'trivial':>10}" if without else "")]
    for name in (name for name in before if name != "samples"):
        extra = f"{without[name]:>10.3f}" if name in without else ""
        lines.append(f"{name:<18}{before[name]:>10.3f}{after[name]:>10.3f}{extra}")
    for one, other in zip(before.get("samples", []), after.get("samples", []), strict=True):
        lines += [
            f"\nprompt  {_short(one['prompt'])}",
            f"wanted  {_short(one['wanted'])}",
            f"before  {_short(one['said'])}",
            f"after   {_short(other['said'])}",
        ]
    return "\n".join(lines)


def _short(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 4] + " ..."
