"""Small models, tasks and plans, with which the runs behind the records take seconds."""

from functools import partial

import pytest
import torch

from lora_lab.ablation import materials, run
from lora_lab.models.llama import Llama
from lora_lab.studies import spectra, steps
from lora_lab.tasks import Examples, Task
from tests.helpers import COMMIT


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """Trials run in this process, on one thread, four to a pack, as of one commit, in a folder of the module's own.

    Yields a MonkeyPatch, with which a module replaces models, tasks and plans by small ones until it ends.
    """
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(materials, "processes", lambda device: 1)
        patch.setattr(run, "_commit", lambda: COMMIT)
        patch.setattr(run, "_count_fitting", lambda *_: 4)  # to foresee how many fit takes a second each time
        patch.setattr(run, "_check_steps", lambda *_: None)  # of no trial here that could not train
        patch.chdir(tmp_path_factory.mktemp("records"))
        torch.set_num_threads(1)
        yield patch
    torch.set_num_threads(before)


@pytest.fixture
def no_trial_runs(monkeypatch):
    """Makes training a trial an error."""

    def attempt(*arguments):
        raise AssertionError("a trial is run again")

    monkeypatch.setattr(run, "_attempt", attempt)


@pytest.fixture
def small_is_tiny(monkeypatch, tiny_config):
    """ "small" is a tiny model, and cases run in this process."""
    monkeypatch.setattr(steps, "_SMALL", tiny_config)
    monkeypatch.setattr(steps, "run_in_subprocess", lambda function, *arguments, **options: function(*arguments))


def sentences(vocabulary):
    def part(n, seed):
        ids = torch.randint(0, vocabulary, (n, 9), generator=torch.Generator().manual_seed(seed))
        return Examples(ids[:, :-1], ids[:, 1:])

    return Task("sentences", part(24, 0), part(5, 1), part(6, 2), part(7, 3), unit="tokens")


def counting_on(seq_len, n_train=None, seed=None):
    """Tokens that count on from a drawn one: learned in a few steps; off-domain they count down."""

    def part(n, draw, step):
        start = torch.randint(0, 260, (n, 1), generator=torch.Generator().manual_seed(draw))
        ids = (start + step * torch.arange(seq_len + 1)) % 260
        return Examples(ids[:, :-1], ids[:, 1:])

    task = Task("counting", part(24, 0, 1), part(9, 1, 1), part(7, 2, 1), part(8, 3, -1), unit="tokens")
    return task if n_train is None else task.limited(n_train, seed)


@pytest.fixture
def small_study(monkeypatch, tiny_config, tmp_path):
    """The study is of a tiny Llama, trained for a moment in this process; trials are kept in a folder of the test's."""
    study = partial(Llama, tiny_config, seed=3), partial(sentences, tiny_config.vocab_size)
    monkeypatch.setattr(materials, "language_model", lambda device, model=None: study[0]())
    monkeypatch.setattr(materials, "docs_task", lambda seq_len, model=None: study[1]())
    plan = {"lrs": {"1": [1e-3, 1e-2], "4": [1e-3, 1e-2]}, "seeds": 2, "steps": 4, "batch_size": 4, "seq_len": 8}
    plan["eval_examples"] = 5
    monkeypatch.setattr(spectra, "plan", lambda device: plan)
    monkeypatch.setattr(materials, "processes", lambda device: 1)
    monkeypatch.chdir(tmp_path)
    return study
