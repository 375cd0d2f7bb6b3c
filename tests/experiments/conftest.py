"""The world in which the long runs behind the records become short ones."""

import pytest
import torch

from lora_lab.ablation import packing, run, studies
from tests.helpers import COMMIT


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """Trials run in this process, on one thread, four to a pack, as of one commit, in a folder of the module's own.

    What it yields puts a module's small models, tasks and plans in the place of the real ones, until the module ends.
    """
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "processes", lambda device: 1)
        patch.setattr(run, "_commit", lambda: COMMIT)
        patch.setattr(packing, "_fitting", lambda *_: 4)  # to foresee how many fit takes a second each time
        patch.chdir(tmp_path_factory.mktemp("records"))
        torch.set_num_threads(1)
        yield patch
    torch.set_num_threads(before)


@pytest.fixture
def no_trial_runs(monkeypatch):
    """Whoever trains anything raises an error that says so."""

    def attempt(*arguments):
        raise AssertionError("a trial is run again")

    monkeypatch.setattr(run, "_attempt", attempt)
