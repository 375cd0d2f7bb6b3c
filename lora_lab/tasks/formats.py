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

from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import TypedDict

from lora_lab.system.schema import check
from lora_lab.system.wording import shortened

Turn = tuple[str, str]  # role and content
_FORMS = (  # the keys of each; an entry has the first form whose keys it has
    ("messages",),
    ("conversations",),
    ("instruction", "output", "input"),
    ("instruction", "output"),
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("text",),
)
_COMMON = ("group", "part")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's names


class _Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


_Said = TypedDict("_Said", {"from": Literal["system", "user", "assistant", "human", "gpt", "chatgpt"], "value": str})


class _Entry(TypedDict, total=False):
    messages: list[_Message]
    conversations: list[_Said]
    instruction: str
    input: str | None
    output: str
    prompt: str
    answer: str
    completion: str
    response: str
    question: str
    text: str
    group: str | None
    part: Literal["", "train", "validation", "test"] | None


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
    check(entry, dict[str, Any], "the line")
    form = next((keys for keys in _FORMS if entry.keys() >= {*keys}), None)
    if form is None:
        forms = "; ".join(" and ".join(keys) for keys in _FORMS)
        raise ValueError(f"has the keys {shortened(str(sorted(entry)), 80)}, but must have those of a form: {forms}")
    own = {key: value for key, value in entry.items() if key in (*form, *_COMMON)}
    check(own, _Entry)
    turns = _turns(form, own)
    texts = [own[key] for key in form if key != "input" and isinstance(own[key], str)] or [text for _, text in turns]
    if not all(text.strip() for text in texts):
        raise ValueError(f"a text of {' and '.join(form)} is empty")
    group, part = (own.get(key) or "" for key in _COMMON)
    return StoredExample(turns, own.get("text", ""), group, part, frozenset(entry.keys() - own.keys()))


def _turns(form: tuple[str, ...], entry: dict[str, Any]) -> tuple[Turn, ...]:
    """Return the turns of an entry: perhaps a system turn, then user and assistant in turn, the assistant last."""
    match form:
        case ("text",):
            return ()
        case ("messages",):
            turns = [(turn["role"], turn["content"]) for turn in entry["messages"]]
        case ("conversations",):
            turns = [(_ROLES.get(turn["from"], turn["from"]), turn["value"]) for turn in entry["conversations"]]
        case (prompt, answer, *_):
            context = entry.get("input") or ""  # Alpaca's
            prompt = entry[prompt] + (f"\n\n{context}" if context.strip() else "")
            return ("user", prompt), ("assistant", entry[answer])
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(
            f"the turns are of {shortened(', '.join(roles) or 'nobody', 80)}, but must be of the user and the "
            "assistant in turn, the assistant last; only the first may be of the system"
        )
    return tuple(turns)
