"""A small model as a stranger would bring it, and the command ``lora-lab`` in this process."""

import importlib
import json
import tomllib

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.acceptance import ROOT

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
SIZES |= {"vocab_size": 260, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 258}


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    """Return the folder of a random Llama and a tokenizer of bytes and two merges, both saved by transformers."""
    folder = tmp_path_factory.mktemp("stranger")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "on", "one"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("o", "n"), ("on", "e")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, eos_token_id=259, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(2)  # so that an adapter's update is not the largest part of a logit
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    """Return a file of prompts and answers: a task of one's own."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{i} plus one?", "answer": str(i + 1)} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def main():
    """Return what the command ``lora-lab`` calls, from the table in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["lora-lab"].partition(":")
    return getattr(importlib.import_module(module), function)


@pytest.fixture
def lora_lab(main, capsys):
    """Run ``lora-lab`` in this process, and return what it printed; it must succeed."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run


@pytest.fixture(scope="session")
def adapter(stranger, tmp_path_factory):
    """Return the folder of a random adapter for the small model."""
    import lora_lab as ll

    model, _ = ll.load_pretrained(stranger, device="cpu")
    ll.inject(model, ll.LoRAConfig(rank=2, alpha=8), seed=1)
    randomise(model)
    return ll.save_adapter(model, tmp_path_factory.mktemp("adapter") / "mine", base=str(stranger))


@torch.no_grad()
def randomise(model, seed=1, size=0.3):
    """Give every adapter random numbers, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model
