"""HeadVis's examples: the model's own largest weights, and what is added up of them."""

import bisect
from itertools import pairwise

import numpy as np
import pytest
import torch

from metaint.views.export.headvis_examples import sampled, sparse
from tests.views.export.headvis_files import HEADS, LAYERS, LENGTH, read


def test_examples_are_the_largest_weights_of_the_model(gpt2, tokens, folder, patterns):
    for i, j in np.ndindex(LAYERS, HEADS):
        payload = read(folder / "heads" / f"L{i}H{j}.json")
        for sequence in payload["sequences"]:
            row = sequence["sequence_id"]
            pattern = patterns[row, i, j].numpy()
            assert sequence["tokens"] == [gpt2.tokenizer.decode([t]) for t in tokens[row].tolist()]
            query, key = np.divmod(sequence["attention_indices"], LENGTH)
            assert sequence["attention_indices"] == sorted(sequence["attention_indices"])
            np.testing.assert_allclose(pattern[query, key], sequence["attention_values"], atol=5.1e-5)
            for q in range(LENGTH):
                kept = key[query == q]
                assert len(kept) == min(8, (pattern[q] >= 0.005).sum())
                assert pattern[q, kept].min() >= np.delete(pattern[q], kept).max(initial=0)
            # As the frontend's findMax reads it.
            shown = [v for q, k, v in zip(query, key, sequence["attention_values"], strict=True) if q and k]
            assert sequence["max_activation"] == max(shown) == round(float(pattern[1:, 1:].max()), 4)


def test_intervals_run_from_the_smallest_to_the_largest(folder, patterns):
    largest = patterns[..., 1:, 1:].amax((-2, -1)).numpy()
    for i, j in np.ndindex(LAYERS, HEADS):
        payload = read(folder / "heads" / f"L{i}H{j}.json")
        by_interval = {n: [s for s in payload["sequences"] if s["interval"] == n] for n in range(1, 6)}
        assert [len(by_interval[n]) for n in range(1, 5)] == [3] * 4
        highest = largest[:, i, j] >= np.sort(largest[:, i, j])[19]  # 24 sequences: bounds at 5, 10, 14 and 19
        assert len(by_interval[5]) == highest.sum() >= 5
        assert by_interval[5][0]["sequence_id"] == int(largest[:, i, j].argmax())
        ends = [(min(s["max_activation"] for s in part), max(s["max_activation"] for s in part))
                for part in by_interval.values()]  # fmt: skip
        assert all(high <= low for (_, high), (low, _) in pairwise(ends))
        assert payload["histogram"]["bin_values"] == [
            int(((largest[:, i, j] * 50).astype(int).clip(max=49) == n).sum()) for n in range(50)
        ]
        assert payload["statistics"] == {
            "n_samples": len(payload["sequences"]), "mean_max_activation": round(float(largest[:, i, j].mean()), 4),
        }  # fmt: skip


def test_histogram_and_tokens_add_up_what_the_examples_show(folder):
    payload = read(folder / "heads" / "L1H2.json")
    edges, bins = payload["qk_distance_histogram"]["bin_edges"], [0.0] * 13
    queries, keys = {}, {}
    for s in payload["sequences"]:
        for place, value in zip(s["attention_indices"], s["attention_values"], strict=True):
            q, k = divmod(place, s["seq_len"])
            bins[bisect.bisect_right(edges, abs(q - k)) - 1] += value
            queries[s["tokens"][q]] = queries.get(s["tokens"][q], 0) + value
            keys[s["tokens"][k]] = keys.get(s["tokens"][k], 0) + value
    np.testing.assert_allclose(payload["qk_distance_histogram"]["bin_values"], bins, atol=1e-4)
    for name, weights in (("top_query_tokens", queries), ("top_key_tokens", keys)):
        assert len(payload[name]) == min(50, len(weights))
        for entry in payload[name]:
            assert entry["weight"] == pytest.approx(weights[entry["token"]], abs=1e-4)


def test_sampling_by_hand():
    largest = np.random.default_rng(0).permutation(np.linspace(0.01, 0.99, 200))
    found = sampled(largest, [0])
    assert found == sampled(largest, [0]) != sampled(largest, [1])
    ordered = sorted(largest.tolist())
    bounds = [ordered[40 * i] for i in range(1, 5)]
    assert [interval for interval, _ in found] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 10
    assert all(interval == bisect.bisect_right(bounds, largest[row]) + 1 for interval, row in found)
    assert [row for interval, row in found if interval == 5] == np.argsort(-largest)[:10].tolist()
    assert sampled(np.array([0.5]), [0]) == [(5, 0)]
    assert len({row for _, row in found}) == len(found)


def test_sparse_keeps_eight_of_a_row_and_drops_what_is_small():
    pattern = torch.zeros(10, 10)
    pattern[9] = torch.tensor([0.3, 0.004, 0.2, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.046])
    pattern[3, 1], pattern[3, 2] = 0.996, 0.004
    places, values = sparse(pattern)
    assert places == [31, 90, 92, 93, 94, 95, 96, 97, 98]
    assert values == pytest.approx([0.996, 0.3, 0.2, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05])
