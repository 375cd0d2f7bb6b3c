"""The small language models that are shipped, each made from nothing in minutes of two cores.

A Llama of 4 blocks and width 64, 128 or 256 reads the docstrings of Python's standard library and of the packages that
lora_lab depends on, once, in an order that the seed draws. Left out, for fine-tuning, are numpy's docstrings, the
manual, the packages' descriptions, and the paragraphs that these share with the rest; a fiftieth of the files is held
out. Their card is lora_lab/models/data/README.md.

    python -m lora_lab.studies.bases runs/bases tiny-64-0 tiny-64-1      # goes on where it was stopped

The text is that of the installed versions, so other versions make other models.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from lora_lab.methods import FullFineTuning
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.models.pretrained import save_model
from lora_lab.models.tokenizer import PRE_TOKENIZERS, Tokenizer
from lora_lab.system import files
from lora_lab.task import Examples, Task
from lora_lab.tasks.pages import READ, Page, corpora, cut_pages, read_pages
from lora_lab.tasks.python_docs import windows
from lora_lab.train import fit

NAMES = ("tiny-64-0", "tiny-64-1", "tiny-128-0", "tiny-128-1", "tiny-256-0")  # width and seed
VOCABULARY, SEQ_LEN, BATCH = 1024, 128, 8
TOKENS = 12_000_000  # of training, about one epoch
END = "<|endoftext|>"


def train_tokenizer(pages: Sequence[Page]) -> Tokenizer:
    """Return a tokenizer of 1,024 tokens: pairs of bytes, merged by how often they occur in a quarter of the pages."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = PRE_TOKENIZERS["smollm"], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([page.text for page in pages[::4]], trainer)
    return Tokenizer(backend, eos_id=backend.token_to_id(END))


def make_task(tokenizer: Tokenizer, pages: Sequence[Page]) -> Task:
    """Return the task of reading these pages; it is tested on numpy's docstrings, and off-domain is the manual."""

    def cut(kind: str) -> Examples:
        return cut_pages(tokenizer, corpora()[kind], SEQ_LEN, 4, 64)

    return Task(
        "docstrings",
        train=windows(tokenizer, [page.text for page in pages], SEQ_LEN),
        validation=cut("known"),
        test=cut("numpy"),
        off_domain=cut("manual"),
        unit="tokens",
        about=f"docstrings of {', '.join(READ)}",
    )


def make_base(name: str, folder: Path) -> Path:
    """Train a base, going on where that was stopped, and write it to ``<folder>/<name>.gguf``, in 8 bits a weight.

    Raises:
        ValueError: there is no such base.
    """
    if name not in NAMES:
        raise ValueError(f"There is no base {name!r}; there are {', '.join(NAMES)}.")
    width, seed = map(int, name.split("-")[1:])
    pages = read_pages()
    tokenizer = train_tokenizer(pages)
    task = make_task(tokenizer, pages)
    heads = width // 32
    config = LlamaConfig(
        *(VOCABULARY, width, 3 * width, 4, heads, heads, 32), max_position_embeddings=256, tie_word_embeddings=True
    )
    model = Llama(config, seed=seed)
    steps = TOKENS // (BATCH * SEQ_LEN)
    options = {"lr": 3e-3 * (128 / width) ** 0.5, "weight_decay": 0.1, "warmup": 100, "batch_size": BATCH}
    every = {"eval_every": 1000, "checkpoint_every": 250}
    run = {"seed": seed, "checkpoint_dir": folder / name, **every, **options}
    history = fit(model, task, FullFineTuning(), steps=steps, **run)
    losses = {part: history.rows[-1][f"{part}_loss"] for part in ("validation", "off_domain")}
    text = hashlib.sha256("\n".join(page.text for page in pages).encode()).hexdigest()[:16]
    files.write_json(folder / f"{name}.json", {"name": name, "steps": steps, "text": text, **options, **losses})
    print(name, json.dumps(losses))
    return save_model(model, folder / f"{name}.gguf", tokenizer, format="gguf", dtype="q8_0")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for base in sys.argv[2:]:
        make_base(base, Path(sys.argv[1]))
