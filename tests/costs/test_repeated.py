"""Bills from a few of a model's identical blocks, byte for byte those from all of them."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_lab import DoRA, FullFineTuning, Lean, Llama, LlamaConfig, LoRA, LoRAFA, PiSSA
from lora_lab.costs import memory, setup
from lora_lab.costs.bill import Part, RecordedOperation, Recording, extend_recording
from lora_lab.costs.fake import blocks_are_alike, last_blocks, transformer_blocks
from lora_lab.costs.memory import predict
from lora_lab.costs.setup import Setup
from lora_lab.methods import AsItIs
from lora_lab.models import quantize

BF16 = torch.bfloat16
CKPT = {"gradient_checkpointing": True}
SHAPE = LlamaConfig(300, 64, 160, 6, 4, 2, 16, tie_word_embeddings=True)  # just enough blocks to leave some out
TWO = ["q_proj", "down_proj"]  # one layer in attention and one in the MLP, as good as all seven for half the operations
SEVEN = replace(SHAPE, num_hidden_layers=7)
TEMPORARY = Part.TEMPORARIES


def deep(config=SHAPE):
    with torch.device("meta"):
        return Llama(config)


@pytest.fixture
def both_ways(monkeypatch):
    """Predicts twice, with both shortcuts and without, and says whether blocks were left out the first time."""

    def predict_twice(*args, **options):
        depths, plain = [], memory.StorageLog

        def log(step):
            depths.append(len(transformer_blocks(step.model)))
            return plain(step)

        with monkeypatch.context() as patch:
            patch.setattr(memory, "StorageLog", log)
            short = predict(*args, **options)
            depth = max(depths)
            patch.setattr(setup, "blocks_are_alike", lambda model: False)
            patch.setattr(memory, "_dequantise_once", lambda log: None)
            whole = predict(*args, **options)
        assert short == whole  # the parts, the moment, what is saved, and every point of the timeline
        assert str(short) == str(whole)
        return depth < depths[-1]

    return predict_twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LoRA(8), {}),
        (LoRA(8, targets=TWO, dropout=0.1), {"accumulate": 2, "device": "cuda"}),
        (LoRA(8), {"lean": Lean(base_dtype=BF16)}),
        (FullFineTuning(), {}),
        (FullFineTuning(), {"dtype": BF16, "optimizer": "sgd", "clip": None}),
        (FullFineTuning(), {"device": "cuda", **CKPT}),
        (DoRA(8, targets=TWO), {}),
        (LoRAFA(8, targets=TWO), {}),
        (PiSSA(8, targets=TWO), {}),
    ],
    ids=str,
)
def test_a_bill_from_a_few_blocks_is_that_from_all_byte_for_byte(method, options, both_ways):
    assert both_ways(deep(), method, 2, 24, **options)


@pytest.mark.parametrize(
    ("columns", "layers", "options"),
    [
        (60, 2, {}),  # slices are the only shortcut; with 64 columns blocks are one too
        pytest.param(64, 6, {}, marks=pytest.mark.slow),
        pytest.param(60, 2, {"device": "cuda", "dtype": BF16, **CKPT}, marks=pytest.mark.slow),
        pytest.param(64, 2, {"lean": Lean(checkpoint=True)}, marks=pytest.mark.slow),
        pytest.param(60, 2, {"accumulate": 2, **CKPT}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_so_is_one_of_matrices_that_are_dequantised_in_slices(columns, layers, options, both_ways, monkeypatch):
    # A slice of 44 rows ends with a block of 64 weights where rows have 64 columns; of 60 it ends within one.
    monkeypatch.setattr(quantize, "_AT_ONCE", 44 * columns)  # of 64 and of 100 rows the last slice is smaller
    shape = replace(SHAPE, num_hidden_layers=layers, intermediate_size=100)
    config = replace(shape, hidden_size=columns, num_attention_heads=2, head_dim=columns // 2)
    assert both_ways(deep(config), LoRA(8, targets=TWO), 2, 24, nf4=True, **options) == (layers == 6)


def test_slices_that_differ_in_values_only_are_dequantised_once(monkeypatch):
    monkeypatch.setattr(quantize, "_AT_ONCE", 16 * 64)
    shapes = []
    plain = quantize.BlockWeight.rows
    monkeypatch.setattr(
        quantize.BlockWeight, "rows", lambda layer, *rows: shapes.append(layer.shape) or plain(layer, *rows)
    )
    predict(deep(replace(SHAPE, num_hidden_layers=2)), LoRA(8), 1, 8, nf4=True)
    # Forward and backward; only the last slice of (64, 160) is smaller than the others.
    assert Counter(shapes) == {(64, 64): 2, (32, 64): 2, (160, 64): 2, (64, 160): 4}


@pytest.mark.slow
def test_so_is_one_whose_peak_lies_in_a_block(both_ways):
    config = replace(SHAPE, vocab_size=16, intermediate_size=2000)
    assert both_ways(deep(config), LoRA(8), 2, 48, **CKPT)
    wide = DoRA(8, targets=["down_proj"])
    assert "layers" in predict(deep(config), wide, 1, 2).moment
    assert both_ways(deep(config), wide, 1, 2)


def test_the_shortcut_rehearses_few_blocks(monkeypatch):
    depths = []
    plain = memory.StorageLog
    monkeypatch.setattr(memory, "StorageLog", lambda step: depths.append(len(step.model.model.layers)) or plain(step))
    predict(deep(), LoRA(8, targets=TWO), 1, 8)
    assert depths == [2, 3]
    depths.clear()
    predict(deep(replace(SHAPE, num_hidden_layers=5)), LoRA(8, targets=TWO), 1, 8)  # too few to matter
    assert depths == [5]


def test_blocks_that_differ_are_not_taken_for_alike(both_ways):
    model = deep(SEVEN)
    top = last_blocks(model, 1)  # six blocks below are alike, but the names are those of the whole model
    assert not both_ways(model, LoRA(8, targets=top), 2, 24)
    named = [f"model.layers.{i}.self_attn.q_proj" for i in range(7)]  # all alike, but a shorter model lacks some
    assert not both_ways(model, LoRA(8, targets=named), 2, 24)
    assert blocks_are_alike(model)
    model.model.layers[4].mlp.register_forward_hook(lambda *_: None)
    assert not blocks_are_alike(model)
    wide = deep(SEVEN)
    wide.model.layers[4] = Llama(replace(SHAPE, intermediate_size=96)).model.layers[0].to("meta")
    assert not blocks_are_alike(wide)


class Alternating(nn.Module):
    """Every second block is called twice: nothing in the blocks tells."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(block(x)).relu() if i % 2 else block(x).relu()
        return x


def test_a_model_of_unknown_code_is_rehearsed_whole(both_ways):
    batch = torch.zeros(3, 8), torch.zeros(3, dtype=torch.long)
    assert not blocks_are_alike(Alternating())
    assert not both_ways(Alternating(), FullFineTuning(), batch=batch)


SIZES = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def transformers_model(name, **changes):
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES, **HEADS, pad_token_id=0, **changes)
    kind = "ForSequenceClassification" if name == "Bert" else "ForCausalLM"
    with torch.device("meta"):
        return getattr(transformers, name.removesuffix("Text") + kind)(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("Llama", {}), ("Qwen3", {"head_dim": 8}), ("Mistral", {}), ("Phi", {}), ("Olmo2", {}), ("Bert", {})],
)
def test_models_of_transformers_have_the_same_bill_from_a_few_blocks(name, changes, both_ways):
    model, ids = transformers_model(name, **changes), torch.zeros(2, 12, dtype=torch.long)
    batch = ids, (torch.zeros(2, dtype=torch.long) if name == "Bert" else ids)
    # Adapters on queries let the first block differ from the others: no gradient flows to its input.
    targets = ["query" if name == "Bert" else "q_proj"]
    assert both_ways(model, LoRA(4, targets=targets), batch=batch, device="cpu")
    if name in ("Llama", "Bert"):  # checkpointing is the same in all of them
        assert both_ways(model, FullFineTuning(), batch=batch, device="cpu", **CKPT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Gemma3Text", {"head_dim": 8, "sliding_window": 4}),  # every sixth layer sees the whole context
        ("SmolLM3", {}),  # every fourth layer has no positions
    ],
)
def test_models_of_transformers_whose_blocks_differ_are_rehearsed_whole(name, changes, both_ways):
    model, ids = transformers_model(name, **changes), torch.zeros(2, 12, dtype=torch.long)
    assert not both_ways(model, LoRA(4, targets=["q_proj"]), batch=(ids, ids), device="cpu")


def test_a_model_that_peft_made_ready_has_the_same_bill_from_a_few_blocks(tiny_hf, both_ways):
    import peft

    model = peft.get_peft_model(tiny_hf(num_hidden_layers=6), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert both_ways(model, AsItIs(), 2, 12)


@pytest.mark.parametrize(("kinds", "alike"), [(["near"] * 5 + ["far"], False), (["near"] * 6, True)])
def test_a_config_with_an_entry_for_each_block_must_have_the_same_throughout(kinds, alike):
    model = transformers_model("Llama")
    model.config.block_kinds = kinds  # nothing in the blocks tells
    assert blocks_are_alike(model) == alike


def test_experts_are_no_stack_of_blocks():
    class Block(nn.Sequential):
        pass

    Block.__module__ = "torch.nn"
    expert = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
    model = nn.Sequential(nn.ModuleList([Block(expert), Block(nn.Linear(4, 4))]))
    assert not blocks_are_alike(model)


def test_a_prediction_shares_nothing_with_the_model_it_shortens():
    model = Llama(SHAPE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predict(model, LoRA(8, targets=TWO), 1, 8)
    assert len(model.model.layers) == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# The arithmetic, on recordings written by hand


def recorded(*operations):
    """Each operation is (name, module, allocated, released)."""
    return Recording("by hand", [RecordedOperation("forward", *operation) for operation in operations], [])


def block(size=8):
    return [("mm", "layers.1", [(TEMPORARY, size)], []), ("add", "", [], [(TEMPORARY, size)])]


ENDS = [("embedding", "", [(TEMPORARY, 4)], [])], [("loss", "", [], [(TEMPORARY, 4)])]


def test_blocks_are_added():
    stacks = {depth: recorded(*ENDS[0], *(depth * block()), *ENDS[1]) for depth in (2, 3, 7)}
    assert extend_recording(stacks[2], stacks[3], 5) == stacks[7]


def test_what_grows_with_each_block_grows_in_size_or_in_number():
    def norms(blocks):
        return recorded(
            ("stack", "", [(TEMPORARY, 4 * blocks)], []),
            ("free", "", [], [(TEMPORARY, 12), *[(TEMPORARY, 4)] * blocks]),
        )

    grown = extend_recording(norms(2), norms(3), 10)
    assert [sorted(o.allocated) for o in grown.operations] == [sorted(o.allocated) for o in norms(12).operations]
    assert [sorted(o.released) for o in grown.operations] == [sorted(o.released) for o in norms(12).operations]


@pytest.mark.parametrize(
    "longer",
    [
        recorded(*ENDS[0], *block(), *block(size=16), *block(), *ENDS[1]),  # another size
        recorded(*ENDS[0], *block(), *block(), *ENDS[1], *block()),  # another place
        recorded(*ENDS[0], *block(), *block(), ("mul",), *block()[1:], *ENDS[1]),  # another operation
        recorded(*ENDS[0], *block(), *ENDS[1]),  # shorter
        recorded(*ENDS[0], *block(), *block(), *block(), ("loss", "", [], [(TEMPORARY, 2)])),  # what shrinks
        Recording("by hand", [RecordedOperation("backward", "mm")], []),
        Recording("by hand", [RecordedOperation("forward", "mm"), RecordedOperation("backward", "mm")], []),
    ],
    ids=["size", "place", "operation", "shorter", "shrinks", "phase", "phases"],
)
def test_a_block_that_is_not_like_the_one_before_is_not_extended(longer):
    shorter = recorded(*ENDS[0], *block(), *block(), *ENDS[1])
    with pytest.raises(ValueError, match=r"No block is like|argument"):
        extend_recording(shorter, longer, 5)


def test_a_setup_is_prepared_once_for_all_sizes_of_a_search(monkeypatch):
    calls = []
    plain = Setup.step
    monkeypatch.setattr(
        Setup, "step", lambda setup, model: calls.append(len(model.model.layers)) or plain(setup, model)
    )
    size, _ = memory.largest(deep(), LoRA(8, targets=TWO), 3 * 2**20, seq_len=16)
    assert size > 1
    assert calls.count(6) == 1
    assert calls.count(3) > 2  # sizes
