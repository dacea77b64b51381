"""`/inner` on SmolLM2 against a logit lens of Hugging Face's final norm and head on its hidden states."""

import numpy as np
import pytest
import torch

import metaint

pytestmark = pytest.mark.real

POSITIONS = 8


@pytest.fixture(scope="module")
def inner(smollm2, tokens):
    return metaint.scan(smollm2, tokens, [metaint.InnerProbe(POSITIONS)], batch_size=3)["inner"].to_dataset()


@pytest.fixture(scope="module")
def places(inner, tokens):
    """Sequence and position of each sample, as the scan tells."""
    sequence = torch.arange(len(tokens)).repeat_interleave(POSITIONS)
    position = torch.from_numpy(inner["token_position"].values)
    assert position.view(len(tokens), -1).diff(dim=1).min() > 0
    assert position.min() > 0
    assert (tokens[sequence, position].numpy() == inner["token"].values).all()
    return sequence, position


def test_readings_by_layer_are_a_logit_lens(inner, places, plain, reference, tokens):
    sequence, position = places
    targets = tokens[sequence, position + 1]
    assert (targets.numpy() == inner["target"].values).all()
    final = reference.lens(plain.streams[-1][sequence, position]).double()
    for layer, stream in enumerate(plain.streams):
        log_p = reference.lens(stream[sequence, position]).double()
        at_target = log_p.gather(1, targets[:, None])
        loss, rank = -at_target[:, 0], (log_p > at_target).sum(1) + 1
        wanted = {
            "loss": loss.mean(),
            "target_rank": rank.double().log().mean().exp(),
            "top1": (rank == 1).double().mean(),
            "prediction_entropy": torch.special.entr(log_p.exp()).sum(1).mean(),
            "kl_to_final": (final.exp() * (final - log_p)).sum(1).mean(),
        }
        for name, value in wanted.items():
            np.testing.assert_allclose(inner[name][layer], value, rtol=1e-4, atol=1e-4, err_msg=f"{name}, {layer}")
        np.testing.assert_allclose(inner["token_loss"][:, layer], loss, rtol=1e-4, atol=1e-4)


def test_the_last_loss_is_the_model_s_own(inner, places, plain, tokens):
    sequence, position = places
    targets = tokens[sequence, position + 1]
    loss = torch.nn.functional.cross_entropy(plain.logits[sequence, position].double(), targets)
    np.testing.assert_allclose(inner["loss"][-1], loss, rtol=1e-4)
    assert float(loss) < float(inner["loss_null"][-1]) - 1  # a language model: it expects what comes
