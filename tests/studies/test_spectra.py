"""What `lora-lab record ablation` and `spectra` run, on a tiny model, and what they write and refuse."""

import pandas
import pytest
import torch

from lora_lab import Lean, LoRA, fit, rank, records, spectra
from lora_lab.ablation import smallest_sufficient_rank
from lora_lab.studies import spectra as spectra_records
from tests.helpers import command

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def test_a_record_of_spectra_tells_of_every_layer(small_study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spectra_records, "CUTS", {"full": (64, 4, 1), "LoRA r=64": (4, 1)})
    assert command("record", "spectra", "--device", "cpu", "--out", tmp_path / "records") == 0
    (record,) = records.load_all("spectra", tmp_path / "records").values()
    make, _ = small_study
    layers = 7 * make().config.num_hidden_layers
    about = {name: rows for name, rows in record.frame().groupby("about")}
    assert {name: len(rows) for name, rows in about.items()} == {
        "run": 5,
        "layer": 4 * layers,
        "intruders": 2 * layers,
        "cut": 5,
        "pair": 2 * layers,
    }
    full = about["layer"][about["layer"].run == "full"].set_index("layer")
    assert full["rank"].isna().all()
    lora = about["layer"][about["layer"].run == "LoRA r=8"]
    assert set(lora["rank"]) == {8}
    assert (lora.stable_rank <= 8).all()
    assert full.relative_norm.between(1e-6, 1).all()
    printed = capsys.readouterr().out
    assert printed.count("test_loss ") == 10


def test_a_cut_at_full_rank_loses_nothing_of_what_linear_layers_learned(small_study, monkeypatch):
    monkeypatch.setattr(spectra_records, "CUTS", {"full": (64, 1), "LoRA r=64": (64, 1)})
    rows = list(spectra_records.record_spectra(CPU))
    run = {row["run"]: row for row in rows if row["about"] == "run"}
    cut = {(row["run"], row["rank"]): row for row in rows if row["about"] == "cut"}
    assert cut["LoRA r=64", 64]["test_loss"] == pytest.approx(run["LoRA r=64"]["test_loss"], rel=1e-6)
    assert cut["LoRA r=64", 64]["energy"] == cut["full", 64]["energy"] == 1.0
    assert cut["full", 1]["energy"] < 0.9
    assert cut["full", 1]["test_loss"] != pytest.approx(cut["full", 64]["test_loss"], rel=1e-5)
    assert run["base"]["test_loss"] != pytest.approx(run["full"]["test_loss"], rel=1e-7)


def test_what_is_recorded_of_a_layer_is_what_the_report_says(small_study):
    rows = list(spectra_records.record_spectra(CPU))
    make, task = small_study
    model = make()
    method, lr, seed = spectra_records.RUNS["LoRA r=8"]
    options = {"steps": 4, "batch_size": 4, "eval_every": 4, "eval_examples": 4}
    fit(model, task(), method, lr=lr, seed=seed, **options)
    report = spectra.report(None, model).set_index("layer")
    found = pandas.DataFrame([row for row in rows if row["about"] == "layer" and row["run"] == "LoRA r=8"])
    found = found.set_index("layer")
    for name in ("norm", "effective_rank", "stable_rank", "amplification", "stable_rank_low"):
        torch.testing.assert_close(
            torch.tensor(found[name].to_numpy()), torch.tensor(report[name].to_numpy()), rtol=1e-3, atol=0
        )
    pairs = [row for row in rows if row["about"] == "pair"]
    assert all(0 <= row[name] <= 1 for row in pairs for name in ("inputs_1", "outputs_1"))
    alone = next(row for row in rows if row["about"] == "intruders" and row.get("intruders_low") is None)
    expected = spectra.count_intruders(spectra.updates(None, model)[alone["layer"]], with_noise=False)
    assert alone["floor"] == pytest.approx(expected["floor"], rel=1e-3)


def test_models_are_not_for_what_is_of_one_model(tmp_path, capsys):
    assert command("record", "spectra", "--models", "small", "--out", tmp_path) == 1
    assert "--models is for memory and speed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_overlaps_are_taken_on_each_side_by_itself():
    draw = torch.Generator().manual_seed(0)
    U, V, other = (rank.orthonormal(n, 8, generator=draw) for n in (40, 30, 30))
    S = torch.arange(8, 0, -1.0, dtype=torch.float64)
    first, second = (spectra.Update(rank.SVD(U, S, W.mT), 8) for W in (V, other))
    (row,) = spectra_records._overlaps({"layer": first}, {"layer": second})
    assert row["outputs_1"] == 1.0
    assert row["inputs_1"] == pytest.approx(float(rank.subspace_similarity(V, other)[0, 0]), rel=1e-3)
    assert row["inputs_1"] < 0.6
    assert (row["out"], row["in"]) == (40, 30)


def test_intruders_are_counted_in_every_block_and_noise_beside_the_middle_one():
    updates = {}
    for block in range(3):
        draw = torch.Generator().manual_seed(block)
        before = rank.gaussian((48, 32), norm=4.0, generator=draw)
        change = rank.gaussian_factors((48, 32), 2, norm=40.0, generator=draw)  # ten times the weight, 2 new directions
        updates[f"layers.{block}.up_proj"] = spectra.Update(rank.product_svd(*change), 2, before)
    rows = list(spectra_records._intruders(updates))
    assert [row["layer"] for row in rows] == list(updates)
    assert all(row["intruders"] >= 2 for row in rows)
    assert [row.get("intruders_high") is not None for row in rows] == [False, True, False]
    for row in rows:
        alone = spectra.count_intruders(updates[row["layer"]])
        assert (row["intruders"], row["energy_share"]) == (
            alone["intruders"],
            pytest.approx(alone["energy_share"], rel=1e-3),
        )


# Ablation


def test_an_ablations_record_can_be_judged_as_the_table_itself(small_study, tmp_path):
    assert command("record", "ablation", "--device", "cpu", "--out", tmp_path / "records") == 0
    (record,) = records.load_all("ablation", tmp_path / "records").values()
    frame = record.frame()
    assert len(frame) == 2 * 2 * 2 * 2  # ranks, rates, seeds; before and after
    verdict = smallest_sufficient_rank(frame, margin=1.0)
    assert [one.rank for one in verdict.ranks] == [1, 4]
    assert len(verdict.seeds) == 2
    assert frame.test_loss.notna().sum() == 8
    row = frame[(frame.step == 4) & (frame["rank"] == 4) & (frame.lr == 1e-2) & (frame.seed == 1)].iloc[0]
    make, task = small_study
    history = fit(make(), task(), LoRA(4, 8), lr=1e-2, seed=1, steps=4, batch_size=4, eval_every=4, eval_examples=5)
    assert row.validation_loss == pytest.approx(history.rows[-1]["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("lean", [None, Lean(), Lean(torch.bfloat16)])
def test_every_trial_takes_the_step_that_is_asked_for(lean):  # or the record would be compared with itself
    sweep = spectra_records.plan_ablation(spectra_records.plan(CPU), lean)
    assert {trial.lean for trial, _ in sweep.setups.values()} == {lean}
