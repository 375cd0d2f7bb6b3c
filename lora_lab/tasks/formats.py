"""The forms in which people store examples: chat messages, ShareGPT, Alpaca, and several names for prompt and answer.

Each is recognised by its keys:

    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    {"conversations": [{"from": "system" | "human" | "gpt", "value": "..."}, ...]}
    {"instruction": "...", "input": "...", "output": "..."}       (input may be missing or empty)
    {"prompt": "...", "answer" | "completion" | "response": "..."}
    {"question": "...", "answer": "..."}
    {"text": "..."}                                               (next-token prediction)

Beside them an entry may have "group" and "part".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.system.wording import shortened

Turn = tuple[str, str]  # role and content
ROLES = ("system", "user", "assistant")
_CHAT_ROLES = {role: role for role in ROLES}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"} | _CHAT_ROLES
_PAIRS = (("prompt", "answer"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
_ALPACA = ("instruction", "output")
_EXAMPLE = '{"prompt": "...", "answer": "..."}'
_COMMON = {"group", "part"}


@dataclass(frozen=True)
class StoredExample:
    """One example as a file has it.

    Args:
        turns: (role, content) of a conversation that ends with an answer; empty for a text.
        text: for next-token prediction.
        group, part: "" if the entry does not name them.
        ignored: keys of the entry that are not part of its form.
    """

    turns: tuple[Turn, ...] = ()
    text: str = ""
    group: str = ""
    part: str = ""
    ignored: frozenset[str] = frozenset()


def parse(entry: Any) -> StoredExample:
    """Read an entry of any of the forms.

    Raises:
        ValueError: what is wrong with it, in a few words.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"a {type(entry).__name__}, not an object such as {_EXAMPLE}")
    keys, turns, text = _form(entry)
    group, part = (_string(entry, key) if entry.get(key) is not None else "" for key in ("group", "part"))
    return StoredExample(turns, text, group, part, frozenset(map(str, entry.keys() - keys - _COMMON)))


def _form(entry: Mapping[str, Any]) -> tuple[set[str], tuple[Turn, ...], str]:
    """The keys of the form that an entry has, and its turns or its text."""
    if "messages" in entry:
        return {"messages"}, _turns(entry["messages"], "messages", "role", "content", _CHAT_ROLES), ""
    if "conversations" in entry:
        return {"conversations"}, _turns(entry["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES), ""
    if all(key in entry for key in _ALPACA):
        context = _string(entry, "input") if entry.get("input") else ""
        prompt = _text(entry, "instruction") + (f"\n\n{context}" if context.strip() else "")
        return {*_ALPACA, "input"}, (("user", prompt), ("assistant", _text(entry, "output"))), ""
    for prompt_key, answer_key in _PAIRS:
        if prompt_key in entry and answer_key in entry:
            turns = ("user", _text(entry, prompt_key)), ("assistant", _text(entry, answer_key))
            return {prompt_key, answer_key}, turns, ""
    if "text" in entry:
        return {"text"}, (), _text(entry, "text")
    known = {key for pair in (*_PAIRS, _ALPACA) for key in pair} & entry.keys()
    missing = sorted({other for pair in (*_PAIRS, _ALPACA) for other in pair if known & {*pair}} - known)
    if missing:
        raise ValueError(f"has {' and '.join(map(repr, sorted(known)))}, but lacks {' or '.join(map(repr, missing))}")
    raise ValueError(
        f"has the keys {shortened(str(sorted(map(str, entry))), 80)}, which match no known form; use a form such as "
        f'{_EXAMPLE}, {{"messages": [...]}} or {{"text": "..."}}'
    )


def _turns(value: Any, key: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> tuple[Turn, ...]:
    """The turns of a conversation: perhaps a system turn, then user and assistant in turn, the assistant last."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a list")
    turns: list[Turn] = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not {role_key, content_key} <= turn.keys():
            raise ValueError(f"turn {number} of {key!r} lacks {role_key!r} or {content_key!r}")
        role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise ValueError(f"turn {number} is of {turn[role_key]!r}, not of one of {', '.join(roles)}")
        turns.append((role, _text(turn, content_key, f"turn {number}")))
    spoken = [role for role, _ in turns if role != "system"]
    if any(role == "system" for role, _ in turns[1:]):
        raise ValueError("a system turn is not the first")
    if not spoken or spoken[-1] != "assistant":
        raise ValueError("the last turn is not the assistant's, so that there is no answer to learn")
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError("user and assistant do not take turns, beginning with the user")
    return tuple(turns)


def _text(entry: Mapping[str, Any], key: str, what: str = "") -> str:
    text = _string(entry, key, what)
    if not text.strip():
        raise ValueError(f"{what or repr(key)} is empty")
    return text


def _string(entry: Mapping[str, Any], key: str, what: str = "") -> str:
    if not isinstance(entry[key], str):
        raise ValueError(f"{what or repr(key)} is a {type(entry[key]).__name__}, not a string")
    return entry[key]
