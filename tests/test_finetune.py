"""`lora-lab finetune`, on a tiny model: what it prints, keeps and refuses."""

import errno
import json
import shutil

import pytest

from lora_lab import Llama, LoRA, PartialFineTuning, finetune, load_adapter, save_adapter, save_model
from lora_lab.adapters.export import find_base, load_whole_model
from lora_lab.models.pretrained import SMOLLM2
from lora_lab.tasks import task_of
from lora_lab.train import TrainingStep
from tests.helpers import command, error_line, names, printed_json

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def tiny(monkeypatch, tmp_path, chatter, tiny_config):
    """Loading gives a tiny Llama; the working directory is the test's own, with a file of sums in it."""
    monkeypatch.setattr(finetune, "load_pretrained", lambda *_, **__: (Llama(tiny_config, seed=3), chatter))
    monkeypatch.setattr("lora_lab.models.pretrained.load_tokenizer", lambda *_: chatter)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} plus one?", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return chatter


def finetune_sums(*options, out="kept"):
    """The exit status of ``lora-lab finetune`` on the file of sums; ``out`` None names no folder."""
    return command("finetune", "--task", "sums.jsonl", *(["--out", out] if out else []), *options)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def never(monkeypatch):
    """Makes a function of the command one that must not be called."""
    return lambda name: monkeypatch.setattr(finetune, name, lambda *_, **__: pytest.fail(f"called {name}"))


@pytest.fixture
def stop(monkeypatch):
    """Runs the command, and stops it after the training, before anything is saved."""

    def run(*options, **where):
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "make_table", interrupt)
            assert finetune_sums(*options, **where) == 130

    return run


def test_it_teaches_a_file_keeps_adapter_history_and_result_and_prints_the_result_as_json(
    tiny, tmp_path, tiny_config, capsys
):
    assert finetune_sums("--rank", 4, "--steps", 20, "--lr", 3e-2, "--by-length", "--json") == 0
    document, rest = printed_json(capsys)
    result = read(tmp_path / "kept" / "result.json")
    assert document == {"folder": "kept"} | result
    assert all(text in rest for text in ("plus one?", "reference", "Saved in kept", "validation loss"))
    assert f"{result['before']['validation_loss']:.3f}" in rest
    assert result["after"]["validation_loss"] < result["before"]["validation_loss"]
    assert (result["method"]["rank"], result["method"]["alpha"]) == (4, 8)
    assert result["settings"]["batches"] == "by_length"
    assert len(result["before"]["samples"]) == finetune.SHOWN
    assert read(tmp_path / "kept" / "history.json")["rows"][-1]["step"] == 20
    model = Llama(tiny_config, seed=3)
    load_adapter(model, tmp_path / "kept")
    losses = finetune._evaluate(model, task_of("sums.jsonl", tiny), 64)
    assert losses["test_loss"] == pytest.approx(result["after"]["test_loss"], rel=1e-5)
    assert losses["test_loss"] != pytest.approx(result["before"]["test_loss"], rel=1e-3)


@pytest.mark.parametrize("out", ["kept", None])
def test_a_stopped_run_goes_on_from_its_checkpoint_which_is_removed_at_the_end(
    tiny, tmp_path, stop, monkeypatch, capsys, out
):
    options, folder = ("--steps", 5, "--checkpoint-every", 2), tmp_path / (out or "runs/finetune")
    stop(*options, out=out)
    assert "Going on" not in capsys.readouterr().out
    assert names(folder) == ["checkpoint"]
    with monkeypatch.context() as patch:
        patch.setattr("lora_lab.train.TrainingStep.__call__", interrupt)  # no step is left to take
        assert finetune_sums(*options, *(["--overwrite"] if out else []), out=out) == 0
    where = folder.relative_to(tmp_path)
    assert capsys.readouterr().out.count(f"Going on from step 5, with the checkpoint in {where}/checkpoint\n") == 1
    assert finetune_sums(*options, out="another") == 0
    losses = [
        [row["train_loss"] for row in read(each / "history.json")["rows"]] for each in (folder, tmp_path / "another")
    ]
    assert losses[0] == losses[1]
    assert names(folder) == names(tmp_path / "another") == sorted([*ADAPTER, "history.json", "result.json"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "the run cannot be resumed, because it writes no checkpoints"),
        (["--checkpoint-every", 9], "out/checkpoint holds no checkpoint yet"),
        (["--checkpoint-every", 1], "the checkpoint in out/checkpoint is whole, at step 2: start the same command"),
    ],
)
def test_ctrl_c_says_where_the_run_goes_on(tiny, monkeypatch, capsys, options, says):
    step, taken = TrainingStep.__call__, []

    def interrupted(self, *batch):
        taken.append(batch)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(TrainingStep, "__call__", interrupted)
    assert finetune_sums("--steps", 5, *options, out="out") == 130
    assert capsys.readouterr().err.startswith(f"lora-lab: stopped; {says}")


# Folders


def test_a_readme_of_the_users_stays(tiny, tmp_path):
    for _ in range(2):
        assert finetune_sums("--steps", 1, "--overwrite") == 0
    card = tmp_path / "kept" / "README.md"
    assert "| lr |" in card.read_text()
    card.write_text("Mine.")
    assert finetune_sums("--steps", 1, "--overwrite") == 0
    assert card.read_text() == "Mine."


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_a_folder_holds_is_kept_and_that_is_told_before_the_training(
    tiny, tmp_path, tiny_config, capsys, never, method
):
    assert finetune_sums("--steps", 1) == 0
    save_model(Llama(tiny_config, seed=5), "model", tiny)
    adapted = Llama(tiny_config, seed=5)
    LoRA(2).prepare(adapted, 0)
    save_adapter(adapted, "adapter")
    shutil.copytree("kept", "beside")
    shutil.copytree("model", "beside", dirs_exist_ok=True)
    other = "model" if method == "lora" else "adapter"
    cases = [
        ("kept", [], "kept holds result.json already; name another folder (--out), or pass --overwrite"),
        ("model", [], "model holds config.json already"),
        ("adapter", [], "adapter holds adapter_config.json already"),
        (other, ["--overwrite"], f"{other} holds a"),
        ("kept", ["--method", "full", "--overwrite"], "kept holds an adapter"),
        ("beside", ["--overwrite"], "beside holds a"),
        ("./model", ["--model", "model"], "model holds the model that is to be trained"),
        ("sums.jsonl", [], "sums.jsonl cannot be written to ("),
        ("sums.jsonl/kept", [], "sums.jsonl/kept cannot be written to ("),
    ]
    capsys.readouterr()
    never("fit")
    for out, options, says in cases:
        before = contents(tmp_path / out) if (tmp_path / out).is_dir() else None
        assert finetune_sums("--method", method, *options, out=out) == 1
        assert says in error_line(capsys)
        assert before is None or contents(tmp_path / out) == before


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_folder_in_which_another_run_will_save_is_refused_before_a_model_is_loaded(
    tiny, tmp_path, monkeypatch, capsys, options
):
    seen, fit = [], finetune.fit

    def meanwhile(*arguments, **more):
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "load_pretrained", lambda *_, **__: pytest.fail("loaded"))
            seen.append(finetune_sums("--steps", 1, *options, "--seed", 1))
        return fit(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "fit", meanwhile)
        assert finetune_sums("--steps", 1, *options) == 0
    assert seen == [1]
    assert capsys.readouterr().err == (
        "lora-lab: kept is in use by another run, which has not ended; name another folder (--out), or wait for it.\n"
    )
    assert read(tmp_path / "kept" / "result.json")["settings"]["seed"] == 0
    assert finetune_sums("--steps", 1, "--overwrite", "--seed", 1) == 0


@pytest.mark.parametrize("of", ["another rate", "another model", "a damaged file", "a damaged header"])
def test_another_runs_checkpoint_is_refused_before_anything_is_evaluated(
    tiny, tmp_path, capsys, monkeypatch, tiny_config, chatter, stop, of
):
    run = ("--steps", 5, "--checkpoint-every", 2)
    stop(*run)
    path = tmp_path / "kept" / "checkpoint" / "checkpoint.safetensors"
    content = path.read_bytes()
    if of == "another rate":
        run = (*run, "--lr", 0.5)
    elif of == "a damaged header":
        path.write_bytes(b"?")
    elif of == "a damaged file":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        monkeypatch.setattr(finetune, "load_pretrained", lambda *_, **__: (Llama(tiny_config, seed=4), chatter))
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_evaluate", lambda *_: pytest.fail("evaluated"))
        for overwrite in ([], ["--overwrite"]):
            assert finetune_sums(*run, *overwrite) == 1
    if of == "another rate":
        assert "is from another run: its settings.lr is 0.001, not 0.5; use" in capsys.readouterr().err
    assert names(tmp_path / "kept") == ["checkpoint"]
    path.unlink()
    assert finetune_sums(*run) == 0


def test_what_was_trained_is_saved_although_its_last_checkpoint_was_not(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("The disk is full.")

    monkeypatch.setattr("lora_lab.checkpoint.save", full)
    with pytest.warns(UserWarning, match="its last checkpoint is missing: The disk is full"):
        assert finetune_sums("--steps", 2, "--checkpoint-every", 2) == 0
    assert names(tmp_path / "kept") == sorted([*ADAPTER, "history.json", "result.json"])


def test_a_method_that_trains_a_part_of_the_model_saves_the_whole(tiny, tmp_path, capsys):
    part = PartialFineTuning(["lm_head", "model.embed_tokens"])
    options = {"steps": 1, "eval_examples": 2, "overwrite": True}
    for _ in range(2):
        finetune.run("sums.jsonl", part, "kept", **options)
        assert names(tmp_path / "kept") == sorted([*MODEL, "history.json", "result.json"])


def test_an_adapter_finds_its_base_from_any_folder(tiny, tmp_path, tiny_config, monkeypatch):
    save_model(Llama(tiny_config, seed=3), "models/base", tiny)
    assert finetune_sums("--steps", 1, "--model", "models/base") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_base("../kept") == str(tmp_path / "models" / "base")
    load_whole_model("../kept")


def test_the_name_of_a_base_stays_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / SMOLLM2).mkdir()
    assert [finetune.name_base(name) for name in (SMOLLM2, "someone/model")] == [SMOLLM2, "someone/model"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_a_full_disk_has_no_room_for_is_kept_elsewhere(tiny, tmp_path, capsys, monkeypatch, method):
    assert finetune_sums("--method", method, "--steps", 1) == 0
    before = contents(tmp_path / "kept")
    capsys.readouterr()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write = finetune.files.write_json

    def full(path, value):
        if path.parent.parent.name == "kept":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    monkeypatch.setattr(finetune.files, "write_json", full)
    assert finetune_sums("--method", method, "--steps", 2, "--overwrite") == 1
    (spare,) = tmp_path.glob("lora_lab-*")
    said = capsys.readouterr()
    assert f"No space left on device. The files are in {spare} instead.\n" in said.err
    assert "test loss" in said.out
    assert contents(tmp_path / "kept") == before
    assert {path.name for path in spare.iterdir()} == before.keys()
    assert len(read(spare / "history.json")["rows"]) == 3


BOOK = "\n\n".join(f"This is paragraph {i}, and it says that {i} is followed by {i + 1}." for i in range(200))


def test_a_text_is_a_task_too(tiny, tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    assert command("finetune", "--task", "book.txt", "--steps", 2, "--out", "kept") == 0
    assert "samples" not in read(tmp_path / "kept" / "result.json")["after"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "missing.jsonl"], "There is no file missing.jsonl"),
        (["--task", "bad.jsonl"], "bad.jsonl has 1 malformed line: line 1: not JSON"),
        (["--task", "sums.jsonl", "--device", "tpu"], "tpu"),
        (["--task", "text.txt", "--by-length"], "all examples of task 'text' have the same length"),
    ],
)
def test_bad_input_is_told_in_one_sentence_if_possible_before_a_model_is_loaded(
    tiny, tmp_path, capsys, never, options, says
):
    if options[1] not in ("bad.jsonl", "text.txt"):  # these are read with the model's tokenizer
        never("load_pretrained")
    (tmp_path / "bad.jsonl").write_text("?", encoding="utf-8")
    (tmp_path / "text.txt").write_text(BOOK)
    assert command("finetune", *options, "--out", "kept") == 1
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert not (tmp_path / "kept").exists() or names(tmp_path / "kept") == []
