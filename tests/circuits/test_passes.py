"""Passes that begin where something is changed, against whole passes with hooks, on every kind of model."""

import functools
from typing import Any

import pytest
import torch

from metaint.circuits import variants as module
from metaint.circuits.clean import clean_pass
from metaint.circuits.passes import outcomes, read_by_mlp
from metaint.circuits.subject import subject_of
from metaint.circuits.trial import begins_anywhere
from metaint.circuits.variants import Variant
from metaint.models.audit import holds
from metaint.models.describe import sublayers_of
from metaint.models.reading import steady
from metaint.toys.memory_transformer import memory_transformer
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build
from tests.circuits.planted import traces
from tests.models.handmade import HandMade

TOKENS = torch.randint(4, 30, (3, 10), generator=torch.Generator().manual_seed(0))
PLACES = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.4
SIZES: dict[str, Any] = {"n_layers": 3, "n_heads": 2, "d_model": 16, "d_mlp": 32, "d_vocab": 50, "n_ctx": 32}


@torch.no_grad()
def randomised(model):
    """Every parameter drawn at random, gains about 1, so that nothing is small."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        gain = bool((parameter == 1).all())
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25 + gain)
    return model


OWN = {
    "pre": lambda: small_transformer(norm="pre", **SIZES),
    "output": lambda: small_transformer(norm="output", **SIZES),
    "post": lambda: small_transformer(norm="post", **SIZES),
    "parallel": lambda: small_transformer(norm="pre", parallel=True, **SIZES),
    "by hand": HandMade,
    "memory": lambda: memory_transformer(d_vocab=30, n_ctx=32, d_model=32),
    "memory with MLPs": lambda: memory_transformer(
        d_vocab=30, n_ctx=32, d_model=32, feed_forward="linear", first_feed_forward="mlp"
    ),
}
KINDS = [*available_kinds(), *OWN]


@functools.cache
def shared(kind):
    """A model that tests leave as it was."""
    return model_of(kind)


def model_of(kind):
    return randomised(OWN[kind]()) if kind in OWN else build(kind)


def plain(model, edits):
    """All logits of a whole pass with hooks that put each value at its hook."""
    hooks = []
    for layer, head, value in edits:
        name = f"blocks.{layer}.hook_mlp_out" if head is None else f"blocks.{layer}.attn.hook_z"

        def edit(activation, hook, head=head, value=value):
            new = activation.clone()
            new[(slice(None), slice(None)) + (() if head is None else (head,))] = value
            return new

        hooks.append((name, edit))
    with torch.no_grad():
        return model.run_with_hooks(TOKENS, fwd_hooks=hooks)


def variant_of(edits):
    z, mlp = {}, {}
    for layer, head, value in edits:
        if head is None:
            mlp[layer] = value
        else:
            z.setdefault(layer, {})[head] = value
    return Variant(z, mlp)


def edits_of(model, clean):
    """Single heads, heads of several layers, all of one, numbers for each position, and MLPs."""
    zero, last = torch.zeros(()), int(model.cfg.n_heads) - 1
    other = torch.randn(clean.z[1][:, :, 0].shape, generator=torch.Generator().manual_seed(2))
    found = [[(0, 0, zero)], [(0, last, zero + 1)], [(1, 0, other)], [(1, last, other[:1, :1])]]
    found += [[(0, 0, zero), (1, last, other)], [(0, 0, zero), (0, last, zero)]]
    every = range(last + 1)
    found += [[(0, 0, zero), *((1, head, other + head) for head in every)]]
    found += [[(layer, head, zero) for layer in (0, 1) for head in every]]
    if clean.mlp:
        mean = clean.mlp[1].mean((0, 1))
        found += [[(0, None, mean)], [(1, None, mean)], [(0, 0, zero), (0, None, mean), (1, None, mean)]]
    return found


@pytest.mark.parametrize("places", [PLACES, None], ids=["places", "everywhere"])
@pytest.mark.parametrize("kind", KINDS)
def test_like_whole_passes(kind, places):
    model = shared(kind)
    writes = sublayers_of(model) != "attention" and holds(model, "residual")
    with steady(model):
        clean = clean_pass(subject_of(model), TOKENS, places, mlps=writes)
        cases = edits_of(model, clean)
        expected = [plain(model, edits) for edits in cases]
        assert all(float((some - plain(model, [])).abs().max()) > 1e-3 for some in expected)
        for rows in (3, 7):
            for anywhere in (True, False) if kind != "bert" else (False,):
                found = dict(outcomes(clean, [variant_of(case) for case in cases], rows, anywhere))
                assert sorted(found) == list(range(len(cases)))
                for i, logits in enumerate(expected):
                    logits = logits if places is None else logits[places]
                    torch.testing.assert_close(found[i], logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])
def test_every_kind_can_begin_in_the_middle(kind):
    assert begins_anywhere(subject_of(shared(kind))) == ""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])
def test_later_layers_attend_as_before(kind):
    """Against the definition: the clean pattern times what are now the values, at every later layer."""
    model = shared(kind)
    group = model.cfg.n_heads // (getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)
    patterns, values = {}, {}

    def forced(z, hook):
        layer = int(hook.name.split(".")[1])
        if layer == 0:
            z = z.clone()
            z[:, :, 0] = 0
            return z
        return torch.einsum("bhqk,bkhd->bqhd", patterns[layer], values[layer].repeat_interleave(group, 2))

    names = [f"blocks.{layer}.attn" for layer in range(model.cfg.n_layers)]
    with steady(model):
        first = [
            (f"{name}.hook_pattern", lambda x, hook: patterns.update({int(hook.name.split(".")[1]): x}))
            for name in names
        ]
        model.run_with_hooks(TOKENS, fwd_hooks=first)
        hooks = [(f"{name}.hook_v", lambda x, hook: values.update({int(hook.name.split(".")[1]): x})) for name in names]
        expected = model.run_with_hooks(TOKENS, fwd_hooks=[*hooks, *((f"{name}.hook_z", forced) for name in names)])
        clean = clean_pass(subject_of(model), TOKENS, None, patterns=True)
        zero = Variant({0: {0: torch.zeros(())}})
        for anywhere in (True, False):
            for _, found in outcomes(clean, [zero, zero], 6, anywhere, preserve=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        free = next(iter(outcomes(clean, [zero], 6, True)))[1]
    assert kind == "by hand" or float((free - expected).abs().max()) > 1e-6


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "attn-only" not in kind and kind not in ("bert", "post", "by hand", "memory")]
)
def test_what_an_mlp_reads(kind):
    """Adding to the stream before a block what leaves its attention as it was, and nothing, changes its MLP alone."""
    model = shared(kind)
    with steady(model):
        clean = clean_pass(subject_of(model), TOKENS, None, mlps=True)
        change = torch.randn(clean.streams[1].shape, generator=torch.Generator().manual_seed(3))
        same, other = read_by_mlp(clean, 1, [clean.streams[1], clean.streams[1] + change])
        torch.testing.assert_close(same, clean.mlp[1], rtol=1e-5, atol=1e-5)
        assert float((other - same).abs().max()) > 1e-4
        # What is written by hand: the block's own MLP on a stream that holds the change.
        kept = {}
        hooks = [
            ("blocks.1.hook_resid_pre", lambda x, hook: x + change),
            ("blocks.1.attn.hook_z", lambda z, hook: clean.z[1]),
            ("blocks.1.hook_mlp_out", lambda x, hook: kept.update(written=x.clone())),
        ]
        model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    torch.testing.assert_close(other, kept["written"], rtol=1e-5, atol=1e-5)


# ---- no trace ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anywhere", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])
def test_no_trace_is_left_nor_after_an_exception(kind, anywhere, monkeypatch):
    model = shared(kind)
    model(TOKENS)
    begins_anywhere(subject_of(model))
    before = traces(model)
    variants = [Variant({layer: {0: torch.zeros(())}}) for layer in (0, 1)]
    with steady(model):
        clean = clean_pass(subject_of(model), TOKENS, PLACES, patterns=True)
        list(outcomes(clean, variants, 6, anywhere, preserve=True))
    assert traces(model) == before

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(module, "edit_z", fail)
    monkeypatch.setattr("metaint.circuits.passes._attended", fail)  # in its place where a layer has one head
    both = Variant({0: {0: torch.zeros(())}, 1: {0: torch.zeros(())}})
    with steady(model), pytest.raises(RuntimeError, match="on purpose"):
        list(outcomes(clean, [both], 6, anywhere))
    assert traces(model) == before


def test_a_block_with_a_forward_of_its_own_keeps_it():
    model = model_of("pre")
    block = model.blocks[0]
    own = type(block).forward.__get__(block)
    block.__dict__["forward"] = own
    with steady(model):
        clean = clean_pass(subject_of(model), TOKENS, None)
        list(outcomes(clean, [Variant({1: {0: torch.zeros(())}})], 6, True))
    assert block.__dict__["forward"] is own


# ---- whether passes can begin in the middle ----------------------------------------------------------------------


def test_hooks_on_the_model_run_in_whole_passes():
    model = model_of("pre")
    assert begins_anywhere(subject_of(model)) == ""
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: None)]):
        assert begins_anywhere(subject_of(model)).startswith("hooks are on the model")
    assert begins_anywhere(subject_of(model)) == ""


def test_a_model_that_looks_back_past_the_stream_is_found_out():
    """A block that reads what an earlier one left in a module, beside the stream."""
    model = model_of("pre")
    kept = {}
    model.blocks[0].register_forward_hook(lambda module, args, output: kept.update(first=output.detach()))
    model.blocks[2].register_forward_hook(lambda module, args, output: output + kept["first"][: len(output)] * 3)
    assert "gives other logits" in begins_anywhere(subject_of(model))


def test_a_model_that_will_not_be_stacked_is_found_out():
    model = model_of("pre")

    def refuse(module, args):
        if len(args[0]) > 2:
            raise ValueError("too many sequences")

    holds(model, "edit_mlp")  # before it refuses
    model.embed.register_forward_pre_hook(refuse)
    assert (
        begins_anywhere(subject_of(model)) == "a pass that begins in the middle fails (ValueError: too many sequences)"
    )
