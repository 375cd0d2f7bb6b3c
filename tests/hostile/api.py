"""Odd arguments to the public functions, in the place of one argument or two of a call that works."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch
from torch import nn

import lora_lab as ll
from lora_lab import adapters, analysis, claims, rank, records, tasks
from lora_lab.costs import memory, memory_report
from lora_lab.models.decoding import Sampling
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.task import Task, cross_entropy
from lora_lab.tasks import Pair, PairTask, generate, metrics
from tests.helpers import randomise
from tests.hostile.core import Case
from tests.hostile.material import CONFIG, llama, model_folder, tokenizer
from tests.hostile.values import Values

# A large value of these is asked for, not an error: the call takes as long, or as much memory, as it says.
LONG = {"steps", "batch_size", "draws", "count", "n", "k", "shape", "width", "directions", "n_train"}
Call = tuple[Callable[..., Any], dict[str, Any]]


@dataclass
class Material:
    """What calls are made with; those that change a model get one of their own."""

    values: Values
    folder: Path
    tokens: Tokenizer
    digits: Task
    pairs: PairTask
    frame: pandas.DataFrame
    history: ll.History
    adapter: Path

    @property
    def net(self) -> DigitsMLP:
        return DigitsMLP(width=8)

    @property
    def adapted(self) -> nn.Module:
        model = self.net
        ll.inject(model, ll.LoRAConfig(2))
        return randomise(model)

    @property
    def matrix(self) -> torch.Tensor:
        return torch.arange(12.0).reshape(3, 4) + torch.eye(3, 4)


def prepare(folder: Path, values: Values) -> Material:
    """A folder with a model, an adapter, two tasks and the table of a sweep."""
    tokens, digits = tokenizer(), tasks.digits().limited(16)
    pairs = tasks.from_pairs(
        tokens, [Pair(f"question {i}", f"answer {i % 2}") for i in range(12)], metric="translation"
    )
    model_folder(folder / "model")
    model = DigitsMLP(width=8)
    history = ll.fit(model, digits, ll.LoRA(2), steps=2, lr=1e-2, eval_examples=4, progress=False)
    ll.save_adapter(model, folder / "adapter")
    grid = ll.Grid([1, 2], [1e-2], range(2), steps=1, eval_examples=4)
    frame = ll.ablate(DigitsMLP(width=8), digits, grid, progress=False)
    return Material(values, folder, tokens, digits, pairs, frame, history, folder / "adapter")


def case(rng: random.Random, folder: Path, material: Material) -> Case:
    """A call with one odd argument or two."""
    name = rng.choice([*_CALLS, *4 * [name for name in _CALLS if name not in _SLOW]])
    function, arguments = _CALLS[name](material, folder)
    names = sorted(arguments.keys() - {"generator"})  # without one, the global one is used, and changes
    odd = rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2)))) if rng.random() < 0.97 else []
    tensors = wrong_type = False
    foreign = not RUN.get(name, set()).isdisjoint(odd)
    for argument in odd:
        value = _odd_value(rng, material, argument in LONG)
        tensors |= isinstance(value, torch.Tensor | numpy.ndarray | nn.Module)
        wrong_type |= argument in LET_THROUGH.get(name, ()) and _kind(value) is not _kind(arguments[argument])
        arguments[argument] = value
    what = f"{name}({', '.join(f'{argument}={_described(arguments[argument])}' for argument in odd)})"
    watched = [value for value in arguments.values() if isinstance(value, nn.Module)] if name in _UNCHANGED else []
    before = [_state(model) for model in watched]
    generator = torch.get_rng_state()

    def changed() -> Iterator[str]:
        if [_state(model) for model in watched] != before:
            yield "the error has changed the model"
        if not torch.equal(torch.get_rng_state(), generator):
            yield "the error has changed the global generator"

    def wrong(result: Any) -> Iterator[str]:
        if name != "seed_everything" and not torch.equal(torch.get_rng_state(), generator):
            yield "the global generator has changed"
        if result is _BEYOND:
            yield _BEYOND
        if not tensors and not all(math.isfinite(number) for number in _numbers(result)):
            yield "the result is not finite"

    good = not odd and name not in _FAILING
    return Case(
        what,
        partial(function, **arguments),
        wrong,
        changed,
        python=True,
        wrong_type=wrong_type,
        foreign=foreign,
        good=good,
    )


def _kind(value: Any) -> Any:
    """The type of an object, where types that are used alike, such as those of numbers or of paths, are one."""
    return next((kind for kind in _KINDS if isinstance(value, kind)), type(value))


_KINDS = (str | Path, bool | int | float | numpy.number, list | tuple, torch.Tensor, nn.Module, Task)


def _described(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}"


def _state(model: nn.Module) -> Any:
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    return modules, [(name, p._version, p.requires_grad, p.shape) for name, p in model.named_parameters()]


def _numbers(result: Any) -> Iterator[float]:
    """The numbers in a result, as far as it is easy to see."""
    if isinstance(result, float):
        yield result
    elif isinstance(result, torch.Tensor) and result.is_floating_point():
        yield from result.flatten().tolist()[:1000]
    elif isinstance(result, dict):
        for value in result.values():
            yield from _numbers(value)
    elif isinstance(result, list | tuple):
        for value in result[:50]:
            yield from _numbers(value)
    elif isinstance(result, ll.History):
        yield from (
            row[key] for row in result.rows for key in ("train_loss", "validation_loss") if row[key] is not None
        )
    elif is_dataclass(result) and not isinstance(result, type | Task):
        for field in fields(result):
            if field.name != "clip":  # which may be infinite, for no clipping
                yield from _numbers(getattr(result, field.name))
    elif isinstance(result, nn.Module):
        for parameter in result.parameters():
            yield from parameter.detach().flatten().tolist()[:100]


def _odd_value(rng: random.Random, material: Material, long: bool) -> Any:
    """A number, a text or None, as somebody may pass by mistake; or any object."""
    values = material.values
    kind = rng.choice(("number", "number", "number", "text", "none", "list", "object", "object", "object"))
    if kind == "number":
        number = rng.choice((values.integer, values.number))(rng)
        return -number if long and number > 1000 else number
    if kind == "text":
        return values.text(rng)
    if kind == "none":
        return None
    if kind == "list":
        items = [rng.choice((values.number, values.text))(rng) for _ in range(rng.choice((0, 1, 2, 5)))]
        return [-item if long and not isinstance(item, str) else item for item in items]
    return rng.choice(_OBJECTS)(material)


_OBJECTS: list[Callable[[Material], Any]] = [
    lambda m: True,
    lambda m: b"x",
    lambda m: (),
    lambda m: {},
    lambda m: {"a": 1},
    lambda m: set(),
    lambda m: object(),
    lambda m: lambda *arguments: None,
    lambda m: int,
    lambda m: ll.LoRA,
    lambda m: ll.LoRA(2),
    lambda m: ll.LoRAConfig(2),
    lambda m: nn.Module(),
    lambda m: nn.Linear(3, 3),
    lambda m: nn.Linear(3, 3, device="meta"),
    lambda m: m.net,
    lambda m: m.adapted,
    lambda m: llama(),
    lambda m: torch.tensor(1.0),
    lambda m: torch.tensor([]),
    lambda m: torch.tensor(5),
    lambda m: torch.full((2, 2), math.nan),
    lambda m: torch.zeros(3, dtype=torch.int64),
    lambda m: torch.ones(500, dtype=torch.int64),
    lambda m: torch.zeros(2, 2, device="meta"),
    lambda m: torch.zeros(2, 2, dtype=torch.complex64),
    lambda m: torch.ones(3, 4, requires_grad=True),
    lambda m: torch.float16,
    lambda m: torch.device("meta"),
    lambda m: numpy.float32(0.5),
    lambda m: numpy.int64(3),
    lambda m: numpy.array([1, 2]),
    lambda m: numpy.array(["x", None], dtype=object),
    lambda m: numpy.nan,
    lambda m: Path("nowhere"),
    lambda m: m.folder,
    lambda m: str(m.folder / "model"),
    lambda m: m.adapter,
    lambda m: range(3),
    lambda m: iter([1, 2]),
    lambda m: (number for number in (1, 2)),
    lambda m: 1j,
    lambda m: Decimal("0.1"),
    lambda m: Fraction(1, 2),
    lambda m: m.tokens,
    lambda m: m.digits,
    lambda m: m.pairs,
    lambda m: m.frame,
    lambda m: pandas.DataFrame(),
    lambda m: m.history,
    lambda m: torch.Generator(),
    lambda m: ["q_proj"],
    lambda m: {"x": torch.ones(2)},
    lambda m: slice(None),
    lambda m: ...,
    lambda m: ValueError("x"),
]

_TRAINING = {"lr": 1e-2, "seed": 0, "steps": 2, "batch_size": 4, "weight_decay": 0.0, "clip": 1.0, "warmup": 0}
_TRAINING |= {"accumulate": 1, "eval_every": 1, "eval_examples": 4, "schedule": "cosine", "batches": "random"}
_LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "all-linear", "exclude": ()}
_SAMPLING = {"max_new_tokens": 3, "temperature": 0.5, "seed": 0, "repetition_penalty": 1.1}
_BEYOND = "the text is longer than the model can read"
# By call, the arguments for which Python may answer an object of another type. This list only gets shorter.
LET_THROUGH: dict[str, set[str]] = {
    "fit, checkpoints": {"on_row"},  # the function that was passed raises it
    "lora_layers": {"required"},
    "spectra.report": {"before", "after"},
    "Halving": {"rungs"},
}
# By call, the models and tasks that are run together.
RUN: dict[str, set[str]] = {
    "fit": {"model", "task"},
    "fit, a loss of partial": {"task"},
    "fit, checkpoints": {"on_row"},
    "ablate": {"model_factory", "task"},
    "evaluate": {"model", "task"},
    "memory.predict": {"model"},
}
IDS = torch.tensor([1, 5, 9])


def _within(manager: Callable[..., Any]) -> Callable[..., None]:
    """Enters and leaves a block."""

    def entered(**arguments: Any) -> None:
        with manager(**arguments):
            pass

    return entered


def _generate(**arguments: Any) -> torch.Tensor | str:
    text = llama().generate(**arguments)
    return _BEYOND if len(arguments["ids"]) + len(text) > CONFIG.max_position_embeddings else text


def _forward(**arguments: Any) -> torch.Tensor:
    return llama()(**arguments)


# A call that works, by name: the function and its arguments.
_CALLS: dict[str, Callable[[Material, Path], Call]] = {
    "fit, a loss of partial": lambda m, f: (
        partial(ll.fit, m.net, steps=1, lr=1e-2, eval_examples=4, progress=False),
        {"task": replace(m.digits, loss=partial(cross_entropy)), "method": ll.LoRA(2)},
    ),
    "ablate, a judge with numbers of numpy": lambda m, f: (
        partial(ll.ablate, m.net, m.digits, [ll.Trial(ll.LoRA(1), 1e-2, steps=1, eval_examples=4)], progress=False),
        {"folder": f / "sweep", "judge": lambda model, task: {"accuracy": numpy.float32(0.5)}},
    ),
    "LoRAConfig": lambda m, f: (ll.LoRAConfig, dict(_LORA)),
    "inject": lambda m, f: (ll.inject, {"model": m.net, "config": ll.LoRAConfig(2), "seed": 0, "layer": None}),
    "inject a rank": lambda m, f: (lambda **a: ll.inject(m.net, ll.LoRAConfig(**a)), dict(_LORA)),
    "merge": lambda m, f: (ll.merge, {"model": m.adapted, "into": "dequantised", "base": None}),
    "adapter_state": lambda m, f: (ll.adapter_state, {"model": m.adapted}),
    "lora_layers": lambda m, f: (ll.lora_layers, {"model": m.adapted, "required": True}),
    "LoRAPlus": lambda m, f: (ll.LoRAPlus, {**_LORA, "ratio": 4.0}),
    "PartialFineTuning": lambda m, f: (ll.PartialFineTuning, {"modules": ("head",)}),
    "TrainConfig": lambda m, f: (ll.TrainConfig, dict(_TRAINING)),
    "fit": lambda m, f: (
        partial(ll.fit, progress=False),
        {"model": m.net, "task": m.digits, "method": ll.LoRA(2), "checkpoint_dir": None, **_TRAINING},
    ),
    "fit, checkpoints": lambda m, f: (
        partial(ll.fit, m.net, m.digits, ll.LoRA(2), steps=2, lr=1e-2, eval_examples=4, progress=False),
        {
            "checkpoint_dir": f / "run",
            "checkpoint_every": 1,
            "gradient_checkpointing": False,
            "lean": None,
            "on_row": None,
        },
    ),
    "fit, lean": lambda m, f: (
        lambda **a: ll.fit(llama(), m.pairs, ll.LoRA(2), lean=ll.Lean(**a), steps=1, lr=1e-3, progress=False),
        {"base_dtype": None, "checkpoint": False, "threads": 1, "loss_rows": 16},
    ),
    "evaluate": lambda m, f: (
        ll.evaluate,
        {"model": m.net, "task": m.digits, "part": "test", "batch_size": 8, "limit": 4, "by_length": False},
    ),
    "Trial": lambda m, f: (ll.Trial, {"method": ll.LoRA(2), **_TRAINING}),
    "Grid": lambda m, f: (
        ll.Grid,
        {
            "ranks": [1, 2],
            "lrs": [1e-2],
            "seeds": range(2),
            "methods": (ll.LoRA(8),),
            "alpha_per_rank": 2.0,
            "steps": 1,
        },
    ),
    "ablate": lambda m, f: (
        partial(ll.ablate, progress=False),
        {
            "model_factory": m.net,
            "task": m.digits,
            "trials": [ll.Trial(ll.LoRA(2), 1e-2, steps=1, eval_examples=4)],
            "folder": f / "sweep",
            "engine": "auto",
            "budget_bytes": None,
            "judge": lambda model, task: {"accuracy": 1.0},
            "timeout_s": 60.0,
            "halving": None,
        },
    ),
    "Halving": lambda m, f: (ll.Halving, {"rungs": (0.5,), "keep": 0.25, "slack": 0.0, "choose": None}),
    "save_adapter": lambda m, f: (
        ll.save_adapter,
        {"model": m.adapted, "folder": f / "a", "base": "x", "dtype": None, "history": m.history},
    ),
    "load_adapter": lambda m, f: (ll.load_adapter, {"model": m.net, "source": m.adapter}),
    "read_adapter": lambda m, f: (adapters.read_adapter, {"folder": m.adapter}),
    "combine": lambda m, f: (
        adapters.combine,
        {"adapters": [m.adapter, m.adapter], "weights": [0.5, 0.5], "how": "svd", "rank": 2},
    ),
    "extract": lambda m, f: (ll.extract, {"base": m.net, "tuned": DigitsMLP(width=8, seed=1), "rank": 2}),
    "extract, energy": lambda m, f: (partial(ll.extract, m.net), {"tuned": DigitsMLP(width=8, seed=1), "energy": 0.9}),
    "resize": lambda m, f: (adapters.resize, {"model": m.adapted, "rank": 1}),
    "switch": lambda m, f: (adapters.switch, {"model": m.adapted, "state": ll.adapter_state(m.adapted)}),
    "strength": lambda m, f: (_within(adapters.strength), {"model": m.adapted, "factor": 0.5}),
    "off": lambda m, f: (_within(adapters.off), {"model": m.adapted}),
    "LlamaConfig": lambda m, f: (ll.LlamaConfig, vars(llama().config).copy()),
    "Llama": lambda m, f: (ll.Llama, {"config": llama().config, "seed": 0}),
    "Llama.forward": lambda m, f: (
        _forward,
        {"ids": IDS[None], "attention_mask": None, "cache": None, "position_ids": None, "logits_to_keep": None},
    ),
    "Llama.generate": lambda m, f: (_generate, {"ids": IDS, "stop": 5, **_SAMPLING}),
    "Sampling": lambda m, f: (Sampling, {"temperature": 0.5, "seed": 0, "repetition_penalty": 1.1}),
    "load_pretrained": lambda m, f: (
        ll.load_pretrained,
        {"source": m.folder / "model", "dtype": torch.float32, "device": "cpu", "keep_blocks": False},
    ),
    "save_model": lambda m, f: (
        ll.save_model,
        {"model": llama(), "path": f / "m.gguf", "tokenizer": m.tokens, "format": "gguf", "dtype": "f16"},
    ),
    "save_model, folder": lambda m, f: (ll.save_model, {"model": llama(), "path": f / "m", "tokenizer": m.tokens}),
    "encode": lambda m, f: (m.tokens.encode, {"text": "the", "add_special_tokens": True}),
    "decode": lambda m, f: (m.tokens.decode, {"ids": [1, 2]}),
    "chat": lambda m, f: (
        m.tokens.chat,
        {"messages": [{"role": "user", "content": "the"}], "add_generation_prompt": True},
    ),
    "quantize_nf4": lambda m, f: (
        ll.quantize_nf4,
        {"model": DigitsMLP(width=64), "block": 64, "double": False, "exclude": ()},
    ),
    "from_pairs": lambda m, f: (
        tasks.from_pairs,
        {
            "tokenizer": m.tokens,
            "pairs": [Pair(f"q{i}", f"a{i}") for i in range(6)],
            "name": "x",
            "max_tokens": 64,
            "skip_long": False,
            "seed": 0,
            "metric": "",
            "about": "",
            "licence": "",
        },
    ),
    "Pair": lambda m, f: (
        lambda **a: tasks.from_pairs(m.tokens, [Pair(**a), *(Pair(f"q{i}", "a") for i in range(5))]).preview(6),
        {"prompt": "p", "answer": "a", "group": "g", "before": (("user", "x"), ("assistant", "y"))},
    ),
    "from_jsonl": lambda m, f: (tasks.from_jsonl, {"tokenizer": m.tokens, "path": f / "none.jsonl", "seq_len": 16}),
    "from_text": lambda m, f: (tasks.from_text, {"tokenizer": m.tokens, "path": _text(f), "seq_len": 16, "name": "x"}),
    "from_table": lambda m, f: (
        tasks.from_table,
        {
            "tokenizer": m.tokens,
            "table": pandas.DataFrame({"prompt": list("abcdef"), "answer": list("ghijkl")}),
            "prompt": "prompt",
            "answer": "answer",
            "group": None,
            "part": None,
        },
    ),
    "from_arrays": lambda m, f: (
        tasks.from_arrays,
        {
            "X": numpy.ones((20, 3)),
            "y": numpy.arange(20) % 2,
            "kind": "auto",
            "name": "x",
            "off_domain": None,
            "seed": 0,
        },
    ),
    "digits": lambda m, f: (tasks.digits, {"part": "adapt", "seed": 0, "n_train": 16}),
    "planted": lambda m, f: (tasks.planted, {"model": m.net, "rank": 2, "noise": 0.1, "n_train": 16, "seed": 0}),
    "docs": lambda m, f: (lambda **a: tasks.share_rows(m.pairs, **a).preview(), {"length": 64}),
    "limited": lambda m, f: (m.pairs.limited, {"n_train": 3, "seed": 0}),
    "preview": lambda m, f: (m.pairs.preview, {"count": 2, "part": "test"}),
    "reply": lambda m, f: (ll.reply, {"model": llama(), "tokenizer": m.tokens, "prompt": "the", **_SAMPLING}),
    "answers": lambda m, f: (
        generate.answers,
        {"model": llama(), "task": m.pairs, "part": "test", "limit": 1, "max_new_tokens": 2, "batch_size": 2},
    ),
    "score": lambda m, f: (metrics.score, {"task": m.pairs, "predictions": ["x"], "part": "test"}),
    "rouge_l": lambda m, f: (metrics.rouge_l, {"predictions": ["x"], "references": ["x"]}),
    "classification": lambda m, f: (metrics.classification, {"predictions": ["x"], "references": ["x"]}),
    "translation": lambda m, f: (metrics.translation, {"predictions": ["x"], "references": ["x"]}),
    "svd": lambda m, f: (rank.svd, {"W": m.matrix}),
    "truncate": lambda m, f: (
        rank.truncate,
        {"W": m.matrix, "rank": 2, "randomized": False, "generator": torch.Generator()},
    ),
    "effective_rank": lambda m, f: (rank.effective_rank, {"S": torch.tensor([2.0, 1.0])}),
    "energy_rank": lambda m, f: (rank.energy_rank, {"S": torch.tensor([2.0, 1.0]), "share": 0.9}),
    "subspace_similarity": lambda m, f: (rank.subspace_similarity, {"V1": torch.eye(4, 2), "V2": torch.eye(4, 2)}),
    "principal_angles": lambda m, f: (rank.principal_angles, {"V1": torch.eye(4, 2), "V2": torch.eye(4, 2)}),
    "product_svd": lambda m, f: (rank.product_svd, {"B": m.matrix, "A": m.matrix.mT, "scaling": 1.0}),
    "amplification": lambda m, f: (rank.amplification, {"delta": m.matrix, "W": m.matrix, "rank": 2}),
    "intruder_dimensions": lambda m, f: (
        rank.intruder_dimensions,
        {"before": m.matrix, "after": m.matrix + 1, "top": 2, "epsilon": 0.5},
    ),
    "random_cosine": lambda m, f: (rank.random_cosine, {"width": 8, "directions": 2, "draws": 5}),
    "orthonormal": lambda m, f: (rank.orthonormal, {"n": 4, "k": 2, "generator": torch.Generator()}),
    "gaussian": lambda m, f: (rank.gaussian, {"shape": (3, 4), "norm": 1.0, "generator": torch.Generator()}),
    "spectra.report": lambda m, f: (
        partial(analysis.spectra.report, progress=False),
        {"before": m.net, "after": m.adapter, "directions": 2},
    ),
    "diagnose": lambda m, f: (ll.diagnose, {"model": m.adapted, "optimizer": None, "base": None, "load_report": None}),
    "memory.predict": lambda m, f: (
        memory.predict,
        {"model": llama(), "method": ll.LoRA(2), "batch_size": 1, "seq_len": 8, "device": "cpu"},
    ),
    "parse_bytes": lambda m, f: (memory_report.parse_bytes, {"text": "24GiB"}),
    "smallest_sufficient_rank": lambda m, f: (
        ll.ablation.smallest_sufficient_rank,
        {"frame": m.frame, "margin": 0.1, "method": None},
    ),
    "pick_device": lambda m, f: (ll.pick_device, {"device": "cpu"}),
    "seed_everything": lambda m, f: (ll.seed_everything, {"seed": 0}),
    "History.from_dict": lambda m, f: (ll.History.from_dict, {"content": {}}),
    "History.load": lambda m, f: (ll.History.load, {"path": f / "none.json"}),
    "records.load": lambda m, f: (records.load, {"path": f / "none.json"}),
    "Record": lambda m, f: (
        records.Record,
        {
            "what": "memory",
            "device": "x",
            "facts": {"a": "b"},
            "commit": "unknown",
            "date": "2026-01-01",
            "command": "x",
            "settings": {},
            "rows": [{"a": 1}],
        },
    ),
    "ablation.load": lambda m, f: (ll.ablation.load, {"folder": f}),
    "claims.verdict": lambda m, f: (claims.verdict, {"claim_id": "no such claim"}),
}
# Calls that name something that is not there, so that an argument is odd already.
_FAILING = {"from_jsonl", "History.from_dict", "History.load", "records.load", "ablation.load", "claims.verdict"}
_SLOW = ("memory.predict", "spectra.report", "planted")  # a tenth of a second or more
# Calls that leave models as they were, if they raise an error.
_UNCHANGED = {"inject", "merge", "adapter_state", "lora_layers", "evaluate", "save_adapter", "load_adapter", "extract"}
_UNCHANGED |= {
    "resize",
    "switch",
    "strength",
    "off",
    "save_model",
    "save_model, folder",
    "quantize_nf4",
    "reply",
    "answers",
}
_UNCHANGED |= {"diagnose", "spectra.report", "memory.predict", "planted", "ablate"}


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {i} " + 10 * "so on " for i in range(12)))
    return path
