"""reference -> Teacher -> plan -> Student -> folder. Called, the package converts: `bcosify.convert(...)`."""

from __future__ import annotations

from ..core.lazy import call_as_verb
from .agreement import Agreement, agreement_of, measured_agreement
from .calibrate import calibrate
from .checkpoint import load, save, skeleton
from .fold import fold
from .inspection import StudentFacts, TeacherFacts, inspect
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
from .original import teacher_of
from .plan import Plan
from .student import Student, check_teacher, identity_error, lossy_steps
from .verb import convert, plan_for

__all__ = [
    "Agreement",
    "BcosConfig",
    "CaStreamConfig",
    "CodaConfig",
    "FaCnnConfig",
    "KMeansConfig",
    "Plan",
    "Preprocess",
    "Source",
    "Student",
    "StudentFacts",
    "Teacher",
    "TeacherFacts",
    "Text",
    "agreement_of",
    "calibrate",
    "check_teacher",
    "convert",
    "embed_texts",
    "fold",
    "identity_error",
    "inspect",
    "load",
    "load_teacher",
    "lossy_steps",
    "measured_agreement",
    "plan_for",
    "probabilities",
    "reload_teacher",
    "save",
    "set_strength",
    "skeleton",
    "teacher_of",
    "token_grid",
]

call_as_verb(__name__)
