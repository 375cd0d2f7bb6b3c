"""GGUF files that are written here, run by llama.cpp itself: equal tokens, and logits that are equal but for rounding.

Needs Node.js and the package node-llama-cpp, which brings llama.cpp. LORA_LAB_LLAMA_CPP names its folder; without it
these tests are skipped:

    npm install --prefix somewhere --ignore-scripts node-llama-cpp@3.22.1
    LORA_LAB_LLAMA_CPP=somewhere/node_modules python -m pytest -q -rP tests/guards/test_llama_cpp.py

They take a few minutes and 1.6 GB of the temporary folder, and print the largest differences between logits.
"""

import copy
import dataclasses
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_lab import Llama, LoRAConfig, inject, load_adapter, load_pretrained, save_model
from lora_lab.adapters import save_gguf, shipped, strength
from lora_lab.models.llama import RopeScaling, reader_of
from lora_lab.models.reading import Sampling, stream
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.variants import DoRALinear, PiSSALinear, RsLoRALinear
from tests.helpers import logits, random_ids, randomise, randomise_all
from tests.models.test_gguf import bytes_tokenizer
from tests.tiny_models import RELATIVES, relative, trained_tokenizer

FOLDER = os.environ.get("LORA_LAB_LLAMA_CPP")
pytestmark = pytest.mark.skipif(not FOLDER, reason="LORA_LAB_LLAMA_CPP names no folder with node-llama-cpp")
TEXTS = ["Once upon a time, the other's", "in  2024, 3.14 and 1 000 000", "Grüße 😀 東京", "  a\n\n b\t", "THE'S\r\n12"]
TEXTS += ["½①²Ⅷǅʰª٣\u3000\xa0\x85x", "a.that'LL_x/y!\n\r\n \t", "<|im_end|> <tool_call>1", "한국어 नमस्ते\u200d\ufeff"]


@dataclasses.dataclass
class Run:
    """A GGUF file for llama.cpp, and the model of ours that it must equal."""

    ours: torch.nn.Module
    tokenizer: Tokenizer
    model: Path
    adapter: Path | None = None
    scale: float = 1.0
    prompt: list[int] = dataclasses.field(default_factory=lambda: random_ids(1, 9)[0].tolist())
    count: int = 24
    texts: list[str] = dataclasses.field(default_factory=lambda: TEXTS)


@dataclasses.dataclass
class Result:
    """How far llama.cpp is from ours: the largest difference of logits, and how many greedy tokens are equal."""

    difference: float
    equal: int
    count: int
    gap: float  # between our two best logits, where the tokens part
    ids_equal: bool
    texts_equal: bool
    template: str | None


def greedy(run):
    """The tokens that our model continues the prompt with."""
    return list(stream(reader_of(run.ours), torch.tensor(run.prompt), run.count, None, Sampling()))


def answers(runs, continued, folder):
    """What llama.cpp computes of all runs and their tokens, in one process; logits go to files in the folder."""
    request = []
    for i, (run, tokens) in enumerate(zip(runs, continued, strict=True)):
        files = {"model": str(run.model), "adapter": run.adapter and str(run.adapter), "scale": run.scale}
        prompt = {"texts": run.texts, "prompt": run.prompt, "forced": tokens[:-1]}
        request.append(files | prompt | {"logits": str(folder / f"{i}.logits")})
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("llama_cpp.mjs")
    done = subprocess.run(["node", script, FOLDER, folder / "request.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_all(runs, folder):
    """How far llama.cpp is from ours in each run."""
    results = []
    continued = [greedy(run) for run in runs]
    for i, (run, tokens, answer) in enumerate(zip(runs, continued, answers(runs, continued, folder), strict=True)):
        ours = logits(run.ours, torch.tensor([run.prompt + tokens[:-1]]))[0, len(run.prompt) - 1 :]
        theirs = np.fromfile(folder / f"{i}.logits", dtype=np.float32)
        results.append(compare(run, answer, tokens, ours, theirs))
    return results


def compare(run, answer, tokens, ours, theirs):
    theirs = torch.from_numpy(theirs).view(ours.shape)
    assert len(answer["greedy"]) == len(tokens) == run.count
    equal = next((i for i, (a, b) in enumerate(zip(answer["greedy"], tokens, strict=True)) if a != b), run.count)
    best = ours[min(equal, run.count - 1)].topk(2).values
    return Result(
        difference=float((theirs - ours).abs().max()),
        equal=equal,
        count=run.count,
        gap=float(best[0] - best[1]),
        ids_equal=answer["ids"] == [run.tokenizer.encode(text) for text in run.texts],
        texts_equal=answer["texts"] == run.texts,
        template=answer["template"],
    )


def check(name, result, bound):
    parted = f"; there our two best logits are {result.gap:.2g} apart" if result.equal < result.count else ""
    equal = f"the first {result.equal} of {result.count} tokens are equal"
    print(f"{name}: logits differ by {result.difference:.2g} at most, {equal}{parted}")
    assert result.difference < bound, name
    assert result.equal == result.count or result.gap < 2 * result.difference, name
    assert result.ids_equal, name


# Small models, with everything that a file may hold


SHAPES = {
    "gpt-2": {"vocab_size": 265},
    "smollm": {"vocab_size": 300, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama-bpe": {
        "vocab_size": 265,
        "head_dim": 64,
        "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32),
        "rope_theta": 500000.0,
    },
}
ADAPTERS = {
    "LoRA": {},
    "rsLoRA": {"layer": RsLoRALinear},
    "PiSSA": {"layer": PiSSALinear},
    "embedding and head": {"targets": ["embed_tokens", "lm_head", "q_proj"]},
    "DoRA": {"layer": DoRALinear},
}


def check_with_adapters(base, tokenizer, folder, label):
    """Compare a base alone, with each kind of adapter, and with that adapter merged; the base must be told from them.

    Returns:
        What llama.cpp computed of each.
    """
    runs = {"base": Run(base, tokenizer, save_model(base, folder / "base.gguf", tokenizer, "gguf", "f32"))}
    for name, options in ADAPTERS.items():
        if "targets" in options and base.config.tie_word_embeddings:
            continue
        model, options = copy.deepcopy(base), dict(options)
        inject(model, LoRAConfig(4, 6.0, targets=options.pop("targets", "all-linear")), **options)
        randomise(model, size=0.1)
        assert (logits(model, random_ids(1, 9)) - logits(base, random_ids(1, 9))).abs().max() > 0.1
        path = save_gguf(model, folder / f"{name} merged.gguf", merged=True, dtype="f32", tokenizer=tokenizer)
        runs[f"{name} merged"] = Run(model, tokenizer, path)
        if name != "DoRA":
            path = save_gguf(model, folder / f"{name}.gguf", dtype="f32")
            runs[name] = Run(model, tokenizer, folder / "base.gguf", path)
    results = run_all(list(runs.values()), folder)
    for name, result in zip(runs, results, strict=True):
        check(f"{label}, {name}", result, 1e-3)
        assert result.texts_equal
    (wrong,) = run_all([dataclasses.replace(runs["LoRA"], ours=base)], folder)
    assert wrong.difference > 0.05
    return results


@pytest.mark.parametrize("words", SHAPES)
def test_small_models_give_our_logits_merged_and_with_their_adapters(tiny_config, tmp_path, words):
    base = randomise_all(Llama(dataclasses.replace(tiny_config, **SHAPES[words])).eval())
    check_with_adapters(base, bytes_tokenizer(words), tmp_path, words)


# Relatives of a Llama, as transformers computes them


@pytest.mark.parametrize("kind", RELATIVES)
def test_relatives_give_the_logits_of_transformers_merged_and_with_their_adapters(tmp_path, kind):
    base, tokenizer = relative(kind), trained_tokenizer(RELATIVES[kind][3])
    for result in check_with_adapters(base, tokenizer, tmp_path, kind):
        assert result.template == tokenizer.chat_template


def test_hard_texts_are_split_as_qwen2s_tokenizer_splits_them(tmp_path):
    tokenizer, generator = trained_tokenizer("qwen2"), np.random.default_rng(0)
    letters = [*"abT 'sSlRE12\n\r\t.,!_-/éß東京ж٣½①²Ⅷǅʰªאनि한€😀👍\0\1\xa0\u3000\u2028\x85\u200b\u200d\ufeff\ue000"]
    letters += ["'re", "'LL", "  ", "the", "<|im_end|>", "<tool_call>"]
    texts = ["".join(generator.choice(letters, generator.integers(1, 14))) for _ in range(3000)]
    path = save_model(relative("Qwen3"), tmp_path / "base.gguf", tokenizer, "gguf", "f32")
    run = Run(relative("Qwen3"), tokenizer, path, texts=[*texts, "e\u0301", "é"])
    (answer,) = answers([run], [greedy(run)], tmp_path)
    expected = [tokenizer.encode(text) for text in run.texts]
    assert answer["ids"][:-2] == expected[:-2]
    # In two characters, which the tokenizer joins by Unicode's NFC and llama.cpp does not.
    assert expected[-2] == expected[-1] == answer["ids"][-1] != answer["ids"][-2]


def test_llama_cpps_own_scale_is_strength(tiny_config, tmp_path):
    base, tokenizer = (
        randomise_all(Llama(dataclasses.replace(tiny_config, vocab_size=265)).eval()),
        bytes_tokenizer(),
    )
    save_model(base, tmp_path / "base.gguf", tokenizer, "gguf", "f32")
    inject(base, LoRAConfig(4, 6.0))
    path = save_gguf(randomise(base, size=0.1), tmp_path / "adapter.gguf", dtype="f32")
    with strength(base, 0.5):
        half, whole = run_all(
            [Run(base, tokenizer, tmp_path / "base.gguf", path, scale) for scale in (0.5, 1)], tmp_path
        )
    check("scale 0.5", half, 1e-3)
    assert whole.difference > 0.05


# The real model, with an adapter that ships


BOUNDS = {"f32": 1e-3, "f16": 0.1, "q8_0": 3.0}


def test_the_real_model_tells_the_lighthouse_keepers_story(smollm2, tmp_path):
    base, tokenizer = smollm2
    model = copy.deepcopy(base)
    load_adapter(model, shipped("lighthouse-keeper"))
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Tell a story about a lost umbrella."}]))
    save_model(base, tmp_path / "base.gguf", tokenizer, "gguf", "f32")
    runs = {"base": Run(base, tokenizer, tmp_path / "base.gguf")}
    for dtype in BOUNDS:
        path = save_gguf(shipped("lighthouse-keeper"), tmp_path / f"merged-{dtype}.gguf", merged=True, dtype=dtype)
        runs[f"merged, {dtype}"] = Run(model, tokenizer, path)
        path = save_gguf(shipped("lighthouse-keeper"), tmp_path / f"adapter-{dtype}.gguf", dtype=dtype)
        runs[f"adapter, {dtype}"] = Run(model, tokenizer, tmp_path / "base.gguf", path)
    # What rounding the weights costs, without what llama.cpp adds to it by rounding inputs.
    rounded, _ = load_pretrained(tmp_path / "merged-q8_0.gguf", device="cpu")
    runs["merged, q8_0, against ours of the same file"] = Run(rounded, tokenizer, tmp_path / "merged-q8_0.gguf")
    runs = {name: dataclasses.replace(run, prompt=prompt, count=64) for name, run in runs.items()}
    results = dict(zip(runs, run_all(list(runs.values()), tmp_path), strict=True))
    for name, result in results.items():
        (bound,) = [bound for dtype, bound in BOUNDS.items() if dtype in name] or [BOUNDS["f32"]]
        check(name, result, bound)
        assert result.template == tokenizer.chat_template
    assert results["merged, f32"].equal == results["adapter, f32"].equal == 64
    story = tokenizer.decode(model.generate(torch.tensor(prompt), 64).tolist())
    assert "watch. Wind" in story
    assert "watch. Wind" not in tokenizer.decode(base.generate(torch.tensor(prompt), 64).tolist())
    for path in tmp_path.glob("*.gguf"):  # 1.6 GB
        path.unlink()
