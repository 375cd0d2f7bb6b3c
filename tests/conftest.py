"""Fixtures that several test files share: the real model, transformers' own, and tiny random ones.

Models of session scope are for reading: a test that changes one works on a deep copy.
"""

import functools
import gc
import sys

import gguf
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import lora_lab as ll
from lora_lab.models import pretrained
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.models.pretrained import fetch_smollm2, load_pretrained, save_model
from lora_lab.models.tokenizer import Tokenizer
from tests.helpers import randomise_all


def pytest_collection_finish():
    """A million objects are there by now, which need not be looked through for garbage each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def figures_are_closed():
    """pyplot keeps what it drew until it is told otherwise."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def seeded():
    """Seeds torch's global generator before each test."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def heap_that_thaws():
    """After the last test of a file garbage is looked for everywhere again."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture
def frozen_heap(heap_that_thaws):
    """``measure`` collects garbage; what was imported and made before a test need not be looked through each time."""
    gc.collect()  # of what the tests before left, since the last freeze only
    gc.freeze()


@pytest.fixture
def one_thread():
    """As workers compute; and on small matrices two threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quantiles_once():
    """Answers that try one number of seeds after another ask for thousands of quantiles, and scipy is slow."""
    from scipy.stats import t

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "ppf", functools.cache(t.ppf))
        yield


@pytest.fixture(scope="session")
def ledger():
    """All claims with their verdicts; it takes seconds."""
    return ll.claims.load()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer): SmolLM2-135M-Instruct as lora_lab loads it."""
    return load_pretrained(device="cpu")


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2):
    """The path of the file that holds the model, in the cache."""
    return fetch_smollm2()


@pytest.fixture(scope="session")
def gguf_reader(smollm2_gguf):
    """The gguf library's view of that file; it takes seconds to make."""
    return gguf.GGUFReader(smollm2_gguf)


@pytest.fixture(scope="session")
def from_gguf(smollm2_gguf, gguf_reader):
    """Loads the file with transformers: ``from_gguf(AutoTokenizer)``.

    transformers reads the file anew for every part of the model, and makes the table of names anew for
    every tensor; here one reader and one table serve all, which saves ten seconds.
    """

    def load(auto, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf, "GGUFReader", lambda path: gguf_reader)
            patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
            return auto.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, **options)

    return load


@pytest.fixture(scope="session")
def hf_smollm2(from_gguf):
    """The same model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return from_gguf(AutoModelForCausalLM, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer of 256 bytes, two merges and two special tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return Tokenizer(backend, bos_id=258, eos_id=259)


@pytest.fixture(scope="session")
def chatter(tiny_tokenizer):
    """The tiny tokenizer with a chat template."""
    template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    return Tokenizer(tiny_tokenizer.backend, eos_id=259, bos_id=258, chat_template=template)


TINY = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True}


@pytest.fixture(scope="session")
def tiny_config():
    """The shape of a Llama that computes in milliseconds, and knows the tiny tokenizer's tokens."""
    return LlamaConfig(**TINY, head_dim=8)


@pytest.fixture(scope="session")
def tiny_hf():
    """Makes a small random LlamaForCausalLM of transformers: ``tiny_hf(seed=1, attention_bias=True, ...)``.

    All its parameters are random, the norms and biases too.
    """
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    def make(seed=0, **changes):
        config = HFConfig(**(TINY | {"bos_token_id": 258, "eos_token_id": 259} | changes))
        return randomise_all(LlamaForCausalLM(config).eval(), seed)

    return make


@pytest.fixture
def hf_folder(tmp_path, tiny_tokenizer):
    """Saves a model of transformers with the tiny tokenizer, and returns the folder."""

    def save(model, **options):
        folder = tmp_path / "hf"
        model.save_pretrained(folder, **options)
        tiny_tokenizer.save(folder)
        return folder

    return save


@pytest.fixture
def tiny_smollm2(tmp_path, monkeypatch, tiny_config, tiny_tokenizer):
    """A folder with a tiny random Llama, which takes the place of SmolLM2 wherever that is asked for."""
    folder = save_model(Llama(tiny_config, seed=1).eval(), tmp_path / "tiny", tiny_tokenizer)
    monkeypatch.setattr(pretrained, "_smollm2_folder", lambda: folder)
    return folder
