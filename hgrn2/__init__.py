"""HGRN2: a gated linear RNN with outer-product state expansion (arXiv 2404.07904). Usable without Lightning."""

from hgrn2.backbone import HGRN2Backbone
from hgrn2.config import ConfigError, HGRN2Config
from hgrn2.mixer import HGRN2Mixer
from hgrn2.ops import hgrn2_scan, hgrn2_scan_2d, hgrn2_step

__all__ = [
    "ConfigError",
    "HGRN2Backbone",
    "HGRN2Config",
    "HGRN2Mixer",
    "hgrn2_scan",
    "hgrn2_scan_2d",
    "hgrn2_step",
]
