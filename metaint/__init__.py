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
from typing import Any

import lazy_loader

try:
    __version__ = version("metaint")
except PackageNotFoundError:  # run from a source folder that was never installed
    __version__ = "0+unknown"

_load, _names, _public = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*_public, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def _add_accessor() -> None:
    """`scan.metaint`, as soon as there is an xarray that could hold a scan; loading one only for this would cost."""
    if "xarray" in sys.modules:
        import_module("metaint.views.accessor")


def __getattr__(name: str) -> Any:
    value = _load(name)
    _add_accessor()
    return value


def __dir__() -> list[str]:
    return __all__


_add_accessor()
