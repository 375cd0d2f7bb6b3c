"""A clock for tests of what takes time."""

import pytest
from torch.nn import functional as F

from lora_lab.costs import timing


class Clock:
    """Time that passes only when a test says so."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def loss(self, seconds, log=None, name=""):
        """A loss that takes so long, and notes that it was called."""

        def loss(model, inputs, targets):
            self.now += seconds
            if log is not None:
                log.append(name)
            return F.cross_entropy(model(inputs), targets)

        return loss


@pytest.fixture
def clock(monkeypatch):
    """The clock by which steps and costs are timed."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock
