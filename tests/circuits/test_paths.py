"""Direct paths cut, against passes with hooks at everything a reader reads, and against TransformerLens's own."""

import functools
from typing import Any

import pytest
import torch

from metaint.circuits.experiment import batches, set_up
from metaint.circuits.metrics import next_token_loss
from metaint.circuits.paths import COMPONENTS, EMBEDDING, LOGITS, Path, cut, wiring_of, writers_of
from metaint.circuits.subject import subject_of
from metaint.models.describe import sublayers_of
from metaint.models.reading import Unavailable
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build
from tests.circuits.planted import circuit_model, traces, written_model
from tests.circuits.test_passes import SIZES, randomised

TOKENS = repeated_tokens(96, 8, batch=3, ids=(5, 95), seed=1)
KINDS = [kind for kind in available_kinds() if kind != "bert"]
OWN: dict[str, dict[str, Any]] = {
    "pre": {"norm": "pre"},
    "output": {"norm": "output"},
    "parallel": {"norm": "pre", "parallel": True},
}


@functools.cache
def model_of(kind):
    """A model that tests leave as it was."""
    if kind in OWN:
        return randomised(small_transformer(**{**SIZES, "n_layers": 2, "n_heads": 4, "d_vocab": 100}, **OWN[kind]))
    return build(kind)


def cut_by_us(model, paths, how="zero", tokens=TOKENS, batch_size=8, metric="next_token_loss"):
    experiment = set_up(subject_of(model), tokens, how, metric, batch_size=batch_size, seed=0)
    return cut(experiment, wiring_of(subject_of(model), tokens.shape[1]), paths)


def run(model, edits, names):
    """The loss by sequence, and what the named hooks carried after the edits."""
    kept = {}

    def keep(name):
        return lambda x, hook: kept.update({name: x.clone()})

    hooks = [*edits.items(), *((name, keep(name)) for name in names)]
    with torch.no_grad():
        return next_token_loss(model.run_with_hooks(TOKENS, fwd_hooks=hooks), TOKENS), kept


def contribution(model, writer):
    """What a writer adds to the stream, nothing standing in for it: what is gone from the stream without it."""
    if writer == EMBEDDING:
        return run(model, {}, ["blocks.0.hook_resid_pre"])[1]["blocks.0.hook_resid_pre"]
    layer, head = writer
    block = f"blocks.{layer}"
    if head is None:
        return run(model, {}, [f"{block}.hook_mlp_out"])[1][f"{block}.hook_mlp_out"]
    z, length = (
        f"{block}.attn.hook_z",
        next(
            (name for name in (f"{block}.ln1_post.hook_scale", f"{block}.ln1.hook_scale") if name in model.hook_dict),
            "",
        ),
    )
    kept = run(model, {}, [z, *([length] if length else [])])[1]
    written = kept[z][:, :, head] @ model.W_O[layer][head]
    name = str(model.cfg.model_name)
    if f"{block}.ln1_post.hook_scale" in model.hook_dict:  # Gemma-2: a norm of its own, at the length it has
        return written / kept[length] * (1 + model.blocks[layer].ln1_post.weight)
    if name == "small-output":
        norm = model.blocks[layer].ln1
        return (written - written.mean(-1, keepdim=True)) / kept[length] * norm.w
    return written


def by_hooks(model, path):
    """The loss with a path into a head cut: the head's inputs are read off a pass whose block reads x - c, put at
    hook_q, hook_k and hook_v for its group of heads, and the z that comes of it is put at its own place alone."""
    (layer, head), missing = path.reader, contribution(model, path.writer)
    attention = f"blocks.{layer}.attn"
    names = {letter: f"{attention}.hook_{letter}" for letter in "qkv"}
    without = {f"blocks.{layer}.hook_resid_pre": lambda x, hook: x - missing}
    # HookedTransformer and ours hook what they read; a bridge of a parallel block may read it beside the hook.
    read = run(model, without, names.values())[1]

    def put(letter):
        def edit(x, hook):
            new, at = x.clone(), head * x.shape[2] // model.cfg.n_heads
            new[:, :, at] = read[names[letter]][:, :, at]
            return new

        return edit

    edits = {names[letter]: put(letter) for letter in path.by}
    z = run(model, edits, [f"{attention}.hook_z"])[1][f"{attention}.hook_z"][:, :, head]

    def place(x, hook):
        new = x.clone()
        new[:, :, head] = z
        return new

    return run(model, {f"{attention}.hook_z": place}, [])[0]


@pytest.mark.parametrize("kind", [*KINDS, *OWN])
def test_paths_into_heads(kind):
    model = model_of(kind).eval()
    paths = [Path(writer, (1, 2), by) for writer in (EMBEDDING, (0, 1), (0, 3)) for by in COMPONENTS]
    if subject_of(model).has_mlps:
        paths += [Path((0, None), (1, 0), by) for by in COMPONENTS]
    found = cut_by_us(model, paths)
    clean = run(model, {}, [])[0].double()
    torch.testing.assert_close(found[0], clean, rtol=0, atol=2e-5)
    for path, value in zip(paths, found[1:], strict=True):
        expected = by_hooks(model, path).double()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-4, msg=lambda text, path=path: f"{path}: {text}")
        assert float((expected - clean).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", [*KINDS, *OWN])
def test_paths_to_the_logits_and_into_mlps(kind):
    model = model_of(kind).eval()
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    writers = [EMBEDDING, (0, 1), (1, 2), *([(1, None)] if subject_of(model).has_mlps else [])]
    found = cut_by_us(model, [Path(writer, LOGITS) for writer in writers])[1:]
    for writer, value in zip(writers, found, strict=True):
        missing = contribution(model, writer)
        expected, _ = run(model, {last: lambda x, hook, missing=missing: x - missing}, [])
        torch.testing.assert_close(value, expected.double(), rtol=0, atol=1e-4)
    if not subject_of(model).has_mlps:
        return
    block = "blocks.1"
    held = run(model, {}, [f"{block}.attn.hook_z"])[1][f"{block}.attn.hook_z"]
    same = [(1, 2)] if sublayers_of(model) == "sequential" else []
    writers = [EMBEDDING, (0, 1), (0, None), *same]
    found = cut_by_us(model, [Path(writer, (1, None)) for writer in writers], batch_size=7)[1:]
    for writer, value in zip(writers, found, strict=True):
        missing = contribution(model, writer)
        edits = {
            f"{block}.hook_resid_pre": lambda x, hook, missing=missing: x - missing,
            f"{block}.attn.hook_z": lambda z, hook: held,
        }
        written = run(model, edits, [f"{block}.hook_mlp_out"])[1][f"{block}.hook_mlp_out"]
        expected, _ = run(model, {f"{block}.hook_mlp_out": lambda x, hook, written=written: written}, [])
        torch.testing.assert_close(value, expected.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("kind", [kind for kind in ("gpt2", "neox", "llama") if kind in KINDS])
def test_like_transformer_lens(kind, how):
    """The exact path patching of TransformerLens 4, where a bridge supports it: q alone under grouped queries."""
    patching = pytest.importorskip("transformer_lens.patching")
    if not hasattr(patching, "get_act_patch_direct_path"):
        pytest.skip("this TransformerLens has no exact path patching")
    model, letters = build(kind), "q" if kind == "llama" else "qkv"
    experiment = set_up(subject_of(model), TOKENS, how, "next_token_loss", batch_size=8, seed=0)
    (clean, stand), *_ = batches(experiment, [slice(0, len(experiment.tokens))])
    found = cut_by_us(model, [Path((0, 3), (1, head), by) for by in letters for head in range(4)], how)
    ablated = clean.z[0].clone()
    ablated[:, :, 3] = stand.of((0, 3))
    name = "blocks.0.attn.hook_z"
    for i, by in enumerate(letters):
        theirs = patching.get_act_patch_direct_path(
            model, TOKENS, {name: ablated}, {name: clean.z[0]},
            lambda logits: next_token_loss(logits, TOKENS).mean(), 0, 3, by, verbose=False,
        )  # fmt: skip
        ours = found[1 + 4 * i : 5 + 4 * i].mean(1)
        torch.testing.assert_close(ours.float(), theirs[1], rtol=0, atol=2e-6)
        assert float((ours - found[0].mean()).abs().max()) > 1e-3


def test_the_planted_circuit_goes_through_keys():
    """0.0 reaches 1.0 by its keys and by nothing else; 1.0 reaches the logits, 0.0 does not."""
    for model, other in ((circuit_model(), (0, 3)), (written_model(), None)):
        tokens = repeated_tokens(16, 12, batch=4)
        paths = [Path((0, 0), (1, 0), by) for by in COMPONENTS] + [Path((0, 0), LOGITS), Path((1, 0), LOGITS)]
        paths += [Path(other, (1, 0), "qkv")] if other else []
        found = cut_by_us(model, paths, "mean", tokens, metric="in_context_loss")
        q, k, v, qkv, unread, read, *rest = (found[1:] - found[:1]).mean(1).tolist()
        assert k == pytest.approx(qkv, rel=1e-3)
        assert k > 2
        assert read > 2
        assert max(map(abs, (q, v, unread, *rest))) < 0.1


def test_nothing_is_lost_where_what_stands_in_is_the_same():
    model = build(KINDS[0])
    found = cut_by_us(model, [Path((0, 0), (1, 1), "qkv")], "resample", TOKENS[:1].repeat(2, 1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_batches_do_not_matter():
    model = build(KINDS[-1])
    paths = [Path((0, 0), (1, 1), "k"), Path(EMBEDDING, LOGITS), Path(EMBEDDING, (1, 1), "v")]
    for how in ("zero", "mean", "resample"):
        found = [cut_by_us(model, paths, how, batch_size=size) for size in (1, 2, 30)]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


def test_who_reads_whom():
    model = model_of("pre")
    nodes = [EMBEDDING, (0, 0), (0, 1), (0, None), (1, 0), (1, None), LOGITS]
    assert writers_of(subject_of(model), (0, 0), nodes) == [EMBEDDING]
    assert writers_of(subject_of(model), (0, None), nodes) == [EMBEDDING, (0, 0), (0, 1)]
    assert writers_of(subject_of(model), (1, 0), nodes) == nodes[:4]
    assert writers_of(subject_of(model), LOGITS, nodes) == nodes[:-1]
    assert writers_of(subject_of(model_of("parallel")), (0, None), nodes) == [EMBEDDING]
    assert writers_of(subject_of(model_of("parallel")), (1, None), nodes) == nodes[:4]


def test_models_whose_weights_are_not_trusted():
    with pytest.raises(Unavailable, match="attention_input"):
        wiring_of(subject_of(small_transformer(norm="post", **SIZES)), 8)


def test_where_patterns_can_not_be_made_only_values_are_followed():
    """Positions that enter as a bias, say; and a rotation that isn't the model's is found out."""
    model = model_of(KINDS[0])
    experiment = set_up(subject_of(model), TOKENS, "zero", "next_token_loss", batch_size=8, seed=0)
    paths = [Path((0, 0), (1, 1), by) for by in COMPONENTS]
    expected = cut_by_us(model, paths)
    for change in ({"opaque": "a bias"}, {"rotation": {1: torch.eye(8).flip(0).expand(16, 8, 8) * 2}}):
        wiring = wiring_of(subject_of(model), TOKENS.shape[1])
        for name, value in change.items():
            setattr(wiring, name, value)
        found = cut(experiment, wiring, paths)
        assert found[1:].isnan().all(1).tolist() == [True, True, False, True]
        torch.testing.assert_close(found[3], expected[3])


def test_no_trace_is_left():
    model = model_of("pre")
    paths = [Path((0, 0), (1, 1), "k"), Path((0, 0), (1, None)), Path((0, 0), LOGITS)]
    cut_by_us(model, paths)
    before = traces(model)
    cut_by_us(model, paths)
    assert traces(model) == before
