"""`lora-lab finetune`, on a tiny model: what it prints, keeps and refuses."""

import errno
import json
import shutil

import pytest

from lora_lab import FullFineTuning, Llama, LoRA, PartialFineTuning, finetune, load_adapter, save_adapter, save_model
from lora_lab.adapters.export import find_base, load_merged
from lora_lab.models.pretrained import SMOLLM2
from lora_lab.tasks import task_of
from lora_lab.train import TrainingStep
from lora_lab.variants import RsLoRA
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


def test_it_teaches_a_file_and_keeps_adapter_history_and_result(tiny, tmp_path, tiny_config, capsys):
    assert command("finetune", "--task", "sums.jsonl", "--rank", 4, "--steps", 20, "--lr", 3e-2, "--out", "kept") == 0
    printed = capsys.readouterr().out
    assert "plus one?" in printed
    assert "reference" in printed
    result = json.loads((tmp_path / "kept" / "result.json").read_text(encoding="utf-8"))
    assert result["after"]["validation loss"] < result["before"]["validation loss"]
    assert result["method"]["rank"] == 4
    assert result["method"]["alpha"] == 8
    assert len(result["before"]["samples"]) == finetune.SHOWN
    history = json.loads((tmp_path / "kept" / "history.json").read_text(encoding="utf-8"))
    assert history["rows"][-1]["step"] == 20
    model = Llama(tiny_config, seed=3)
    load_adapter(model, tmp_path / "kept")
    task = task_of("sums.jsonl", tiny)
    assert finetune._evaluate(model, task, 64)["test loss"] == pytest.approx(result["after"]["test loss"], rel=1e-5)
    assert result["after"]["test loss"] != pytest.approx(result["before"]["test loss"], rel=1e-3)


def test_as_json_it_prints_the_result_alone(tiny, tmp_path, capsys):
    arguments = ["--task", "sums.jsonl", "--rank", 4, "--steps", 5, "--lr", 3e-2, "--out", "kept", "--json"]
    assert command("finetune", *arguments) == 0
    document, rest = printed_json(capsys)
    assert "Saved in kept" in rest
    stored = json.loads((tmp_path / "kept" / "result.json").read_text(encoding="utf-8"))
    assert document.pop("folder") == "kept"
    assert document.keys() == stored.keys()
    for part in ("before", "after"):
        names = {"validation_loss": "validation loss", "test_loss": "test loss", "off_domain_loss": "off_domain loss"}
        assert document[part] == {name: stored[part][names.get(name, name)] for name in (*names, "samples")}
        assert f"{document[part]['validation_loss']:.3f}" in rest
    assert document["method"]["rank"] == 4
    assert document["settings"] == stored["settings"]
    assert document["after"]["test_loss"] != document["before"]["test_loss"]


def test_a_half_precision_adapter_is_half_as_large_and_scored_as_it_is_stored(tiny, tmp_path, tiny_config):
    results = {}
    for name, options in {"whole": [], "half": ["--half"]}.items():
        arguments = ["--task", "sums.jsonl", "--rank", 4, "--steps", 5, "--lr", 3e-2, *options, "--out", name]
        assert command("finetune", *arguments) == 0
        results[name] = json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8"))
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.7 * sizes[0]  # the header with the names stays
    model = Llama(tiny_config, seed=3)
    load_adapter(model, tmp_path / "half")
    task = task_of("sums.jsonl", tiny)
    after = results["half"]["after"]
    assert finetune._evaluate(model, task, 64)["test loss"] == after["test loss"]
    assert after["test loss"] != results["whole"]["after"]["test loss"]
    assert after["test loss"] == pytest.approx(results["whole"]["after"]["test loss"], rel=1e-2)


def test_batches_go_by_length_where_that_is_asked_for(tiny, tmp_path, monkeypatch):
    lines = [{"prompt": "very " * (i % 7) + f"{i}?", "answer": "yes"} for i in range(40)]
    (tmp_path / "unequal.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    losses = {}
    for name, options in {"random": [], "by_length": ["--by-length"]}.items():
        arguments = ["--task", "unequal.jsonl", "--steps", 3, "--batch", 4, *options, "--out", name]
        assert command("finetune", *arguments) == 0
        history = json.loads((tmp_path / name / "history.json").read_text(encoding="utf-8"))
        assert history["settings"].get("batches", "random") == name
        losses[name] = [row["train_loss"] for row in history["rows"]]
    assert losses["random"] != losses["by_length"]


def test_a_stopped_run_goes_on_from_its_checkpoint_which_is_removed_at_the_end(tiny, tmp_path, monkeypatch, capsys):
    def arguments(out):
        return ["--task", "sums.jsonl", "--steps", 5, "--checkpoint-every", 2, "--out", out]

    def losses(out):
        rows = json.loads((tmp_path / out / "history.json").read_text(encoding="utf-8"))["rows"]
        return [row["train_loss"] for row in rows]

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "table", stopped)  # after training, before anything is saved
        assert command("finetune", *arguments("kept")) == 130
    assert "Going on" not in capsys.readouterr().out
    assert names(tmp_path / "kept") == ["checkpoint"]
    with monkeypatch.context() as patch:
        patch.setattr("lora_lab.train.TrainingStep.__call__", stopped)  # no step is left to take
        assert command("finetune", *arguments("kept")) == 0
    assert capsys.readouterr().out.count("Going on from step 5, with the checkpoint in kept/checkpoint\n") == 1
    assert command("finetune", *arguments("another")) == 0
    assert losses("kept") == losses("another")
    assert names(tmp_path / "kept") == names(tmp_path / "another") == sorted([*ADAPTER, "history.json", "result.json"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "the run cannot be resumed, because it writes no checkpoints"),
        (["--checkpoint-every", 9], "out/checkpoint holds no checkpoint yet, so start the same command again from the"),
        (
            ["--checkpoint-every", 1],
            "the checkpoint in out/checkpoint is whole, at step 2: start the same command again",
        ),
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
    assert command("finetune", "--task", "sums.jsonl", "--steps", 5, "--out", "out", *options) == 130
    assert capsys.readouterr().err.startswith(f"lora-lab: stopped; {says}")


@pytest.mark.parametrize("methods", [("lora", "full"), ("full", "dora")])
def test_another_method_into_the_same_folder_leaves_nothing_of_the_first(tiny, tmp_path, methods):
    for method in (*methods, methods[0]):
        arguments = ["--task", "sums.jsonl", "--method", method, "--steps", 1, "--out", "kept", "--overwrite"]
        assert command("finetune", *arguments) == 0
        (tmp_path / "kept" / "notes.txt").write_text("mine")
        own = MODEL if method == "full" else ADAPTER
        assert {path.name for path in (tmp_path / "kept").iterdir()} == {
            *own,
            "history.json",
            "result.json",
            "notes.txt",
        }
        for name in ("history", "result"):
            assert json.loads((tmp_path / "kept" / f"{name}.json").read_text())["method"]["name"] == method


def test_a_readme_of_the_users_stays(tiny, tmp_path):
    arguments = ["--task", "sums.jsonl", "--steps", 1, "--out", "kept", "--overwrite"]
    for _ in range(2):
        assert command("finetune", *arguments) == 0
    card = tmp_path / "kept" / "README.md"
    assert "## Training" in card.read_text()
    card.write_text("Mine.")
    assert command("finetune", *arguments) == 0
    assert command("finetune", *arguments, "--method", "full") == 0
    assert card.read_text() == "Mine."


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def no_training(monkeypatch):
    monkeypatch.setattr(finetune, "fit", lambda *_, **__: pytest.fail("trained"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_folder_with_results_is_refused_before_the_training(tiny, tmp_path, capsys, monkeypatch, method):
    arguments = ["--task", "sums.jsonl", "--steps", 1, "--out", "kept"]
    assert command("finetune", *arguments) == 0
    before = contents(tmp_path / "kept")
    capsys.readouterr()
    no_training(monkeypatch)
    assert command("finetune", *arguments, "--method", method) == 1
    assert error_line(capsys) == (
        "lora-lab: kept holds result.json already; name another folder (--out), or pass --overwrite to replace what an "
        "earlier run saved there.\n"
    )
    assert contents(tmp_path / "kept") == before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_or_an_adapter_that_no_run_saved_is_kept_too(tiny, tmp_path, tiny_config, capsys, monkeypatch, method):
    save_model(Llama(tiny_config, seed=5), "model", tiny)
    adapted = Llama(tiny_config, seed=5)
    LoRA(2).prepare(adapted, 0)
    save_adapter(adapted, "adapter")
    no_training(monkeypatch)
    for folder, first in (("model", "config.json"), ("adapter", "adapter_config.json")):
        before = contents(tmp_path / folder)
        assert command("finetune", "--task", "sums.jsonl", "--method", method, "--out", folder) == 1
        assert f"{folder} holds {first} already" in error_line(capsys)
        assert contents(tmp_path / folder) == before
    beside = "model" if method == "lora" else "adapter"
    assert command("finetune", "--task", "sums.jsonl", "--method", method, "--out", beside, "--overwrite") == 1
    assert f"{beside} holds a" in error_line(capsys)


def test_a_users_model_beside_an_adapter_of_a_run_is_not_replaced(tiny, tmp_path, tiny_config, capsys, monkeypatch):
    arguments = ["--task", "sums.jsonl", "--steps", 1, "--out", "kept", "--overwrite"]
    assert command("finetune", *arguments) == 0
    save_model(Llama(tiny_config, seed=5), "mine", tiny)
    shutil.copytree("mine", "kept", dirs_exist_ok=True)
    capsys.readouterr()
    no_training(monkeypatch)
    assert command("finetune", *arguments, "--method", "full") == 1
    assert "kept holds a model" in error_line(capsys)


def test_without_a_folder_each_run_gets_one_of_its_own(tiny, tmp_path, capsys):
    for method, folder in (("lora", "runs/finetune"), ("full", "runs/finetune-2"), ("lora", "runs/finetune-3")):
        assert command("finetune", "--task", "sums.jsonl", "--method", method, "--steps", 1, "--json") == 0
        assert printed_json(capsys)[0]["folder"] == folder
    assert {*MODEL} < {*names(tmp_path / "runs/finetune-2")}
    for folder in ("runs/finetune", "runs/finetune-3"):
        assert names(tmp_path / folder) == sorted([*ADAPTER, "history.json", "result.json"])
    assert command("finetune", "--task", "sums.jsonl", "--steps", 2, "--overwrite") == 0
    assert "Saved in runs/finetune\n" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "runs/finetune/history.json").read_text())["rows"]) == 3
    assert names(tmp_path / "runs") == ["finetune", "finetune-2", "finetune-3"]


def test_without_a_folder_a_stopped_run_goes_on_and_others_leave_its_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    arguments = ["--task", "sums.jsonl", "--steps", 5, "--checkpoint-every", 2]
    assert command("finetune", "--task", "sums.jsonl", "--steps", 1) == 0
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "table", stopped)
        assert command("finetune", *arguments) == 130
    assert names(tmp_path / "runs/finetune-2") == ["checkpoint"]
    assert command("finetune", "--task", "sums.jsonl", "--steps", 1) == 0
    assert names(tmp_path / "runs/finetune-2") == ["checkpoint"]
    assert "result.json" in names(tmp_path / "runs/finetune-3")
    capsys.readouterr()
    assert command("finetune", *arguments) == 0
    printed = capsys.readouterr().out
    assert "Going on from step 5, with the checkpoint in runs/finetune-2/checkpoint" in printed
    assert "Saved in runs/finetune-2\n" in printed


def test_of_two_runs_that_end_in_the_same_folder_the_second_is_saved_elsewhere(tiny, tmp_path, monkeypatch, capsys):
    def meanwhile(result):
        (tmp_path / "kept" / "result.json").write_text("of the other run")
        return ""

    monkeypatch.setattr(finetune, "table", meanwhile)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert command("finetune", "--task", "sums.jsonl", "--steps", 1, "--out", "kept") == 1
    (spare,) = tmp_path.glob("lora_lab-*")
    assert capsys.readouterr().err.endswith(f"saved there. The files are in {spare} instead.\n")
    assert contents(tmp_path / "kept") == {"result.json": b"of the other run"}
    assert names(spare) == sorted([*ADAPTER, "history.json", "result.json"])


def while_training(monkeypatch, function):
    """Let the next run call a function before its training."""
    fit = finetune.fit

    def meanwhile(*arguments, **options):
        monkeypatch.setattr(finetune, "fit", fit)
        function()
        return fit(*arguments, **options)

    monkeypatch.setattr(finetune, "fit", meanwhile)


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_folder_in_which_another_run_will_save_is_refused_before_a_model_is_loaded(
    tiny, tmp_path, monkeypatch, capsys, options
):
    arguments = ["--task", "sums.jsonl", "--steps", 1, "--out", "kept", *options]
    seen = []

    def another():
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "load_pretrained", lambda *_, **__: pytest.fail("loaded"))
            seen.append(command("finetune", *arguments, "--seed", 1))

    while_training(monkeypatch, another)
    assert command("finetune", *arguments) == 0
    assert seen == [1]
    assert capsys.readouterr().err == (
        "lora-lab: kept is in use by another run, which has not ended; name another folder (--out), or wait for it.\n"
    )
    assert json.loads((tmp_path / "kept" / "result.json").read_text())["settings"]["seed"] == 0
    assert command("finetune", *arguments, "--overwrite", "--seed", 1) == 0


@pytest.mark.parametrize("options", [[], ["--checkpoint-every", 1]])
def test_without_a_folder_runs_at_the_same_time_get_one_each(tiny, tmp_path, monkeypatch, options):
    arguments = ["--task", "sums.jsonl", "--steps", 1, *options]
    while_training(monkeypatch, lambda: command("finetune", *arguments, "--seed", 1))
    assert command("finetune", *arguments) == 0
    seeds = [json.loads(path.read_text())["settings"]["seed"] for path in sorted(tmp_path.glob("runs/*/result.json"))]
    assert names(tmp_path / "runs") == ["finetune", "finetune-2"]
    assert seeds == [0, 1]


@pytest.fixture
def stopped(tiny, tmp_path, monkeypatch):
    """The folder of a run that was stopped at its end, at step 5, before anything was saved."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "table", stop)
        arguments = ["--task", "sums.jsonl", "--steps", 5, "--checkpoint-every", 2, "--out", "kept"]
        assert command("finetune", *arguments) == 130
    return tmp_path / "kept"


def test_another_runs_checkpoint_is_refused_before_anything_is_evaluated(stopped, monkeypatch, capsys):
    capsys.readouterr()
    monkeypatch.setattr(finetune, "_evaluate", lambda *_: pytest.fail("evaluated"))
    arguments = ["--task", "sums.jsonl", "--steps", 5, "--checkpoint-every", 2, "--out", "kept", "--lr", 0.5]
    assert command("finetune", *arguments) == 1
    said = capsys.readouterr()
    assert "is from another run: its settings.lr is 0.001, not 0.5; use another folder, or delete it" in said.err
    assert "Going on" not in said.out
    assert names(stopped) == ["checkpoint"]


@pytest.mark.parametrize("of", ["another rate", "another model", "a damaged file", "a damaged header"])
def test_overwrite_begins_anew_in_place_of_another_runs_checkpoint(
    stopped, capsys, monkeypatch, tiny_config, chatter, of
):
    path, options = stopped / "checkpoint" / "checkpoint.safetensors", ["--lr", 0.5] if of == "another rate" else []
    content = path.read_bytes()
    if of == "a damaged header":
        path.write_bytes(b"?")
    elif of == "a damaged file":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif of == "another model":
        monkeypatch.setattr(finetune, "load_pretrained", lambda *_, **__: (Llama(tiny_config, seed=4), chatter))
    arguments = ["--task", "sums.jsonl", "--steps", 5, "--checkpoint-every", 2, "--out", "kept", *options]
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_evaluate", lambda *_: pytest.fail("evaluated"))
        assert command("finetune", *arguments) == 1
    capsys.readouterr()
    assert command("finetune", *arguments, "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "The checkpoint in kept/checkpoint is not of this run, so --overwrite removes it\n" in printed
    assert "Going on" not in printed
    assert names(stopped) == sorted([*ADAPTER, "history.json", "result.json"])


def test_full_fine_tuning_does_not_go_on_from_the_checkpoint_of_another_model(
    tiny, monkeypatch, tiny_config, chatter, capsys
):
    def stop(*_):
        raise KeyboardInterrupt

    arguments = ["--task", "sums.jsonl", "--method", "full", "--steps", 2, "--checkpoint-every", 1, "--out", "kept"]
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "table", stop)
        assert command("finetune", *arguments) == 130
    monkeypatch.setattr(finetune, "load_pretrained", lambda *_, **__: (Llama(tiny_config, seed=4), chatter))
    assert command("finetune", *arguments) == 1
    assert "is of a run that started from other weights; load the same model" in capsys.readouterr().err


def test_what_was_trained_is_saved_although_its_last_checkpoint_was_not(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("The disk is full.")

    monkeypatch.setattr("lora_lab.checkpoint.save", full)
    with pytest.warns(UserWarning, match="its last checkpoint is missing: The disk is full"):
        assert command("finetune", "--task", "sums.jsonl", "--steps", 2, "--checkpoint-every", 2, "--out", "kept") == 0
    assert names(tmp_path / "kept") == sorted([*ADAPTER, "history.json", "result.json"])


def test_a_method_that_trains_a_part_of_the_model_saves_the_whole(tiny, tmp_path, capsys):
    part = PartialFineTuning(["lm_head", "model.embed_tokens"])
    options = {"steps": 1, "eval_examples": 2, "overwrite": True}
    with pytest.raises(ValueError, match=r"'partial' saves a whole model, .* leave --half out"):
        finetune.run("sums.jsonl", part, "kept", half=True, **options)
    for method, own in ((part, MODEL), (LoRA(2), ADAPTER), (part, MODEL)):
        finetune.run("sums.jsonl", method, "kept", **options)
        assert names(tmp_path / "kept") == sorted([*own, "history.json", "result.json"])


def test_overwrite_goes_on_from_the_runs_own_checkpoint(stopped, capsys):
    arguments = ["--task", "sums.jsonl", "--steps", 5, "--checkpoint-every", 2, "--out", "kept", "--overwrite"]
    assert command("finetune", *arguments) == 0
    assert "Going on from step 5, with the checkpoint in kept/checkpoint\n" in capsys.readouterr().out


def test_an_adapter_finds_its_base_from_any_folder(tiny, tmp_path, tiny_config, monkeypatch):
    save_model(Llama(tiny_config, seed=3), "models/base", tiny)
    assert command("finetune", "--task", "sums.jsonl", "--steps", 1, "--model", "models/base", "--out", "kept") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_base("../kept") == str(tmp_path / "models" / "base")
    load_merged("../kept")


def test_the_name_of_a_base_stays_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / SMOLLM2).mkdir()
    assert [finetune.base_name(name) for name in (SMOLLM2, "someone/model")] == [SMOLLM2, "someone/model"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_folder_of_the_model_that_is_trained_is_no_place_for_results(tiny, tmp_path, tiny_config, capsys, method):
    save_model(Llama(tiny_config, seed=5), "base", tiny)
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    arguments = ["--task", "sums.jsonl", "--method", method, "--model", "base", "--out", "./base"]
    assert command("finetune", *arguments) == 1
    assert "base holds the model that is to be trained, which must stay as it is; name another" in error_line(capsys)
    assert {path.name for path in (tmp_path / "base").iterdir()} == MODEL
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_what_an_earlier_run_kept_gives_way_to_what_another_method_saves(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"method": {"name": "full"}}))
    assert set(finetune._outdated(tmp_path, "lora")) == {*MODEL, "generation_config.json"}


@pytest.mark.parametrize("content", [None, "?", "[]", "{}", '{"method": 5}'])
def test_without_a_result_of_a_run_nothing_gives_way(tmp_path, content):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    assert finetune._outdated(tmp_path, "full") == ()


@pytest.mark.parametrize("out", ["sums.jsonl", "sums.jsonl/kept"])
def test_a_folder_that_cannot_be_written_to_is_told_before_the_training(tiny, capsys, monkeypatch, out):
    monkeypatch.setattr(finetune, "fit", lambda *_, **__: pytest.fail("trained"))
    assert command("finetune", "--task", "sums.jsonl", "--out", out) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"lora-lab: {out} cannot be written to (")
    assert told.count("\n") == 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_a_full_disk_has_no_room_for_is_kept_elsewhere(tiny, tmp_path, capsys, monkeypatch, method):
    assert command("finetune", "--task", "sums.jsonl", "--method", method, "--steps", 1, "--out", "kept") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    capsys.readouterr()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write = finetune.write_json

    def full(path, value):
        if path.parent.parent.name == "kept":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    monkeypatch.setattr(finetune, "write_json", full)
    arguments = ["--task", "sums.jsonl", "--method", method, "--steps", 2, "--out", "kept", "--overwrite"]
    assert command("finetune", *arguments) == 1
    (spare,) = tmp_path.glob("lora_lab-*")
    said = capsys.readouterr()
    assert "kept could not be written (No space left on device)" in said.err
    assert f"The files are in {spare} instead.\n" in said.err
    assert "test loss" in said.out
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before
    assert {path.name for path in spare.iterdir()} == before.keys()
    assert len(json.loads((spare / "history.json").read_text())["rows"]) == 3


def test_a_preview_trains_nothing(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "fit", None)
    assert command("finetune", "--task", "sums.jsonl", "--preview", "--out", "kept") == 0
    assert "'<s>user: " in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


def test_a_text_is_a_task_too(tiny, tmp_path):
    text = "\n\n".join(f"This is paragraph {i}, and it says that {i} is followed by {i + 1}." for i in range(200))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    assert command("finetune", "--task", "book.txt", "--steps", 2, "--out", "kept") == 0
    assert "samples" not in json.loads((tmp_path / "kept" / "result.json").read_text(encoding="utf-8"))["after"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "nothing"], "task is 'nothing', but it must be one of docs, summarise"),
        (["--task", "missing.jsonl"], "There is no file missing.jsonl"),
        (["--task", "bad.jsonl"], "bad.jsonl has 1 malformed line: line 1: not JSON"),
        (["--task", "sums.jsonl", "--method", "lorra"], "method is 'lorra', but it must be one of full, lora"),
        (["--task", "sums.jsonl", "--rank", 0], "rank"),
        (["--task", "sums.jsonl", "--steps", 0], "steps is 0"),
        (["--task", "sums.jsonl", "--lr", -1], "lr is -1.0"),
        (["--task", "sums.jsonl", "--device", "tpu"], "tpu"),
        (["--task", "sums.jsonl", "--checkpoint-every", 0], "checkpoint_every is 0"),
        (["--task", "sums.jsonl", "--method", "full", "--half"], "half precision is for adapters; leave --half out"),
        (["--task", "text.txt", "--by-length"], "all examples of task 'text' have the same length"),
    ],
)
def test_bad_input_is_told_in_one_sentence_and_nothing_is_kept(tiny, tmp_path, capsys, options, says):
    (tmp_path / "bad.jsonl").write_text("?", encoding="utf-8")
    text = "\n\n".join(f"This is paragraph {i}, and it says that {i} is followed by {i + 1}." for i in range(200))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert command("finetune", *options, "--out", "kept") == 1
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert not (tmp_path / "kept").exists()


def test_methods_by_name():
    assert finetune.method_of("full", 8) == FullFineTuning()
    assert finetune.method_of("lora", 4) == LoRA(4, 8)
    assert finetune.method_of("rslora", 4, alpha=3.0) == RsLoRA(4, 3.0)


@pytest.mark.parametrize(("task", "says"), [("none.jsonl", "There is no file none.jsonl"), ("cats", "task is 'cats'")])
def test_a_task_that_is_not_there_is_told_before_the_model_is_loaded(tiny, capsys, monkeypatch, task, says):
    monkeypatch.setattr(finetune, "load_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert command("finetune", "--task", task, "--out", "out") == 1
    assert says in error_line(capsys)
