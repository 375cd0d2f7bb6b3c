"""A setup: how it describes itself, what it refuses, and the step that it makes."""

import sys

import pytest
import torch

from lora_lab import FullFineTuning, Lean, Llama, LoRA, LoRAFA, LoRAPlus, PartialFineTuning
from lora_lab.costs.cost_model import StepTrace
from lora_lab.costs.fake import fake_copy
from lora_lab.costs.setup import Setup, as_setup
from lora_lab.lean import FlatAdamW
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
        "full, SGD, 2 micro-batches, no clipping": Setup(optimizer="sgd", accumulate=2, clip=None),
        "full, AdamW by foreach": Setup(optimizer="adamw-foreach"),
        "lora r=8, lean": Setup(LoRA(8), lean=Lean()),
        "full, autocast": Setup(autocast=torch.bfloat16),
        "lora r=8, lean bf16 base, checkpointing": Setup(
            LoRA(8), lean=Lean(base_dtype=torch.bfloat16, checkpoint=True)
        ),
    }
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


REFUSED = [
    (lambda: Setup(optimizer="adam"), "optimizer is 'adam'"),
    (lambda: Setup(optimizer="sgd", lean=Lean()), "optimizer is 'sgd'"),
    (lambda: Setup(accumulate=0), "accumulate is 0"),
    (lambda: Setup(LoRA(4), lean=Lean(threads=3)).check_watchable(), "lean.threads is 3"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_wrong_values_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
