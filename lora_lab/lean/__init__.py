r"""The training step with the same results, in less time and memory. Understanding LoRA does not require it.

    fit(model, task, LoRA(rank=8), ..., lean=Lean(checkpoint=True))

What it changes in a LoRA step of our Llama, and what each change saves:

    the loss in slices       logits (4 x 128 tokens x 49152, 100 MB) never exist as a whole, and only for targets that
                             count
    backward by hand         matrix multiplications by A and B with the short side first, and one for all layers of an
                             input; W + s B A as one matrix where that is cheaper
    SwiGLU recomputed        silu(gate) * up is not saved, but computed again in the backward pass
    flat AdamW               one tensor instead of 420
    base in bfloat16         half the bytes, and twice the speed where the processor multiplies bfloat16
    checkpoint               only the input of each block is saved, and the block is computed again
    threads=2                two halves of the batch on one core each, which wait for each other once per step

Adapters, norms, an adapted head and all sums stay in float32. Over a base in 4-bit blocks
(``lora_lab.models.quantize``), each matrix is dequantised where it is used, and that of the head in slices.

In reading order:

    blocks     LoRA's matrix multiplications with a hand-written backward pass; norm, rotation, attention and SwiGLU
               that save fewer activations; checkpointing
    loss       cross-entropy without whole logits
    step       gives a Llama lean blocks, and makes the step that trains it: flat AdamW, parallel threads

Shapes in the comments: SmolLM2-135M, 4 sequences of 128 tokens, which is 512 rows; rank 8.

References: Hu et al. 2021, arXiv 2106.09685, equation 3; the order of multiplications: Cherniuk et al. 2023
(RunLoRA), arXiv 2312.03415; checkpointing: Chen et al. 2016, arXiv 1604.06174.
"""

from lora_lab.lean.loss import cross_entropy, token_losses
from lora_lab.lean.step import FlatAdamW, Lean, LeanStep, apply_lean

__all__ = ["FlatAdamW", "Lean", "LeanStep", "apply_lean", "cross_entropy", "token_losses"]
