"""metaint reads a transformer through its TransformerLens hooks and tells what its heads do.

    import metaint
    model = metaint.open_model("gpt2")
    scan = metaint.scan(model)
    metaint.label_heads(scan)

Names are loaded when first used, so that importing metaint costs little.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("metaint")
except PackageNotFoundError:  # run from a source folder that was never installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from metaint import measures, tasks
    from metaint.circuits.ablation import ablate
    from metaint.circuits.checks import check_circuit
    from metaint.circuits.circuit import trace_circuit
    from metaint.circuits.files import load_circuit, save_circuit
    from metaint.circuits.scan_metrics import scan_metric
    from metaint.errors import (
        ActivationError,
        HookAuditError,
        InputError,
        MetaintError,
        ModelError,
        StoreError,
    )
    from metaint.measures.measure import kind, statistic
    from metaint.measures.memory import Recall
    from metaint.models.audit import audit
    from metaint.models.memory import key_composition_recall, ov_recall, previous_position_recall
    from metaint.models.open import open_model
    from metaint.models.parameters import scaled
    from metaint.probes.heads import HeadProbe
    from metaint.probes.inner import InnerProbe
    from metaint.probes.memory import MemoryProbe
    from metaint.probes.probe import Probe
    from metaint.probes.recurrence import RecurrenceProbe
    from metaint.probes.residual import ResidualProbe
    from metaint.probes.saturation import SaturationProbe
    from metaint.probes.weights import WeightProbe
    from metaint.scanning.given import default_tokens, text_tokens
    from metaint.scanning.recorder import Recorder, read_recording
    from metaint.scanning.recur import recur
    from metaint.scanning.saturate import saturate
    from metaint.scanning.scan import attach, read_cache, scan
    from metaint.scans.labels import label_heads
    from metaint.scans.store import load, save
    from metaint.views.attention.patterns import show_attention, show_tokens
    from metaint.views.circuit.graph import show_circuit
    from metaint.views.export.headvis import save_headvis
    from metaint.views.export.tables import save_tables, tables_of
    from metaint.views.groups.heads import plot_heads
    from metaint.views.groups.inner import plot_inner
    from metaint.views.groups.memory import plot_memory
    from metaint.views.groups.recurrence import plot_recurrence
    from metaint.views.groups.residual import plot_residual
    from metaint.views.groups.saturation import plot_saturation
    from metaint.views.groups.training import plot_training
    from metaint.views.groups.weights import plot_weights

_HOMES = {
    "metaint.circuits.ablation": ("ablate",),
    "metaint.circuits.checks": ("check_circuit",),
    "metaint.circuits.circuit": ("trace_circuit",),
    "metaint.circuits.files": ("load_circuit", "save_circuit"),
    "metaint.circuits.scan_metrics": ("scan_metric",),
    "metaint.errors": (
        "ActivationError", "HookAuditError", "InputError", "MetaintError", "ModelError", "StoreError",
    ),
    "metaint.scans.labels": ("label_heads",),
    "metaint.measures.measure": ("kind", "statistic"),
    "metaint.measures.memory": ("Recall",),
    "metaint.models.audit": ("audit",),
    "metaint.models.memory": ("key_composition_recall", "ov_recall", "previous_position_recall"),
    "metaint.models.open": ("open_model",),
    "metaint.models.parameters": ("scaled",),
    "metaint.probes.heads": ("HeadProbe",),
    "metaint.probes.inner": ("InnerProbe",),
    "metaint.probes.memory": ("MemoryProbe",),
    "metaint.probes.probe": ("Probe",),
    "metaint.probes.recurrence": ("RecurrenceProbe",),
    "metaint.probes.residual": ("ResidualProbe",),
    "metaint.probes.saturation": ("SaturationProbe",),
    "metaint.probes.weights": ("WeightProbe",),
    "metaint.scanning.given": ("default_tokens", "text_tokens"),
    "metaint.scanning.recorder": ("Recorder", "read_recording"),
    "metaint.scanning.recur": ("recur",),
    "metaint.scanning.saturate": ("saturate",),
    "metaint.scanning.scan": ("attach", "read_cache", "scan"),
    "metaint.scans.store": ("load", "save"),
    "metaint.views.attention.patterns": ("show_attention", "show_tokens"),
    "metaint.views.circuit.graph": ("show_circuit",),
    "metaint.views.export.tables": ("save_tables", "tables_of"),
    "metaint.views.export.headvis": ("save_headvis",),
    "metaint.views.groups.heads": ("plot_heads",),
    "metaint.views.groups.inner": ("plot_inner",),
    "metaint.views.groups.memory": ("plot_memory",),
    "metaint.views.groups.recurrence": ("plot_recurrence",),
    "metaint.views.groups.residual": ("plot_residual",),
    "metaint.views.groups.saturation": ("plot_saturation",),
    "metaint.views.groups.training": ("plot_training",),
    "metaint.views.groups.weights": ("plot_weights",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_ROOMS = ("measures", "tasks")
__all__ = sorted([*_HOME, *_ROOMS, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def _add_accessor() -> None:
    """`scan.metaint`, as soon as there is an xarray that could hold a scan; loading one only for this would cost."""
    if "xarray" in sys.modules:
        import_module("metaint.views.accessor")


_add_accessor()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        found = getattr(import_module(_HOME[name]), name)
    elif name in _ROOMS:
        found = import_module(f"metaint.{name}")
    else:
        raise AttributeError(f"module 'metaint' has no attribute {name!r}")
    globals()[name] = found
    _add_accessor()
    return found


def __dir__() -> list[str]:
    return __all__
