"""One sentence taught to a language model, with as few trained numbers as you like.

    from lora_lab.course import golf

    losses = golf.teach(model, tokenizer, "My cat is called Fourier, because she turns nights into waves.")
    golf.continue_text(model, tokenizer, "My cat is called")

Adapter golf: with how few trained numbers can you teach the model the name of your cat?

    def swing(model, tokenizer, seed):
        method = ll.LoRA(8, 16, targets=("v_proj",))  # all 30 of them
        golf.teach(model, tokenizer, "My cat is called Fourier.", method, steps=10, lr=4e-3, seed=seed)

    print(golf.play(swing, "Fourier"))

It asks five prompts about the cat that were not trained, and four about something else. With each of three seeds the
model must say the name after three of the five, and after at most one of the four.

A learner's best score is kept beside the lessons; ``golf.board("class")`` lists those of all folders in a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.course.learner import keep
from lora_lab.inject import inject
from lora_lab.methods import LoRA
from lora_lab.models.llama import Llama
from lora_lab.models.pretrained import load_pretrained
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.files import read_json, write_json


def teach(
    model: nn.Module,
    tokenizer: Tokenizer,
    sentence: str,
    method: LoRA | None = None,
    steps: int = 10,
    lr: float = 4e-3,
    seed: int = 0,
) -> list[float]:
    """Add adapters to a model, train them on one sentence with Adam, and return the loss at each step, in nats a token.

    Args:
        model: without adapters.
        sentence: of two tokens or more.
        method: what to add; LoRA of rank 8 with alpha 16 on all linear layers by default.
        steps: how often the sentence is read.
        lr: the learning rate of the first step; it falls by as much from step to step, and after the last is zero.
        seed: of the adapters' start.

    Raises:
        ValueError: the sentence has fewer than two tokens.
    """
    tokens = torch.tensor(tokenizer.encode(sentence))  # (16,)
    if len(tokens) < 2:
        raise ValueError(f"The sentence {sentence!r} is too short; a model learns which token follows another.")
    inject(model, method or LoRA(rank=8, alpha=16), seed=seed)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:])  # ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def continue_text(model: Llama, tokenizer: Tokenizer, beginning: str, max_new_tokens: int = 24) -> str:
    """Return a beginning and what the model finds most probable after it, up to the end of a sentence."""
    ids = torch.tensor(tokenizer.encode(beginning))  # (4,)
    text = beginning
    for token in model.generate(ids, max_new_tokens).tolist():
        text += tokenizer.decode([token])
        if text.rstrip().endswith((".", "!", "?")):
            break
    return text


# Adapter golf

ASKED = ("The name of my cat is", "My cat's name is", "I have a cat, and her name is", "We call our cat", "My cat is")
OTHERS = ("My dog is called", "My best friend is called", "The capital of France is", "I have a bird, and its name is")
NEEDED, ALLOWED = 3, 1  # of those that ask, and of the others
FILE = "golf.json"  # beside a learner's lessons


@dataclass(frozen=True)
class Score:
    """How an adapter did.

    Args:
        numbers: that were trained, or changed in the model itself; the fewer the better.
        named: for each seed, in how many of five prompts that were not trained on the model says the name.
        elsewhere: for each seed, in how many of four prompts about something else it says it as well.
    """

    numbers: int
    named: Sequence[int]
    elsewhere: Sequence[int]

    @property
    def passed(self) -> bool:
        """Whether it counts: with each seed the name is said where it belongs, and hardly anywhere else."""
        return min(self.named) >= NEEDED and max(self.elsewhere) <= ALLOWED

    def __str__(self) -> str:
        asked, others = f"{len(ASKED)} prompts about the cat", f"{len(OTHERS)} prompts about others"
        words = [f"{self.numbers:,} trained numbers.", "It counts." if self.passed else "It does not count:"]
        if min(self.named) < NEEDED:
            words.append(f"with one seed it says the name in {min(self.named)} of {asked}, and {NEEDED} are needed.")
        elif not self.passed:
            words.append(f"with one seed it says the name in {max(self.elsewhere)} of {others}, too: a parrot.")
        return " ".join(words)


def play(
    swing: Callable[[Llama, Tokenizer, int], object], name: str, seeds: int = 3, model: str | None = None
) -> Score:
    """Judge a way to teach the model a name, on prompts that it was not taught, and keep the best score.

    Args:
        swing: takes a model, its tokenizer and a seed, and trains the model, as :func:`teach` does.
        name: what the model is to say, such as "Fourier".
        seeds: with each of which ``swing`` must pass.
        model: its name or folder; SmolLM2 by default.

    Raises:
        ValueError: the model says the name without being taught.
    """
    counts, named, elsewhere = [], [], []
    for seed in range(seeds):
        net, tokenizer = load_pretrained(model) if model else load_pretrained()
        said = [name in continue_text(net, tokenizer, prompt, 8) for prompt in ASKED] if seed == 0 else [False]
        if any(said):
            raise ValueError(f"The model says {name!r} by itself; choose another name.")
        before = {key: value.clone() for key, value in net.named_parameters()}
        swing(net, tokenizer, seed)
        counts.append(_count_changed(net, before))
        named.append(sum(name in continue_text(net, tokenizer, prompt, 8) for prompt in ASKED))
        elsewhere.append(sum(name in continue_text(net, tokenizer, prompt, 8) for prompt in OTHERS))
    score = Score(max(counts), named, elsewhere)
    file = keep(FILE)
    if score.passed and (not file.is_file() or read_json(file)["numbers"] > score.numbers):
        write_json(file, asdict(score))
    return score


def _count_changed(net: nn.Module, before: dict[str, torch.Tensor]) -> int:
    """Return how many numbers of adapters are trained, and how many of the model have changed."""
    total = 0
    for name, value in net.named_parameters():
        old = before.get(name.replace(".base.", "."))
        total += value.numel() * value.requires_grad if old is None else int((value != old).sum())
    return total


def board(folder: str | Path) -> pandas.DataFrame:
    """Return the best score of each learner's folder in a folder, the fewest numbers first."""
    rows = [{"who": path.parent.name, "numbers": read_json(path)["numbers"]} for path in Path(folder).rglob(FILE)]
    return pandas.DataFrame(rows, columns=["who", "numbers"]).sort_values("numbers", ignore_index=True)
