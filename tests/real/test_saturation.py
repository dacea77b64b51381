"""`SaturationProbe` at kappa 4 against SmolLM2 with every query's weights multiplied by 4."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import metaint
from metaint.measures.saturation import TIE, sharpened

pytestmark = pytest.mark.real

KAPPA = 4


@pytest.fixture(scope="module")
def sharp(reference, tokens):
    """Hugging Face's pass with every score times kappa."""
    with reference.sharpened(KAPPA):
        return reference(tokens)


@pytest.fixture(scope="module")
def read(smollm2, tokens):
    """The probe's `/saturation`, and the patterns that the copy at kappa 4 had before it was sharpened."""
    patterns = []

    def keep(pattern, hook):
        patterns.append(pattern[len(tokens) :].clone())

    hooks = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(smollm2.cfg.n_layers)]
    probe = metaint.SaturationProbe((1, KAPPA), positions=tokens.shape[1])
    with torch.no_grad(), metaint.attach(smollm2, probe):
        smollm2.run_with_hooks(probe.stacked(tokens), fwd_hooks=hooks)
    return probe.to_dataset(), patterns


def test_the_copy_s_patterns_are_those_of_the_sharper_model(read, sharp):
    _, patterns = read
    assert len(patterns) == len(sharp.patterns)
    for layer, pattern in enumerate(patterns):
        difference = (sharpened(pattern, KAPPA) - sharp.patterns[layer]).abs()
        # Four times the scores enlarge rounding from layer to layer: 1e-5 after the first, 4e-3 in the last.
        assert difference.max() < (1e-4 if layer < 10 else 1e-2), layer
        assert difference.mean() < 1e-5, layer


def test_streams_are_those_of_the_sharper_model(read, plain, sharp):
    found = read[0].sel(scale=KAPPA)
    cosine = (normalize(plain.streams.double(), dim=-1) * normalize(sharp.streams.double(), dim=-1)).sum(-1)[1:]
    np.testing.assert_allclose(found["similarity"], cosine[:, :, 1:].mean((1, 2)), atol=1e-4)
    np.testing.assert_allclose(found["similarity_first"], cosine[:, :, 0].mean(1), atol=1e-4)
    assert found["similarity"].min() < 0.95  # the sharper model is another one


def test_predictions_are_those_of_the_sharper_model(read, plain, sharp, tokens):
    found = read[0].sel(scale=KAPPA)
    log_p, log_q = (part.logits[:, 1:-1].double().log_softmax(-1) for part in (plain, sharp))
    targets = tokens[:, 2:, None]
    wanted = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(),
        "loss_change": (log_p - log_q).gather(-1, targets).mean(),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-3, err_msg=name)
    assert found["kl"] > 0.1


def test_the_distance_to_saturated_is_that_of_the_first_sharper_layer(read, sharp):
    """In the first layer nothing has propagated yet, so the sharper model's own pattern tells the distance."""
    pattern = sharp.patterns[0].double()
    largest = pattern.max(-1, keepdim=True).values
    tied = (pattern >= largest * math.exp(-TIE * KAPPA)).sum(-1)
    others = 1 - tied * largest[..., 0]
    found = read[0]["total_variation"].sel(scale=KAPPA, layer=0)
    np.testing.assert_allclose(found, others[..., 1:].mean((0, 2)), atol=1e-3)


def test_kappa_one_is_the_model_itself(read):
    found = read[0].sel(scale=1)
    np.testing.assert_allclose(found["similarity"], 1, atol=1e-6)
    np.testing.assert_allclose(found["kl"], 0, atol=1e-6)
