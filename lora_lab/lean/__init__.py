r"""The same training step, with the same numbers, in less time and memory. Understanding LoRA does not need it.

    fit(model, task, LoRA(rank=8), ..., lean=Lean(checkpoint=True))

What it does to a LoRA step of our Llama, and what each is for:

    the loss in slices       logits (4 x 128 tokens x 49152, 100 MB) never exist whole, and only for targets that count
    backward by hand         the narrow products short side first, and once for all layers of one input; W + s B A
                             as one matrix where that is cheaper
    SwiGLU recomputed        silu(gate) * up is made again in the backward pass, not kept
    flat AdamW               one tensor in place of 420
    base in bfloat16         half the bytes, and twice the speed where the processor multiplies bfloat16
    checkpoint               of each block only the input is kept, and the block computed again
    threads=2                two halves of the batch on one core each, with no barrier at every product

Adapters, norms, an adapted head and all sums stay in float32. Where the base is in 4-bit blocks
(``lora_lab.models.quantize``), each matrix is dequantised where it is used, and the head's a slice at a time.

In reading order:

    linear  LoRA's products, with the backward pass written by hand
    blocks  norm, rotation, attention and SwiGLU that keep less
    loss    cross-entropy without whole logits
    optim   flat AdamW, and halves of a batch in threads
    step    puts them into a Llama, and makes the step that trains it

Shapes in the comments: SmolLM2-135M, 4 sequences of 128 tokens, so 512 rows; rank 8.

References: Hu et al. 2021, arXiv 2106.09685, equation 3; the orders of products: Cherniuk et al. 2023
(RunLoRA), arXiv 2312.03415; checkpointing: Chen et al. 2016, arXiv 1604.06174.
"""

from lora_lab.lean.loss import cross_entropy, token_losses
from lora_lab.lean.optim import FlatAdamW, ThreadedStep
from lora_lab.lean.step import Lean, LeanStep, apply_lean
from lora_lab.system.renamed import renamed

__all__ = ["FlatAdamW", "Lean", "LeanStep", "ThreadedStep", "apply_lean", "cross_entropy", "token_losses"]

__getattr__ = renamed(__name__, {"InThreads": "ThreadedStep", "rewire": "apply_lean"})
