"""What should hold between weights and what they make of activations, and along the residual stream.

One generator a check, each of a Trial, as in `invariants.py`.
"""

from collections.abc import Iterator

from einops import einsum, rearrange
from torch import Tensor

from metaint.models.describe import by_layer
from metaint.models.heads import INTO_HEADS, OUT_OF_HEADS, by_head, thin_heads
from metaint.models.invariants import Pair, Trial, bias_of, write_factor_of
from metaint.models.reading import Unavailable, widen
from metaint.models.readout import final_norm_of, readout_of


def output_sum(trial: Trial) -> Iterator[Pair]:
    weights = by_layer(trial.model, "W_O")  # which a bridge makes anew at each call
    for layer in trial.attending:
        name = _attention_output(trial, layer)
        z = by_head(trial.reading[f"blocks.{layer}.attn.hook_z"], len(weights[layer]))
        summed = einsum(z, widen(weights[layer]), OUT_OF_HEADS)
        summed = summed + bias_of(trial.model, "b_O", layer, summed)
        if name.endswith("hook_attn_out"):
            summed = summed * write_factor_of(trial.model)
        yield Pair(name, trial.reading[name], summed)


def _attention_output(trial: Trial, layer: int) -> str:
    """The attention's output before any norm that follows it (Gemma-2's second norm, BERT's LN(x + out))."""
    block, reading = f"blocks.{layer}", trial.reading
    z = f"{block}.attn.hook_z"
    after = [name for name in reading.activations if reading.before(z, name)]
    norms = [name for name in after if name.startswith((f"{block}.ln1", f"{block}.ln2"))]
    for name in (f"{block}.hook_attn_out", f"{block}.attn.hook_out", f"{block}.attn.o.hook_out"):
        if name in after and not any(reading.before(norm, name) for norm in norms):
            return name
    name = f"{block}.hook_attn_out"
    raise Unavailable(f"the hook {name} never fired before a norm", name)


def weights_query(trial: Trial) -> Iterator[Pair]:
    return _projection(trial, "Q")


def weights_key(trial: Trial) -> Iterator[Pair]:
    return _projection(trial, "K")


def weights_value(trial: Trial) -> Iterator[Pair]:
    return _projection(trial, "V")


def _projection(trial: Trial, letter: str) -> Iterator[Pair]:
    """W and b against the hook, from whichever form of the attention's input lies nearest."""
    weights = by_layer(trial.model, f"W_{letter}")
    for layer in trial.attending:
        actual = trial.reading[f"blocks.{layer}.attn.hook_{letter.lower()}"]
        weight = thin_heads(widen(weights[layer]), actual.shape[2])
        bias = thin_heads(bias_of(trial.model, f"b_{letter}", layer, actual), actual.shape[2])
        candidates = [einsum(x, weight, INTO_HEADS) + bias for x in _attention_inputs(trial, layer, letter)]
        expected = min(candidates, key=lambda candidate: float((candidate - actual).abs().max()))
        yield Pair(f"W_{letter}[{layer}]", actual, expected)


def _attention_inputs(trial: Trial, layer: int, letter: str) -> list[Tensor]:
    """What the projections may have read: two candidates on HookedTransformer, which puts `hook_normalized`
    before or after the norm's own weights, depending on its version and on the kind of norm."""
    block, reading = f"blocks.{layer}", trial.reading
    query = f"{block}.attn.hook_q"
    if reading.before(f"{block}.ln1.hook_out", query):
        inputs = [reading[f"{block}.ln1.hook_out"]]
    elif reading.before(f"{block}.ln1.hook_normalized", query):
        norm = trial.model.blocks[layer].ln1
        normalized = reading[f"{block}.ln1.hook_normalized"]
        scaled = normalized * getattr(norm, "w", 1.0) + getattr(norm, "b", 0.0)
        inputs = [normalized, widen(scaled)]
    else:
        inputs = [reading[f"{block}.hook_resid_pre"]]
    if getattr(trial.model.cfg, "positional_embedding_type", None) == "shortformer" and letter != "V":
        inputs = [x + reading["hook_pos_embed"] for x in inputs]
    return inputs


def residual(trial: Trial) -> Iterator[Pair]:
    for layer in trial.layers:
        block, reading = f"blocks.{layer}", trial.reading
        if reading.before(f"{block}.hook_mlp_out", f"{block}.ln2.hook_normalized"):
            reason = "a norm follows each addition (post-norm), so that what a block writes doesn't add up"
            raise Unavailable(reason, f"{block}.hook_resid_post")
        summed = reading[f"{block}.hook_resid_pre"] + reading[f"{block}.hook_attn_out"]
        if not getattr(trial.model.cfg, "attn_only", False):
            summed = summed + reading[f"{block}.hook_mlp_out"]
        yield Pair(f"{block}.hook_resid_post", reading[f"{block}.hook_resid_post"], summed)


def stream(trial: Trial) -> Iterator[Pair]:
    for layer in trial.layers[1:]:
        before, name = f"blocks.{layer - 1}.hook_resid_post", f"blocks.{layer}.hook_resid_pre"
        yield Pair(name, trial.reading[name], trial.reading[before])
    last = f"blocks.{trial.layers[-1]}.hook_resid_post"
    yield Pair(last, trial.reading[last], trial.reading[last])


def final_norm(trial: Trial) -> Iterator[Pair]:
    """The norm's `hook_scale` against what the last residual stream says it is."""
    norm = final_norm_of(trial.model)
    if norm is None:
        raise Unavailable("the model has no final norm", "ln_final")
    scale = trial.reading["ln_final.hook_scale"]
    last = trial.reading[f"blocks.{trial.layers[-1]}.hook_resid_post"]
    yield Pair("ln_final.hook_scale", scale, norm.scale(last))


def unembedding(trial: Trial) -> Iterator[Pair]:
    last = trial.reading[f"blocks.{trial.layers[-1]}.hook_resid_post"]
    logits = readout_of(trial.model).logits(rearrange(last, "batch position d_model -> (batch position) d_model"))
    yield Pair("W_U", rearrange(widen(trial.reading.logits), "batch position vocab -> (batch position) vocab"), logits)
