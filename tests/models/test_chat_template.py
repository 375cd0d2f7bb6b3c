"""Chat templates: what a stranger's program may take."""

import os
import signal
import time

import pytest

from lora_lab.models import chat_template
from lora_lab.models.chat_template import render
from lora_lab.models.tokenizer import Tokenizer
from tests.helpers import run_python

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Grüße \ud83d \u2028 😀\n"}]
VARIABLES = {"messages": CHAT, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": ""}
TEMPLATE = "{% for m in messages %}{{ m.role | upper }}: {{ m['content'] }}{% endfor %}{{ bos_token }}"
NEVER_ENDING = {
    "M8: two loops in each other": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a list of itself, twice": "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x }}",
}
LARGE = {
    "M8: x + x": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "x ~ x": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a product": "{{ 'x' * 10**11 }}",
    "a width": "{{ 'x'.center(10**11) }}",
    "a list": "{{ [0] * 10**11 }}",
}
WRONG = {
    "M7: a product of texts": "{{ messages[0].content * messages[0].role }}",
    "division by zero": "{{ 1 / 0 }}",
    "a range too far": "{{ range(100001) }}",
    "no Jinja": "{% if %}",
    "an index": "{{ messages[0].content.index('z') }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep again": "{{ " + "-" * 20_000 + "1 }}",
    "another file": "{% include '/etc/passwd' %}",
    "Python's classes": "{{ ''.__class__.__mro__ }}",
    "what the model does not want": "{{ raise_exception('users only') }}",
    "long": "{{ 'x' * 9_000_000 }}",
}


def test_a_process_writes_any_text():
    assert render(TEMPLATE, VARIABLES) == "USER: hiASSISTANT: Grüße \ud83d \u2028 😀\n<s>"


def refuse(tokenizer, template):
    with pytest.raises(ValueError, match=r"^The chat template refuses these messages: .*\.$") as caught:
        Tokenizer(tokenizer.backend, chat_template=template).chat([{"role": "user", "content": "hi"}])
    assert len(str(caught.value)) < 400
    assert render(TEMPLATE, VARIABLES)  # the next one is rendered all the same


@pytest.mark.slow
@pytest.mark.parametrize("template", [*NEVER_ENDING.values(), *LARGE.values()], ids=[*NEVER_ENDING, *LARGE])
def test_what_takes_too_much_is_ended_in_one_sentence(tiny_tokenizer, template):
    refuse(tiny_tokenizer, template)


@pytest.mark.parametrize("template", WRONG.values(), ids=WRONG)
def test_m7_whatever_a_template_raises_is_one_sentence(tiny_tokenizer, template):
    refuse(tiny_tokenizer, template)


def test_an_interrupt_does_not_leave_the_answer_to_the_next_text():
    render(TEMPLATE, VARIABLES)
    process = chat_template._process(os.getpid())
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            render(next(iter(NEVER_ENDING.values())), VARIABLES)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert render("{{ 'the next one' | upper }}", VARIABLES) == "THE NEXT ONE"
    assert process.poll() is not None


def test_a_process_that_was_killed_is_replaced():
    render(TEMPLATE, VARIABLES)
    process = chat_template._process(os.getpid())
    process.kill()
    process.wait()
    assert render("{{ 'x' | upper }}", VARIABLES) == "X"


def test_no_process_stays_behind():
    done = run_python(
        "from lora_lab.models import chat_template\n"
        "chat_template.render('x', {})\n"
        "print(*(chat_template._process(chat_template.os.getpid()).pid,))\n"
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process is still there")
