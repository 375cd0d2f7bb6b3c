"""The forms of examples that people have: each is recognised, and what is malformed is named."""

import json

import pytest

from lora_lab.task import IGNORE
from lora_lab.tasks import Pair, PairTask, Task, from_jsonl, from_pairs
from lora_lab.tasks.formats import StoredExample, parse
from lora_lab.tasks.instruction import encode

USER, ASSISTANT, SYSTEM = ("user", "What is 2 + 2?"), ("assistant", "4"), ("system", "Answer in one word.")
LONGER = (SYSTEM, USER, ASSISTANT, ("user", "And 3 + 3?"), ("assistant", "6"))


def chat(turns):
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": content} for role, content in turns]


@pytest.mark.parametrize(
    ("entry", "turns"),
    [
        ({"messages": chat(LONGER)}, LONGER),
        ({"messages": chat(LONGER), "prompt": "kept beside it", "prompt_id": 7}, LONGER),
        ({"conversations": sharegpt(LONGER)}, LONGER),
        ({"conversations": chat(LONGER[1:]) and sharegpt(LONGER[1:])}, LONGER[1:]),
        ({"instruction": USER[1], "output": "4"}, (USER, ASSISTANT)),
        ({"instruction": USER[1], "input": "", "output": "4"}, (USER, ASSISTANT)),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, (("user", "Add.\n\n2, 2"), ASSISTANT)),
        ({"prompt": USER[1], "answer": "4"}, (USER, ASSISTANT)),
        ({"prompt": USER[1], "completion": "4"}, (USER, ASSISTANT)),
        ({"prompt": USER[1], "response": "4"}, (USER, ASSISTANT)),
        ({"question": USER[1], "answer": "4"}, (USER, ASSISTANT)),
    ],
    ids=str,
)
def test_each_form_is_recognised_by_its_keys(entry, turns):
    assert parse(entry).turns == turns
    assert parse(entry | {"group": "g", "part": "test"}) == StoredExample(turns, "", "g", "test", parse(entry).ignored)


def test_a_text_is_no_conversation_and_other_keys_are_ignored_by_name():
    assert parse({"text": "Once upon a time."}) == StoredExample(text="Once upon a time.")
    assert parse({"question": "a", "answer": "b", "id": 3, "source": "x"}).ignored == {"id", "source"}
    assert parse({"prompt": "a", "answer": "b", "group": None}).group == ""


REFUSED = [
    ("text", "text"),
    ({}, r"keys \[\]"),
    ({"content": "x"}, "'content'"),
    ({"prompt": "a"}, "'prompt'.*prompt and completion"),
    ({"prompt": "a", "answer": None}, "answer is None"),
    ({"prompt": "a", "answer": " "}, "answer is empty"),
    ({"instruction": " ", "output": "a", "input": "b"}, "instruction"),
    ({"text": ""}, "text is empty"),
    ({"prompt": "a", "answer": "b", "group": 3}, "group is 3"),
    ({"prompt": "a", "answer": "b", "part": "dev"}, "part is 'dev'"),
    ({"messages": "hello"}, "messages is 'hello'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "content is .'x'."),
    ({"conversations": [{"from": 3, "value": "x"}]}, "from is 3"),
    ({"messages": chat([("tool", "x"), ASSISTANT])}, "role is 'tool'"),
    ({"messages": chat([("user", " "), ASSISTANT])}, "messages is empty"),
    ({"conversations": sharegpt([USER])}, "are of user,"),
    *(
        ({"messages": chat(turns)}, f"are of {', '.join(role for role, _ in turns) or 'nobody'}, but")
        for turns in (
            [],
            [SYSTEM],
            [USER, ASSISTANT, USER],
            [ASSISTANT],
            [USER, USER, ASSISTANT],
            [USER, SYSTEM, ASSISTANT],
        )
    ),
]


@pytest.mark.parametrize(("entry", "named"), REFUSED, ids=str)
def test_what_is_malformed_is_named(entry, named):
    with pytest.raises(ValueError, match=named):
        parse(entry)


# Conversations in a task


def learned(tokenizer, pair):
    """The texts that are learned, by stretch."""
    _, targets = encode(tokenizer, pair)
    stretches, current = [], []
    for target in [*targets, IGNORE]:
        if target != IGNORE:
            current.append(target)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return stretches


def test_every_turn_of_the_assistant_is_learned_to_its_end_and_nothing_else(chatter):
    pair = Pair("And 3 + 3?", "6", before=LONGER[:3])
    end = chatter.decode([chatter.eos_id])
    assert learned(chatter, pair) == [f"4{end}", f"6{end}"]
    inputs, targets = encode(chatter, pair)
    assert len(inputs) == len(targets)
    whole = chatter.chat(chat(LONGER), add_generation_prompt=False).rstrip("\n")
    assert chatter.decode([*inputs, targets[-1]]) == whole
    assert all(target in (IGNORE, following) for target, following in zip(targets, inputs[1:], strict=False))


def conversations(count=30):
    return [((*LONGER[:3], ("user", f"And {i} + {i}?"), ("assistant", str(2 * i)))) for i in range(count)]


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_a_file_of_conversations_becomes_a_task(chatter, tmp_path, form):
    write = {"messages": chat, "conversations": sharegpt}[form]
    lines = [json.dumps({form: write(turns), "id": i}) for i, turns in enumerate(conversations())]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    task = from_jsonl(chatter, tmp_path / "talk.jsonl")
    assert isinstance(task, PairTask)
    assert sum(len(task.pairs[part]) for part in task.pairs) == 30
    assert "without its entries 'id'" in task.about
    pair = task.pairs["train"][0]
    assert pair.before == LONGER[:3]
    text = chatter.decode(task.prompt_ids(pair))
    assert "Answer in one word." in text
    assert text.count("What is 2 + 2?") == 1
    ends = int((task.train.targets[0] == chatter.eos_id).sum())
    assert ends == 2
    shown = [line.split(maxsplit=1)[0] for line in task.preview(1).splitlines()[1:-1]]
    assert shown == ["reads", "learns", "reads", "learns"]


def test_the_same_last_prompt_may_end_different_conversations_in_different_parts(chatter):
    def thanks(number):
        return Pair("Thanks!", "You are welcome.", before=(("user", f"What is {number}?"), ("assistant", "A number.")))

    parts = {"train": [thanks(1)], "validation": [thanks(2)], "test": [thanks(3)]}
    from_pairs(chatter, parts)
    with pytest.raises(ValueError, match="is in train and in test"):
        from_pairs(chatter, parts | {"test": [thanks(1)]})


def test_a_file_of_texts_becomes_next_token_prediction(chatter, tmp_path):
    lines = [json.dumps({"text": f"This is text {i}, which says that {i} times {i} is {i * i}."}) for i in range(60)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))
    task = from_jsonl(chatter, path, seq_len=16)
    assert type(task) is Task
    assert task.train.inputs.shape[1] == 16
    path.write_text("\n".join([*lines, json.dumps({"prompt": "a", "answer": "b"})]))
    with pytest.raises(ValueError, match="has 60 texts and 1 conversations; split them"):
        from_jsonl(chatter, path)
    path.write_text(lines[0])
    with pytest.raises(ValueError, match="has 1 text, too few for a"):
        from_jsonl(chatter, path)
