"""`scan`: defaults, what it records, and what bad input gets."""

import subprocess
import sys

import pytest
import torch

import metaint
from metaint.errors import InputError
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build

GOOD = torch.randint(5, 95, (3, 16), generator=torch.Generator().manual_seed(0))
CASES = [
    ([1, 2, 3], None, r"tokens is a list: pass a tensor of ids \[batch, position\], or a text"),
    (GOOD.float(), None, r"tokens has dtype torch.float32: token ids are integers"),
    (GOOD[None], None, r"tokens has shape \(1, 3, 16\): it must be \[batch, position\]"),
    (GOOD[:, :0], None, r"tokens is empty \(shape \(3, 0\)\): give at least one sequence of two tokens"),
    (GOOD[:0], None, r"tokens is empty \(shape \(0, 16\)\)"),
    (GOOD[:, :1], None, r"tokens has one position: attention needs at least two"),
    (torch.ones(1, 129, dtype=torch.long), None, r"tokens has 129 positions, and the model reads at most 128: cut it"),
    (torch.full((1, 4), 100), None, r"tokens holds id 100, and the model's vocabulary is 0 to 99"),
    (torch.full((1, 4), -1), None, r"tokens holds id -1, and the model's vocabulary is 0 to 99"),
    (GOOD, torch.ones(3, 15), r"attention_mask has shape \(3, 15\), and tokens \(3, 16\): they must be the same"),
    (
        GOOD,
        torch.tensor([1, 0, 1])[:, None].expand(3, 16),
        r"attention_mask hides every position of sequence 1: drop that sequence",
    ),
]


@pytest.mark.parametrize(("tokens", "mask", "sentence"), CASES)
def test_bad_tokens_get_one_sentence(gpt2, tokens, mask, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        metaint.scan(gpt2, tokens, attention_mask=mask)
    assert "\n" not in str(caught.value)


def test_one_sequence_may_come_without_a_batch(gpt2):
    alone, batch = metaint.scan(gpt2, GOOD[0])["heads"], metaint.scan(gpt2, GOOD[:1])["heads"]
    assert (alone["entropy"] == batch["entropy"]).all()


def test_a_text_is_read_in_the_model_s_own_tokens(gpt2):
    found = metaint.scan(gpt2, "the cat sat on the dog")
    assert found["heads"].attrs["tokens_seen"] == gpt2.to_tokens("the cat sat on the dog").numel()


def test_a_scan_records_where_it_comes_from(gpt2):
    attrs = metaint.scan(gpt2, attributes={"task": "mine"}).attrs
    assert attrs["task"] == "mine"
    assert attrs["weights"] == "raw"
    assert attrs["dtype"] == "float32"
    assert all(attrs[f"{name}_version"][0].isdigit() for name in ("metaint", "transformer_lens", "torch"))
    assert attrs["bos"] == int(gpt2.cfg.default_prepend_bos)
    if hasattr(gpt2, "enable_compatibility_mode"):
        from tests.builders import build

        folded = build("gpt2")
        folded.enable_compatibility_mode()
        assert metaint.scan(folded).attrs["weights"] == "folded"


def test_importing_metaint_loads_no_heavy_library():
    heavy = ("torch", "transformer_lens", "xarray", "torchmetrics", "pandas", "rich", "typer", "zarr", "plotly")
    code = f"import sys, metaint; print([m for m in {heavy!r} if m in sys.modules]); dir(metaint)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_a_model_loads_no_figure_or_shell_library():
    code = "import sys, metaint; metaint.scan, metaint.HeadProbe, metaint.label_heads; print([m for m in"
    code += " ('rich.table', 'typer', 'plotly', 'circuitsvis', 'networkx') if m in sys.modules and m not in before])"
    code = "import sys, torch, transformer_lens; before = set(sys.modules); " + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_every_public_name_is_there():
    for name in metaint.__all__:
        assert getattr(metaint, name) is not None
    with pytest.raises(AttributeError, match="No metaint attribute skan"):
        _ = metaint.skan


def test_a_model_of_one_layer_and_one_head():
    kind = "native-mlp-ln" if "native-mlp-ln" in available_kinds() else "hooked"
    model = build(kind, n_layers=1, n_heads=1, d_head=32)
    probes = [metaint.HeadProbe(), metaint.ResidualProbe(), metaint.InnerProbe(), metaint.WeightProbe()]
    found = metaint.scan(model, repeated_tokens(96, 8, batch=2, ids=(5, 95)), [*probes, metaint.SaturationProbe()])
    assert found["heads"]["induction"].shape == (1, 1)
    assert found["residual"]["growth"].shape == (1,)
    assert found["inner"]["loss_decrease"].shape == (1,)
    assert found["saturation"]["similarity"].shape == (7, 1)
    assert found["weights"]["qk_norm"].shape == (1, 1)


def test_a_model_without_a_tokenizer_and_a_plain_cache_are_one_sentence():
    model = small_transformer(norm="pre", n_layers=1, n_heads=2, d_model=8, d_mlp=8, d_vocab=20, n_ctx=16)
    with pytest.raises(InputError, match="SmallTransformer has no to_tokens: pass token ids"):
        metaint.scan(model, "a text")
    with pytest.raises(InputError, match="cache is a dict: pass a model's ActivationCache"):
        metaint.read_cache({})


def test_weights_alone_need_no_pass(gpt2, repeated, monkeypatch):
    first = metaint.scan(gpt2, repeated, [metaint.WeightProbe()])  # and its audit
    monkeypatch.setattr(type(gpt2), "forward", lambda *_, **__: pytest.fail("a pass was made"))
    again = metaint.scan(gpt2, repeated, [metaint.WeightProbe()])
    assert again["weights"]["total_norm"] == first["weights"]["total_norm"] > 0


def test_a_recurrence_probe_is_sent_to_recur(gpt2):
    probe = metaint.RecurrenceProbe({})
    sentence = r"^probes holds a RecurrenceProbe, .*: use metaint\.recur\(model, vectors, matrices\)"
    for call in (metaint.scan, metaint.read_cache):
        with pytest.raises(InputError, match=sentence):
            call(gpt2, GOOD, [probe])
