"""What a phase of alignment minimises, one file an objective; each file here registers itself when it is imported.

Objectives are modules over the student, so that DDP and FSDP see their forward.
"""

from __future__ import annotations

import importlib
import pkgutil

from . import end_to_end as _first  # noqa: F401 - lists of objectives begin with it
from .base import (
    FITS,
    OBJECTIVES,
    FeatureConfig,
    Objective,
    ObjectiveConfig,
    Registered,
    changed,
    deviations,
    moved_settings,
    observe,
    with_settings,
)

__all__ = [
    "FITS",
    "OBJECTIVES",
    "FeatureConfig",
    "Objective",
    "ObjectiveConfig",
    "Registered",
    "changed",
    "deviations",
    "moved_settings",
    "observe",
    "with_settings",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
