"""Streamed scans equal eager ones, are refused in a sentence where they can't be had, and leave no trace."""

import numpy as np
import pytest
import torch

import metaint
from metaint.measures.rows import mixed_rows, weights_of_rows
from metaint.models.row_masks import Unstreamable, asked_mask, row_mask
from metaint.models.streamed import streaming
from metaint.scanning.attached import attached
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build

STREAMED = [kind for kind in ("gpt2", "neox", "llama", "gemma2", "bert") if kind in available_kinds()]
SMALL = {"d_mlp": 16, "d_vocab": 60, "n_ctx": 40}
LONG = {"gpt2": "n_positions"}

if not STREAMED:
    pytest.skip("streams bridges over models of transformers", allow_module_level=True)


def long_model(kind, length):
    return build(kind, **{LONG.get(kind, "max_position_embeddings"): length})


def padded(tokens):
    """A mask with padding on either side of some sequences."""
    mask = torch.ones_like(tokens)
    mask[1, : tokens.shape[1] // 3] = 0
    mask[2, -tokens.shape[1] // 4 :] = 0
    return mask


def assert_same(streamed, eager, limit=1e-5):
    """Every variable of every group, within the limit of its largest value or of 1; a tie may fall the other way."""
    assert list(streamed) == list(eager)
    for group in eager.children:
        for name, variable in eager[group].data_vars.items():
            expected, actual = variable.values, streamed[group][name].values
            if name.startswith(("tied", "bundle_value")):  # the latter holds ties too
                np.testing.assert_allclose(actual, expected, rtol=0.05, atol=0.02, err_msg=name)
                continue
            finite = np.abs(expected[np.isfinite(expected)])
            scale = max(1.0, finite.max(initial=0))
            np.testing.assert_allclose(actual, expected, rtol=0, atol=limit * scale, err_msg=f"{group}/{name}")


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("mask", [None, padded])
def test_every_head_measure_is_the_eager_one_at_512_tokens(kind, mask):
    model = long_model(kind, 512)
    tokens = torch.randint(5, 95, (3, 256), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    given = None if mask is None else mask(tokens)
    streamed = metaint.scan(model, tokens, attention_mask=given, attention="streamed")
    assert_same(streamed, metaint.scan(model, tokens, attention_mask=given))
    assert streamed.attrs["attention_way"] == "streamed"


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("mask", [None, padded])
def test_every_other_probe_is_the_eager_one(kind, mask):
    model, tokens = build(kind), repeated_tokens(96, 45, batch=4, ids=(5, 95), seed=1)
    given = None if mask is None else mask(tokens)

    def probes():
        return [metaint.OutputProbe(positions=8), metaint.ResidualProbe()]

    streamed = metaint.scan(model, tokens, probes(), attention_mask=given, attention="streamed", batch_size=3)
    assert_same(streamed, metaint.scan(model, tokens, probes(), attention_mask=given, batch_size=3))


@pytest.mark.parametrize("kind", [kind for kind in STREAMED if kind != "bert"])
def test_inner_probe_is_the_eager_one(kind):
    model, tokens = build(kind), repeated_tokens(96, 30, batch=4, ids=(5, 95), seed=1)
    streamed = metaint.scan(model, tokens, [metaint.InnerProbe(positions=8)], attention="streamed")
    # Fidelities are quotients of small differences.
    assert_same(streamed, metaint.scan(model, tokens, [metaint.InnerProbe(positions=8)]), limit=2e-3)


@metaint.statistic
def runner_up(tile):
    """The second largest weight of the row."""
    return tile.pattern.topk(2, dim=-1).values[..., 1]


@pytest.mark.parametrize(
    "measures", [["induction"], ["previous_token", "sink_rate"], ["entropy"], ["effective_keys_l2", runner_up]]
)
def test_some_measures_are_the_eager_ones(measures):
    model, tokens = build("llama"), repeated_tokens(96, 50, batch=3, ids=(5, 95), seed=1)
    scans = [metaint.scan(model, tokens, [metaint.HeadProbe(measures)], attention=way) for way in ("streamed", "eager")]
    assert_same(*scans)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_the_number_of_rows_in_a_block_changes_nothing(rows):
    model, tokens = build("gemma2"), repeated_tokens(96, 40, batch=2, ids=(5, 95), seed=1)
    groups = []
    for each in (0, rows):
        probe = metaint.HeadProbe()
        with torch.no_grad(), attached(model, [probe], private=True, rows=each):
            model(tokens)
        groups.append(probe.to_scan())
    assert_same(*groups)


def trace(model):
    """What a streamed pass changes while it lasts."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    names = [list(each._global_mapping) for each in (AttentionInterface, AttentionMaskInterface)]
    forwards = [block.attn.__dict__.get("forward") for block in model.blocks]
    config = model.original_model.config
    return names, forwards, config._attn_implementation, [len(p._forward_hooks) for p in model.hook_dict.values()]


def test_nothing_is_left_of_a_streamed_pass_also_after_an_exception():
    model, tokens = build("llama"), repeated_tokens(96, 20, batch=2, ids=(5, 95))
    before = trace(model)
    metaint.scan(model, tokens, attention="streamed")
    assert trace(model) == before

    class Raises:
        def begin_layer(self, layer, value, queries):
            assert trace(model) != before
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), streaming(model, [Raises()]):
        model(tokens)
    assert trace(model) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda model: small_transformer(norm="pre", n_layers=1, n_heads=2, d_model=8, **SMALL),
            "over a model of tra",
        ),
        (lambda model: model.add_hook("blocks.0.attn.hook_pattern", lambda x, hook: x) or model, "a hook of yours is"),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_a_sentence_or_read_the_eager_way(change, words):
    model = change(build("llama"))
    with pytest.raises(metaint.InputError, match=words):
        metaint.scan(model, attention="streamed")
    scan = metaint.scan(model, attention="auto")
    assert scan.attrs["attention_way"] == "eager"
    assert words in scan.attrs["attention_reason"]


def test_probes_that_need_the_hooks_in_attention_say_so():
    model = build("llama")
    with pytest.raises(metaint.InputError, match=r"its HeadProbe reads blocks\.0.attn.hook_rot_q"):
        metaint.scan(model, probes=[metaint.HeadProbe(max_logit=True)], attention="streamed")
    with pytest.raises(metaint.InputError, match=r"attention is 'fast': give .eager., .streamed. or .auto."):
        metaint.scan(model, attention="fast")


def test_a_model_whose_two_ways_differ_is_read_the_eager_way():
    model = build("gpt2")
    tokens = repeated_tokens(96, 20, batch=2, ids=(5, 95))
    assert metaint.scan(model, tokens, attention="auto").attrs["attention_way"] == "streamed"
    query = model.blocks[1].attn.q.original_component  # a copy that the wrapped attention does not read
    query.weight = torch.nn.Parameter(query.weight * 2)
    scan = metaint.scan(model, tokens, attention="auto")
    assert scan.attrs["attention_way"] == "eager"
    assert "would differ from the eager way's" in scan.attrs["attention_reason"]
    assert_same(scan, metaint.scan(model, tokens))


# ---- the rows themselves ----


@pytest.mark.parametrize("sink", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_rows_are_those_of_the_plain_softmax(cap, sink):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 9, 8, generator=generator)
    hidden = torch.rand(2, 1, 5, 3, generator=generator) < 0.5
    pattern = weights_of_rows(query, key, [(slice(4, 7), hidden)], scale=0.3, cap=cap, sink=sink)
    mixed = mixed_rows(pattern, value)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)).tolist():
        scores = [0.3 * float(query[b, h, i] @ key[b, h // 2, j]) for j in range(9)]
        scores = [cap * np.tanh(score / cap) if cap else score for score in scores]
        weights = [0.0 if 4 <= j < 7 and hidden[b, 0, i, j - 4] else np.exp(score) for j, score in enumerate(scores)]
        weights = np.array(weights) / (sum(weights) + (0 if sink is None else np.exp(float(sink[h]))))
        np.testing.assert_allclose(pattern[b, h, i], weights, atol=1e-6)
        np.testing.assert_allclose(mixed[b, i, h], weights @ value[b, h // 2].double().numpy(), atol=1e-5)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("padding", [False, True])
def test_cuts_of_a_mask_are_the_mask(window, padding):
    length, real = 23, torch.ones(3, 23, dtype=torch.long)
    if padding:
        real[1, :6], real[2, 20:] = 0, 0

    def rule(batch, head, query, key):
        return (key <= query) & ((query - key < window) | (not window))

    mask = asked_mask(3, length, length, mask_function=rule, attention_mask=real if padding else None)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    expected = rule(0, 0, query, key) & real.bool()[:, None]
    for start in range(0, length, 4):
        cut = mask.cut(start, min(start + 4, length))
        seen = torch.ones(3, 1, min(4, length - start), length, dtype=torch.bool)
        seen[..., cut.stop :] = False
        for columns, hidden in cut.hidden:
            seen[..., columns] &= ~hidden
        assert torch.equal(seen[:, 0], expected[:, start : start + 4])


def test_masks_that_are_tensors_are_followed_and_a_bias_is_refused():
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    for mask in (seen, torch.zeros(2, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min), None):
        cut = row_mask(mask, True, 6, torch.device("cpu")).cut(2, 4)
        assert cut.stop == 4
        assert [columns for columns, _ in cut.hidden] == [slice(3, 4)]
    with pytest.raises(Unstreamable, match="bias"):
        row_mask(torch.full((2, 1, 6, 6), -0.5), True, 6, torch.device("cpu"))
