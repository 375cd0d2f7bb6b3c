"""One training step of SmolLM2-135M, LoRA r=8 on all linear layers: time, memory, and what is possible.

    python benchmarks/lora_step.py [--shapes 4x64 4x128 8x128] [--repeats 5] [--only time memory] [--table 1 2]

Table 1 gives every side the same schedule: one step on all cores. Table 2 gives each side its best one:
two Python threads of one core each, PEFT too. Both hold time (all variants in turn in one process, medians of
pair-by-pair ratios) and memory (a fresh process for each variant, its heap as the system sets it up: the highest
resident size during three steps, above what was resident before them). A step is forward, backward, clipping to norm 1
and fused AdamW, on text of Python's manual in which every target counts.

The bound is the step's floating-point operations over the rate of matrix products measured beside it.
On a CUDA GPU steps are timed by events, and memory is the allocator's peak. The model must be in the cache
(`lora-lab fetch`). CONTRIBUTING.md, "Claims of speed or memory", says what can ruin a timing.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

SAME = {
    "PEFT": "transformers and peft, float32",
    "loralib": "our Llama, loralib's formula in two products, float32",
    "plain": "our Llama, LoRALinear, float32 (what fit does by itself)",
    "full": "our Llama, full fine-tuning, float32",
    "lean": "fit(..., lean=Lean())",
    "lean bf16": "fit(..., lean=Lean(base_dtype=torch.bfloat16))",
}
MEMORY_ONLY = {
    "PEFT ckpt": "PEFT with checkpointing",
    "lean ckpt": "fit(..., lean=Lean(checkpoint=True, loss_rows=64))",
    "lean 4-bit ckpt": "load_pretrained(keep_blocks=True), fit(..., lean=Lean(checkpoint=True, loss_rows=64))",
    "lean 4-bit ckpt, 4 parts": "the same with accumulate=4: one sequence at a time",
}
BEST = {
    "PEFT 2 threads": "PEFT, half the batch in each of two Python threads",
    "PEFT bf16": "PEFT, base in bfloat16",
    "PEFT bf16 2 threads": "both",
    "full 2 threads": "full fine-tuning in two Python threads",
    "lean 2 threads": "fit(..., lean=Lean(threads=2))",
    "lean bf16 2 threads": "fit(..., lean=Lean(base_dtype=torch.bfloat16, threads=2))",
}
RANK, ALPHA = 8, 16


def batch(shape: str):
    """Inputs and targets (sequences, length) of the manual's text."""
    import lora_lab as ll
    from lora_lab.models.pretrained import load_tokenizer

    sequences, length = (int(part) for part in shape.split("x"))
    tokenizer = load_tokenizer("smollm2-135m")  # without the model, whose traces would count as memory
    examples = ll.tasks.docs(tokenizer, seq_len=length).train[:sequences]
    device = ll.device.pick_device()[0]
    return examples.inputs.to(device), examples.targets.to(device)


_LOADED: list = []


def loaded():
    """Our model and tokenizer, loaded once a process."""
    import lora_lab as ll

    if not _LOADED:
        _LOADED.extend(ll.load_pretrained())
    return _LOADED


def prepare(name: str, own_model: bool):
    """A model ready to train, and its loss.

    Args:
        own_model: the process trains nothing else, so the loaded model need not be copied.
    """
    return (peft_model(name), hf_loss) if name.startswith("PEFT") else our_model(name, own_model)


def stepper(name: str, model, loss) -> Callable:
    """A function that takes one training step on (inputs, targets), and returns the loss."""
    import torch

    from lora_lab.lean import FlatAdamW, LeanStep
    from lora_lab.train import TrainingStep

    threads = 2 if name.endswith("2 threads") else 1
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name.startswith("lean"):
        optimizer = FlatAdamW([{"params": parameters}], lr=1e-5, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    kind = LeanStep if threads > 1 else TrainingStep  # the lean step only adds threads here, to PEFT's model too
    training_step = kind(model, loss, optimizer, clip=1.0, threads=threads)
    count = 4 if name.endswith("4 parts") else threads

    def step(inputs, targets) -> float:
        parts = list(zip(inputs.chunk(count), targets.chunk(count), strict=True))
        weights = [1 / count] * count  # every target counts, and the parts are equal
        return float(training_step(parts, weights)[0])

    return step


def our_model(name: str, own_model: bool):
    """An adapted (or fully trainable) Llama of ours and its loss."""
    import torch

    import lora_lab as ll
    from lora_lab import lean, tasks

    if "4-bit" in name:
        model = ll.load_pretrained(keep_blocks=True)[0]
    else:
        model = loaded()[0] if own_model else copy.deepcopy(loaded()[0])
    model.train()
    if name.startswith("full"):
        return model.requires_grad_(True), tasks.cross_entropy
    layer = loralib_layer() if name == "loralib" else None
    ll.inject(model, ll.LoRAConfig(rank=RANK, alpha=ALPHA), layer=layer)
    if not name.startswith("lean"):
        return model, tasks.cross_entropy
    options = lean.Lean(
        base_dtype=torch.bfloat16 if "bf16" in name else None,
        checkpoint="ckpt" in name,
        loss_rows=64 if "ckpt" in name else 256,
        threads=2 if name.endswith("2 threads") else 1,
    )
    lean.apply_lean(model, options)
    return model, functools.partial(lean.cross_entropy, rows=options.loss_rows)


def loralib_layer():
    """A layer that computes by loralib's formula, x A^T B^T after x W^T, on our interface."""
    from torch.nn import functional as F

    from lora_lab import LoRALinear

    class LoralibLinear(LoRALinear):
        def forward(self, x):
            result = F.linear(x, self.base.weight, self.base.bias)
            return result + (self.dropout(x) @ self.lora_A.T @ self.lora_B.T) * self.scaling

    return LoralibLinear


def peft_model(name: str):
    """transformers' Llama with peft's adapters."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import lora_lab as ll

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        ll.save_model(loaded()[0], folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(ll.device.pick_device()[0])
        for parameter in model.parameters():  # else the file's pages would count as memory of the first step
            parameter.data = parameter.data.clone()
    if "ckpt" in name:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


def hf_loss(model, inputs, targets):
    """The loss that transformers computes; our targets are shifted already."""
    return model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss


# Time


def seconds_of(step: Callable, inputs, targets) -> float:
    """One step's time, by CUDA events on a GPU."""
    import torch

    if inputs.device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step(inputs, targets)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    started = time.perf_counter()
    step(inputs, targets)
    return time.perf_counter() - started


def matrix_rate(rows: int, dtype, reference_threads: int) -> float:
    """Operations a second of the model's own products, forward and to the inputs, weighted as a step does.

    With two threads, each thread multiplies half the rows on one core: the most that schedule can reach.
    """
    import torch

    device = loaded()[0].lm_head.weight.device
    layers = [(576, 576, 2), (192, 576, 2), (1536, 576, 2), (576, 1536, 1), (49152, 576, 1 / 30)]
    part = rows // reference_threads
    tensors = [
        [(torch.randn(part, width, device=device).to(dtype), torch.randn(out, width, device=device).to(dtype),
          torch.randn(part, out, device=device).to(dtype)) for _ in range(reference_threads)]
        for out, width, _ in layers
    ]  # fmt: skip

    def products(x, weight, g) -> None:
        x @ weight.T
        g @ weight

    def run(index: int) -> None:
        if reference_threads == 1:
            products(*tensors[index][0])
        else:
            list(pool.map(lambda triple: products(*triple), tensors[index]))

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(reference_threads, initializer=torch.set_num_threads, initargs=(1,))
    if reference_threads > 1:
        torch.set_num_threads(1)
    taken = operations = 0.0
    for index, (out, width, weight) in enumerate(layers):
        run(index)
        times = []
        for _ in range(9):
            started = time.perf_counter()
            run(index)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        taken += statistics.median(times) * weight
        operations += 4 * rows * out * width * weight
    torch.set_num_threads(before)
    return operations / taken


def step_operations(shape: str, full: bool) -> float:
    """Floating-point operations of a step: products of the layers, the head, the adapters and attention.

    Forward and backward of LoRA: 2 M + 2 E + 3 P + 3 T products a token; of full fine-tuning 3 M + 3 E + 3 T; M
    the layers' weights, E the head's, P the adapters', T attention's, 2 * length * width in each layer,
    of which a causal mask leaves half. An operation is half a product.
    """
    sequences, length = (int(part) for part in shape.split("x"))
    M, E, P, T = 106_168_320, 28_311_552, 305_280 * RANK, length * 576 * 30
    products = 3 * (M + E + T) if full else 2 * (M + E) + 3 * (P + T)
    return 2 * products * sequences * length


def time_table(names: dict[str, str], shapes: list[str], repeats: int, threads: int) -> dict:
    """Times of all variants by shape, taken in turn."""
    import torch

    steps = {name: stepper(name, *prepare(name, own_model=False)) for name in names}
    tables = {}
    for shape in shapes:
        inputs, targets = batch(shape)
        calls = {name: functools.partial(seconds_of, step, inputs, targets) for name, step in steps.items()}
        times = common.interleaved(calls, repeats)
        rates = {}
        for dtype in (torch.float32, torch.bfloat16):
            rates[str(dtype).removeprefix("torch.")] = matrix_rate(inputs.numel(), dtype, threads)
        tables[shape] = {"times": times, "rates": rates}
    return tables


def print_times(tables: dict, title: str, first: str) -> None:
    print(f"\n{title}: seconds a step, median [lowest-highest]; ratio to {first}, median of pairs [lowest-highest];")
    print("reached: the step's operations over the matrix rate measured beside it, in its base's dtype")
    for shape, result in tables.items():
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in result["rates"].items())
        print(f"\n  {shape.replace('x', ' sequences of ')} tokens; matrix rate {rates}")
        reference = result["times"][first]
        for name, times in result["times"].items():
            ratios = [taken / other for taken, other in zip(times, reference, strict=True)]
            rate = result["rates"]["bfloat16" if "bf16" in name else "float32"]
            bound = step_operations(shape, name.startswith("full")) / rate
            print(
                f"  {name:<22}{statistics.median(times):7.3f} [{min(times):.3f}-{max(times):.3f}]"
                f"{statistics.median(ratios):8.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
                f"   bound {bound:.2f} s, reached {bound / statistics.median(times):4.0%}"
            )


# Memory


def status(field: str) -> int:
    """A size of this process in bytes, from the kernel (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def load_code() -> None:
    """Take a step of AdamW on one number, for which torch loads 60 MB of code, which are no part of a method."""
    import torch

    number = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([number], fused=True)
    number.square().sum().backward()
    optimizer.step()


def measure_memory(name: str, shape: str) -> dict[str, float]:
    """In this process, which does nothing else: resident before the steps, and at most during three of them."""
    import torch

    inputs, targets = batch(shape)
    if "4-bit" in name:
        _LOADED.clear()
    model, loss = prepare(name, own_model=True)
    _LOADED.clear()  # a PEFT process needs our model no more
    if not name.startswith("lean"):  # whose step does without that code
        load_code()
    gc.collect()
    if inputs.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = stepper(name, model, loss)
        losses = [step(inputs, targets) for _ in range(3)]
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        step = stepper(name, model, loss)
        losses = [step(inputs, targets) for _ in range(3)]
        peak = status("VmHWM")
    return {"before": before, "peak": peak, "above": peak - before, "losses": losses}


def memory_table(names: dict[str, str], shapes: list[str]) -> dict:
    """Each variant in a fresh process."""
    tables: dict[str, dict] = {}
    for shape in shapes:
        tables[shape] = {}
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--shapes", shape]
            done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} at {shape} failed:\n{done.stderr[-2000:]}")
            tables[shape][name] = json.loads(done.stdout.splitlines()[-1])
    return tables


def print_memory(tables: dict, title: str) -> None:
    print(f"\n{title}: MiB above the resident model, and of the whole process, at the peak of three steps")
    for shape, rows in tables.items():
        print(f"\n  {shape.replace('x', ' sequences of ')} tokens")
        for name, row in rows.items():
            reference = rows.get("PEFT ckpt" if "ckpt" in name else "PEFT", row)
            print(
                f"  {name:<22}{row['above'] / 2**20:8.0f}{row['peak'] / 2**20:8.0f}"
                f"{row['above'] / reference['above']:8.2f} of {'PEFT ckpt' if 'ckpt' in name else 'PEFT'}"
                f"   loss of the third step {row['losses'][-1]:.4f}"
            )


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x64", "4x128", "8x128"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--table", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one variant's memory, in this process
    parser.add_argument("--timing", type=int, help=argparse.SUPPRESS)  # one table's times, in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_memory(options.one, options.shapes[0])))
        return
    if options.timing:
        names = SAME if options.timing == 1 else {"PEFT": SAME["PEFT"], **BEST}
        print_times(
            time_table(names, options.shapes, options.repeats, options.timing), f"Table {options.timing}, time", "PEFT"
        )
        return
    common.print_machine()
    for table in options.table:
        if "time" in options.only:
            command = [sys.executable, __file__, "--timing", str(table), "--repeats", str(options.repeats)]
            subprocess.run(
                [*command, "--shapes", *options.shapes], env=os.environ | ENVIRONMENT | common.KEEP_HEAP, check=True
            )
        if "memory" in options.only:
            names = {**SAME, **MEMORY_ONLY} if table == 1 else {"PEFT": SAME["PEFT"], **BEST}
            print_memory(memory_table(names, options.shapes), f"Table {table}, memory")


if __name__ == "__main__":
    main()
