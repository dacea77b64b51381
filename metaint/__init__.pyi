"""The public names, each with the file it lives in; `__init__.py` loads them when they are first used."""

from . import (
    circuits as circuits,
    labs as labs,
    measures as measures,
    models as models,
    probes as probes,
    scanning as scanning,
    scans as scans,
    tasks as tasks,
    toys as toys,
    views as views,
)
from .circuits.ablation import ablate as ablate
from .circuits.checks import check_circuit as check_circuit
from .circuits.circuit import trace_circuit as trace_circuit
from .circuits.curve import ablation_curve as ablation_curve
from .circuits.files import load_circuit as load_circuit, save_circuit as save_circuit
from .circuits.scan_metrics import scan_metric as scan_metric
from .errors import (
    ActivationError as ActivationError,
    HookAuditError as HookAuditError,
    InputError as InputError,
    MetaintError as MetaintError,
    ModelError as ModelError,
    StoreError as StoreError,
)
from .measures.measure import kind as kind, statistic as statistic
from .measures.memory import Recall as Recall
from .models.audit import audit as audit
from .models.fresh import fresh_model as fresh_model
from .models.memory import (
    key_composition_recall as key_composition_recall,
    ov_recall as ov_recall,
    previous_position_recall as previous_position_recall,
)
from .models.open import open_model as open_model
from .models.parameters import scaled as scaled
from .probes.heads import HeadProbe as HeadProbe
from .probes.inner import InnerProbe as InnerProbe
from .probes.memory import MemoryProbe as MemoryProbe
from .probes.outputs import OutputProbe as OutputProbe
from .probes.probe import Probe as Probe
from .probes.recurrence import RecurrenceProbe as RecurrenceProbe
from .probes.residual import ResidualProbe as ResidualProbe
from .probes.saturation import SaturationProbe as SaturationProbe
from .probes.weights import WeightProbe as WeightProbe
from .scanning.given import default_tokens as default_tokens, text_tokens as text_tokens
from .scanning.recorder import Recorder as Recorder
from .scanning.recur import recur as recur
from .scanning.saturate import saturate as saturate
from .scanning.scan import (
    attach as attach,
    read_cache as read_cache,
    scan as scan,
)
from .scans.compare import compare as compare
from .scans.labels import THRESHOLDS as THRESHOLDS, label_heads as label_heads, telling_heads as telling_heads
from .scans.matching import match_heads as match_heads
from .scans.recordings import read_recording as read_recording
from .scans.store import load as load, save as save
from .views.attention.patterns import show_attention as show_attention
from .views.attention.tokens import show_tokens as show_tokens
from .views.circuit.ablation import plot_ablation as plot_ablation
from .views.circuit.check import plot_check as plot_check
from .views.circuit.curve import plot_ablation_curve as plot_ablation_curve
from .views.circuit.graph import show_circuit as show_circuit
from .views.comparison.figure import plot_comparison as plot_comparison
from .views.export.headvis import save_headvis as save_headvis
from .views.export.tables import save_tables as save_tables, tables_of as tables_of
from .views.groups.heads import plot_heads as plot_heads
from .views.groups.inner import plot_inner as plot_inner
from .views.groups.lags import plot_lags as plot_lags
from .views.groups.memory import plot_memory as plot_memory
from .views.groups.outputs import plot_outputs as plot_outputs
from .views.groups.recurrence import plot_recurrence as plot_recurrence
from .views.groups.residual import plot_residual as plot_residual
from .views.groups.saturation import plot_saturation as plot_saturation
from .views.groups.training import plot_training as plot_training
from .views.groups.weights import plot_weights as plot_weights
from .views.report import report as report

__version__: str
__all__: list[str]
