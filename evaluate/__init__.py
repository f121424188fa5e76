"""What a model keeps of its teacher, and what its explanations are worth. Called, the package evaluates.

`evaluate` and `compare` are the verbs; `evaluate_subjects` measures any two models. All are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import call_as_verb, lazy_exports

if TYPE_CHECKING:
    from .comparison import Comparison, compare
    from .record import Evaluation, Measurement, read_evaluation
    from .subject import Subject
    from .suite import Settings, evaluate_subjects
    from .verb import evaluate

__all__ = [
    "Comparison",
    "Evaluation",
    "Measurement",
    "Settings",
    "Subject",
    "compare",
    "evaluate",
    "evaluate_subjects",
    "read_evaluation",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Comparison": ".comparison",
        "Evaluation": ".record",
        "Measurement": ".record",
        "Settings": ".suite",
        "Subject": ".subject",
        "compare": ".comparison",
        "evaluate": ".verb",
        "evaluate_subjects": ".suite",
        "read_evaluation": ".record",
    },
)
call_as_verb(__name__)
