"""Labels of heads that are what we say they are, planted as patterns, and of what heads write."""

import numpy as np
import pytest
import torch
import xarray as xr

import metaint
from metaint.scans.evidence import evidence
from tests.builders import available_kinds, build

LENGTH = 32


def named(scan):
    table = metaint.label_heads(scan).query("label != 'none'")
    return {(row.head, row.label) for row in table.itertuples()}


def scan_of(model, heads):
    """A scan of one layer after another as if its heads had these patterns [query, key]."""
    tokens = (torch.arange(LENGTH).expand(4, -1) * torch.tensor([1, 3, 5, 7])[:, None]) % 95
    probe = metaint.HeadProbe()
    hooks = dict(probe.fwd_hooks(model, tokens))
    hooks[next(iter(hooks))](tokens, None)
    pattern = torch.stack(heads).expand(4, -1, -1, -1).contiguous()
    for layer in range(model.cfg.n_layers):
        hooks[f"blocks.{layer}.attn.hook_pattern"](pattern, None)
    return probe.to_scan()


def over(weights):
    """Causal rows that go with these weights of the keys."""
    rows = weights.expand(LENGTH, -1).tril() if weights.ndim == 1 else weights.tril()
    return rows / rows.sum(-1, keepdim=True)


def uniform_but_first():
    weights = torch.ones(LENGTH, LENGTH)
    weights[1:, 0] = 0
    return over(weights)


def noisy(seed):
    """A head of no kind: scores that are normally distributed, with a standard deviation of 3."""
    generator = torch.Generator().manual_seed(seed)
    return over((3 * torch.randn(LENGTH, LENGTH, generator=generator)).exp())


@pytest.mark.parametrize("averaging", [over(torch.ones(LENGTH)), uniform_but_first()], ids=["all", "all-but-first"])
def test_a_head_that_averages_by_construction_is_found_among_others(gpt2, averaging):
    found = named(scan_of(gpt2, [averaging, *(noisy(seed) for seed in range(gpt2.cfg.n_heads - 1))]))
    assert found == {(f"{layer}.0", "averaging") for layer in range(gpt2.cfg.n_layers)}


def test_heads_that_all_average_alike_are_not_told_from_untrained_ones(gpt2):
    assert named(scan_of(gpt2, [over(torch.ones(LENGTH))] * gpt2.cfg.n_heads)) == set()


def outputs_of(**variables):
    """`/outputs` of one layer with four heads; an interval of a tenth to each side where none is given."""
    data = {}
    for name, numbers in variables.items():
        values = np.array([numbers], dtype=float)
        for part, shift in (("", 0.0), ("_low", -0.1), ("_high", 0.1)):
            data[name + part] = (("layer", "head"), values + shift)
    return xr.Dataset(data, {"layer": [0], "head": range(4)})


def test_what_heads_write_earns_labels_of_its_own(repeated_scan):
    heads = repeated_scan["heads"].to_dataset().isel(layer=[0])
    outputs = outputs_of(
        output_norm=[1.0, 1.0, 1.0, 1.0],
        output_share=[0.2, 0.5, 1.0, 2.0],
        z_share=[0.1, 0.2, 1.0, 2.0],
        copying_deviations=[0.0, 2.0, -2.0, 2.0],
        copying_deviations_null=[0.0, 0.1, -0.1, 1.8],
    )
    scan = xr.DataTree.from_dict({"/heads": heads, "/outputs": outputs})
    before = named(heads)
    assert named(scan) - before == {("0.0", "inactive"), ("0.1", "copying"), ("0.2", "suppressing")}
    assert before <= named(scan)
    table = metaint.label_heads(scan).set_index(["head", "label"])
    assert table.loc[("0.2", "suppressing"), "score"] == pytest.approx(2.0)
    assert table.loc[("0.1", "copying"), "output_share"] == pytest.approx(0.5)


def test_a_head_that_writes_nothing_is_inactive_and_nothing_else(repeated_scan):
    heads = repeated_scan["heads"].to_dataset().isel(layer=[0])
    heads["first_token"].values[:] = 0.9
    heads["first_token_low"].values[:], heads["first_token_high"].values[:] = 0.85, 0.95
    # The whole layer of the second scan writes nothing, so that shares are no numbers.
    for shares, silent in (([0.0, 1.0, 1.0, 2.0], {"0.0"}), ([np.nan] * 4, {"0.0", "0.1", "0.2", "0.3"})):
        norm = np.nan_to_num(shares)
        outputs = outputs_of(output_norm=norm, output_share=shares, z_share=np.nan_to_num(shares))
        found = named(xr.DataTree.from_dict({"/heads": heads, "/outputs": outputs}))
        assert {head for head, label in found if label == "inactive"} == silent
        assert {head for head, label in found if label != "inactive"} == {"0.0", "0.1", "0.2", "0.3"} - silent


@pytest.mark.parametrize("kind", available_kinds())
def test_untrained_models_copy_and_suppress_nothing_and_all_their_heads_write(kind):
    model = build(kind)
    tokens = torch.randint(5, 90, (6, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, 17:] = tokens[:, 1:16]
    scan = metaint.scan(model, tokens, [metaint.HeadProbe(), metaint.OutputProbe()])
    assert {label for _, label in named(scan)} & {"copying", "suppressing", "inactive"} == set()


def test_every_label_has_a_threshold(repeated_scan):
    outputs = outputs_of(
        output_norm=[1] * 4, output_share=[1] * 4, z_share=[1] * 4,
        copying_deviations=[0] * 4, copying_deviations_null=[0] * 4,
    )  # fmt: skip
    heads = repeated_scan["heads"].to_dataset().isel(layer=[0])
    assert set(evidence(heads, outputs)) == set(metaint.THRESHOLDS)
