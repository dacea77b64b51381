"""How a model turns its last residual stream into logits: final norm, unembedding, soft cap.

In: a model. Out: `Readout` and `Norm`, which `measures/inner.py` computes with. The audit's `final_norm` and
`unembedding` tell whether what is read here is what the model does.
"""

from typing import Any

from torch import Tensor

from metaint.measures.inner import Norm, Readout
from metaint.models.protocol import Model
from metaint.models.reading import Unavailable


def readout_of(model: Model) -> Readout:
    """The model's final norm, `W_U`, `b_U`, scale and soft cap; raises Unavailable, naming what is missing."""
    weight = getattr(model, "W_U", None)
    if not isinstance(weight, Tensor):
        raise Unavailable("the model has no W_U", "W_U")
    cap = float(setting(model, "output_logits_soft_cap") or setting(model, "final_logit_softcapping") or 0)
    bias = getattr(model, "b_U", None)
    bias = bias.detach() if isinstance(bias, Tensor) else None
    factor = float(setting(model, "logit_scale") or 1) / float(setting(model, "logits_scaling") or 1)
    bound = cap if cap > 0 else None
    return Readout(weight.detach(), bias, final_norm_of(model), factor, bound)


def final_norm_of(model: Model) -> Norm | None:
    """The norm before the unembedding, or None for a model without one; raises Unavailable for an unknown kind."""
    return norm_of(model, getattr(model, "ln_final", None), "ln_final")


def norm_of(model: Model, module: Any, name: str) -> Norm | None:
    """A norm of the model as `Norm`, or None where it has none there; raises Unavailable for an unknown kind.

    `name` is where the module stands: "ln_final", or as in "blocks.0.ln1".
    """
    kind = str(getattr(model.cfg, "normalization_type", None) or "")
    if not kind or module is None:
        return None
    if not kind.startswith(("LN", "RMS")):
        raise Unavailable(f"the norm {name} is of the kind {kind}, which has no closed form here", name)
    final_rms = name == "ln_final" and kind == "LNPre" and bool(getattr(model.cfg, "final_rms", False))
    names = [parameter for parameter, _ in module.named_parameters()]
    gain, bias = (_parameter(module, names, ends) for ends in (("weight", "w"), ("bias", "b")))
    if gain is not None and getattr(model.cfg, "rmsnorm_uses_offset", False):
        gain = gain.float() + 1.0 if gain.dtype.itemsize < 4 else gain + 1.0
    form = "rms" if kind.startswith("RMS") or final_rms else "layer"
    return Norm(form, float(model.cfg.eps), gain, bias)


def setting(model: Model, name: str) -> Any:
    """A field of `cfg`, else of the configuration of the model that a bridge wraps, else None.

    Bridges leave out of `cfg` what Gemma-2 scales its queries by, and the width of sliding windows.
    """
    value = getattr(model.cfg, name, None)
    wrapped = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(wrapped, name, None) if value is None else value


def _parameter(module: Any, names: list[str], ends: tuple[str, ...]) -> Tensor | None:
    matching = [name for name in names if name.rsplit(".", 1)[-1] in ends]
    return module.get_parameter(matching[0]).detach() if matching else None
