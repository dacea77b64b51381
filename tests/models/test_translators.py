"""The translators of a tuned lens as affine maps: with or without the library, what the lens itself would answer."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from metaint.errors import InputError
from metaint.models import translators
from metaint.models.translators import affine_translators
from tests.builders import D_MODEL, N_LAYERS, available_kinds, build

LAYERS, WIDTH = 3, 5


class StandIn(nn.Module):
    """What a TunedLens is to us: its translators, and how it applies them."""

    def __init__(self, layers=LAYERS, width=WIDTH, bias=True, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer_translators = nn.ModuleList(nn.Linear(width, width, bias, dtype=dtype) for _ in range(layers))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def transform_hidden(self, hidden, layer):
        return hidden + self.layer_translators[layer](hidden)


def rows(width=WIDTH):
    return torch.randn(2, 4, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_a_lens_is_applied_as_it_applies_itself(bias):
    lens = StandIn(bias=bias)
    found = affine_translators(lens, LAYERS, WIDTH)
    assert len(found) == LAYERS
    for layer, (matrix, offset) in enumerate(found):
        assert matrix.shape == (WIDTH, WIDTH)
        assert offset.shape == (WIDTH,)
        assert torch.allclose(rows() @ matrix + offset, lens.transform_hidden(rows(), layer), atol=1e-5)
        assert not matrix.requires_grad
        assert not offset.requires_grad


def test_an_untrained_lens_is_the_identity():
    pairs = [(torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH))] * LAYERS
    for matrix, bias in affine_translators(pairs, LAYERS, WIDTH):
        assert torch.equal(matrix, torch.eye(WIDTH))
        assert not bias.any()


def test_pairs_are_taken_as_they_are():
    lens = StandIn()
    pairs = [(linear.weight.T, linear.bias) for linear in lens.layer_translators]
    for sequence in (pairs, tuple(pairs), lens.layer_translators, list(lens.layer_translators)):
        found = affine_translators(sequence, LAYERS, WIDTH)
        expected = affine_translators(lens, LAYERS, WIDTH)
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(found, expected, strict=True))


def test_the_lens_is_not_shared():
    lens = StandIn()
    before = [parameter.detach().clone() for parameter in lens.parameters()]
    for matrix, bias in affine_translators(lens, LAYERS, WIDTH):
        matrix.zero_()
        bias.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, lens.parameters(), strict=True))


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_half_precision_is_widened(dtype, wide):
    for matrix, bias in affine_translators(StandIn(dtype=dtype), LAYERS, WIDTH):
        assert matrix.dtype == bias.dtype == wide


def square(width=WIDTH):
    return torch.zeros(width, width)


@pytest.mark.parametrize(
    ("lens", "sentence"),
    [
        (StandIn(layers=2), "the lens has 2 translators, and the model 3 layers: one for each."),
        (
            StandIn(width=4),
            "the lens has a matrix [4, 4] and a bias [4] for layer 0, and the model's width is 5: they must be "
            "[5, 5] and [5].",
        ),
        (
            [(square(), torch.zeros(WIDTH)), (square(), torch.zeros(2)), (square(), torch.zeros(WIDTH))],
            "the lens has a matrix [5, 5] and a bias [2] for layer 1, and the model's width is 5: they must be "
            "[5, 5] and [5].",
        ),
        (
            [square()] * LAYERS,
            "the lens has a Tensor for layer 0: give an nn.Linear or a pair of tensors (matrix, bias).",
        ),
        (
            [(square(), None)] * LAYERS,
            "the lens has a tuple for layer 0: give an nn.Linear or a pair of tensors (matrix, bias).",
        ),
        (
            torch.zeros(LAYERS, WIDTH, WIDTH),
            "lens is a Tensor: give a TunedLens, a folder it was saved to, or for each layer an nn.Linear or a pair "
            "(matrix, bias).",
        ),
        (
            7,
            "lens is a int: give a TunedLens, a folder it was saved to, or for each layer an nn.Linear or a pair "
            "(matrix, bias).",
        ),
    ],
)
def test_what_does_not_fit(lens, sentence):
    with pytest.raises(InputError) as caught:
        affine_translators(lens, LAYERS, WIDTH)
    assert str(caught.value) == sentence


def test_a_path_that_is_no_saved_lens(tmp_path):
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(InputError) as caught:
            affine_translators(path, LAYERS, WIDTH)
        assert str(caught.value) == (
            f"lens is {str(tmp_path)!r}, which has no config.json: give a folder that tuned-lens saved a lens to "
            f"(config.json and params.pt)."
        )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"which has no params\.pt: give a folder"):
        affine_translators(tmp_path, LAYERS, WIDTH)


def test_a_folder_needs_the_library(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "params.pt").write_bytes(b"")
    monkeypatch.setattr(translators, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        affine_translators(tmp_path, LAYERS, WIDTH)
    assert str(caught.value) == (
        f"lens is the folder {str(tmp_path)!r}, and tuned-lens, which reads it, isn't installed: "
        f"pip install tuned-lens."
    )


def real_lens(layers, width):
    """A lens of the real library with random translators; its unembedding is a stand-in, as we need none."""
    lenses = pytest.importorskip("tuned_lens.nn.lenses")
    unembed = SimpleNamespace(unembedding=nn.Linear(width, 2), unembedding_hash=lambda: "a hash")
    lens = lenses.TunedLens(unembed, lenses.TunedLensConfig("none", width, layers))
    lens.layer_translators.load_state_dict(StandIn(layers, width).layer_translators.state_dict())
    return lens


def test_the_real_library(tmp_path, caplog):
    lens = real_lens(LAYERS, WIDTH)
    lens.save(tmp_path)
    state = torch.get_rng_state()
    for source in (lens, tmp_path, str(tmp_path)):
        for layer, (matrix, bias) in enumerate(affine_translators(source, LAYERS, WIDTH)):
            assert torch.allclose(rows() @ matrix + bias, lens.transform_hidden(rows(), layer), atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not caplog.records
    with pytest.raises(InputError, match="the lens has 3 translators, and the model 4 layers"):
        affine_translators(tmp_path, 4, WIDTH)


def test_a_damaged_lens_of_the_real_library(tmp_path):
    lens = real_lens(LAYERS, WIDTH)
    lens.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"which tuned-lens can't read \(RuntimeError: .*\): save it anew\.$"):
        affine_translators(tmp_path, LAYERS, WIDTH)
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(InputError, match=r"which tuned-lens can't read \(JSONDecodeError: "):
        affine_translators(tmp_path, LAYERS, WIDTH)


class Arbitrary:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_but_tensors_is_unpickled(tmp_path, capsys):
    real_lens(LAYERS, WIDTH).save(tmp_path)
    torch.save({"0.weight": Arbitrary()}, tmp_path / "params.pt")
    with pytest.raises(InputError, match=r"which tuned-lens can't read \(UnpicklingError: "):
        affine_translators(tmp_path, LAYERS, WIDTH)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.skipif("gpt2" not in available_kinds(), reason="needs a bridge over a Hugging Face model")
@torch.no_grad()
def test_translator_i_is_for_the_stream_before_block_i():
    """tuned-lens trains translator i on `hidden_states[:-1][i]`: the same numbers as our `hook_resid_pre`."""
    from transformers import AutoModelForCausalLM

    from tests.builders import hf_directory

    lens = StandIn(N_LAYERS, D_MODEL)
    tokens = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(2))
    theirs = AutoModelForCausalLM.from_pretrained(hf_directory("gpt2")).eval()
    streams = theirs(tokens, output_hidden_states=True).hidden_states[:-1]
    assert len(streams) == N_LAYERS
    _, cache = build("gpt2").run_with_cache(tokens)
    for layer, (matrix, bias) in enumerate(affine_translators(lens, N_LAYERS, D_MODEL)):
        ours = cache[f"blocks.{layer}.hook_resid_pre"] @ matrix + bias
        assert torch.allclose(ours, lens.transform_hidden(streams[layer], layer), atol=1e-4)
