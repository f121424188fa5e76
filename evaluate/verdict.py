"""What an evaluation says of its student, in words: does it decide like its teacher, and do its maps show the class?

The page, the terminal and the model card all begin with this, so that nobody has to find it in a table. It claims
nothing that an interval does not carry: a contrast or a gain counts only where its 95 % interval excludes zero. (Ours.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ..convert.agreement import ENOUGH
from .record import Evaluation, Measurement
from .task import OURS

__all__ = ["Clause", "Verdict", "class_contrast", "verdict"]

# What shows best that a map is about the class comes first: a positive share cannot see a map that turns its sign.
CONTRASTS = ("signed_contrast", "energy_in_mask_contrast", "pointing_contrast")
VARIANTS = ("random class", "runner-up", None)
CONTRAST_GAINS = tuple(f"{name}_gain" for name in CONTRASTS)
SHARE_GAINS = ("signed_share_gain", "energy_in_mask_gain", "pointing_gain")


@dataclasses.dataclass(frozen=True)
class Clause:
    """One thing that is said of the student, by what measurement; `doubt`: it speaks against trusting the student."""

    text: str
    doubt: bool = False
    of: Measurement | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an evaluation says; `str` is all of it as one line."""

    clauses: tuple[Clause, ...]

    @property
    def doubtful(self) -> bool:
        """Whether the student should not be trusted."""
        return any(clause.doubt for clause in self.clauses)

    @property
    def lead(self) -> str:
        return "Do not trust this student yet: it" if self.doubtful else "The student"

    def __str__(self) -> str:
        return f"{self.lead} {'; '.join(clause.text for clause in self.clauses)}."


def verdict(evaluation: Evaluation) -> Verdict:
    """The verdict on the student of `evaluation`.

    It is doubtful where top-1 agreement (of models without classes, the centred cosine of the output) is below
    `ENOUGH`, or where the class contrast of the student's maps is not above zero with its whole interval. What was not
    measured is said, and is no doubt by itself.
    """
    clauses = (_agreement(evaluation), _contrast(class_contrast(evaluation)), _gain(evaluation))
    return Verdict(tuple(clause for clause in clauses if clause is not None))


def class_contrast(evaluation: Evaluation, model: str = "student") -> Measurement | None:
    """By how much the map of the decision does better than that of another class: the first such row that has a value,
    else the first that says why there is none, else None."""
    return _first(evaluation, CONTRASTS, model)


def _first(evaluation: Evaluation, metrics: Iterable[str], model: str) -> Measurement | None:
    rows = (evaluation.find(metric, model, OURS, variant) for metric in metrics for variant in VARIANTS)
    found = [row for row in rows if row is not None]
    return next((row for row in found if row.value is not None), found[0] if found else None)


def _agreement(evaluation: Evaluation) -> Clause:
    same = evaluation.find("top1_agreement", "both", variant="")
    if same is not None and same.value is not None:
        text = f"decides like its teacher on {_percent(same)} of held-out pictures"
        return Clause(text, same.value < ENOUGH, same)
    cosine = evaluation.find("centred_cosine", "both", variant="output")
    if cosine is not None and cosine.value is not None:
        text = f"gives outputs with a centred cosine of {cosine.value:.2f}{_interval(cosine, '.2f')} to its teacher's"
        return Clause(text, cosine.value < ENOUGH, cosine)
    reason = next((f" ({row.reason})" for row in (same, cosine) if row is not None and row.reason), "")
    return Clause(f"was not compared with its teacher's decisions{reason}")


def _contrast(row: Measurement | None) -> Clause:
    if row is None or row.value is None:
        reason = f" ({row.reason})" if row is not None and row.reason else ""
        return Clause(f"whether its maps differ between classes was not measured{reason}")
    if row.above_zero:
        return Clause(f"its maps differ between classes ({_signed(row)})", of=row)
    if row.below_zero:
        return Clause(f"its maps lie on the object less than those of another class ({_signed(row)})", True, row)
    return Clause(f"its maps are not shown to differ between classes ({_signed(row)})", True, row)


def _gain(evaluation: Evaluation) -> Clause | None:
    """Beside its teacher; None where no paired difference was measured."""
    for metrics, words in ((CONTRAST_GAINS, "tell classes apart"), (SHARE_GAINS, "lie on the object")):
        row = _first(evaluation, metrics, "both")
        if row is None or row.value is None:
            continue
        told = "" if row.above_zero or row.below_zero else "are not shown to "
        than = "worse" if row.below_zero else "better"
        return Clause(f"they {told}{words} {than} than its teacher's ({_signed(row)})", of=row)
    return None


# ---------------------------------------------------------------------------------------------------------------- words


def _percent(row: Measurement) -> str:
    value, low, high = (None if one is None else f"{100 * one:.0f}" for one in (row.value, row.low, row.high))
    return f"{value} %" + (f" ({low} to {high})" if low is not None and high is not None else "")


def _interval(row: Measurement, form: str) -> str:
    return "" if row.low is None or row.high is None else f" ({row.low:{form}} to {row.high:{form}})"


def _signed(row: Measurement) -> str:
    """A difference with its interval, with as many digits as none of the three needs to be no zero."""
    known = [one for one in (row.value, row.low, row.high) if one is not None]
    form = "+.2f" if all(abs(one) >= 0.005 for one in known) else "+.3f"
    value, *ends = (f"{one:{form}}" for one in known)
    return f"{value}, {' to '.join(ends)}" if len(ends) == 2 else f"{value}, of one picture"
