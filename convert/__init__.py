"""reference -> Teacher -> plan -> Student -> folder."""

from __future__ import annotations

from .calibrate import calibrate
from .checkpoint import load, save, skeleton
from .fold import fold
from .layers import set_strength
from .libraries import (
    Preprocess,
    Source,
    Teacher,
    Text,
    embed_texts,
    load_teacher,
    probabilities,
    reload_teacher,
    token_grid,
)
from .methods.bcos import BcosConfig
from .methods.ca_stream import CaStreamConfig
from .methods.coda import CodaConfig
from .methods.fa_cnn import FaCnnConfig
from .methods.kmeans import KMeansConfig
from .plan import Plan
from .student import Student, check_teacher, convert, identity_error, lossy_steps, plan_for

__all__ = [
    "BcosConfig",
    "CaStreamConfig",
    "CodaConfig",
    "FaCnnConfig",
    "KMeansConfig",
    "Plan",
    "Preprocess",
    "Source",
    "Student",
    "Teacher",
    "Text",
    "calibrate",
    "check_teacher",
    "convert",
    "embed_texts",
    "fold",
    "identity_error",
    "load",
    "load_teacher",
    "lossy_steps",
    "plan_for",
    "probabilities",
    "reload_teacher",
    "save",
    "set_strength",
    "skeleton",
    "token_grid",
]
