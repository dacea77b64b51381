"""What only some architectures do: heads of another shape, names that mislead, masks that are not obeyed."""

import pytest
import torch

import metaint
from metaint.errors import HookAuditError
from metaint.models.direction import is_causal
from tests.builders import build
from tests.models.architectures import bridged, needs_bridge, original
from tests.models.handmade import HandMade

TOKENS = torch.arange(40).reshape(2, 20) + 4


def plain_loss(logits, tokens):
    """Mean next-token loss of each sequence."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(-1)


def statuses(model):
    table = metaint.audit(model)
    return dict(zip(table["check"], table["status"], strict=True))


@needs_bridge
@pytest.mark.parametrize("kind", ["deepseek2", "deepseek3"])
def test_latent_attention_s_hooks_are_named_and_its_heads_ablated_whole(kind):
    """hook_z is cut into as many rows as make d_head, so that "head h" of it is half of head h // 2."""
    model, theirs = bridged(kind), original(kind)
    assert statuses(model)["head_shapes"] == "fails"
    tokens = TOKENS.repeat(1, 2)
    ours = metaint.ablate(model, tokens, ["0.1"], how="zero", metric=plain_loss)
    output = theirs.model.layers[0].self_attn.o_proj
    width = output.in_features // model.cfg.n_heads

    def without_head_1(module, inputs):
        (z,) = inputs
        z = z.clone()
        z[..., width : 2 * width] = 0
        return (z,)

    with torch.no_grad():
        before = float(plain_loss(theirs(tokens).logits, tokens).mean())
        handle = output.register_forward_pre_hook(without_head_1)
        after = float(plain_loss(theirs(tokens).logits, tokens).mean())
        handle.remove()
    assert float(ours["effect"].sel(layer=0, head=1)) == pytest.approx(after - before, abs=1e-5)


@needs_bridge
def test_a_decoder_called_bert_is_causal():
    model = bridged("modernbert-decoder")
    scan = metaint.scan(model, TOKENS)
    assert scan.attrs["attention"] == "causal"
    pattern = original("modernbert-decoder")(TOKENS, output_attentions=True).attentions[0].detach().double()
    length = torch.arange(1, TOKENS.shape[1] + 1, dtype=torch.float64)
    rows = -(pattern * pattern.clamp(min=1e-300).log()).sum(-1)[..., 1:] / length[1:].log()
    torch.testing.assert_close(
        torch.tensor(scan["heads"]["entropy"].values[0]), rows.mean((0, 2)), rtol=1e-4, atol=1e-5, check_dtype=False
    )


class _Bidirectional(HandMade):
    """Every query sees every key, though `cfg` says otherwise."""

    def __init__(self):
        super().__init__("leaky_mask")
        for block in self.blocks:
            block.attn.fault = "leaky_mask"


def test_direction_is_measured_whatever_the_configuration_says():
    assert is_causal(HandMade())
    model = _Bidirectional()
    assert not is_causal(model)
    assert statuses(model)["direction"] == "holds"
    model = HandMade()
    model.cfg.attention_dir, model.cfg.architecture = "bidirectional", "BertForMaskedLM"
    assert is_causal(model)


def test_direction_is_measured_once():
    model, passes = HandMade(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    assert is_causal(model)
    assert is_causal(model)
    assert len(passes) == 1


@needs_bridge
def test_a_model_that_does_not_obey_masks_is_refused_with_one():
    model, mask = bridged("gpt1"), torch.ones_like(TOKENS)
    sentence = (
        r"^attention_mask was given, and this model can't be trusted with one\. The hook audit's attention_mask f"
    )
    with pytest.raises(HookAuditError, match=sentence):
        metaint.scan(model, TOKENS, attention_mask=mask)
    with pytest.raises(HookAuditError, match=sentence), metaint.attach(model, metaint.HeadProbe()):
        model(TOKENS, attention_mask=mask)
    with pytest.raises(HookAuditError, match=sentence):
        metaint.HeadProbe().fwd_hooks(model, TOKENS, mask)
    assert bool(metaint.scan(model, TOKENS)["heads"]["entropy"].notnull().all())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_trusted_where_it_is_obeyed(gpt2, side):
    mask = torch.ones_like(TOKENS)
    mask[0, : 5 if side == "left" else None][-5:] = 0
    metaint.scan(gpt2, TOKENS, attention_mask=mask)


class _HalfHeads(HandMade):
    """An edit of a head at hook_z reaches half of what it writes, and half of what the next head does."""

    def __init__(self):
        super().__init__()
        attention = self.blocks[1].attn
        attention.o = torch.nn.Identity()
        shown, plain = attention.hook_z, attention.forward

        def shifted(x, *weights):
            kept = {}

            def keep(module, args, output):
                kept["clean"], kept["edited"] = args[0], output

            handle = shown.register_forward_hook(keep)
            try:
                plain(x, *weights)
            finally:
                handle.remove()
            change = kept["edited"] - kept["clean"]
            moved = change.flatten(2).roll(change.shape[-1] // 2, -1).view_as(change)
            return self.hook_written(torch.einsum("bqhd,hdm->bqm", kept["clean"] + moved, weights[-1]))

        self.hook_written = _hook_point()
        attention.o.hook_out = self.hook_written
        attention.forward = shifted
        self.setup()


def _hook_point():
    from transformer_lens.hook_points import HookPoint

    return HookPoint()


def test_an_edit_of_one_head_that_lands_elsewhere_fails():
    table = metaint.audit(_HalfHeads()).set_index("check")
    assert table.loc["output_sum", "status"] == "holds"
    assert table.loc["edit_z", "status"] == "fails"
    assert table.loc["edit_z", "where"] == "blocks.1.attn.hook_z"
    assert table.loc["edit_z", "note"] == (
        "An edit of one head at hook_z should change what that head writes, and nothing else."
    )


@needs_bridge
def test_usual_models_pass_the_new_checks():
    found = statuses(build("llama"))
    assert {found[check] for check in ("direction", "head_shapes", "attention_mask", "left_padding")} == {"holds"}
