"""reference -> Teacher -> plan -> Student -> folder."""

from __future__ import annotations

from .calibrate import calibrate
from .checkpoint import load, save
from .layers import set_strength
from .methods.bcos import BcosConfig
from .plan import Plan
from .sources import Preprocess, Source, Teacher, load_teacher
from .student import Student, convert, identity_error, lossy_steps, plan_for

__all__ = [
    "BcosConfig",
    "Plan",
    "Preprocess",
    "Source",
    "Student",
    "Teacher",
    "calibrate",
    "convert",
    "identity_error",
    "load",
    "load_teacher",
    "lossy_steps",
    "plan_for",
    "save",
    "set_strength",
]
