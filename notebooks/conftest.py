"""``make test`` runs a lesson on each core, so a lesson trains in one process there. Its numbers are the same."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Keep joblib from starting processes in a lesson's kernel, which inherits the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOBLIB_MULTIPROCESSING", "0")
        return (yield)
