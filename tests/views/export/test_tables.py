"""Scans as tables: every number of a scan is there, at its place, and comes back from the files as it was."""

import errno
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import metaint
from metaint.errors import InputError, StoreError
from metaint.scans.finding import without_bundles
from metaint.tasks import autoregressive
from metaint.views.export.tables import save_tables, tables_of
from tests.views.groups.test_heads import planted

PROBES = ("HeadProbe", "ResidualProbe", "InnerProbe", "SaturationProbe", "WeightProbe")
WIDE = {
    "heads", "labels", "residual", "inner", "saturation", "memory", "memory_pairs", "weights", "recurrence",
    "attributes",
}  # fmt: skip


@pytest.fixture(scope="module")
def scan(gpt2, repeated):
    """Every group that there is."""
    probes = [getattr(metaint, name)() for name in PROBES]
    found = metaint.scan(gpt2, repeated, [*probes, metaint.MemoryProbe(30)], seed=7)
    vectors, matrices = autoregressive("haar", 3, 7, 24, dtype=torch.float32)
    found["recurrence"] = metaint.recur(gpt2, vectors, matrices, positions=[3])["recurrence"]
    return found


@pytest.fixture(scope="module")
def tables(scan):
    return tables_of(scan)


@pytest.fixture(scope="module")
def stored(scan, tmp_path_factory):
    """The scan from a store, which gives groups and variables back in any order."""
    return metaint.load(metaint.save(scan, tmp_path_factory.mktemp("store") / "scan.zarr"))


def recorded(scan, steps=(0, 10)):
    """The scan at several steps, each with other numbers, as `read_recording` gives them."""
    groups = {}
    for name, node in scan.children.items():
        parts = [
            node.to_dataset().map(lambda x, i=i: x * 0.9**i if x.dtype.kind == "f" else x) for i in range(len(steps))
        ]
        groups[f"/{name}"] = xr.concat(parts, xr.IndexVariable("step", list(steps)))
    groups["/training"] = xr.Dataset({"loss": ("step", [3.0, np.nan])}, {"step": list(steps)})
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = dict(scan.attrs)
    return tree


def at(recording, i):
    tree = xr.DataTree.from_dict(
        {f"/{name}": node.to_dataset().isel(step=i, drop=True) for name, node in recording.children.items()}
    )
    tree.attrs = dict(recording.attrs)
    return tree


def finite(values):
    values = np.asarray(values)
    return set(values[np.isfinite(values)].ravel().tolist())


def test_every_number_of_the_scan_is_in_a_table_of_its_group(scan, tables):
    assert set(tables) > WIDE
    for group, node in scan.children.items():
        of_group = [table for name, table in tables.items() if name.split("_")[0] == group]
        there = set().union(*(finite(table[c]) for table in of_group for c in table if table[c].dtype.kind in "fiub"))
        for name, values in without_bundles(node.to_dataset()).data_vars.items():
            assert finite(values) <= there, (group, name)


def test_tidy_tables_are_the_variables_again(scan, tables):
    tidy = {
        "saturation_scale_layer_head": ("scale", "layer", "head"),
        "residual_quantile_layer_position": ("quantile", "layer", "position"),
        "inner_sample_layer": ("sample", "layer"),
    }
    for name, dims in tidy.items():
        data = scan[name.split("_")[0]].to_dataset()
        variables = [str(v) for v in data.data_vars if set(data[v].dims) == set(dims)]
        assert variables
        places = list(itertools.product(*(data[dim].values.tolist() for dim in dims)))
        assert list(tables[name][list(dims)].itertuples(index=False, name=None)) == places
        for variable in variables:
            np.testing.assert_array_equal(tables[name][variable], data[variable].transpose(*dims).values.ravel())


def test_wide_tables_have_a_row_for_each_head_layer_and_pair(scan, tables):
    heads = tables["heads"].set_index("head")
    assert list(heads.index) == [f"{i}.{j}" for i in range(2) for j in range(4)]
    assert heads.loc["1.2", "entropy"] == float(scan["heads"]["entropy"].sel(layer=1, head=2))
    assert heads.loc["1.2", "tied_keys_tau_0.5"] == float(scan["heads"]["tied_keys"].sel(layer=1, head=2, tau=0.5))
    assert (heads["layer"].tolist(), heads["index"].tolist()) == ([0] * 4 + [1] * 4, [*range(4)] * 2)
    pd.testing.assert_frame_equal(tables["labels"], metaint.label_heads(scan))
    assert len(tables["residual"]) == 3
    assert len(tables["memory"]) == len(tables["weights"]) == 8
    pairs = tables["weights_pairs"]
    assert len(pairs) == 16  # of the first layer's heads with the second's
    row = pairs.query("head == 1 and head_to == 3").iloc[0]
    known = scan["weights"]["k_composition"].sel(layer=0, head=1, layer_to=1, head_to=3)
    assert row["k_composition"] == float(known)
    assert tables["weights_scalars"]["total_norm"].tolist() == [float(scan["weights"]["total_norm"])]


def test_attributes_tell_where_the_scan_comes_from(scan, tables):
    found = {(group, name): value for group, name, value in tables["attributes"].itertuples(index=False)}
    assert found["", "model"] == scan.attrs["model"]
    assert json.loads(found["", "tokens_shape"]) == [6, 64]
    assert found["heads", "sequences"] == "6"
    assert len(found) == len(scan.attrs) + sum(len(node.attrs) for node in scan.children.values())


def test_a_recording_is_its_scans_one_below_the_other(scan):
    recording = recorded(scan)
    found = tables_of(recording)
    assert found["training"].columns.tolist() == ["step", "loss"]
    assert set(found) >= WIDE
    for i, step in enumerate((0, 10)):
        one = tables_of(at(recording, i))
        assert set(one) == set(found)
        for name, table in one.items():
            if name != "attributes":
                part = found[name][found[name]["step"] == step].drop(columns="step").reset_index(drop=True)
                pd.testing.assert_frame_equal(part, table, check_dtype=False)
    assert len(found["weights"]) == 2 * 8


def test_groups_of_other_probes_are_tidy_tables(tmp_path):
    mine = xr.Dataset({"depth": 3.0, "reach": (("layer", "thing"), np.eye(2))}, {"thing": ["a", "b"]})
    found = tables_of(xr.DataTree.from_dict({"/mine": mine, "/empty": xr.Dataset()}))
    assert list(found) == ["mine", "mine_layer_thing", "attributes"]
    assert found["mine"].to_dict("records") == [{"depth": 3.0}]
    assert found["mine_layer_thing"].query("layer == 1")["reach"].tolist() == [0, 1]
    save_tables(xr.DataTree.from_dict({"/mine": mine}), tmp_path, "parquet")


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_tables_come_back_from_their_files(stored, tables, tmp_path, format):
    paths = save_tables(stored, tmp_path / "new" / "folder", format)
    assert [path.name for path in paths] == [f"{name}.{format}" for name in tables]
    assert set((tmp_path / "new" / "folder").iterdir()) == set(paths)
    for path, table in zip(paths, tables.values(), strict=True):
        if format == "parquet":
            pd.testing.assert_frame_equal(pd.read_parquet(path), table)
            continue
        texts = {name: str for name in table if pd.api.types.is_string_dtype(table[name])}
        found = pd.read_csv(path, dtype=texts, float_precision="round_trip", keep_default_na=False, na_values={
            name: [""] for name in table if name not in texts})  # fmt: skip
        if path.stem == "attributes":
            found = found.fillna("")
        singles = {name: np.float32 for name in table if table[name].dtype == np.float32}
        pd.testing.assert_frame_equal(found.astype(singles), table, check_dtype=False, check_exact=True)


def test_head_names_that_look_like_numbers_have_their_index_beside(tmp_path):
    save_tables(planted(2, 11), tmp_path)
    careless = pd.read_csv(tmp_path / "heads.csv")
    assert careless["index"].tolist() == [*range(11)] * 2
    assert pd.read_csv(tmp_path / "heads.csv", dtype={"head": str})["head"][10] == "0.10"


def test_a_full_disk_leaves_the_earlier_tables(scan, tmp_path, monkeypatch):
    (tmp_path / "thesis.csv").write_text("years of work")
    save_tables(scan, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    whole = pd.DataFrame.to_csv

    def full(self, path, **options):
        if path.stem == "memory":
            path.write_text("torn")
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(StoreError, match=r"could not be written to .* \(No space left on device\)"):
        save_tables(scan.isel(head=[0], missing_dims="ignore"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_can_not_be_written_is_one_sentence(scan, tmp_path):
    with pytest.raises(InputError, match='format is \'xls\': it must be "csv" or "parquet"'):
        save_tables(scan, tmp_path, "xls")
    (tmp_path / "file").write_text("here first")
    with pytest.raises(StoreError, match="file is a file: name a folder for the tables"):
        save_tables(scan, tmp_path / "file")
    with pytest.raises(StoreError, match=r"could not be written to .*file/below \(Not a directory\)"):
        save_tables(scan, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "here first"
    with pytest.raises(InputError, match="scan holds no group into which something was read"):
        tables_of(xr.DataTree.from_dict({"/heads": xr.Dataset()}))
