"""Folders and configs of any architecture: which models they become, what is refused, and what the commands do."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

import lora_lab as ll
from lora_lab.costs.flops import flops
from lora_lab.models.pretrained import architecture, load_tokenizer
from lora_lab.tasks.generate import reply
from tests.helpers import command, error_line, logits, randomise
from tests.tiny_models import SHAPE, fresh, gpt2, vit

GREEDY = ("--temperature", 0, "--repetition-penalty", 1)
CONFIGS = sorted((Path(__file__).parents[1] / "data" / "configs").glob("*.json"))
IDS = torch.arange(3, 11)[None]


@pytest.fixture
def folder(tmp_path, chatter):
    """A Qwen3 that knows the tiny tokenizer's tokens, as transformers saves it, with a chat template."""
    torch.manual_seed(0)
    config = hf.Qwen3Config(**{**SHAPE, "vocab_size": 260, "max_position_embeddings": 256}, head_dim=8)
    hf.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen3")
    chatter.save(tmp_path / "qwen3")
    return tmp_path / "qwen3"


def changed(folder, **entries):
    """The folder, with other entries in its config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


# Configs without weights


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_published_config_has_its_published_number_of_parameters_and_a_bill(path):
    config = json.loads(path.read_text())
    with torch.device("meta"):
        model = architecture(path)()
    assert type(model).__name__ == config["architectures"][0]
    assert sum(parameter.numel() for parameter in model.parameters()) == config["published_parameters"]
    length = None if "image_size" in config else 16
    bill = ll.memory.predict(path, ll.LoRA(rank=4), 1, length, dtype=torch.bfloat16, device="cpu")
    assert bill.parts["frozen weights"] == pytest.approx(2 * config["published_parameters"], rel=1e-4)
    assert bill.peak_bytes > bill.static_bytes > bill.parts["frozen weights"]


def test_a_bill_of_a_config_is_that_of_the_model_with_weights(folder):
    options = {"batch_size": 2, "seq_len": 16, "device": "cpu"}
    expected = ll.memory.predict(hf.Qwen3ForCausalLM.from_pretrained(folder), ll.LoRA(rank=4), **options)
    for source in (folder, str(folder), folder / "config.json"):
        assert ll.memory.predict(source, ll.LoRA(rank=4), **options).parts == expected.parts
        assert flops(source, ll.LoRA(rank=4), 2, 16).total == flops(architecture(folder), ll.LoRA(rank=4), 2, 16).total


def test_a_name_a_llamas_config_and_another_are_built_by_the_right_library(folder, tiny_config, tmp_path):
    for name, entries in {"llama": {}, "gelu": {"hidden_act": "gelu"}}.items():
        changed(ll.save_model(ll.Llama(tiny_config), tmp_path / name), **entries)
    for source, expected in (
        ("smollm2-360m", ll.Llama),
        (tmp_path / "llama", ll.Llama),
        (folder, hf.Qwen3ForCausalLM),
        (tmp_path / "gelu", hf.LlamaForCausalLM),
    ):
        with torch.device("meta"):
            assert type(architecture(source)()) is expected


@pytest.mark.parametrize("names", [None, ["BertModel"], ["NoSuchClass"], ["Trainer"], ["pipeline"]])
def test_a_config_that_names_no_model_with_a_head_is_refused(tmp_path, names):
    hf.BertConfig(architectures=names).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^The config's architectures are .* has no model with a head"):
        architecture(tmp_path)()


def test_a_config_of_which_nothing_can_be_built_is_refused(tmp_path):
    hf.BertConfig(num_attention_heads=0, architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^transformers cannot build a BertForMaskedLM of this config: .*zero"):
        architecture(tmp_path)()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"model_type": "no-such-model"}', "transformers .* cannot read .*no-such-model"),
        ("{}", "transformers .* cannot read"),
        ("[]", r"config.json is \[\], but it must be a valid dictionary"),
        ('{"model_type": "gpt2", "n_layer": 1000000000}', "n_layer is 1000000000, but it must be at most 1000"),
        (
            '{"model_type": "bert", "num_labels": 1000000000}',
            "num_labels is 1000000000, but .* at most 1000000",
        ),
        ("{", "config.json"),
        ('{"model_type": "qwen3", "hidden_size": "wide"}', "cannot read"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, capsys, content, says):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        architecture(tmp_path)
    assert command("memory", "--model", tmp_path) == 1
    error_line(capsys)


def test_without_transformers_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (architecture, ll.load_pretrained):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lora-lab\[hf\]'\.$"):
            call(folder)


# Folders with weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_another_family_is_loaded_by_transformers_which_is_said(folder, capsys, dtype):
    model, tokenizer = ll.load_pretrained(folder, dtype=dtype, device="cpu")
    assert f"{folder}: a model of transformers, because it is of type 'qwen3', and lora_lab builds only 'llama'." in (
        capsys.readouterr().err
    )
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assert type(model) is type(theirs) is hf.Qwen3ForCausalLM
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(logits(model, IDS), logits(theirs, IDS))
    assert tokenizer.encode("the dog") == load_tokenizer(folder).encode("the dog")


def test_a_folder_of_our_family_is_a_llama_which_is_said_too(tiny_config, chatter, tmp_path, capsys):
    folder = ll.save_model(ll.Llama(tiny_config, seed=2), tmp_path / "llama", chatter)
    assert type(ll.load_pretrained(folder, device="cpu")[0]) is ll.Llama
    assert capsys.readouterr().err == f"{folder}: a lora_lab.Llama.\n"
    changed(folder, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert type(ll.load_pretrained(folder, device="cpu")[0]) is hf.LlamaForCausalLM
    assert "because its positions are scaled by 'linear'" in capsys.readouterr().err


SPOILT = [  # what is done to a folder, and what must be named
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "file model.safetensors"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "lacks the file tokenizer.json; make"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (
        lambda folder: changed(folder, num_hidden_layers=3, layer_types=None),
        "lacks tensors .*11, such as .*; copy or make it anew",
    ),
    (lambda folder: changed(folder, intermediate_size=25), "cannot be loaded by transformers: "),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "cannot be loaded"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    (lambda folder: changed(folder, quantization_config={"quant_method": "fp8"}), "quantised weights.*quantize_nf4"),
]


@pytest.mark.parametrize(("spoil", "named"), SPOILT)
def test_what_is_missing_or_damaged_is_told_in_one_sentence(folder, spoil, named):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=named) as caught:
        ll.load_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_there_are_no_blocks_to_keep(folder):
    with pytest.raises(ValueError, match="keep_blocks"):
        ll.load_pretrained(folder, device="cpu", keep_blocks=True)


def test_a_model_of_transformers_is_saved_and_read_again(folder, chatter, tiny_config, tmp_path):
    model, _ = ll.load_pretrained(folder, device="cpu")
    ll.inject(model, ll.LoRAConfig(rank=2), seed=1)
    randomise(model)
    with pytest.raises(ValueError, match="merge"):
        ll.save_model(model, tmp_path / "tuned")
    ll.merge(model)
    saved = ll.save_model(model, tmp_path / "tuned", chatter)
    again, tokenizer = ll.load_pretrained(saved, device="cpu")
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert not torch.equal(logits(again, IDS), logits(ll.load_pretrained(folder, device="cpu")[0], IDS))
    assert tokenizer.chat_template == chatter.chat_template
    ll.save_model(ll.Llama(tiny_config), saved, chatter)
    assert not (saved / "generation_config.json").exists()  # it was the other model's
    with pytest.raises(ValueError, match=r"^A Linear is neither a lora_lab.Llama nor a model of transformers"):
        ll.save_model(torch.nn.Linear(2, 2), tmp_path / "layer")
    with pytest.raises(ValueError, match=r"^The model is a GPT2LMHeadModel, but a GGUF file holds"):
        ll.save_model(fresh(gpt2), tmp_path / "x.gguf", chatter, format="gguf")


# The commands


@pytest.fixture
def chat_file(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": [system, {"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(30)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_newcomers_model_is_tuned_talked_to_swept_and_analysed(folder, chat_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--task", chat_file, "--model", folder, "--device", "cpu"]
    assert command("finetune", *options, "--steps", 30, "--lr", 1e-2, "--batch", 4, "--rank", 4, "--out", "run") == 0
    losses = json.loads((tmp_path / "run" / "result.json").read_text())
    assert losses["after"]["validation_loss"] < losses["before"]["validation_loss"] - 0.1
    assert str(folder) in (tmp_path / "run" / "README.md").read_text()
    capsys.readouterr()
    assert command("chat", "7?", *GREEDY, "--adapter", "run", "--tokens", 6, "--device", "cpu") == 0
    adapted = capsys.readouterr().out.strip()
    model, tokenizer = ll.load_pretrained(folder, device="cpu")
    ll.load_adapter(model, "run")
    assert adapted == reply(model, tokenizer, "7?", max_new_tokens=6)
    answers = iter(["7?", "/off", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    greedy = ["--tokens", 6, "--temperature", 0, "--repetition-penalty", 1]
    assert command("chat", "--adapter", "run", *greedy, "--device", "cpu") == 0
    assert adapted in capsys.readouterr().out
    sweep = ["--ranks", 1, 2, "--lrs", "1e-2", "--seeds", 1, "--steps", 2, "--out", "sweep"]
    assert command("ablate", "--task", chat_file, "--model", folder, *sweep) == 0
    trials = [json.loads(path.read_text())["trial"] for path in Path("sweep/trials").glob("*.json")]
    assert {trial["method"]["rank"] for trial in trials} == {1, 2}
    assert command("analyze", "run", "--base", folder, "--out", "spectra") == 0
    assert (tmp_path / "spectra" / "layers.csv").is_file()


def test_full_fine_tuning_saves_the_model_of_transformers(folder, chat_file, tmp_path, capsys):
    arguments = ["--task", chat_file, "--model", folder, "--device", "cpu", "--steps", 2, "--method", "full"]
    assert command("finetune", *arguments, "--out", tmp_path / "full") == 0
    tuned, _ = ll.load_pretrained(tmp_path / "full", device="cpu")
    assert type(tuned) is hf.Qwen3ForCausalLM
    assert not torch.equal(logits(tuned, IDS), logits(ll.load_pretrained(folder, device="cpu")[0], IDS))


@pytest.mark.slow
def test_memory_and_speed_take_a_folder_and_leave_the_lean_step_to_our_llama(folder, capsys):
    assert command("memory", "--model", folder, "--seq", 16, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "full fine-tuning" in printed
    assert "lean" not in printed
    expected = ll.memory.predict(folder, ll.LoRA(rank=8, alpha=16), 1, 16, dtype=torch.bfloat16, device="cpu")
    assert f"{'LoRA r=8':<32}{expected.peak_bytes / 2**30:>6.2f} GiB" in printed
    vit().save_pretrained(folder.parent / "vit")
    assert command("memory", "--model", folder.parent / "vit" / "config.json", "--device", "cpu") == 0
    assert "batch 1 pictures: peak" in capsys.readouterr().out


def test_what_cannot_answer_is_refused_before_it_is_trained(tmp_path, chat_file, chatter, capsys):
    config = hf.BertConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    hf.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    chatter.save(tmp_path / "bert")
    arguments = ["--task", chat_file, "--model", tmp_path / "bert", "--device", "cpu", "--out", tmp_path / "out"]
    assert command("finetune", *arguments) == 1
    assert "lora-lab: Only a causal language model can continue a text" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()
