"""Where to compute and why, how much to do, and functions called in processes of their own."""

import os

import pytest
import torch

from lora_lab.system.device import effort, pick_device, run_in_subprocess


@pytest.fixture
def no_wishes(monkeypatch):
    monkeypatch.delenv("LORA_LAB_DEVICE", raising=False)
    monkeypatch.delenv("LORA_LAB_EFFORT", raising=False)
    return monkeypatch


def pretend_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *which: "Some GPU")


def test_without_a_gpu_the_cpu_is_picked_and_the_reason_says_so(no_wishes):
    no_wishes.setattr(torch.cuda, "is_available", lambda: False)
    no_wishes.setenv("LORA_LAB_DEVICE", "")  # which is no wish
    device, why = pick_device()
    assert device == torch.device("cpu")
    threads = torch.get_num_threads()
    assert why == f"cpu because torch sees no CUDA GPU; {threads} thread{'s' if threads > 1 else ''}"


def test_with_a_gpu_it_is_picked_and_named(no_wishes):
    pretend_cuda(no_wishes)
    assert pick_device() == (torch.device("cuda"), "cuda because a GPU is there: Some GPU")


def test_the_variable_is_honoured_above_the_machine_and_an_argument_above_both(no_wishes):
    pretend_cuda(no_wishes)
    no_wishes.setenv("LORA_LAB_DEVICE", "cpu")
    assert pick_device() == (torch.device("cpu"), "cpu because LORA_LAB_DEVICE asks for it")
    no_wishes.setenv("LORA_LAB_DEVICE", "no such device")
    assert pick_device("cpu") == (torch.device("cpu"), "cpu because it was asked for")
    assert pick_device(torch.device("cpu"))[0] == torch.device("cpu")


@pytest.mark.parametrize("bad", ["banana", "cpu:x", "", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_refused_in_one_line(no_wishes, bad):
    with pytest.raises(ValueError, match=f"Device '{bad}' .*; try 'cpu'") as error:
        pick_device(bad)
    assert "\n" not in str(error.value)
    if bad:
        no_wishes.setenv("LORA_LAB_DEVICE", bad)
        with pytest.raises(ValueError, match=f"Device '{bad}'"):
            pick_device()


def test_effort_is_quick_without_a_gpu_full_with_one_and_as_the_variable_says(no_wishes):
    no_wishes.setattr(torch.cuda, "is_available", lambda: False)
    assert effort() == "quick"
    no_wishes.setenv("LORA_LAB_EFFORT", "full")
    assert effort() == "full"
    no_wishes.delenv("LORA_LAB_EFFORT")
    pretend_cuda(no_wishes)
    assert effort() == "full"
    no_wishes.setenv("LORA_LAB_EFFORT", "quick")
    assert effort() == "quick"
    no_wishes.setenv("LORA_LAB_EFFORT", "some")
    with pytest.raises(ValueError, match="LORA_LAB_EFFORT is 'some', but it must be 'quick' or 'full'"):
        effort()


# Fresh processes


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
