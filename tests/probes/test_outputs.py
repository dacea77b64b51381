"""OutputProbe against a plain version from a cache, on planted heads, and against the kinds of /heads."""

import copy

import pytest
import torch

import metaint
from metaint.errors import InputError
from metaint.measures.attention import HEAD_MEASURES, targets
from metaint.measures.outputs import Vocabulary
from metaint.measures.tile import Context
from metaint.models.describe import shape_of
from metaint.models.folded import norm_after
from metaint.models.readout import readout_of
from tests.builders import available_kinds, build

LENGTH, ALL = 12, 1000
KINDS = [measure for measure in HEAD_MEASURES if measure.form == "kind"]
PLANTED_IN = [kind for kind in ("gpt2", "neox", "llama", "gemma2", "native-gqa") if kind in available_kinds()]


def tokens_of(seed=0, batch=3):
    block = torch.randint(5, 95, (batch, LENGTH // 2), generator=torch.Generator().manual_seed(seed))
    return block.repeat(1, 2)


def cached(model, tokens):
    """What the plain version rests on, by hook, in float64."""
    found = {}

    def keeper(name):
        def keep(activation, hook):  # which may go by another name
            found[name] = activation.detach().double().clone()

        return keep

    parts = ("hook_resid_pre", "attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_resid_post")
    names = [f"blocks.{layer}.{part}" for layer in range(model.cfg.n_layers) for part in parts]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, keeper(name)) for name in names])
    return found


class Plain:
    """One head of one layer, a query at a time, with whole vectors and the whole vocabulary."""

    def __init__(self, model, tokens, cache, layer, head):
        self.tokens, self.causal = tokens, shape_of(model).causal
        self.last = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
        self.stream = cache[f"blocks.{layer}.hook_resid_pre"]
        self.pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        self.z, value = cache[f"blocks.{layer}.attn.hook_z"], cache[f"blocks.{layer}.attn.hook_v"]
        self.W_O = model.W_O[layer].detach().double()
        self.head, self.n_heads = head, len(self.W_O)
        self.vectors = value[:, :, head * value.shape[2] // self.n_heads] @ self.W_O[head]
        try:
            bias = model.b_O
        except (AttributeError, TypeError):  # as a bridge of 4.x and one of 3.x say that there is none
            bias = None
        total = torch.einsum("bqhd,hdm->bqm", self.z, self.W_O)
        self.total = total if bias is None else total + bias[layer].detach().double()
        try:
            self.after = norm_after(model, layer)
        except Exception:
            self.after = None
        self.readout = readout_of(model)

    def added(self, b, i):
        """What is added to the stream: through Gemma's norm after attention, whose length is that of the pass."""
        write = self.z[b, i, self.head] @ self.W_O[self.head]
        if self.after is None:
            return write
        whole = self.total[b, i]
        return write * self.after.gain.double() / (whole.square().mean() + self.after.eps).sqrt()

    def logits(self, b, i):
        """What the write gives to all tokens, less its mean, with the final norm frozen."""
        norm, write = self.readout.norm, self.added(b, i)
        if norm is not None:
            stream = self.last[b, i]
            if norm.kind == "layer":
                stream, write = stream - stream.mean(), write - write.mean()
            write = write / (stream.square().mean() + norm.eps).sqrt()
            write = write if norm.gain is None else write * norm.gain.double()
        logits = write @ self.readout.weight.double() * self.readout.scale
        return logits - logits.mean()

    def read(self):
        batch, length = self.tokens.shape
        sums = dict.fromkeys(("norm", "along", "across", "from_first", "energy", "queries"), 0.0)
        said = {name: [0.0] * 4 for name in ("copying", "following")}
        drain = [0.0, 0.0]
        for b in range(batch):
            lengths = self.vectors[b].norm(dim=-1)
            drain[0] += float(lengths[1:].mean() - lengths[0])
            drain[1] += float(lengths[1:].mean())
            for i in range(1, length):
                write = self.z[b, i, self.head] @ self.W_O[self.head]
                weights = self.pattern[b, self.head, i]
                sums["norm"] += float(write.norm())
                sums["from_first"] += float(weights[0] * self.vectors[b, 0] @ write)
                sums["energy"] += float(write @ write)
                sums["queries"] += 1
                stream = self.stream[b, i] / self.stream[b, i].norm()
                along = float(self.added(b, i) @ stream)
                sums["along"] += along
                sums["across"] += float((self.added(b, i) - along * stream).norm())
                logits = self.logits(b, i)
                seen = range(1, i + 1 if self.causal else length)
                after = range(1, i if self.causal else length - 1)
                for name, keys, step in (("copying", seen, 0), ("following", after, 1)):
                    weight = sum(float(weights[j]) for j in keys)
                    each = [float(logits[self.tokens[b, j + step]]) for j in keys]
                    if each:
                        said[name][0] += sum(float(weights[j]) * x for j, x in zip(keys, each, strict=True))
                        said[name][1] += weight * sum(each) / len(each)
                        said[name][2] += weight
                        said[name][3] += weight * float(logits.std(correction=0))
        found = {
            "output_norm": sums["norm"] / sums["queries"],
            "along_stream": sums["along"] / sums["queries"],
            "across_stream": sums["across"] / sums["queries"],
            "first_token_output": sums["from_first"] / sums["energy"],
            "sink_drain": drain[0] / drain[1],
        }
        for name, (at, null, weight, spread) in said.items():
            found |= {name: at / weight, f"{name}_null": null / weight}
            found |= {f"{name}_deviations": at / spread, f"{name}_deviations_null": null / spread}
        return found

    def written(self, kind):
        """The kind's weight with each key's weight times its value's length, over the row's sum."""
        context = Context.whole(self.tokens, causal=self.causal)
        keys = {}
        for b, i, j in zip(*(index.tolist() for index in targets(kind, context)), strict=True):
            keys.setdefault((b, i), []).append(j)
        rows = []
        for (b, i), places in keys.items():
            weighted = self.pattern[b, self.head, i] * self.vectors[b].norm(dim=-1)
            rows.append(float(weighted[places].sum() / weighted.sum()))
        return sum(rows) / len(rows)


def test_every_architecture_equals_the_plain_version_from_a_cache(any_model):
    tokens = tokens_of()
    cache = cached(any_model, tokens)
    found = metaint.scan(any_model, tokens, [metaint.OutputProbe(positions=ALL)], batch_size=2)["outputs"]
    says = bool(found["copying"].notnull().all())
    assert says == shape_of(any_model).causal  # BERT's norms follow its additions
    for layer in range(any_model.cfg.n_layers):
        for head in (0, any_model.cfg.n_heads - 1):
            plain = Plain(any_model, tokens, cache, layer, head)
            for name, expected in plain.read().items():
                if says or not name.startswith(("copying", "following")):
                    assert float(found[name][layer, head]) == pytest.approx(expected, rel=1e-5, abs=1e-5), name
            for kind in KINDS:
                written = float(found[f"{kind.name}_written"][layer, head])
                assert written == pytest.approx(plain.written(kind), abs=1e-5), kind.name
        norms = found["output_norm"][layer]
        z = cache[f"blocks.{layer}.attn.hook_z"][:, 1:].norm(dim=-1).mean((0, 1))
        assert found["output_share"][layer].values == pytest.approx((norms / norms.mean()).values, abs=1e-6)
        assert found["z_share"][layer].values == pytest.approx((z / z.mean()).numpy(), abs=1e-5)


def test_value_weighted_kinds_are_the_plain_ones_where_all_values_have_one_length(gpt2, monkeypatch):
    tokens = tokens_of(1, batch=4)
    real = metaint.measures.outputs.through

    def alike(vectors, weight):
        return torch.nn.functional.normalize(real(vectors, weight), dim=-1)

    monkeypatch.setattr("metaint.measures.outputs.through", alike)
    scan = metaint.scan(gpt2, tokens, [metaint.HeadProbe(), metaint.OutputProbe()])
    for kind in KINDS:
        written = scan["outputs"][f"{kind.name}_written"].values
        assert written == pytest.approx(scan["heads"][kind.name].values, abs=1e-5), kind.name


# ---- planted heads ----------------------------------------------------------------------------------------------


def attention_input(model, tokens, layer=0):
    """What the values of a layer are made of: solved from the model's own values, by least squares in float64."""
    found = {}

    def keep(activation, hook):
        found["x"] = activation.detach().double()

    names = [f"blocks.{layer}.{part}" for part in ("ln1.hook_out", "ln1.hook_normalized")]
    name = next(name for name in names if name in model.hook_dict)
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, keep)])
    return found["x"]


def planted(kind):
    """Layer 0: head 0 writes nothing, the value of position 0 is 0 for the last group of heads, and head 1 writes
    against the token that it reads, by the rank of its width."""
    model = copy.deepcopy(build(kind))
    tokens = tokens_of(2, batch=8)
    tokens[:, 0] = 7
    x, attention = attention_input(model, tokens), model.blocks[0].attn
    group = model.cfg.n_heads // (getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)
    places = range(model.cfg.n_heads - group, model.cfg.n_heads)
    W_V, W_O = attention.W_V, attention.W_O
    with torch.no_grad():
        W_O[0] = 0
        sink = torch.nn.functional.normalize(x[0, 0], dim=0).to(W_V)
        shared = len(W_V) - 1
        W_V[shared] -= torch.outer(sink, sink @ W_V[shared])
        biased = getattr(attention, "b_V", None)
        if biased is not None:
            biased[shared] = 0
        head = group if group < places[0] else 1
        columns = Vocabulary.of(readout_of(model), torch.float32).columns(tokens).double()
        left, _, right = torch.linalg.svd(torch.einsum("bpm,bpn->mn", x, columns))
        width = W_V.shape[-1]
        W_V[head // group] = left[:, :width].to(W_V)
        W_O[head] = -2 * right[:width].to(W_O)
        if biased is not None:
            biased[head // group] = 0
    return model, tokens, head, list(places)


WRITTEN = ("inactive", "copying", "suppressing")


@pytest.mark.parametrize("kind", PLANTED_IN)
def test_planted_heads_are_found_and_no_others(kind):
    model, tokens, suppressing, drained = planted(kind)
    found = metaint.scan(model, tokens, [metaint.OutputProbe(positions=ALL)])["outputs"]
    says = found["copying_deviations"] - found["copying_deviations_null"]

    def places(where):
        return [(int(layer), int(head)) for layer, head in zip(*where.values.nonzero(), strict=True)]

    for name in ("output_share", "z_share"):
        nothing = places(found[name] < 0.01)
        assert nothing == ([(0, 0)] if name == "output_share" else []), name
    assert places(found["sink_drain"] > 0.9) == [(0, head) for head in drained]
    assert found["first_token_output"].values[0, drained] == pytest.approx(0, abs=1e-5)
    assert places(says < -0.5) == [(0, suppressing)]
    assert places(says > 0.5) == []
    assert found["previous_token_written"].isnull().values[0, 0]  # no length to take a share of
    labels = metaint.label_heads(metaint.scan(model, tokens, [metaint.HeadProbe(), metaint.OutputProbe(positions=ALL)]))
    of_outputs = {(row.head, row.label) for row in labels.itertuples() if row.label in WRITTEN}
    assert of_outputs == {("0.0", "inactive"), (f"0.{suppressing}", "suppressing")}
    assert set(labels.query("head == '0.0'")["label"]) == {"inactive"}
    model.blocks[0].attn.W_O.data[suppressing] *= -1
    found = metaint.scan(model, tokens, [metaint.OutputProbe(positions=ALL)])["outputs"]
    assert places(found["copying_deviations"] - found["copying_deviations_null"] > 0.5) == [(0, suppressing)]


# ---- in other people's passes -----------------------------------------------------------------------------------


def test_weights_that_an_optimiser_changes_between_passes_are_read_again(gpt2):
    model, tokens = copy.deepcopy(gpt2), tokens_of()
    with torch.no_grad(), metaint.attach(model, probe := metaint.OutputProbe()):
        model(tokens)
        before = probe.compute()["output_norm"].clone()
        probe.reset()
        model.blocks[0].attn.W_O.mul_(2)
        model(tokens)
    after = probe.compute()["output_norm"]
    torch.testing.assert_close(after[0], 2 * before[0])


def test_weights_that_are_scaled_for_a_while_are_read_as_they_are(gpt2):
    """`scaled` puts other memory behind the parameters, which no version counter tells."""
    tokens = tokens_of()
    last = f"blocks.{gpt2.cfg.n_layers - 1}.attn"

    def is_output(name, parameter):
        return name.startswith(last) and name.split(".")[-1] in ("W_O", "weight") and (".o." in name or "W_O" in name)

    with torch.no_grad(), metaint.attach(gpt2, probe := metaint.OutputProbe()):
        gpt2(tokens)
        before = probe.compute()["output_norm"].clone()
        probe.reset()
        with metaint.scaled(gpt2, 2, is_output):
            gpt2(tokens)
    torch.testing.assert_close(probe.compute()["output_norm"][-1], 2 * before[-1])


def test_steps_that_continue_a_cache_are_left_out(gpt2):
    prompt = tokens_of(batch=2)
    with torch.no_grad(), metaint.attach(gpt2, metaint.OutputProbe()) as probe:
        gpt2.generate(prompt, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    expected = metaint.scan(gpt2, prompt, [metaint.OutputProbe()])["outputs"].to_dataset()
    for name, values in probe.to_dataset().items():
        assert values.values == pytest.approx(expected[name].values, rel=1e-4, abs=1e-5, nan_ok=True), name


def test_without_positions_nothing_is_asked_of_the_stream_and_what_heads_say_is_unknown(gpt2):
    probe = metaint.OutputProbe(["induction"], positions=0)
    found = metaint.scan(gpt2, tokens_of(), [probe])["outputs"]
    assert not any("resid" in name for name in probe.hook_names(shape_of(gpt2)))
    assert found["copying"].isnull().all()
    assert found["along_stream"].isnull().all()
    assert found["output_norm"].notnull().all()
    assert found["induction_written"].notnull().all()
    assert "previous_token_written" not in found


def test_fewer_positions_are_a_sample_and_the_rest_stays(gpt2):
    few, many = (metaint.scan(gpt2, tokens_of(), [metaint.OutputProbe(positions=n)])["outputs"] for n in (4, ALL))
    assert few["output_norm"].equals(many["output_norm"])
    assert few["induction_written"].equals(many["induction_written"])
    assert not few["copying"].equals(many["copying"])


def test_embeddings_have_no_tokens_to_speak_of(gpt2):
    if not hasattr(gpt2, "original_model"):
        pytest.skip("only bridges take embeddings as their input")
    with torch.no_grad(), metaint.attach(gpt2, metaint.OutputProbe()) as probe:
        gpt2(gpt2.embed(tokens_of()).detach())
    found = probe.to_dataset()
    assert found["copying"].isnull().all()
    assert found["along_stream"].notnull().all()


def test_what_cannot_be_weighed_or_read_is_refused(gpt2):
    with pytest.raises(
        InputError, match="kinds has 'entropy', a statistic, which no value weighs: give kinds of heads"
    ):
        metaint.OutputProbe(["entropy"])
    with pytest.raises(InputError, match="positions is -1: give 0, which leaves out what heads say, or more"):
        metaint.OutputProbe(positions=-1)
    model = copy.deepcopy(gpt2)
    metaint.OutputProbe().prepare(model)
    with torch.no_grad():
        model.blocks[1].attn.W_V.fill_(float("nan"))
    with pytest.raises(metaint.ActivationError, match=r"blocks\.1\.attn\.hook_v holds NaN or infinity"):
        metaint.scan(model, tokens_of(), [metaint.OutputProbe()])
