"""What the autoregression lab can train: the settings of a run, and the runs of each size.

In: the name of a setting, a size, and what takes the place of the size's own. Out: `Settings`, checked. Sizes are those
of michaelsdr/ical (Sander et al. 2024, 2402.05787) and of `transformers_learn_icl_by_gd` (von Oswald et al. 2023), but
for shorter training in "default" and "quick"; learning rates other than theirs are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metaint.errors import InputError
from metaint.labs.common.checks import above_zero, at_least, choose

MODELS = {
    "augmented": ("diagonal", "signed", "shared", "blocks", "free"),
    "unitary": ("heads",),
    "orthogonal": ("heads",),
    "haar": ("linear", "released", "transformer"),
    "positional": ("positions",),
    "icl-regression": ("linear",),
}
SIZES = ("quick", "default", "full")
_PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "augmented": {
        "default": {"d": 5, "length": 8, "steps": 800, "batch": 512, "learning_rate": 0.02},
        "quick": {"steps": 250, "records": 5},
        "full": {"steps": 3200, "batch": 1024, "learning_rate": 0.01},
    },
    "unitary": {
        "default": {"d": 10, "length": 20, "steps": 300, "starts": 4, "learning_rate": 0.01, "records": 6},
        "full": {"steps": 1000, "starts": 16},
    },
    "orthogonal": {
        "default": {"d": 10, "length": 20, "steps": 3000, "starts": 128, "learning_rate": 2e-3, "records": 6},
        "quick": {"steps": 800, "starts": 96, "records": 4},
        "full": {"steps": 100_000, "learning_rate": 1e-3},
    },
    "haar": {
        "default": {"d": 5, "length": 50, "steps": 1300, "batch": 32, "learning_rate": 0.01, "records": 5},
        "quick": {"steps": 200, "batch": 64},
        "full": {"steps": 3200, "batch": 1024, "records": 8},
    },
    "positional": {
        "default": {"d": 1, "length": 30, "steps": 3000, "batch": 1000, "learning_rate": 0.5},
        "full": {"steps": 100_000},
    },
    "icl-regression": {
        "default": {"d": 10, "length": 10, "steps": 2000, "batch": 512, "learning_rate": 3e-3},
        "quick": {"steps": 800, "records": 6},
        "full": {"steps": 5000, "batch": 2048, "learning_rate": 1e-3},
    },
}
_CONTEXTS = {"quick": (3, 16), "default": (3, 5, 16, 32), "full": (3, 5, 16, 32, 49)}
_LAYERS = {
    "haar": {"quick": (1, 2), "default": (1, 2, 3), "full": (1, 2, 3, 4)},
    "icl-regression": {"quick": (1,), "default": (1, 2), "full": (1, 2, 5)},
}
# At these the models of "haar" learn within some hundred steps; the released model's is the authors'.
_RATES = {"linear": 3e-3, "released": 1e-2, "transformer": 1e-2}
_MUS = (50, 100, 200, 300)


@dataclass(frozen=True)
class Settings:
    """All that makes a run what it is. Raises InputError for what can't be trained.

    `length` is the longest context T; in "icl-regression" the number of points. `starts` diagonal models are trained
    side by side, and the best of them is the model. `mu` divides the phases of "positional".
    """

    setting: str
    model: str
    d: int
    length: int
    steps: int
    learning_rate: float
    batch: int = 256
    heads: int = 1
    layers: int = 1
    mu: float = 1.0
    starts: int = 1
    records: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        choose("setting", self.setting, MODELS)
        choose("model", self.model, MODELS[self.setting])
        at_least(self, d=1, length=2, steps=1, batch=2, heads=1, layers=1, starts=1, records=2, seed=0)
        above_zero("learning_rate", self.learning_rate)
        above_zero("mu", self.mu)
        if self.setting == "orthogonal" and self.d % 2:
            raise InputError(f"d is {self.d}: give an even number, since eigenvalues come in conjugate pairs.")
        needs = {"unitary": self.d + 1, "orthogonal": self.d + 1, "haar": self.d + 1, "icl-regression": self.d}
        if self.length < needs.get(self.setting, 2):
            what = "points, or least squares is singular" if self.setting == "icl-regression" else "vectors"
            because = "" if self.setting == "icl-regression" else ", or least squares can't tell W"
            raise InputError(
                f"length is {self.length}, and d is {self.d}: give at least {needs[self.setting]} {what}{because}."
            )

    @property
    def name(self) -> str:
        """What the run and its folder are called."""
        parts = [self.model, f"d{self.d}", f"T{self.length}"]
        parts += [f"H{self.heads}"] * (self.diagonal or self.model == "transformer")
        parts += [f"L{self.layers}"] * (self.setting in ("haar", "icl-regression"))
        parts += [f"mu{self.mu:g}"] * (self.setting == "positional")
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def diagonal(self) -> bool:
        """Whether this is about diagonal heads."""
        return self.model == "heads"

    @property
    def record_steps(self) -> list[int]:
        """About `records` steps from 0 to the last, wider apart as they go."""
        return sorted({round(self.steps * (i / (self.records - 1)) ** 2) for i in range(self.records)})

    def positions(self) -> list[int]:
        """Context lengths whose effective matrices are read; none of diagonal models, whose query isn't s_T."""
        return [] if self.diagonal or self.setting == "positional" else sorted({max(2, self.length // 4), self.length})


def runs(
    setting: str,
    size: str = "default",
    *,
    seeds: Sequence[int] = (0,),
    heads: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    **given: int | None,
) -> list[Settings]:
    """The runs of a setting at a size; `given` (d, length, steps, batch, ...) takes the place of the size's own.

    `heads` are those of diagonal models, `layers` those of "haar" and "icl-regression". InputError for what can't be
    trained and for what the setting has no use for.
    """
    choose("setting", setting, MODELS)
    choose("size", size, SIZES)
    if not seeds:
        raise InputError("seeds is empty: give at least one.")
    for name, value, users in (
        ("heads", heads, ("unitary", "orthogonal")),
        ("layers", layers, tuple(_LAYERS)),
        ("d", given.get("d"), tuple(set(MODELS) - {"positional"})),
    ):
        if value is not None and setting not in users:
            raise InputError(f"{name} is {value}, which setting {setting!r} has no use for: leave it out.")
    plan = _PLANS[setting]
    common = {**plan["default"], **plan.get(size, {}), **{n: v for n, v in given.items() if v is not None}}
    varied = _varied(setting, size, common, heads, layers)
    return list(dict.fromkeys(Settings(setting, **{**common, **part}, seed=seed) for seed in seeds for part in varied))


def _varied(
    setting: str, size: str, common: Mapping[str, Any], heads: Sequence[int] | None, layers: Sequence[int] | None
) -> list[dict[str, Any]]:
    """What tells the runs of a setting apart."""
    if setting == "augmented":
        contexts = sorted({*_CONTEXTS[size], common["length"]})
        others = [{"model": model} for model in MODELS[setting] if model != "diagonal"]
        return [{"model": "diagonal", "length": length} for length in contexts] + others
    if setting == "positional":
        return [{"model": "positions", "mu": float(mu)} for mu in _MUS]
    if setting in ("unitary", "orthogonal"):
        return [{"model": "heads", "heads": count} for count in heads or _staircase(setting, size, common["d"])]
    depths = layers or _LAYERS[setting][size]
    if setting == "icl-regression":
        return [{"model": "linear", "layers": depth} for depth in depths]
    linear = [{"model": m, "layers": n, "learning_rate": _RATES[m]} for m in ("linear", "released") for n in depths]
    if size == "quick":
        return linear
    # A transformer takes ten times as long as the others: fewer depths, and one head beside four at the first.
    shapes = [(depths[0], 1), *((n, 4) for n in (depths if size == "full" or layers else depths[:2]))]
    rate = _RATES["transformer"]
    return linear + [{"model": "transformer", "layers": n, "heads": h, "learning_rate": rate} for n, h in shapes]


def _staircase(setting: str, size: str, d: int) -> list[int]:
    """Numbers of heads up to what a loss of 0 takes, and beyond: 8 of d = 10 as in `orthogonal.py`."""
    enough = max(1, d) if setting == "unitary" else max(1, d // 2)
    more = {"unitary": {d + 2}, "orthogonal": {enough + 1, 4 * d // 5}}[setting]
    if size != "quick":
        return sorted({*range(1, enough + 1), *more})
    return sorted({1, max(1, enough // 2), max(1, enough - 1), enough, max(more)})
