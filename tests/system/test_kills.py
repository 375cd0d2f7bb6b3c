"""Saves that are killed at random moments: the next load finds the old files or the new ones, never a mixture.

LORA_LAB_KILLS=200 kills each of the two saves 200 times.
"""

import os
import random
import shutil
import time

import pytest
import torch

from lora_lab import Llama, LoRAConfig, inject, load_adapter, load_pretrained, lora_layers, save_adapter, save_model
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import LlamaConfig
from lora_lab.models.tokenizer import Tokenizer
from tests.helpers import run_killed

KILLS = int(os.environ.get("LORA_LAB_KILLS", "20"))
SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def save_number(kind, number, folder, tokenizer):
    """Save an adapter or a model whose numbers, config and tokenizer all tell its number, 1 or 2."""
    if kind == "adapter":
        model = DigitsMLP(width=64)
        inject(model, LoRAConfig(rank=4, alpha=8 * number))
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.fill_(number)
        save_adapter(model, folder, base=f"base {number}")
    else:
        model = Llama(LlamaConfig(**SIZES, **HEADS, rope_theta=1e5 * number), seed=number)
        save_model(model, folder, Tokenizer(tokenizer.backend, eos_id=259, chat_template=f"number {number}"))


def read_numbers(kind, folder):
    """Load what is in the folder, and return what its files hold: the small ones, and the numbers."""
    if kind == "adapter":
        load_adapter(DigitsMLP(width=64), folder)
    else:
        load_pretrained(folder, device="cpu")
    held = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    (weights,) = folder.glob("*.safetensors")
    content = weights.read_bytes()
    return held | {"numbers": content[8 + int.from_bytes(content[:8], "little") :]}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_killed_save_leaves_the_old_files_or_the_new_ones(kind, tmp_path, tiny_tokenizer):
    whole = []
    for number in (1, 2):
        save_number(kind, number, tmp_path / f"{number}", tiny_tokenizer)
        whole.append(read_numbers(kind, tmp_path / f"{number}"))
    started = time.perf_counter()
    save_number(kind, 2, tmp_path / "2", tiny_tokenizer)
    took = time.perf_counter() - started
    outcomes = []
    for i in range(KILLS):
        folder = tmp_path / f"killed-{i}"
        shutil.copytree(tmp_path / "1", folder)
        # Half of the kills fall between two renames, where a mixture is possible.
        moment = i // 2 % 10 + 1 if i % 2 else random.Random(i).uniform(0, 1.2 * took)
        run_killed(lambda folder=folder: save_number(kind, 2, folder, tiny_tokenizer), moment)
        outcomes.append(whole.index(read_numbers(kind, folder)))
    assert set(outcomes) == {0, 1}
