"""What a model does on in-context bigrams, against plain loops in the terms of the reference."""

import random
from collections import defaultdict

import pytest
import torch

from metaint.labs.birth.behaviour import evaluate
from metaint.labs.birth.training import Trainer
from metaint.tasks import bigram
from metaint.toys.memory_transformer import memory_transformer

TEXT = "".join(random.Random(0).choices("abcdefghijkl ", k=3000))
COUNT, LENGTH = 40, 24


def half_trained(n_layers=2):
    """A model that has learnt something, so that no score is 0 or 1."""
    model = memory_transformer(d_vocab=13, n_ctx=LENGTH, d_model=16, n_layers=n_layers)
    trainer = Trainer(model, bigram(TEXT), length=LENGTH, batch=16, learning_rate=0.2)
    for _ in range(30):
        trainer.take_step()
    return model


@pytest.fixture(scope="module")
def sample():
    return bigram(TEXT, triggers="fixed", trigger_count=3).sample(COUNT, LENGTH, 2)


def plain(model, sample):
    """Every number of `evaluate`, one position at a time."""
    x, y, outs = sample.tokens[:, :-1], sample.tokens[:, 1:], sample.outs
    kept = {}
    layers = range(model.cfg.n_layers)
    hooks = [(f"blocks.{i}.attn.hook_pattern", lambda p, hook, i=i: kept.update({i: p[:, 0]})) for i in layers]
    with torch.no_grad():
        logits = model.run_with_hooks(x, fwd_hooks=hooks)
    counts = defaultdict(list)
    for b in range(COUNT):
        first, last = kept[0][b].tolist(), kept[model.cfg.n_layers - 1][b].tolist()
        tokens, losses = x[b].tolist(), []
        for t in range(LENGTH):
            now, after, out = tokens[t], int(y[b, t]), int(outs[b, t])
            guess, loss = int(logits[b, t].argmax()), -float(logits[b, t].log_softmax(-1)[after])
            losses.append(loss)
            counts[f"loss_{('bigram', 'first', 'later')[min(out, 2)]}"].append(loss)
            if t > 0:
                counts["previous_mass"].append(first[t][t - 1])
                counts["previous_uniform"].append(1 / (t + 1))
            if out >= 1:
                counts["accuracy_triggers"].append(guess == after)
                counts["copy_accuracy_triggers"].append(now == after)
                if t < 10:
                    counts["accuracy_start"].append(guess == after)
                if t + 1 < LENGTH:
                    back = most(first[t + 1]) == t
                    for name in ["back_to_every_trigger", *["back_to_trigger"] * (out == 1)]:
                        counts[name].append(back)
                        counts[f"{name}_uniform"].append(1 / (t + 2))
            if out >= 2:
                counts["accuracy"].append(guess == after)
                counts["copy_accuracy"].append(now == after)
                if now != after:
                    counts["accuracy_without_copies"].append(guess == after)
                look(counts, tokens, t, first, last, {"target": after, "prediction": guess}, len(layers) > 1)
        counts["in_context_learning_score"].append(losses[LENGTH - 1] - losses[LENGTH // 10 - 1])
    return {name: sum(values) / len(values) for name, values in counts.items()}


def look(counts, tokens, t, first, last, wanted, two):
    """Where the last head looks from position t, and the first from there."""
    best, keys, row = most(last[t]), range(t + 1), last[t]
    follows = [s >= 1 and tokens[s - 1] == tokens[t] for s in keys]
    counts["induction_mass"].append(sum(row[s] for s in keys if follows[s]))
    counts["induction_match"].append(follows[best])
    counts["induction_uniform"].append(sum(follows) / (t + 1))
    for name, token in wanted.items():
        counts[f"attended_{name}"].append(tokens[best] == token)
        counts[f"attended_{name}_uniform"].append(tokens[: t + 1].count(token) / (t + 1))
    if two:
        counts["looked_back_mass"].append(sum(row[s] * first[s][s - 1] for s in keys if s >= 1))
        counts["looked_back_uniform"].append(sum(1 / (t + 1) / (s + 1) for s in keys if s >= 1))
        if best > 0:
            counts["looked_back"].append(most(first[best]) == best - 1)


def most(row):
    return max(range(len(row)), key=row.__getitem__)


@pytest.mark.parametrize("layers", [1, 2])
def test_all_that_is_told_equals_plain_loops(sample, layers):
    model = half_trained(layers)
    found, expected = evaluate(model, sample), plain(model, sample)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert ("looked_back" in found) == (layers == 2)
    assert len({round(value, 4) for value in found.values()}) == len(found)  # else this told nothing apart
    shares = [v for name, v in found.items() if not name.startswith("loss_") and name != "in_context_learning_score"]
    assert all(0.01 < value < 0.99 for value in shares)
    assert not any(point._forward_hooks for point in model.hook_dict.values())


def test_attention_is_left_out_where_it_is_not_asked_for(sample):
    model = half_trained()
    whole, told = evaluate(model, sample), evaluate(model, sample, attention=False)
    assert told == pytest.approx({name: whole[name] for name in told}, rel=1e-6)
    assert {name.split("_")[0] for name in whole if name not in told} == {
        "induction", "attended", "previous", "back", "looked",
    }  # fmt: skip


def test_a_model_whose_predictions_do_not_change_learns_nothing_in_context(sample):
    """All logits alike: log(vocabulary) everywhere, and a learning score of 0."""
    model = half_trained()
    with torch.no_grad():
        model.W_U.zero_()
    found = evaluate(model, sample)
    assert found["in_context_learning_score"] == 0
    for name in ("loss_later", "loss_first", "loss_bigram"):
        assert found[name] == pytest.approx(torch.tensor(13.0).log().item())
