"""What a checkpoint holds beside what its model needs: weights that are missing, of another shape, or left over.

In: a name or folder that transformers loads. Out: the model, and what to record of its weights, or ModelError with
their names. Transformers draws a missing weight at random and says so in a log that nobody may read.
"""

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaint.errors import InputError, ModelError

Missing = Literal["refuse", "allow"]
_NAMED = 3  # so many weights are called by their names, the others counted
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
# Logits may differ by this share of the largest, between devices in bfloat16; a wrong bridge is off by half.
_FAR = 0.1
# What old checkpoints hold of what models compute by themselves: causal masks, rotary frequencies, positions.
_COMPUTED = re.compile(r"(attn|attention)\.(bias|masked_bias)$|inv_freq$|position_ids$|token_type_ids$")


class Loader:
    """Stands in for a class of transformers: loads with the right one, and keeps `facts` of the weights.

    TransformerLens is handed this as its `model_class` and asks it for nothing but `from_pretrained`.
    """

    def __init__(self, missing: Missing) -> None:
        self.missing: Missing = missing
        self.facts: dict[str, str] = {}
        # What was loaded: the name of its class, and what it said before TransformerLens changed its modules.
        self.kind = ""
        self.reference: Tensor | None = None

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """The model, with its missing weights drawn at random where `missing` allows that."""
        from transformers.utils.peft_utils import find_adapter_config_file

        if find_adapter_config_file(name, revision=options.get("revision"), token=options.get("token")) is not None:
            raise ModelError(adapter_sentence(name))
        # Weights of another shape are asked for, so that they can be named; without that there is no word of which.
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, loading = _class_of(name, options).from_pretrained(name, **options)
        self.facts, self.kind = weight_facts(model, loading, name, self.missing), type(model).__name__
        self.reference = reference_logits(model)
        return model


def weight_facts(model: nn.Module, loading: Mapping[str, Any], name: str, missing: Missing) -> dict[str, str]:
    """What a scan records of weights that a checkpoint lacks or leaves over; ModelError unless they are allowed.

    Left over may be what belongs to no part of this model (the pooler or the classifier of another task): that is
    recorded. What belongs to a part that the model has (a bias, an adapter, a block more) changes what the part
    computes, and is refused as a missing weight is.
    """
    random = sorted([*loading["missing_keys"], *(mismatch[0] for mismatch in loading["mismatched_keys"])])
    left_over = sorted(key for key in loading["unexpected_keys"] if not _COMPUTED.search(key))
    ignored = [key for key in left_over if _belongs(model, key)]
    parts = [_part(loading["missing_keys"], "lacks"), _part(_shapes(loading), "has in another shape")]
    wrong = [part for part in [*parts, _part(ignored, "has, unlike this model,")] if part]
    if wrong and missing == "refuse":
        raise ModelError(
            f"the checkpoint {name!r} {', and '.join(wrong)}: give the whole checkpoint of this kind of model, or pass "
            'missing="allow" to open it with such weights drawn at random or left out.'
        )
    facts = {"random_weights": _names(random), "unused_weights": _names(left_over)}
    return {fact: names for fact, names in facts.items() if names}


def reference_logits(model: Any) -> Tensor | None:
    """What a model of transformers says of a few tokens, None for one that does not read tokens alone."""
    training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return model.eval()(_few_tokens(next(model.parameters()).device)).logits.float().cpu()
    except Exception:  # every kind of model asks for something else: images, a second sequence, ...
        return None
    finally:
        model.train(training)


def check_logits(model: Any, reference: Tensor | None, kind: str) -> None:
    """ModelError for a bridge with other logits than the model had by itself, by far more than a device explains."""
    if reference is None:
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits = model.eval()(_few_tokens(next(model.parameters()).device))
    difference = float((logits.float().cpu() - reference).abs().max())
    largest = float(reference.abs().max())
    if difference > _FAR * largest:
        raise ModelError(
            f"TransformerLens {version('transformer-lens')} gives a {kind} other logits than transformers does (by up "
            f"to {difference:.3g}, the largest being {largest:.3g}): open it with another version of TransformerLens."
        )


def _few_tokens(device: torch.device) -> Tensor:
    return torch.arange(4, 10, device=device)[None]


def check_missing(missing: str) -> None:
    """InputError for another word than `Missing` has."""
    if missing not in ("refuse", "allow"):
        raise InputError(f'missing is {missing!r}: choose "refuse" or "allow".')


def adapter_sentence(name: str) -> str:
    """What to do with an adapter, whose weights transformers leaves out where it has no peft."""
    return (
        f"{name!r} holds an adapter (adapter_config.json), such as LoRA makes: merge it into its base model "
        "first (peft's merge_and_unload), and open what that saves."
    )


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights in a format of Hugging Face's."""
    return any(next(folder.glob(pattern), None) is not None for pattern in _WEIGHTS)


def _class_of(name: str, options: Mapping[str, Any]) -> Any:
    """The class of transformers that TransformerLens opens this name with."""
    from transformer_lens.model_bridge.sources import transformers as source
    from transformers import AutoConfig

    # Read again: TransformerLens may have put the text part of the configuration into the options.
    config = AutoConfig.from_pretrained(name, revision=options.get("revision"), token=options.get("token"))
    architecture = source.determine_architecture_from_hf_config(config)
    return source.get_hf_model_class_for_architecture(architecture)


def _belongs(model: nn.Module, key: str) -> bool:
    """Whether a weight of this name lies in a list of blocks of the model, or beside weights of a part it has."""
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    for path in (key.split("."), [prefix, *key.split(".")]):
        parents = [modules.get(".".join(path[:i])) for i in range(1, len(path))]
        holds_weights = parents[-1:] != [None] and bool(parents) and bool(_own_weights(parents[-1]))
        if holds_weights or any(isinstance(parent, nn.ModuleList) for parent in parents):
            return True
    return False


def _own_weights(module: Any) -> dict[str, Any]:
    return dict(module.named_parameters(recurse=False))


def _shapes(loading: Mapping[str, Any]) -> list[str]:
    return [f"{key} {list(theirs)} for {list(ours)}" for key, theirs, ours in loading["mismatched_keys"]]


def _part(keys: Iterable[str], verb: str) -> str:
    names = _names(keys)
    return f"{verb} {names}" if names else ""


def _names(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
