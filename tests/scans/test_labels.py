"""Labels: every planted head is found and nothing else, and untrained models earn none."""

import pytest
import torch
import xarray as xr

import metaint
from metaint.errors import InputError
from metaint.scans.labels import THRESHOLDS, telling_heads
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds, build
from tests.planted import LENGTH, PLANTED, VOCAB, planted_model

BRIDGES = ("native-mlp-ln", "gpt2", "neox", "llama", "bert", "gemma2")
ARCHITECTURES = [kind for kind in BRIDGES if kind in available_kinds()] or available_kinds()
needs_bridge = pytest.mark.skipif(
    "native-attn-only" not in available_kinds(), reason="needs TransformerBridge.boot_native"
)


def pairs(table):
    return {(row.head, row.label) for row in table.itertuples() if row.label != "none"}


@needs_bridge
@pytest.mark.parametrize("seed", range(3))
def test_every_planted_head_is_found_and_nothing_else(seed):
    tokens = repeated_tokens(VOCAB, LENGTH // 2, batch=12, seed=seed)
    found = pairs(metaint.label_heads(metaint.scan(planted_model(seed), tokens)))
    # argmax describes a shape and goes with the place: the two planted heads that look at one key at every query.
    assert found == {*PLANTED.items(), ("0.0", "argmax"), ("0.3", "argmax")}


def text_like(sequences):
    """Random tokens in which a phrase of five comes twice, at places of its own in each sequence: no block repeats."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (sequences, LENGTH), generator=generator)
    for row in tokens:
        start, gap = (int(torch.randint(low, low + 4, (), generator=generator)) for low in (2, 9))
        row[start + gap : start + gap + 5] = row[start : start + 5]
    return tokens


@needs_bridge
def test_induction_is_found_on_text_that_does_not_repeat():
    table = metaint.label_heads(metaint.scan(planted_model(), text_like(24)))
    assert {head for head, label in pairs(table) if label == "induction"} == {"1.0"}
    assert table.attrs["not_judged"] == {}


@needs_bridge
def test_a_text_with_too_few_matches_names_no_induction_head_and_says_why():
    table = metaint.label_heads(metaint.scan(planted_model(), text_like(3)))
    assert "induction" not in set(table["label"])
    assert "50 in two sequences or more are needed" in table.attrs["not_judged"]["induction"]


def test_a_label_near_its_line_is_borderline_and_not_given_strictly(repeated_scan):
    heads = repeated_scan["heads"].to_dataset().copy(deep=True)
    heads["previous_token"].values[:] = 0.3
    heads["previous_token_low"].values[:] = 0.28
    heads["previous_token_off_sink"].values[:] = 0.2
    heads["previous_token_off_sink"].values[0] = [0.9, 0.55, 0.49, 0.2]
    for end, width in (("low", -0.1), ("high", 0.1)):
        heads[f"previous_token_off_sink_{end}"].values[:] = heads["previous_token_off_sink"].values + width
    named = metaint.label_heads(heads).query("label == 'previous_token'").set_index("head")
    assert named["borderline"].to_dict() == {"0.0": False, "0.1": True}
    strictly = metaint.label_heads(heads, strict=True).query("label == 'previous_token'")
    assert list(strictly["head"]) == ["0.0"]


def test_an_idle_head_is_named_after_what_it_does_when_it_acts(gpt2):
    """Most of its weight rests on position 0, all else goes to the token before."""
    length = 32
    pattern = torch.zeros(3, gpt2.cfg.n_heads, length, length)
    pattern[..., 0] = 0.7
    steps = torch.arange(1, length)
    pattern[:, :, steps, steps - 1] += 0.3
    pattern[..., 0, 0] = 1.0
    tokens = torch.arange(length).expand(3, -1)
    probe = metaint.HeadProbe()
    hooks = dict(probe.fwd_hooks(gpt2, tokens))
    hooks[next(iter(hooks))](tokens, None)
    for layer in range(gpt2.cfg.n_layers):
        hooks[f"blocks.{layer}.attn.hook_pattern"](pattern, None)
    assert {label for _, label in pairs(metaint.label_heads(probe.to_scan()))} == {"sink", "previous_token"}


@pytest.mark.parametrize("scale", [1.0, 0.08], ids=["large-weights", "std-0.02"])
def test_untrained_models_earn_almost_no_labels(scale):
    labelled, possible = 0, 0
    for kind in ARCHITECTURES:
        for seed in range(5):
            model = build(kind, seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(scale)
            tokens = repeated_tokens(model.cfg.d_vocab, 32, batch=4, ids=(5, 95), seed=seed)
            table = metaint.label_heads(metaint.scan(model, tokens))
            labelled += len(pairs(table))
            possible += model.cfg.n_layers * model.cfg.n_heads * len(THRESHOLDS)
    assert possible >= 5 * 8 * len(THRESHOLDS)
    assert labelled <= possible / 100


def test_every_head_has_a_row_with_its_evidence(repeated_scan):
    table = metaint.label_heads(repeated_scan)
    assert set(table["head"]) == {f"{layer}.{head}" for layer in range(2) for head in range(4)}
    assert list(table.columns)[:7] == ["head", "label", "score", "off_sink", "uniform", "null_mean", "null_std"]


def test_the_typical_head_is_the_median_of_the_others_of_the_layer(repeated_scan):
    heads = repeated_scan["heads"].to_dataset().isel(layer=[0, 1, 0]).assign_coords(layer=range(3))
    heads["averaging"].values[:] = [[0.1, 0.2, 0.3, 0.95], [0.9, 0.91, 0.92, 0.93], [0.1, 0.2, 0.3, 0.4]]
    heads = heads.drop_vars(["averaging_low", "averaging_high"])
    table = metaint.label_heads(heads)
    # The heads of layer 1 all average alike, which says nothing of any one of them.
    assert {row.head for row in table.itertuples() if row.label == "averaging"} == {"0.3"}
    assert table.set_index(["head", "label"]).loc[("0.3", "averaging"), "null_mean"] == pytest.approx(0.2)


def test_a_head_alone_in_its_layer_is_compared_with_the_other_layers(repeated_scan):
    heads = repeated_scan["heads"].to_dataset().isel(layer=[0, 1, 0], head=[0]).assign_coords(layer=range(3))
    heads["averaging"].values[:] = [[1.0], [0.2], [0.4]]
    heads = heads.drop_vars(["averaging_low", "averaging_high"])
    table = metaint.label_heads(heads)
    assert {row.head for row in table.itertuples() if row.label == "averaging"} == {"0.0"}


def test_thresholds_are_arguments(repeated_scan):
    eager = metaint.label_heads(repeated_scan, {"local": 0.0}, margin=-1, deviations=-100)
    assert len(pairs(eager)) > len(pairs(metaint.label_heads(repeated_scan)))
    with pytest.raises(InputError, match="thresholds names 'previous': the labels are previous_token"):
        metaint.label_heads(repeated_scan, {"previous": 0.1})


def test_a_sink_is_a_sink_and_no_previous_token_head(gpt2):
    """99 % on position 0 and 1 % on the token before: detect_head with exclude_bos calls that 1.000."""
    length = 32
    pattern = torch.zeros(3, gpt2.cfg.n_heads, length, length)
    pattern[..., 0] = 0.99
    pattern[..., 0, 0] = 1.0
    steps = torch.arange(1, length)
    pattern[:, :, steps, steps - 1] += 0.01
    tokens = torch.arange(length).expand(3, -1)
    probe = metaint.HeadProbe()
    hooks = dict(probe.fwd_hooks(gpt2, tokens))
    hooks[next(iter(hooks))](tokens, None)
    for layer in range(gpt2.cfg.n_layers):
        hooks[f"blocks.{layer}.attn.hook_pattern"](pattern, None)
    found = pairs(metaint.label_heads(probe.to_scan()))
    assert {label for _, label in found} == {"sink", "argmax"}


def test_the_group_will_do(repeated_scan):
    found = metaint.label_heads(repeated_scan)
    for group in (repeated_scan["heads"], repeated_scan["heads"].to_dataset()):
        assert metaint.label_heads(group).equals(found)


def test_scans_without_heads_are_refused():
    with pytest.raises(InputError, match="scan has no /heads group: scan with a HeadProbe"):
        metaint.label_heads(xr.DataTree())
    with pytest.raises(InputError, match="scan holds no heads: nothing was read yet"):
        metaint.label_heads(metaint.HeadProbe().to_scan())


def test_telling_heads_are_the_strongest_of_each_label_in_turn():
    scores = {"induction": [0.9, 0.8, 0.7, 0.0], "previous_token": [0.0, 0.0, 0.0, 0.6], "first_token": [0.7] * 4}
    data = {}
    for name, values in scores.items():
        data[name] = (("layer", "head"), [values])
        data[f"{name}_count"] = (("layer", "head"), [[100] * 4])
        for null in ("uniform", "null_mean", "null_std"):
            data[f"{name}_{null}"] = (("layer", "head"), [[0.01] * 4])
        for end in ("low", "high"):
            data[f"{name}_{end}"] = data[name]
    heads = xr.Dataset(data, {"layer": [0], "head": range(4)})
    # Every head is a sink too, which says less: those labels come after all that name the token looked for.
    assert telling_heads(heads, 3)[["head", "label"]].values.tolist() == [
        ["0.0", "induction"],
        ["0.1", "induction"],
        ["0.3", "previous_token"],
    ]
    assert telling_heads(heads, 9)["head"].tolist() == ["0.0", "0.1", "0.2", "0.3"]
    with pytest.raises(InputError, match="most is 0"):
        telling_heads(heads, 0)
