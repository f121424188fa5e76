"""The model card: what a converted model is, measured numbers with their intervals, and how to load it.

`model_cards/template.md` is filled from the student's own record and its `evaluation.json`. A number that was not
measured is not there, and the card says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markupsafe import Markup

from ..convert import Student, agreement_of
from ..convert.layers import STRENGTHS, strength_spans
from ..convert.libraries import CLASSES, FEATURES, LIBRARIES, REGRESSION
from ..convert.methods import find_method
from ..convert.output import output_kind
from ..core import words
from ..evaluate.record import Evaluation, Measurement
from ..evaluate.report.tables import Cell, Table, absences, fidelity_table, method_tables, named, number, turned
from ..evaluate.task import OURS
from ..evaluate.verdict import verdict
from .licences import Base, Licence

__all__ = ["Shown", "card_of", "load_lines", "task_of"]


@dataclasses.dataclass(frozen=True)
class Shown:
    """The explained picture of a card, and its ledger: a row of `Explanation.row`."""

    target: str
    ledger: dict[str, Any]


# How a student is opened with this package; the libraries' own ways are in their descriptors. `{repo}` is ORG/NAME.
BCOSIFY = """\
from bcosify.data import read_picture
from bcosify.explain import {target}, explain
from bcosify.publish import load

student = load("{repo}")
picture = student.preprocess.transform()(read_picture("cat.png"))[None]
explanation = explain(student.model, picture, {call})
print(explanation.scores, explanation.input_part, explanation.constants)
"""


# Kind of output -> the target that a card's lines import, and how it is called.
TARGETS = {
    CLASSES: ("TopTarget", "TopTarget()"),
    REGRESSION: ("ClassTarget", "ClassTarget(0)"),
    FEATURES: ("SelfTarget", "SelfTarget()"),
}


def task_of(student: Student) -> str:
    """The hub's name of what the model is for."""
    if student.text is not None:
        return "zero-shot-image-classification"
    return "image-classification" if output_kind(student).count else "image-feature-extraction"


def load_lines(student: Student, repo: str) -> dict[str, str]:
    """Library -> the lines that open `repo` with it, of those that can: most open students of their own models only."""
    output = output_kind(student)
    names = {
        "repo": repo,
        "auto": "AutoModelForImageClassification" if output.count else "AutoModel",
        **dict(zip(("target", "call"), TARGETS.get(output.kind, TARGETS[CLASSES]), strict=True)),
    }
    doors = {name: library.door for name, library in LIBRARIES.items() if library.door}
    fits = {
        name: door.lines
        for name, door in doors.items()
        if (door.everyone or name == student.source.library) and (student.text is not None or not door.pairs)
    }
    return {name: code.format(**names) for name, code in {"bcosify": BCOSIFY, **fits}.items()}


def card_of(
    student: Student,
    repo: str,
    base: Base,
    licence: Licence,
    *,
    evaluation: Evaluation | None = None,
    recipe: dict[str, Any] | None = None,
    data: str | None = None,
    shown: Shown | None = None,
) -> ModelCard:
    """The card of `student` in `repo`.

    Args:
        evaluation: of these weights; None is said in the card.
        recipe: as `recipe.yaml` of the alignment holds it.
        data: what pictures it was aligned and measured on, in the publisher's words.
        shown: the ledger of `explanation.png`, where there is one.
    """
    template = resources.files("bcosify.model_cards").joinpath("template.md").read_text("utf-8")
    method = find_method(student.method)
    tables = {} if evaluation is None else method_tables(evaluation)
    facts: dict[str, Any] = dict(
        title=f"{student.source.architecture}, {method.title}",
        repo=repo,
        base=base,
        terms=licence,
        student=student,
        output=str(output_kind(student)),
        layers=", ".join(f"{count} {name}" for name, count in student.plan.counts().items()),
        strengths=_strengths(student),
        alignment=student.history.alignment,
        recipe=recipe,
        phases=[_phase(phase) for phase in (recipe or {}).get("phases", ())],
        end_to_end=any(_objective(phase) == "end-to-end" for phase in (recipe or {}).get("phases", ())),
        data_words=data,
        doors=[(name, Markup(code)) for name, code in load_lines(student, repo).items()],
        shown=shown,
        evaluation=evaluation,
        verdict="" if evaluation is None else str(verdict(evaluation)),
        fidelity="" if evaluation is None else Markup(markdown(fidelity_table(evaluation))),
        localisation=Markup(markdown(turned(tables["localisation"]))) if _has(tables, "localisation") else "",
        faithfulness=Markup(markdown(turned(tables["faithfulness"]))) if _has(tables, "faithfulness") else "",
        absent=[] if evaluation is None else absences(evaluation),
        mask_area=None if evaluation is None else evaluation.find("mask_area", "both"),
        limits=_limits(student, evaluation, recipe),
    )
    return ModelCard.from_template(
        _metadata(student, repo, base, licence, evaluation),
        template_str=template,
        **{name: _as_words(fact) for name, fact in facts.items()},
        method=method,
        number=number,
        code=lambda text: words.markdown_code(getattr(text, "raw", text)),
        link=lambda address, text: words.markdown_link(getattr(address, "raw", address), text),
    )


class _Word(str):
    """A text of others as words of Markdown; `raw` is what they wrote."""

    raw: str


class _Words:
    """What the template sees of an object: its texts, at any depth, are words, whatever they look like."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return _as_words(getattr(self._of, name))

    def __getitem__(self, key: Any) -> Any:
        return _as_words(self._of[getattr(key, "raw", key)])

    def __iter__(self) -> Iterator[Any]:
        return map(_as_words, self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __bool__(self) -> bool:
        return bool(self._of)

    def __str__(self) -> str:
        return words.markdown(self._of)


def _as_words(value: Any) -> Any:
    """`value` for the template: numbers, methods and what is Markdown already as they are."""
    if value is None or isinstance(value, Markup | _Words | bool | int | float) or callable(value):
        return value
    if not isinstance(value, str):
        return _Words(value)
    word = _Word(words.markdown(value))
    word.raw = value
    return word


def _has(tables: Mapping[str, Table], section: str) -> bool:
    return section in tables and bool(tables[section].rows)


def _strengths(student: Student) -> str:
    known = {"b": "B", "beta": "share of the biases", "carry": "share of the biases that is carried"}
    spans = strength_spans(student.model).items()
    return ", ".join(
        f"{known.get(name, name)} {least:g}" + (f" to {most:g}" if most > least else "")
        for name, (least, most) in spans
    )


def _objective(phase: dict[str, Any]) -> str:
    """Its name, with or without settings (`objective: {name: {...}}`)."""
    found = phase.get("objective", "")
    return next(iter(found), "") if isinstance(found, dict) else found


def _phase(phase: dict[str, Any]) -> dict[str, Any]:
    """One line of the recipe: what it trains towards, for how long, and where its strengths go."""
    moves = {name: phase[name] for name in STRENGTHS if isinstance(phase.get(name), list)}
    return {
        "objective": _objective(phase),
        "pictures": phase.get("pictures", ""),
        "learning_rate": phase.get("learning_rate", ""),
        "moves": ", ".join(
            f"{name} {ends[0]:g}" + (f" → {ends[-1]:g}" if ends[0] != ends[-1] else "") for name, ends in moves.items()
        ),
    }


# ----------------------------------------------------------------------------------------------------------- the header


def _metadata(
    student: Student, repo: str, base: Base, licence: Licence, evaluation: Evaluation | None
) -> ModelCardData:
    task = task_of(student)
    related = {} if base.repo is None else {"base_model": base.repo, "base_model_relation": "finetune"}
    results = [] if evaluation is None else [_result(one, task, evaluation) for one in evaluation.headlines().values()]
    return ModelCardData(
        **licence.card_fields(),
        **related,
        library_name="bcosify",
        pipeline_tag=task,
        tags=["bcosify", "interpretability", "explainable-ai", student.method, student.source.library],
        **({"model_name": repo.partition("/")[2], "eval_results": results} if results else {}),
    )


def _result(one: Measurement, task: str, evaluation: Evaluation) -> EvalResult:
    """A line of the model-index. The hub knows no data set of these pictures: their digest says which they are."""
    masks = one.section == "localisation"
    of = f"{one.model}: {one.method}" if one.method else ""
    return EvalResult(
        task_type=task,
        dataset_type="pictures-with-masks" if masks else "pictures",
        dataset_name="held-out pictures with masks" if masks else "held-out pictures, no labels read",
        dataset_args={"sha256 of the index": evaluation.data.get("masks" if masks else "data")},
        metric_type=one.metric,
        metric_name=", ".join(filter(None, (named(one.metric, one.variant), of))),
        metric_value=one.value,
        metric_args={"low": one.low, "high": one.high, "interval": "95 %", "n": one.n},
    )


# ----------------------------------------------------------------------------------------------------------- the tables


def markdown(table: Table) -> str:
    """A table with each value's interval behind it; what `table` marks in bold."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    heads = [words.markdown(f"{name} ({hint})" if hint else name) for name, hint in table.columns]
    return "\n".join(
        [line(heads), line(["---"] * len(heads)), *(line([_format_cell(c) for c in row]) for row in table.rows)]
    )


def _format_cell(cell: Cell) -> str:
    text = words.markdown(cell.text)
    text = f"**{text}**" if cell.best and text else text
    return f"{text} ({words.markdown(cell.interval)})" if cell.interval else text


# ----------------------------------------------------------------------------------------------------------- the limits


def _limits(student: Student, evaluation: Evaluation | None, recipe: dict[str, Any] | None) -> list[str]:
    """What the facts say against this model, one sentence each."""
    found = [*_of_training(student), *_of_sizes(student, evaluation, recipe)]
    found += _of_measuring(evaluation) if evaluation else ()
    if evaluation is None:
        found.append("It was not evaluated: nothing is known here of how close it is to its teacher, or of its maps.")
    return found


def _of_training(student: Student) -> list[str]:
    found = []
    if (agreement := agreement_of(student)).low or student.history.alignment is None:
        found.append(agreement.words)
    spans = strength_spans(student.model)
    if spans.get("beta", (0.0, 0.0))[1] > 0:
        found.append("Biases are left in it: they are constants of the ledger, and may outweigh the picture.")
    return found


def _of_sizes(student: Student, evaluation: Evaluation | None, recipe: dict[str, Any] | None) -> list[str]:
    """Where it was aligned or measured on pictures of another size than its own."""
    own, trained = student.preprocess.size, (recipe or {}).get("image_size")
    measured = own if evaluation is None else tuple(evaluation.model["size"])
    found = []
    if trained and (trained, trained) != own:
        found.append(f"It was aligned on pictures of {trained} px, but its preprocessing makes {own[0]} px.")
    if measured != own:
        found.append(
            f"It was measured on pictures of {measured[0]} px, but its preprocessing makes {own[0]} px: the figures "
            f"here hold at {measured[0]} px."
        )
    return found


def _of_measuring(evaluation: Evaluation) -> list[str]:
    found, lines = evaluation.headlines(), []
    for metric, meaning in (
        ("top1_agreement", "is the share of held-out pictures on which it decides as its teacher does"),
        ("centred_cosine", "is the centred cosine of its output to its teacher's (1 is the same)"),
    ):
        if metric in found:
            lines.append(f"{_with_interval(found[metric])} {meaning}. It is not its teacher: measure it on your task.")
            break
    ours, theirs = found.get("energy_in_mask"), found.get("energy_in_mask_teacher")
    gain = evaluation.find("energy_in_mask_gain", "both", OURS)
    if ours and theirs and gain is not None and gain.value is not None:
        if not gain.above_zero:
            lines.append(
                "Its maps are not shown to lie on the object more than its teacher's in explanation mode: "
                f"{_with_interval(ours)} of the positive contribution against {_with_interval(theirs)}; on the same "
                f"pictures the difference is {_with_interval(gain)}."
            )
    elif ours and theirs and (ours.value or 0) <= (theirs.value or 0):
        lines.append(
            f"Its maps do not lie on the object more than its teacher's in explanation mode: {_with_interval(ours)} of "
            f"the positive contribution against {_with_interval(theirs)}."
        )
    if found:
        least = min(one.n for one in found.values())
        lines.append(f"Some figures are of {least} pictures or grids only; the intervals say how far to trust them.")
    return lines


def _with_interval(one: Measurement) -> str:
    interval = "" if one.low is None or one.high is None else f" ({number(one.low)} to {number(one.high)})"
    return f"{number(one.value or 0.0)}{interval}"
