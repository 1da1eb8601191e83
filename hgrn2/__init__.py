"""HGRN2: a gated linear RNN with outer-product state expansion (arXiv 2404.07904). Usable without Lightning."""

import importlib
from typing import TYPE_CHECKING

from hgrn2.config import ConfigError, HGRN2Config

if TYPE_CHECKING:
    from hgrn2.backbone import HGRN2Backbone
    from hgrn2.mixer import HGRN2Mixer
    from hgrn2.ops import hgrn2_scan, hgrn2_scan_2d, hgrn2_step

# imported when first asked for: a command line with a mistake is answered before torch is loaded
_LAZY = {
    "HGRN2Backbone": "hgrn2.backbone",
    "HGRN2Mixer": "hgrn2.mixer",
    "hgrn2_scan": "hgrn2.ops",
    "hgrn2_scan_2d": "hgrn2.ops",
    "hgrn2_step": "hgrn2.ops",
}

__all__ = [
    "ConfigError",
    "HGRN2Backbone",
    "HGRN2Config",
    "HGRN2Mixer",
    "hgrn2_scan",
    "hgrn2_scan_2d",
    "hgrn2_step",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
