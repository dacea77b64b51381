"""A trace races, is stopped, goes on: the graph is the same, and one that was cut short says so."""

import json

import pytest

import metaint
from metaint.circuits import circuit, race, tracing
from metaint.circuits.ablation import ablate
from metaint.circuits.circuit import trace_circuit
from metaint.circuits.counting import at_first_position, known_parts, race_parts
from metaint.circuits.experiment import run, set_up
from metaint.circuits.ledger import Ledger
from metaint.circuits.subject import subject_of
from metaint.errors import InputError, StoreError
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds, build
from tests.circuits.planted import CIRCUIT, circuit_model, doubled_model, traces
from tests.planted import VOCAB

TOKENS = repeated_tokens(VOCAB, 20, batch=16)
KIND = "gpt2" if "gpt2" in available_kinds() else available_kinds()[0]


@pytest.fixture(scope="module")
def planted():
    return circuit_model()


@pytest.fixture
def racing(monkeypatch):
    """A race of however few parts."""
    for module in (race, tracing):
        monkeypatch.setattr(module, "FEW", 1)


def measured(graph):
    """Everything that a graph says."""
    return graph.graph, dict(graph.nodes(data=True)), {ends: graph.edges[ends] for ends in graph.edges}


# ---- the race ----------------------------------------------------------------------------------------------------


def test_a_race_finds_what_everything_on_everything_finds(planted, racing):
    exact = trace_circuit(planted, TOKENS, race=False, random=30)
    raced = trace_circuit(planted, TOKENS, random=30)
    assert set(raced) == set(exact)
    assert set(raced.edges) == set(exact.edges)
    assert raced.graph["verdict"] == exact.graph["verdict"] == "found"
    assert raced.graph["faithfulness"] == exact.graph["faithfulness"]
    assert (raced.graph["random"], exact.graph["random"]) == (20, 30)
    for name in ("0.0", "1.0"):
        assert raced.nodes[name]["sequences"] == exact.nodes[name]["sequences"] == 16
        assert raced.nodes[name]["effect"] == pytest.approx(exact.nodes[name]["effect"], abs=1e-5)
        assert raced.nodes[name]["share"] == pytest.approx(exact.nodes[name]["share"], abs=1e-5)
    assert exact.graph["race"] == ""
    assert "parts below the line were measured until it was plain, and none counts" in raced.graph["race"]


def test_what_races_is_run_on_less(planted, racing, tmp_path):
    for name, on in (("exact", False), ("raced", True)):
        trace_circuit(planted, TOKENS, race=on, random=0, journal=tmp_path / name)
    exact, raced = (json.loads((tmp_path / name).read_text())["values"] for name in ("exact", "raced"))
    parts = [f"without {layer}.{head}" for layer in range(2) for head in range(8)]
    assert {len(exact[part]) for part in parts} == {16}
    assert len(raced["without 0.0"]) == len(raced["without 1.0"]) == 16
    assert sum(len(raced[part]) <= 8 for part in parts) >= 9


def test_a_model_of_few_parts_does_not_race(planted):
    assert measured(trace_circuit(planted, TOKENS, random=3)) == measured(
        trace_circuit(planted, TOKENS, random=3, race=False)
    )


def test_where_a_part_matters(planted):
    """Both heads of the planted circuit do what they do everywhere."""
    traced = trace_circuit(planted, TOKENS, random=0)
    for name in ("0.0", "1.0"):
        assert traced.nodes[name]["positions"] == "all"
        assert abs(traced.nodes[name]["first_position"]) < 0.2


# ---- stopped, and gone on ----------------------------------------------------------------------------------------


def stop_after(monkeypatch, count, error):
    """Stops when so many results have come, once."""
    add, left = Ledger.add, [count]

    def counted(self, name, start, values):
        left[0] -= 1
        if left[0] == -1:
            raise error
        add(self, name, start, values)

    monkeypatch.setattr(Ledger, "add", counted)


def names_added(monkeypatch):
    """The names of the results that come from now on."""
    add, names = Ledger.add, []

    def noted(self, name, start, values):
        names.append(name)
        add(self, name, start, values)

    monkeypatch.setattr(Ledger, "add", noted)
    return names


@pytest.mark.parametrize("results", [1, 5, 19, 25, 32, 40])
def test_an_interrupted_trace_goes_on_to_the_same_graph(planted, monkeypatch, tmp_path, results):
    whole = measured(trace_circuit(planted, TOKENS, random=4))
    journal, before = tmp_path / "journal", traces(planted)
    stop_after(monkeypatch, results, KeyboardInterrupt())
    stopped = trace_circuit(planted, TOKENS, random=4, journal=journal)
    assert traces(planted) == before
    assert (stopped.graph["finished"], stopped.graph["verdict"]) == (False, "unfinished")
    assert stopped.graph["found"] is False
    assert stopped.graph["why"].startswith("Stopped while measuring ")
    assert metaint.load_circuit(metaint.save_circuit(stopped, tmp_path / "c.graphml")).graph["finished"] is False
    assert set(stopped) <= set(whole[1])
    known = json.loads(journal.read_text())["values"]
    assert sum(map(len, known.values())) == results * 16
    monkeypatch.undo()
    added = names_added(monkeypatch)
    assert measured(trace_circuit(planted, TOKENS, random=4, journal=journal)) == whole
    assert not set(added) & set(known)


def test_a_killed_trace_loses_one_batch(planted, monkeypatch, tmp_path):
    monkeypatch.setattr("metaint.circuits.ledger.EVERY", -1.0)
    journal = tmp_path / "journal"
    stop_after(monkeypatch, 30, SystemExit())
    monkeypatch.setattr(tracing.Trace, "run", _killed_in(tracing.Trace.run))
    with pytest.raises(_Killed):
        trace_circuit(planted, TOKENS, random=4, journal=journal)
    assert sum(map(len, json.loads(journal.read_text())["values"].values())) == 30 * 16


class _Killed(BaseException):
    pass


def _killed_in(run):
    def killed(self):
        try:
            run(self)
        except SystemExit:
            self.experiment.ledger.path = None  # nothing is written any more
            raise _Killed from None

    return killed


def test_a_journal_of_another_trace_is_refused(planted, tmp_path):
    journal = tmp_path / "journal"
    trace_circuit(planted, TOKENS, random=0, journal=journal)
    with pytest.raises(StoreError) as error:
        trace_circuit(planted, TOKENS[:8], random=0, how="zero", journal=journal)
    assert str(error.value) == (
        f"{journal} holds an unfinished trace with other tokens, how: delete it, or choose another name."
    )
    with pytest.raises(StoreError, match="with other weights: "):
        trace_circuit(circuit_model(seed=1), TOKENS, random=0, journal=journal)
    journal.write_text("{")
    with pytest.raises(StoreError) as error:
        trace_circuit(planted, TOKENS, random=0, journal=journal)
    assert str(error.value) == (
        f"{journal} holds no unfinished trace (JSONDecodeError): delete it, or choose another name."
    )


# ---- the verdict -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("least", "verdict"), [(0.0, "found"), (0.5, "found"), (0.7, "part of a circuit")])
def test_a_share_below_the_least_is_part_of_a_circuit(least, verdict):
    """Of two induction heads that do the same, one alone keeps 59 % of what both bring."""
    checked = metaint.check_circuit(doubled_model(2.0), CIRCUIT, TOKENS, random=20, least=least)
    assert 0.55 < float(checked["faithfulness"]) < 0.65
    assert (checked.attrs["verdict"], checked.attrs["better_than_random"]) == (verdict, 1)
    assert checked.attrs["found"] == (verdict == "found")
    said = "part of a circuit, since one of both shares is below 70 %"
    assert (said in checked.attrs["why"]) == (verdict != "found")


def test_a_circuit_no_better_than_random_is_not_found_however_little_is_asked(planted):
    checked = metaint.check_circuit(planted, ["0.3", "1.3"], TOKENS, random=20, least=0.0)
    assert (checked.attrs["verdict"], checked.attrs["better_than_random"]) == ("not found", 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"least": 1.0}, "least is 1.0: give the share of what all heads bring from which on a circuit is found."),
        ({"precision": -1}, "precision is -1: give half the width of an interval, a share such as 0.05."),
    ],
)
def test_bad_input(planted, arguments, sentence):
    with pytest.raises(InputError) as error:
        trace_circuit(planted, TOKENS, **arguments)
    assert str(error.value) == sentence


# ---- the origin of the sink --------------------------------------------------------------------------------------


def test_what_makes_heads_look_at_position_0(monkeypatch):
    """Of random weights too something decides where heads look; effects are those of `ablate`, MLPs among them."""
    model, tokens = build(KIND), repeated_tokens(96, 8, batch=12, ids=(5, 95))
    monkeypatch.setattr(circuit, "_labels", lambda heads: {(1, 0): ["sink"], (1, 2): ["sink"]})
    traced = trace_circuit(model, tokens, target="sink", random=10, threshold=0.005)
    metric = metaint.scan_metric("first_token", heads=["1.0", "1.2"])
    assert (traced.graph["target"], traced.graph["metric"]) == ("sink", metric.name)
    assert traced.graph["paths"].startswith("not followed: ")
    assert "what all heads and MLPs bring to first_token of 1.0, 1.2 is there with the" in traced.graph["why"]
    every = ablate(model, tokens, sets={"all": ["heads", "mlps"]}, metric=metric, how="mean")["set_effect"].item()
    parts = {name: data for name, data in traced.nodes(data=True) if data["kind"] in ("head", "mlp")}
    assert {data["kind"] for data in parts.values()} == {"head", "mlp"}
    for name, data in parts.items():
        alone = ablate(model, tokens, sets=[[name]], metric=metric, how="mean")["set_effect"].item()
        assert data["effect"] == pytest.approx(alone, abs=1e-7)
        assert data["share"] == pytest.approx(alone / every, abs=1e-5)
        assert data["layer"] == 0  # what comes later writes nothing that these heads read


def test_a_model_without_sinks_has_no_origin_of_them(planted, monkeypatch):
    monkeypatch.setattr(circuit, "_labels", lambda heads: {})
    with pytest.raises(InputError) as error:
        trace_circuit(planted, TOKENS, target="sink")
    assert str(error.value) == "target is 'sink', and no head of the model is labelled so: choose another."


# ---- a real model ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_head_that_a_gradient_misses_wins_the_race(smollm2, monkeypatch):
    """16.0, which one gradient ranks in the middle of all; and MLP 11 matters at position 0 alone, 16.0 does not."""
    monkeypatch.setattr(race, "FEW", 1)
    subject, tokens = subject_of(smollm2), metaint.default_tokens(smollm2, batch=4)
    experiment = set_up(subject, tokens, "mean", "in_context_loss", batch_size=None, seed=0)
    clean, without = run(experiment, [subject.heads])
    total = without - clean
    parts = [(layer, head) for layer in (16, 17) for head in range(9)]
    race_parts(experiment, parts, set(), total, race.Rules(0.02, sample=0))
    effects = known_parts(experiment, parts, total)
    assert max(effects, key=lambda part: effects[part].share) == (16, 0)
    assert effects[16, 0].counts(0.3)
    assert effects[16, 0].sequences == 4
    assert sum(effect.sequences == 2 for effect in effects.values()) > 6
    chosen = [(11, None), (16, 0)]
    shares = at_first_position(experiment, chosen, 2)
    assert shares[11, None] > 0.8
    assert abs(shares[16, 0]) < 0.1
