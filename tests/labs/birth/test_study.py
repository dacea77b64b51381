import io
import random
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console

from metaint.errors import InputError, StoreError
from metaint.labs.birth import study as birth
from metaint.labs.birth.behaviour import evaluate
from metaint.labs.birth.findings import in_order
from metaint.labs.birth.run import first_gradients, settings_of, states_of, train_run
from metaint.labs.birth.settings import Settings
from metaint.labs.birth.training import held_out_sample, matrices
from metaint.labs.common.resumable import RECORDING
from metaint.scans.recordings import read_recording

TEXT = "".join(random.Random(0).choices("abcdefghijkl ", k=3000))
TINY = {"steps": 6, "length": 20, "batch": 4, "d": 8, "records": 4, "learning_rate": 0.1}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("birth") / "run"
    return folder, train_run(folder, Settings(**TINY, trigger_count=3), TEXT)


def test_a_run_records_memories_heads_and_behaviour(tiny_run):
    folder, recording = tiny_run
    settings = settings_of(folder)
    assert settings is not None
    assert settings.record_steps == [0, 1, 3, 6]
    for group in ("memory", "heads", "training"):
        assert recording[group]["step"].values.tolist() == settings.record_steps
    training = recording["training"].to_dataset()
    assert {"accuracy", "accuracy_without_copies", "copy_accuracy", "loss_later", "induction_mass"} <= set(training)
    assert {"attended_prediction", "looked_back", "looked_back_mass", "back_to_every_trigger"} <= set(training)
    assert {"norm_W_K1", "norm_W_K2", "norm_W_O2", "accuracy_bigram", "in_context_learning_score"} <= set(training)
    assert "key_composition_recall_triggers" in recording["memory"]
    states = states_of(folder)
    assert [step for step, _ in states] == settings.record_steps
    assert set(states[0][1]) == {"W_K1", "W_K2", "W_O2"}
    start = matrices(settings.model(13))
    assert all((states[0][1][name] == start[name]).all() for name in start)


def test_behaviour_is_of_the_held_out_sequences_and_losses_and_gradients_of_the_steps_between(tmp_path):
    """A training by hand, with the gradients that autograd has for each step."""
    settings = Settings(**TINY, trigger_count=3, frozen="W_K1:3")
    recording = train_run(tmp_path, settings, TEXT)["training"].to_dataset()
    trainer = settings.trainer(TEXT)
    held_out = held_out_sample(trainer.task, 128, settings.length, settings.seed)
    losses, norms = [], {name: [] for name in trainer.matrices}
    for step in range(settings.steps + 1):
        if step in settings.record_steps:
            found = recording.sel(step=step)
            expected = evaluate(trainer.model, held_out) | {"loss": np.mean(losses or [np.nan])}
            expected |= {f"gradient_norm_{name}": np.mean(values or [np.nan]) for name, values in norms.items()}
            expected |= {f"norm_{name}": m.detach().norm().item() for name, m in trainer.matrices.items()}
            for name, value in expected.items():
                assert float(found[name]) == pytest.approx(value, rel=1e-5, nan_ok=True), (step, name)
            losses, norms = [], {name: [] for name in trainer.matrices}
        loss = trainer.loss_of(trainer.sample())
        gradients = torch.autograd.grad(loss, list(trainer.matrices.values()))
        losses.append(loss.item())
        for name, gradient in zip(trainer.matrices, gradients, strict=True):
            frozen = name == "W_K1" and step < 3
            norms[name].append(np.nan if frozen else gradient.norm().item())
        if step < settings.steps:
            trainer.take_step()
    assert np.isnan(recording["gradient_norm_W_K1"].values).tolist() == [True, True, True, False]
    assert np.isnan(recording["gradient_norm_W_K2"].values).tolist() == [True, False, False, False]


def test_a_killed_run_goes_on_with_the_same_numbers(tiny_run, tmp_path):
    def kill(step, accuracy):
        if step == 5:
            raise KeyboardInterrupt

    _, whole = tiny_run
    settings = Settings(**TINY, trigger_count=3)
    with pytest.raises(KeyboardInterrupt):
        train_run(tmp_path / "run", settings, TEXT, kill)
    assert read_recording(tmp_path / "run" / RECORDING)["memory"]["step"].values.tolist() == [0, 1, 3]
    steps = []
    again = train_run(tmp_path / "run", settings, TEXT, lambda step, accuracy: steps.append(step))
    assert steps == [3, 4, 5, 6]
    for group in ("memory", "training"):
        one, other = whole[group].to_dataset(), again[group].to_dataset()
        # The mean loss since the last record is of the steps after the state that was saved.
        xr.testing.assert_equal(one, other)
    assert train_run(tmp_path / "run", settings, TEXT).equals(again)


def test_a_folder_keeps_to_its_run(tiny_run, tmp_path):
    folder, _ = tiny_run
    with pytest.raises(InputError, match=r"which holds a run with seed 0, and 1 was asked for"):
        train_run(folder, Settings(**TINY, trigger_count=3, seed=1), TEXT)
    shutil.copytree(folder, tmp_path / "run")
    next(iter((tmp_path / "run" / "states").iterdir())).write_bytes(b"nothing")
    with pytest.raises(StoreError, match="is damaged"):
        states_of(tmp_path / "run")


def test_first_gradients_are_read_as_memories():
    settings = Settings(**TINY, triggers="random")
    found = first_gradients(settings, TEXT)
    assert found["ov_recall"].shape == (2, 1)
    assert 0 <= float(found["ov_recall"][1, 0]) <= 1
    assert "key_composition_recall_triggers" not in found


def test_runs_are_every_combination():
    found = birth.runs(
        triggers=["fixed", "random"], trigger_counts=[1, 3], layers=[1, 2], seeds=[0, 1], freeze="W_K2:3"
    )
    assert len(found) == 2 * 2 * 2 * (1 + 2)  # one layer has no W_K2 to freeze
    assert len({s.name for s in found}) == len(found)


def test_a_study_trains_describes_and_draws(tmp_path):
    grid = birth.runs(trigger_counts=[2, 3], freeze="W_K1:3,W_K2:3", **TINY)
    told = io.StringIO()
    found = birth.run(Console(file=told, width=150), tmp_path / "lab", grid, TEXT, jobs=1)
    assert list(found.summary["run"]) == [s.name for s in grid]
    assert (tmp_path / "lab" / "figures.html").stat().st_size > 1e5
    assert (tmp_path / "lab" / "summary.csv").is_file()
    last = told.getvalue().strip().splitlines()[-1]
    assert last.startswith(f"{grid[-1].name}: in-context accuracy ")
    assert "passed one half:" in last
    row = found.summary.iloc[0]
    recording = found.recordings[row["run"]]
    assert row["accuracy"] == float(recording["training"]["accuracy"][-1])
    assert row["W_O2"] == float(recording["memory"]["ov_recall"][-1, 1, 0])
    assert row["W_O2_chance"] == pytest.approx(1 / 13)


def test_one_layer_and_all_positions(tmp_path):
    grid = [Settings(**TINY, layers=1), Settings(**TINY, loss="all", outputs="train")]
    found = birth.run(Console(file=io.StringIO()), tmp_path, grid, TEXT, jobs=1)
    one, both = found.summary.to_dict("records")
    assert np.isfinite(one["W_O1"])
    assert np.isnan(one["W_O2"])
    assert np.isfinite(both["W_F_kl"])
    assert np.isfinite(both["accuracy_test"])


def test_processes_train_what_one_does(tmp_path):
    grid = birth.runs(seeds=[0, 1], **TINY)
    one = birth.study(tmp_path / "one", grid, TEXT, jobs=1)
    threads = torch.get_num_threads()
    two = birth.study(tmp_path / "two", grid, TEXT, jobs=2)
    assert torch.get_num_threads() == threads
    for name in one.recordings:
        xr.testing.assert_allclose(
            one.recordings[name]["training"].to_dataset(), two.recordings[name]["training"].to_dataset(), rtol=1e-3
        )


def test_a_diverged_run_is_said_and_left_out(tmp_path):
    fine, wild = Settings(**TINY), Settings(**{**TINY, "learning_rate": 1e30}, seed=1)
    told = io.StringIO()
    found = birth.run(Console(file=told, width=300), tmp_path, [fine, wild], TEXT, jobs=1)
    assert set(found.recordings) == {fine.name}
    assert f"{wild.name} diverged: learning_rate is 1e+30" in told.getvalue()
    with pytest.raises(InputError, match=r"^no run has a finite loss: learning_rate is 1e\+30"):
        birth.study(tmp_path / "wild", [wild], TEXT, jobs=1)


def test_what_cannot_be_trained_is_told_before_anything_is(tmp_path):
    with pytest.raises(InputError, match=r"^frozen names 'W_K3': name some of W_K1, W_K2, W_O2\.$"):
        birth.study(tmp_path / "lab", birth.runs(freeze="W_K3:2", **TINY), TEXT, jobs=1)
    assert not (tmp_path / "lab").exists()


def test_order_in_words():
    passed = {"W_O2": 60, "W_K2": 20, "W_K1_early": 110, "W_K1": None, "accuracy": 80}
    ended = dict.fromkeys(passed, 0.25)
    assert (
        in_order(passed, ended) == "W_K2 at 20, W_O2 at 60, accuracy at 80, W_K1 (first 64) at 110, W_K1 not yet (0.25)"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"triggers": "some"}, "triggers is 'some': choose one of fixed, random."),
        ({"outputs": "test"}, "outputs is 'test': choose one of uniform, bigram, train."),
        ({"layers": 0}, "layers is 0: give at least 1."),
        ({"records": 1}, "records is 1: give at least 2."),
        ({"learning_rate": 0}, "learning_rate is 0: give a finite number above 0."),
        (
            {"frozen": "W_K1"},
            "frozen is 'W_K1': join matrices and the steps they wait for, such as W_K1:100,W_K2:100.",
        ),
    ],
)
def test_bad_settings_get_one_sentence(options, sentence):
    with pytest.raises(InputError) as caught:
        Settings(**{**TINY, **options})
    assert str(caught.value) == sentence


@pytest.mark.slow
def test_an_induction_head_is_born_and_needs_its_keys(tmp_path):
    """150 steps of a small batch; with both key matrices frozen the accuracy stays low, as in the paper's figure."""
    options = {"length": 64, "batch": 64, "steps": 150, "records": 8}
    free, held = (Settings(**options, frozen=frozen) for frozen in ("", "W_K1:150,W_K2:150"))
    found = birth.study(tmp_path, [free, held], jobs=1).summary.set_index("run")
    assert found["accuracy"][free.name] > 0.8
    assert found["accuracy_without_copies"][free.name] > 0.7
    assert found["accuracy"][held.name] < 0.5
    assert found["W_O2"][held.name] > 0.5  # learnt all the same: necessary, and not enough
