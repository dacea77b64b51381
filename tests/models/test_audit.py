"""The hook audit: what holds on each kind of model, what it says of a broken one, and that it leaves no trace."""

import math
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

import metaint
from metaint.errors import HookAuditError, InputError, ModelError
from metaint.models.audit import CHECKS, audit, require
from tests.builders import available_kinds, build
from tests.models.handmade import HandMade

MAJOR = int(version("transformer-lens").split(".")[0])
KINDS = available_kinds()

# Rotated queries and keys are computed inside the model, past any hook (hook_rot_q exists and never fires).
_ROTATION_UNSEEN = {"pattern_from_scores": "unavailable"}
# TransformerLens 3 shows the pattern after the model has used it; 4 hands it in before.
_PATTERN_LATE = {"edit_pattern": "fails", "pattern_order": "fails"} if MAJOR == 3 else {}
# BERT's pattern is shown late in both, and its norms follow the additions.
_BERT = {
    "pattern_causal": "unavailable",
    "attention_input": "unavailable",
    "residual": "unavailable",
    "edit_pattern": "fails",
    "pattern_order": "fails",
}
_NO_FINAL_NORM = {"final_norm": "unavailable"}
_NO_MLPS = {"edit_mlp": "unavailable"}
_NO_MASKS = dict.fromkeys(("attention_mask", "left_padding"), "unavailable")
# Between BERT's last block and its unembedding stands a dense layer, whose output ln_final normalises.
_BERT_HEAD = {"final_norm": "fails", "unembedding": "fails"}
EXCEPTIONS: dict[str, dict[str, str]] = {
    "native-attn-only": {**_PATTERN_LATE, **_NO_FINAL_NORM, **_NO_MLPS},
    "hooked-attn-only": {**_NO_FINAL_NORM, **_NO_MLPS},
    "native-mlp-ln": _PATTERN_LATE,
    "native-gqa": _PATTERN_LATE,
    "native-rms-rotary": {**_PATTERN_LATE, **_ROTATION_UNSEEN},
    "neox": _ROTATION_UNSEEN,
    "bert": {**_BERT, **_BERT_HEAD},
}


def statuses(model: Any) -> dict[str, str]:
    table = audit(model)
    return dict(zip(table["check"], table["status"], strict=True))


def expected(kind: str) -> dict[str, str]:
    return {**dict.fromkeys(CHECKS, "holds"), **EXCEPTIONS.get(kind, {})}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_kind_has_its_statuses_in_any_dtype(kind: str, dtype: torch.dtype) -> None:
    # Their softmax is in float32 whatever the dtype, and float64's smallest number, which hides keys, is -inf there.
    in_double = {"left_padding": "fails"} if kind in ("llama", "gemma2") and dtype == torch.float64 else {}
    assert statuses(build(kind).to(dtype)) == {**expected(kind), **in_double}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("hooked")])
def test_compatibility_mode_changes_no_status(kind: str) -> None:
    model = build(kind)
    model.enable_compatibility_mode(disable_warnings=True)
    assert statuses(model) == expected(kind)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gemma2", {"sliding_window": 4}),
        ("gemma2", {"query_pre_attn_scalar": 3}),
        ("hooked", {"positional_embedding_type": "shortformer"}),
        ("hooked", {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global"]}),
        ("hooked", {"use_attn_scale": False}),
        ("hooked", {"scale_attn_by_inverse_layer_idx": True}),
        ("hooked", {"attn_scores_soft_cap": 2.0}),
        ("hooked", {"parallel_attn_mlp": True}),
    ],
)
def test_what_the_configuration_asks_for_is_understood(kind: str, overrides: dict[str, Any]) -> None:
    if kind not in KINDS:
        pytest.skip(f"this TransformerLens has no {kind}")
    assert statuses(build(kind, **overrides)) == expected(kind)


def test_a_hooked_transformer_with_norms_before_and_after_hides_its_output() -> None:
    if "hooked-rotary" not in KINDS:
        pytest.skip("this TransformerLens has no HookedTransformer")
    found = statuses(build("hooked-rotary", use_normalization_before_and_after=True))
    assert found == {**expected("hooked-rotary"), "output_sum": "unavailable"}


def test_table_has_one_row_a_check_and_its_columns() -> None:
    table = audit(HandMade())
    assert list(table.columns) == ["check", "status", "difference", "where", "note"]
    assert list(table["check"]) == list(CHECKS)
    assert (table["status"][:-3] == "holds").all()
    assert table["note"].iloc[-3] == "The hook blocks.0.hook_mlp_out never fired."
    assert table["note"].iloc[-1] == "The model takes no attention_mask."
    assert all(note.endswith(".") for note in table["note"])


@pytest.mark.parametrize(
    ("fault", "changed"),
    [
        ("late_pattern", {"edit_pattern": "fails"}),
        ("late_z", {"edit_z": "fails"}),
        ("late_value", {"edit_value": "fails"}),
        ("flat_pattern", {"pattern_rows": "fails", "pattern_from_scores": "fails"}),
        ("leaky_mask", {"pattern_causal": "fails", "pattern_from_scores": "fails", "direction": "fails"}),
        (
            "silent_z",
            dict.fromkeys(("pattern_order", "head_shapes", "value_mix", "output_sum", "edit_z"), "unavailable"),
        ),
    ],
)
def test_a_fault_in_one_layer_is_found_there(fault: str, changed: dict[str, str]) -> None:
    model = HandMade(fault)
    assert statuses(model) == {**dict.fromkeys(CHECKS, "holds"), **_NO_MLPS, **_NO_MASKS, **changed}
    table = audit(model).set_index("check")
    assert all(table.loc[check, "where"].startswith("blocks.1.") for check in changed if check != "direction")


def test_a_pattern_hook_that_never_fires_fails_and_is_named() -> None:
    table = audit(HandMade("silent_pattern")).set_index("check")
    assert table.loc["pattern_fires", "status"] == "fails"
    assert table.loc["pattern_fires", "note"] == "The hook blocks.1.attn.hook_pattern never fired."
    for check in ("pattern_rows", "pattern_causal", "pattern_from_scores", "value_mix", "edit_pattern"):
        assert table.loc[check, "status"] == "unavailable"
        assert table.loc[check, "where"] == "blocks.1.attn.hook_pattern"


def test_not_a_number_never_holds() -> None:
    found = statuses(HandMade("not_a_number"))
    failing = {check for check, status in found.items() if status == "fails"}
    assert failing >= {"value_mix", "output_sum", "residual"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("letter", ["Q", "K", "V"])
def test_weights_in_the_wrong_orientation_are_found(kind: str, letter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    right = getattr(model, f"W_{letter}").clone()
    layers, heads, d_model, d_head = right.shape
    wrong = right.permute(0, 1, 3, 2).reshape(layers, heads, d_model, d_head)
    monkeypatch.setattr(type(model), f"W_{letter}", property(lambda self: wrong))
    check = {"Q": "weights_query", "K": "weights_key", "V": "weights_value"}[letter]
    folded = "fails" if expected(kind)["attention_input"] == "holds" else "unavailable"
    assert statuses(model) == {**expected(kind), check: "fails", "attention_input": folded}
    with pytest.raises(HookAuditError, match=rf"^The hook audit's {check} fails at W_{letter}\[[01]\] \(diff"):
        require(model, [check])


def test_a_transposed_output_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(KINDS[0])
    wrong = model.W_O.transpose(2, 3).reshape(model.W_O.shape)
    monkeypatch.setattr(type(model), "W_O", property(lambda self: wrong))
    assert statuses(model) == {**expected(KINDS[0]), "output_sum": "fails"}


def test_require_passes_what_holds_and_says_what_fails() -> None:
    require(HandMade(), [check for check in CHECKS if check not in (*_NO_MLPS, *_NO_MASKS)])
    with pytest.raises(HookAuditError) as error:
        require(HandMade("late_z"), ["pattern_rows", "edit_z"])
    assert str(error.value) == (
        "The hook audit's edit_z fails at blocks.1.attn.hook_z (difference 0): "
        "An edit at hook_z should change the logits."
    )
    with pytest.raises(HookAuditError) as error:
        require(HandMade("silent_pattern"), ["value_mix"])
    assert str(error.value) == (
        "The hook audit's value_mix can't be checked at blocks.1.attn.hook_pattern: "
        "The hook blocks.1.attn.hook_pattern never fired."
    )


def test_require_refuses_unknown_checks() -> None:
    with pytest.raises(InputError, match=r"^checks has 'pattern_sum': name checks of the audit \(patt"):
        require(HandMade(), ["pattern_sum"])


class _Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model: HandMade) -> None:
        self.count = 0
        model.blocks[0].register_forward_pre_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


def test_few_passes_and_only_those_needed() -> None:
    model = HandMade()
    passes = _Passes(model)
    require(model, ["pattern_rows", "value_mix"])
    require(model, ["pattern_rows"])
    assert passes.count == 1
    require(model, ["edit_z"])
    assert passes.count == 2
    audit(model)
    audit(model)
    assert passes.count == 5
    audit(model, refresh=True)
    assert passes.count == 10


def trace(model: Any) -> dict[str, Any]:
    """All that an audit could leave behind."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    return {
        "hooks": [(len(p._forward_hooks), len(p.fwd_hooks), len(p.bwd_hooks)) for p in points],
        "ctx": [dict(p.ctx) for p in points],
        "training": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "rng": torch.random.get_rng_state().tolist(),
        "grad_enabled": torch.is_grad_enabled(),
        "level": model.context_level,
    }


def _mixed_mode(model: Any) -> None:
    model.train()
    model.blocks[1].attn.training = False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raises", [False, True])
def test_no_trace_is_left(kind: str, raises: bool) -> None:
    model = build(kind)
    calls: list[str] = []
    model.add_hook("blocks.0.attn.hook_pattern", lambda pattern, hook: calls.append(hook.name))
    model.add_hook("blocks.1.attn.hook_z", lambda z, hook: z * 0)
    _mixed_mode(model)
    before, weights = trace(model), {k: v.clone() for k, v in model.state_dict().items()}
    if raises:
        handle = model.blocks[1].register_forward_pre_hook(_refuse)
        with pytest.raises(ModelError, match=r"^The hook audit's forward pass failed: OSError: no$"):
            audit(model)
        handle.remove()
    else:
        assert statuses(model) == expected(kind), "dropout or a caller's hook got in the way"
    assert calls == []
    assert trace(model) == before
    after = model.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def _refuse(*_: Any) -> None:
    raise OSError("no")


def test_callers_hooks_work_and_come_off_after_an_audit() -> None:
    model = HandMade()
    calls: list[Tensor] = []
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: calls.append(z))]):
        audit(model)
        assert calls == []
        model(torch.tensor([[1, 2]]))
        assert len(calls) == 1
    model(torch.tensor([[1, 2]]))
    assert len(calls) == 1


def test_the_edits_report_the_weakest_layer() -> None:
    model = HandMade()
    with torch.no_grad():
        model.W_O[0] *= 1e-3
    row = audit(model).set_index("check").loc["edit_z"]
    assert row["status"] == "holds"
    assert row["where"] == "blocks.0.attn.hook_z"
    assert 0 < row["difference"] < 1
    assert not math.isnan(row["difference"])


# ---- layers that write exactly 0 ---------------------------------------------------------------------------------


@torch.no_grad()
def _silence(model: Any, what: str) -> Any:
    """Layer 1 of a model written by hand, or as much of it as is named."""
    if what == "the edited head":
        model.W_O[1, 1] = 0
    elif what == "values":
        model.W_V[1] = 0
    else:
        model.W_O[:, :] *= torch.tensor([what != "all layers", 0.0])[:, None, None, None]
    return model


@pytest.mark.parametrize("what", ["the edited head", "values", "the layer", "all layers"])
def test_a_layer_that_writes_nothing_is_no_broken_hook(what: str) -> None:
    """As compiled programs have them: an edit that changes nothing is right where W_O is 0 or no value is weighed."""
    table = audit(_silence(HandMade(), what)).set_index("check")
    assert (table["status"].drop([*_NO_MLPS, *_NO_MASKS]) == "holds").all()
    if what in ("the edited head", "values"):
        assert table.loc["edit_z", "difference"] > 1e-3
    if what == "the layer":
        assert table.loc["edit_z", "where"] == "blocks.0.attn.hook_z"
    if what == "all layers":
        note = "No layer's attention writes anything, so that an edit at hook_z rightly changes nothing."
        assert table.loc["edit_z", ["difference", "where", "note"]].tolist() == [0, "", note]


@pytest.mark.parametrize("what", ["the edited head", "values"])
def test_a_broken_hook_is_found_beside_what_writes_nothing(what: str) -> None:
    table = audit(_silence(HandMade("late_z"), what)).set_index("check")
    assert table.loc["edit_z", ["status", "where"]].tolist() == ["fails", "blocks.1.attn.hook_z"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in ("native-attn-only", "hooked-attn-only", "llama")])
def test_a_dead_layer_of_a_real_kind_can_be_ablated(kind: str) -> None:
    model = build(kind)
    attention = model.blocks[1].attn
    with torch.no_grad():
        (attention.W_O if kind.startswith("hooked") else attention.o.weight).zero_()
    assert not model.W_O[1].any()
    effects = metaint.ablate(model, torch.arange(5, 15).repeat(3, 2))["effect"]
    assert not effects.sel(layer=1).any()
    assert float(abs(effects.sel(layer=0)).max()) > 0
