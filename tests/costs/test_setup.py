"""A setup: how it describes itself, what it refuses, and the step that it makes."""

import sys

import pytest
import torch

from lora_lab import FullFineTuning, Lean, Llama, LoRA, LoRAFA, LoRAPlus, PartialFineTuning
from lora_lab.costs.cost_model import StepTrace
from lora_lab.costs.fake import fake_copy
from lora_lab.costs.setup import Setup, as_setup
from lora_lab.lean.optim import FlatAdamW
from lora_lab.methods import AsItIs
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.quantize import BlockLinear
from lora_lab.tasks import cross_entropy
from lora_lab.train import TrainingStep

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
DIGITS = X, torch.arange(6)


def test_a_setup_says_in_a_few_words_how_a_model_is_trained():
    described = {
        "full": Setup(FullFineTuning()),
        "lora r=4": Setup(LoRA(4)),
        "lora-fa r=8, q_proj+v_proj": Setup(LoRAFA(8, targets=["q_proj", "v_proj"])),
        "partial": Setup(PartialFineTuning(["head"])),
        "as it is": Setup(AsItIs()),
        "lora r=8, NF4 base, bfloat16, checkpointing": Setup(
            LoRA(8), torch.bfloat16, nf4=True, gradient_checkpointing=True
        ),
        "full, SGD": Setup(optimizer="sgd"),
        "full, AdamW by foreach": Setup(optimizer="adamw-foreach"),
        "lora r=8, lean": Setup(LoRA(8), lean=Lean()),
        "full, autocast": Setup(autocast=torch.bfloat16),
        "lora r=8, lean bf16 base, checkpointing": Setup(
            LoRA(8), lean=Lean(base_dtype=torch.bfloat16, checkpoint=True)
        ),
    }
    assert {setup.describe() for setup in described.values()} == described.keys()
    for words, setup in described.items():
        assert setup.describe() == words


def test_keywords_make_a_setup_of_a_method_and_change_one_of_a_setup():
    assert as_setup(LoRA(4), {}) == Setup(LoRA(4))
    assert as_setup(LoRA(4), {"nf4": True, "clip": None}) == Setup(LoRA(4), nf4=True, clip=None)
    given = Setup(LoRA(4), torch.bfloat16, accumulate=3)
    assert as_setup(given, {}) == given
    assert as_setup(given, {"accumulate": 2}) == Setup(LoRA(4), torch.bfloat16, accumulate=2)
    assert given.accumulate == 3
    with pytest.raises(TypeError, match="optimiser"):
        as_setup(LoRA(4), {"optimiser": "sgd"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "lora"}, r"method is 'lora', but it must be one such as LoRA\(rank=8\) or FullFineTuning\(\)"),
        ({"optimizer": "adam"}, "optimizer is 'adam', but it must be 'adamw', 'adamw-foreach' or 'sgd'"),
        ({"optimizer": "sgd", "lean": Lean()}, "the lean step has an AdamW of its own; use lean=None"),
        ({"accumulate": 0}, "accumulate is 0, but it must be at least 1"),
        ({"accumulate": "2"}, "accumulate is '2', but it must be a whole number"),
    ],
)
def test_what_no_setup_can_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Setup(**options)


def test_threads_cannot_be_watched():
    Setup(LoRA(4), lean=Lean(threads=1)).check_watchable()
    Setup(LoRA(4)).check_watchable()
    with pytest.raises(
        ValueError, match=r"lean.threads is 3, but.*hold for one thread only; use Lean\(threads=1\) here"
    ):
        Setup(LoRA(4), lean=Lean(threads=3)).check_watchable()


def test_a_batch_is_cut_into_micro_batches_weighted_by_their_examples():
    batch = torch.arange(10).view(5, 2), torch.arange(5)
    parts, weights = Setup(accumulate=2).batches(batch)
    assert [[tensor.tolist() for tensor in part] for part in parts] == [
        [[[0, 1], [2, 3], [4, 5]], [0, 1, 2]],
        [[[6, 7], [8, 9]], [3, 4]],
    ]
    assert weights == [3 / 5, 2 / 5]
    whole, weight = Setup().batches(batch)
    assert weight == [1.0]
    assert torch.equal(whole[0][0], batch[0])
    assert len(Setup(accumulate=5).batches(batch)[0]) == 5
    with pytest.raises(ValueError, match="accumulate is 6, but the batch has only 5 examples"):
        Setup(accumulate=6).batches(batch)


def test_micro_batches_sum_to_the_gradient_of_the_whole():
    gradients = []
    for setup in (Setup(), Setup(accumulate=4)):
        model = DigitsMLP(width=8).double()
        step = setup.step(model)
        step(*setup.batches((X.double(), DIGITS[1])))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert float(gradients[0].norm()) > 0


def test_a_step_is_made_by_its_setup(tiny_config):
    step = Setup(LoRA(4), clip=0.25, gradient_checkpointing=True).step(Llama(tiny_config).eval())
    assert isinstance(step, TrainingStep)
    assert isinstance(step.optimizer, torch.optim.AdamW)
    assert (step.clip, step.loss, step.threads) == (0.25, cross_entropy, 1)
    assert step.model.training
    assert step.model.model.gradient_checkpointing
    assert not Setup(LoRA(4)).step(Llama(tiny_config)).model.model.gradient_checkpointing
    assert Setup(LoRA(4), clip=None).step(Llama(tiny_config)).clip is None
    quantised = Setup(LoRA(4), nf4=True).step(Llama(tiny_config)).model
    assert isinstance(quantised.model.layers[0].mlp.up_proj.base, BlockLinear)
    lean = Setup(LoRA(4), lean=Lean(loss_rows=7)).step(Llama(tiny_config))
    assert isinstance(lean.optimizer, FlatAdamW)
    assert lean.every_target is False
    with fake_copy(lambda: Llama(tiny_config)) as twin:
        fake = Setup(LoRA(4), lean=Lean(loss_rows=7)).step(twin)
    assert (fake.loss.keywords, fake.every_target) == ({"rows": 7}, True)

    def own(model, inputs, targets):
        return model(inputs).mean()

    assert Setup(LoRA(4), lean=Lean(), loss=own).step(Llama(tiny_config)).loss is own


@pytest.mark.parametrize("method", [LoRA(4), LoRAPlus(4)], ids=["one group", "two groups"])
def test_plain_gradient_descent_holds_all_that_is_trained(method):
    model = DigitsMLP()
    optimizer = Setup(method, optimizer="sgd").step(model).optimizer
    assert type(optimizer) is torch.optim.SGD
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(held) == 6


def test_adamw_by_foreach_is_torchs_own_and_passes_over_the_weights_many_times():
    optimizer = Setup(LoRAPlus(4), optimizer="adamw-foreach").step(DigitsMLP()).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert [(group["foreach"], group["fused"]) for group in optimizer.param_groups] == [(True, None)]
    work = {}
    for name in ("adamw", "adamw-foreach"):
        setup = Setup(optimizer=name)
        with fake_copy(DigitsMLP) as twin:
            trace = StepTrace(setup.step(twin))
            trace.run_second(*setup.batches((torch.zeros(4, 64), torch.zeros(4, dtype=torch.long))))
        work[name] = trace.work().count(phase="optimiser step")
    assert work["adamw-foreach"] > 3 * work["adamw"]


def test_a_step_of_a_lean_setup_takes_every_target_and_gives_the_plain_loss(tiny_config):
    ids = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for lean in (None, Lean(loss_rows=5)):
        setup = Setup(LoRA(4), lean=lean)
        losses.append(float(setup.step(Llama(tiny_config))(*setup.batches((ids, ids)))[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_lean_step_on_a_real_batch_leaves_out_targets_that_do_not_count(tiny_config):
    ids = torch.arange(8).view(1, 8)
    targets = ids.clone()
    targets[0, 3:] = -100
    losses = []
    for setup in (Setup(LoRA(2), lean=Lean()), Setup(LoRA(2))):
        torch.manual_seed(0)
        step = setup.step(Llama(tiny_config))
        losses.append(step([(ids, targets)], [1.0])[0])
    torch.testing.assert_close(*losses)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_rehearsal_leaves_the_heap_alone(monkeypatch, tiny_config):
    asked = []
    monkeypatch.setattr(sys.modules[Lean.__module__], "_return_memory_at_once", lambda: asked.append(1))
    setup = Setup(LoRA(2), lean=Lean(checkpoint=True))
    with fake_copy(lambda: Llama(tiny_config)) as twin:
        setup.step(twin)
    setup.step(Llama(tiny_config).to("meta"))
    assert asked == []
    setup.step(Llama(tiny_config))
    assert asked == [1]


def test_a_setup_says_how_it_differs():
    assert Setup(LoRA(2), accumulate=2).describe() != Setup(LoRA(2)).describe()
    assert "2 micro-batches" in Setup(LoRA(2), accumulate=2).describe()
    assert "no clipping" in Setup(LoRA(2), clip=None).describe()
