"""A function called in a process of its own."""

import os

import pytest

from lora_lab.system.process import run_in_subprocess


def test_each_call_has_a_process_of_its_own_and_its_result_and_errors_come_back():
    assert run_in_subprocess(os.getpid) not in (os.getpid(), run_in_subprocess(os.getpid))
    assert run_in_subprocess(divmod, 17, 5) == (3, 2)
    with pytest.raises(ValueError, match="invalid literal"):
        run_in_subprocess(int, "x")


def test_a_process_that_the_system_ends_is_reported_as_lack_of_memory():
    with pytest.raises(MemoryError, match="subprocess was ended by the system, most likely for lack of memory; free"):
        run_in_subprocess(os._exit, 9)


def test_variables_are_the_processs_alone(monkeypatch):
    monkeypatch.setenv("LORA_LAB_TEST_KEPT", "before")
    monkeypatch.delenv("LORA_LAB_TEST_NEW", raising=False)
    before, wanted = dict(os.environ), {"LORA_LAB_TEST_KEPT": "during", "LORA_LAB_TEST_NEW": "during"}
    for name in wanted:
        assert run_in_subprocess(os.getenv, name, environment=wanted) == "during"
    with pytest.raises(ValueError, match="invalid literal"):
        run_in_subprocess(int, "x", environment=wanted)
    assert dict(os.environ) == before
