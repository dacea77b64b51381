"""Views of attention and of tokens: what they hold, what they leave behind, and what they refuse."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metaint.errors import ActivationError, HookAuditError, InputError, StoreError
from metaint.models.describe import is_causal
from metaint.models.reading import read
from metaint.views.attention import patterns as attention
from metaint.views.attention.patterns import show_attention
from metaint.views.attention.tokens import show_tokens, token_labels, visible
from metaint.views.drawing.view import POLICY, View
from tests.builders import N_HEADS, N_LAYERS, build
from tests.views.attention.test_canvas import HOSTILE, Elements, decoded, view_of

TOKENS = torch.arange(5, 29)
HEADS = [f"{layer}.{head}" for layer in range(N_LAYERS) for head in range(N_HEADS)]
needs_circuitsvis = pytest.mark.skipif(attention._bundle() is None, reason="circuitsvis is not installed")


def plain(model, head, tokens=TOKENS):
    """One head's pattern."""
    layer, index = head.split(".")
    hook = f"blocks.{layer}.attn.hook_pattern"
    with torch.no_grad():
        return read(model, tokens[None], [hook])[hook][0, int(index)].double().numpy()


def close(shown, pattern):
    kept = ~np.isnan(shown)
    return bool((np.abs(shown - pattern)[kept] <= np.sqrt(pattern[kept]) / 255 + 5e-6).all()) and kept.any()


def test_every_head_is_shown_as_the_hook_carries_it(any_model):
    view = show_attention(any_model, TOKENS, how="canvas")
    facts, _ = view_of(view.body)
    assert facts["heads"] == HEADS
    assert facts["causal"] == is_causal(any_model)
    for head, shown in zip(HEADS, decoded(view.body)[0], strict=True):
        assert close(shown, plain(any_model, head))


def test_chosen_heads_and_a_window(gpt2):
    view = show_attention(gpt2, TOKENS[None], ["1.3", "0.2", "1.3"], window=(4, 20), how="canvas")
    facts, _ = view_of(view.body)
    assert (facts["heads"], facts["start"], len(facts["labels"])) == (["1.3", "0.2"], 4, 16)
    shown = decoded(view.body)[0]
    assert close(shown[0], plain(gpt2, "1.3")[4:20, 4:20])
    assert close(shown[1], plain(gpt2, "0.2")[4:20, 4:20])
    assert view_of(show_attention(gpt2, TOKENS, "1.3", how="canvas").body)[0]["heads"] == ["1.3"]


def test_one_pass_that_leaves_no_trace():
    model = build("gpt2") if "gpt2" in attention_kinds() else build(attention_kinds()[0])
    is_causal(model)  # by a pass of its own, once a model
    passes = []
    watch = model.blocks[0].register_forward_pre_hook(lambda module, args: passes.append(None))
    model.blocks[0].train()
    before = [len(point._forward_hooks) for point in model.hook_dict.values()]
    show_attention(model, TOKENS, how="canvas")
    assert len(passes) == 1
    edits = [
        ("blocks.1.attn.hook_pattern", torch.nan, ActivationError, "holds NaN or infinity"),
        ("blocks.0.attn.hook_pattern", 2, HookAuditError, "carries no attention weights"),
    ]
    for name, factor, error, words in edits:
        hook = (name, lambda x, hook, factor=factor: x * factor)
        with model.hooks(fwd_hooks=[hook]), pytest.raises(error, match=f"{re.escape(name)} {words}"):
            show_attention(model, TOKENS, how="canvas")
    assert [len(point._forward_hooks) for point in model.hook_dict.values()] == before
    assert model.blocks[0].training
    assert not model.blocks[1].training
    watch.remove()


def attention_kinds():
    from tests.builders import available_kinds

    return available_kinds()


def test_tokens_are_labelled_by_the_tokenizer(gpt2):
    text = view_of(show_attention(gpt2, "w7 w8 w9", how="canvas").body)[0]["labels"]
    assert text[-3:] == ["w7", "w8", "w9"]
    assert token_labels(SimpleNamespace(tokenizer=None), [3, 4]) == ["3", "4"]
    pieces = {
        0: ("▁the", "the"),
        1: ("Ġa", " a"),
        2: ("Ċ", "\n"),
        3: ("æĹ", "\ufffd"),
        4: (None, ""),
        5: ("x", "\u202e"),
    }
    tokenizer = SimpleNamespace(decode=lambda ids: pieces[ids[0]][1], convert_ids_to_tokens=lambda i: pieces[i][0])
    model = SimpleNamespace(tokenizer=tokenizer)
    assert token_labels(model, range(6)) == ["␣the", "␣a", "↵", "æĹ", "4", "\\u202e"]
    assert visible(" a\tb\u200b") == "␣a⇥b\\u200b"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"heads": "2.0"}, "head is '2.0': name one from 0.0 to 1.3."),
        ({"heads": ["0.1", "first"]}, "head is 'first': name one from 0.0 to 1.3."),
        ({"heads": []}, 'heads is empty: name one, such as "0.0", or leave it out to show all.'),
        ({"tokens": TOKENS.repeat(3, 1)}, "tokens holds 3 sequences: show one, such as tokens[0]."),
        ({"window": (4, 30)}, "window is (4, 30): it must be (first, last + 1), within the positions 0 to 23."),
        ({"window": (4, 4)}, "window is (4, 4): it must be (first, last + 1), within the positions 0 to 23."),
        ({"how": "canvass"}, 'how is \'canvass\': it must be "circuitsvis" or "canvas".'),
    ],
)
def test_bad_arguments_get_one_sentence(gpt2, arguments, sentence):
    with pytest.raises(InputError) as caught:
        show_attention(gpt2, **{"tokens": TOKENS, **arguments})
    assert str(caught.value) == sentence


def test_too_much_at_once_is_refused_before_the_pass(gpt2, monkeypatch):
    monkeypatch.setattr(attention, "MOST_CELLS", 800)
    with pytest.raises(InputError, match=r"8 heads of 24 tokens are too many to show: .* at most 10 tokens"):
        show_attention(gpt2, TOKENS)
    show_attention(gpt2, TOKENS, window=(0, 10))


def test_a_text_needs_a_tokenizer():
    with pytest.raises(InputError, match="tokens is a text, and this model has no tokenizer: pass token ids"):
        show_attention(SimpleNamespace(tokenizer=None), "abc")


@needs_circuitsvis
def test_few_weights_go_to_circuitsvis_rounded_and_without_a_way_out(gpt2):
    view = show_attention(gpt2, TOKENS, ["1.3", "0.2"], window=(2, 14))
    elements = Elements(view.body).found
    assert [tag for tag, _ in elements] == ["div", "script"]
    props = json.loads(elements[0][1]["data-props"])
    assert props["attentionHeadNames"] == ["1.3", "0.2"]
    assert props["tokens"][0] == "2: w7"
    assert props["maskUpperTri"] is True
    assert np.abs(np.array(props["attention"][0]) - plain(gpt2, "1.3")[2:14, 2:14]).max() <= 0.0005 + 1e-6
    assert max(len(str(x)) for x in np.ravel(props["attention"])) <= 5
    assert "circuitsvis" not in sys.modules
    assert view.scripts == show_attention(gpt2, TOKENS, "0.0").scripts
    (script,) = view.scripts
    assert 3e5 < len(script) < 6e5
    assert "http" not in view.html.replace(script, "")


@needs_circuitsvis
def test_many_weights_go_to_the_canvas(gpt2, monkeypatch):
    assert "metaint-circuitsvis" in show_attention(gpt2, TOKENS).body
    monkeypatch.setattr(attention, "_CIRCUITSVIS_CELLS", 8 * 24 * 24 - 1)
    assert "metaint-attention" in show_attention(gpt2, TOKENS).body
    monkeypatch.setattr(attention, "_CIRCUITSVIS_BYTES", 1000)
    with pytest.raises(InputError, match=r'8 heads of 24 tokens take 0 MB: pass how="canvas"'):
        show_attention(gpt2, TOKENS, how="circuitsvis")


def test_without_circuitsvis_the_canvas_draws(gpt2, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert "metaint-attention" in show_attention(gpt2, TOKENS).body
    with pytest.raises(InputError, match="which is not installed"):
        show_attention(gpt2, TOKENS, how="circuitsvis")


def spans(view):
    return [attributes for tag, attributes in Elements(view.html).found if tag == "span" and "title" in attributes]


def background(span):
    return span["style"].split("background: ")[1].split(";")[0]


def test_values_colour_their_tokens():
    view = show_tokens(["a", " b", "c\n", "d", HOSTILE], torch.tensor([0.0, 2.0, -2.0, torch.nan, 1.0]))
    found = spans(view)
    assert [background(span) for span in found] == [
        "rgb(255, 255, 255)", "rgb(0, 114, 178)", "rgb(213, 94, 0)", "rgb(200, 200, 200)", "rgb(128, 184, 216)"
    ]  # fmt: skip
    assert [span["title"] for span in found] == [
        "position 0: 0", "position 1: 2", "position 2: -2", "position 3: no value", "position 4: 1"
    ]  # fmt: skip
    assert "␣b" in view.html
    assert "c↵</span><br>" in view.html
    assert {tag for tag, _ in Elements(view.html).found} == {"div", "span", "br", "wbr"}
    assert "&lt;/script&gt;&lt;img" in view.html
    assert view.scripts == ()


def test_values_at_or_above_0_have_one_colour():
    assert "linear-gradient(to right, rgb(255, 255, 255), rgb(0, 114, 178))" in show_tokens(["a", "b"], [0.5, 4.0]).html
    assert [background(span) for span in spans(show_tokens(["a"], [0.0]))] == ["rgb(255, 255, 255)"]


def test_ids_and_texts_are_written_by_the_model(gpt2):
    assert ">w7</span>" in show_tokens(torch.tensor([[7, 8]]), [1.0, 2.0], model=gpt2).html
    text = show_tokens("w7 w8", torch.ones(gpt2.to_tokens("w7 w8").shape[1]), model=gpt2)
    assert ">w7</span>" in text.html


@pytest.mark.parametrize(
    ("tokens", "values", "sentence"),
    [
        (["a", "b"], [1.0], "values has 1 entries, and there are 2 tokens: give one for each."),
        (["a"], [float("inf")], "values holds infinity: there is no colour for it."),
        (["a"], [float("nan")], "values holds no number: there is no colour for it."),
        ([], [], "tokens is empty: there is nothing to show."),
        ("abc", [1.0], "tokens is a text, and there is no tokenizer: pass model, or the tokens as strings."),
        (TOKENS, [1.0], "tokens is ids, and there is no tokenizer: pass model, or the tokens as strings."),
    ],
)
def test_bad_values_get_one_sentence(tokens, values, sentence):
    with pytest.raises(InputError) as caught:
        show_tokens(tokens, values)
    assert str(caught.value) == sentence


def test_a_view_is_saved_as_a_page_that_may_fetch_nothing(tmp_path):
    view = View("<p>body</p>", ("<script>1</script>",))
    assert view._repr_html_() == "<script>1</script><p>body</p>"
    assert repr(view) == "View()"
    page = view.save(tmp_path / "a.html").read_text("utf-8")
    assert "<body><script>1</script><p>body</p></body>" in page
    assert "default-src 'none'" in POLICY
    assert page.count(POLICY) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(StoreError, match="could not be written"):
        view.save(tmp_path / "missing" / "a.html")


def test_a_view_costs_no_figure_library():
    code = "import sys, metaint.views.drawing.view; print(sorted({'plotly', 'circuitsvis'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr
    assert attention.View is View
