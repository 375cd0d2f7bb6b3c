"""What `lora-lab record variants` plans."""

import torch

from lora_lab.studies import variants


def test_variants_differ_in_their_method_alone_and_have_one_base():
    study = variants.plan(torch.device("cpu"))["docs"].study
    assert {type(trial.method).name for trial in study.setups.values()} == {"lora", "rslora", "lora+", "pissa", "dora"}
    for trial in study.setups.values():
        assert trial.method.alpha == 2 * trial.method.rank
        assert trial.lean is None or trial.lean.base_dtype is None
