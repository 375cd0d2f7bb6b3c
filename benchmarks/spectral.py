"""How long spectra of a whole model take, exactly: adapters from their factors, full fine-tunes from dense matrices.

    python benchmarks/spectral.py [--rounds 5]

On SmolLM2-135M's 210 linear layers with random weights and updates:

    adapters     r = 8, from the factors (`lora_lab.spectra.updates`), beside the SVD of each product
    full         singular values of 210 dense changes (`lora_lab.rank.singular_values`), beside torch.linalg.svdvals
    accuracy     the largest error over the largest value, on a matrix with singular values j^-2, by Gram product in
                 float64 (ours), by one in float32, and by svdvals in float32

Rounds are interleaved; medians are printed, and the extremes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import common
import torch
from torch import Tensor

import lora_lab as ll
from lora_lab import rank, spectra
from lora_lab.inject import lora_layers
from lora_lab.models import shapes

FEW = 14  # of 210 dense matrices, two blocks: the slow methods are timed on these only


def timed(calls: dict[str, Callable], rounds: int) -> None:
    """Time each in turn, and print how long each took."""
    for name, seconds in common.interleaved(calls, rounds).items():
        low, middle, high = (f(seconds) * 1e3 for f in (min, statistics.median, max))
        print(f"  {name:<64}{middle:10,.1f} ms [{low:,.1f}-{high:,.1f}]", flush=True)


def adapters(rounds: int) -> None:
    """Exact spectra of all adapters."""
    model = ll.Llama(shapes.config("smollm2-135m"))
    ll.inject(model, ll.LoRAConfig(8))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    state = ll.adapter_state(model)
    layers = list(lora_layers(model).values())
    print(f"\nadapters: {len(layers)} of rank 8")
    timed(
        {
            "from the factors, those of one shape together": lambda: spectra.updates(None, state),
            f"SVD of each product ({FEW} of {len(layers)})": lambda: [
                torch.linalg.svd(layer.delta(), full_matrices=False) for layer in layers[:FEW]
            ],
        },
        rounds,
    )
    by_factors = spectra.updates(None, state)
    worst = 0.0
    for name, layer in list(lora_layers(model).items())[:FEW]:
        S = torch.linalg.svdvals(layer.delta().double())[:8]
        worst = max(worst, float((by_factors[name].svd.S - S).abs().max() / S[0]))
    print(f"  largest difference, over the largest value: {worst:.1e}")


def full(rounds: int) -> None:
    """Singular values of a full fine-tune."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = ll.Llama(shapes.config("smollm2-135m"))
    names = [name for name in dict(model.named_parameters()) if "proj" in name]
    sizes = {name: model.get_parameter(name).shape for name in names}
    before = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}
    after = {name: W + torch.randn(W.shape, generator=generator) / 100 for name, W in before.items()}
    print(f"\nfull: {len(names)} dense changes")
    timed(
        {
            "all, eigenvalues of the Gram product in float64": lambda: [
                rank.singular_values(after[name].double() - before[name].double()) for name in names
            ],
            f"svdvals in float32 ({FEW} of {len(names)})": lambda: [
                torch.linalg.svdvals(after[name] - before[name]) for name in names[:FEW]
            ],
        },
        max(3, rounds // 2),
    )


def accuracy() -> None:
    """On a spectrum that falls steeply."""
    generator, n = torch.Generator().manual_seed(0), 576
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    S = torch.arange(1, n + 1, dtype=torch.float64) ** -2
    W = U * S @ V.T
    single = W.float()

    def error(computed: Tensor) -> float:
        return float((computed.double() - S).abs().max() / S[0])

    in_single = torch.linalg.eigvalsh((single @ single.T).double()).flip(0).clamp_min(0).sqrt()
    print(f"\naccuracy: {n} x {n}, singular values j^-2, largest error over the largest value")
    print(f"  Gram product in float64   {error(rank.singular_values(W)):.1e}")
    print(f"  Gram product in float32   {error(in_single):.1e}")
    print(f"  svdvals in float32        {error(torch.linalg.svdvals(single)):.1e}")


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    common.print_machine(torch.device("cpu"))
    adapters(options.rounds)
    full(options.rounds)
    accuracy()


if __name__ == "__main__":
    main()
