"""Words for messages, and the progress bar."""

import io
import sys

import pytest

from lora_lab.system.wording import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("progress", "watched", "variable", "shown"),
    [
        (True, False, "0", True),
        (True, True, "0", True),
        (False, True, None, False),
        (None, True, None, True),
        (None, True, "0", False),
        (None, False, None, False),
    ],
)
def test_a_bar_is_shown_on_request_or_to_somebody_who_looks(monkeypatch, progress, watched, variable, shown):
    stream = Terminal() if watched else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.delenv("LORA_LAB_PROGRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("LORA_LAB_PROGRESS", variable)
    with progress_bar(2, "lora", progress) as found:
        found.set_postfix_str("loss 0.5")
        found.update(2)
    if shown:
        assert "lora" in stream.getvalue()
        assert "/2" in stream.getvalue()
        assert "loss " in stream.getvalue()
    else:
        assert stream.getvalue() == ""
