"""Curves of a recording: its own numbers by the paper's names, and the step from which on they stay up."""

import pytest
import xarray as xr

from metaint.scans.curves import first_passing, memory_curves
from tests.labs.birth.test_figures import STEPS, recording


def test_memories_have_the_papers_names():
    tree = recording()
    curves, memory = memory_curves(tree), tree["memory"].to_dataset()
    assert curves["step"].values.tolist() == STEPS.tolist()
    for name, values in (
        ("W_O2", memory["ov_recall"][:, 1, 0]),
        ("W_K2", memory["key_composition_recall"][:, 0, 0, 1, 0]),
        ("W_K1", memory["previous_position_recall"][:, 0, 0]),
        ("W_K1_early", memory["previous_position_recall_early"][:, 0, 0]),
    ):
        assert curves[name].values.tolist() == values.values.tolist()
    assert curves["W_O2_chance"].values == pytest.approx([1 / 68] * 4)
    assert {"W_K2_all", "W_K2_chance", "W_K1_chance"} <= set(curves)
    assert "W_F_kl" not in curves


def test_one_layer_has_an_output_alone():
    curves = memory_curves(recording(layers=1))
    assert set(curves) == {"W_O1", "W_O1_chance"}


def test_fixed_triggers_are_asked_for_themselves():
    tree = recording()
    memory = tree["memory"].to_dataset()
    own = xr.full_like(memory["key_composition_recall"], 0.8)
    chance = xr.full_like(memory["key_composition_recall_chance"], 0.2)
    kept = memory.assign(key_composition_recall_triggers=own, key_composition_recall_triggers_chance=chance)
    kept["bigram_kl"] = ("step", [3.0, 2.0, 1.0, 0.5])
    curves = memory_curves(xr.DataTree.from_dict({"/memory": kept}))
    assert curves["W_K2"].values.tolist() == [0.8] * 4
    assert curves["W_K2_chance"].values.tolist() == [0.2] * 4
    assert curves["W_K2_all"].values.tolist() == memory["key_composition_recall"][:, 0, 0, 1, 0].values.tolist()
    assert curves["W_F_kl"].values.tolist() == [3.0, 2.0, 1.0, 0.5]


def test_a_memory_is_there_once_it_stays():
    lucky = xr.Dataset({"W_K2": ("step", [0.0, 0.6, 0.4, 0.8])}, {"step": STEPS})
    assert first_passing(lucky, "W_K2") == 40
    assert first_passing(lucky, "W_K2", 0.3) == 10
    assert first_passing(lucky, "W_K2", 0.9) is None
    assert first_passing(lucky, "W_K2", 0.0) == 0
