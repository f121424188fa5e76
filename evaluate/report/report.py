"""report.html of an Evaluation: cards, tables, curves and a gallery with a ledger under every picture."""

from __future__ import annotations

import base64
import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ...convert.output import OutputKind
from ...core.pictures import fitted
from ...explain import Explanation, explain_scores, signed_map, smoothed, smoothing
from ..baselines import find_method
from ..contrast import OTHERS
from ..decisions import ClassDecisions, ValueDecisions
from ..record import Evaluation
from ..suite import Explained
from ..task import OURS
from ..verdict import Verdict, class_contrast, verdict
from .pages import data_url, render_page
from .tables import Cell, Table, absences, cell_of, fidelity_table, method_tables, student_first

__all__ = ["gallery_of", "report_page"]

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008), then dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
CONTRAST = "class contrast of the student's maps (0: the same map for every class)"
CARDS = {
    "centred_cosine": "centred cosine to the teacher",
    "top1_agreement": "same top-1 class as the teacher",
    "energy_in_mask": "of the student's positive contribution is on the object",
    "energy_in_mask_teacher": "the teacher's, in explanation mode",
    "grid_pointing": "GridPG 2x2, native (chance 0.25)",
    "bias_share": "of the student's scores comes from constants",
    "ledger_residual": "unaccounted for, of a score",
}
SAME = "the same map for every class"
LARGEST = 4
OUTLINE = (("#000", 3.5), ("#fff", 1.5))
SVG = "http://www.w3.org/2000/svg"
# The parts of a score, in the order of the page's tables.
LEDGER = {
    "score": "score",
    "input": "from the input",
    "direct": "of it directly",
    "carried": "of it by carried biases",
    "constants": "from constants",
    "residual": "unaccounted for",
}


def report_page(evaluation: Evaluation, gallery: Sequence[dict[str, Any]], title: str, subtitle: str) -> str:
    """The page; `gallery` is of `gallery_of`."""
    said = verdict(evaluation)
    tables = {section: student_first(table) for section, table in method_tables(evaluation).items()}
    area = evaluation.find("mask_area", "both")
    charts, key = _charts(evaluation)
    rows = [ledger for item in gallery for ledger in item["ledgers"]]
    return render_page(
        "evaluation.html",
        title=title,
        subtitle=subtitle,
        verdict=said,
        cards=_cards(evaluation, said),
        fidelity=fidelity_table(evaluation),
        localisation=tables["localisation"],
        faithfulness=tables["faithfulness"],
        area="" if area is None or area.value is None else f", {cell_of(area).text} here",
        charts=charts,
        key=key,
        gallery=gallery,
        ledger_parts=[
            (part, f"{name}{_places(rows)}" if part == "input" else name)
            for part, name in LEDGER.items()
            if any(part in row for row in rows)
        ],
        absent=absences(evaluation),
        seconds=_seconds(evaluation),
        settings=json.dumps({key: getattr(evaluation, key) for key in ("model", "data", "settings")}, indent=2),
    )


def _cards(evaluation: Evaluation, said: Verdict) -> list[tuple[str, Cell, bool]]:
    """The numbers to begin with, the class contrast before all others, and whether each is a reason for doubt."""
    contrast, headlines = class_contrast(evaluation), evaluation.headlines()
    shown = {} if contrast is None or contrast.value is None else {CONTRAST: contrast}
    shown |= {text: headlines[name] for name, text in CARDS.items() if name in headlines}
    doubts = [clause.of for clause in said.clauses if clause.doubt]
    return [(text, cell_of(one), one in doubts) for text, one in shown.items()]


def gallery_of(explained: Explained, output: OutputKind, count: int = 8) -> list[dict[str, Any]]:
    """The first `count` pictures with every map, the student's first, and the ledgers of both models.

    All maps are averaged over the same number of pixels. A map and that of another class share one scale.
    """
    pictures = explained.pictures
    count = min(count, len(pictures))
    rows = torch.arange(count)
    decisions = explained.decisions.rows(rows)
    ledgers = {}
    for name, subject in explained.subjects.items():
        found = explained.shared.get(("ledger", name))  # of the evaluation, if it was not resumed after this
        if found is None or len(found.scores) < count:
            shown = fitted(pictures.images[:count], subject.model)
            found = explain_scores(subject.model, shown, decisions.target(), check=False)
        ledgers[name] = found
    names = own = None
    if isinstance(decisions, ClassDecisions):
        names = [output.name(int(k)) for k in decisions.classes]
        own = [output.name(int(k)) for k in explained.outputs["student"][:count].argmax(1)]
    if isinstance(decisions, ValueDecisions):
        names = [output.name(0)] * count
    teacher = explained.subjects["teacher"]
    place = {("student", OURS): 0, ("teacher", OURS): 1}
    pairs = sorted(explained.maps, key=lambda pair: place.get(pair, 2))
    return [
        {
            "name": pictures.keys[i],
            "decision": names[i] if names else "what sets its feature apart",
            "student_decides": own[i] if own else None,
            "picture": data_url(to_pil_image(teacher.colours(pictures.images[i]).clamp(0, 1)), "JPEG"),
            "outline": None if pictures.masks is None else _outline(pictures.masks[i]),
            "size": tuple(pictures.images.shape[-2:]),
            "maps": [
                {
                    "of": f"{model}: {method}",
                    "ours": method == OURS,
                    "blind": not find_method(method).of_decision,
                    "sources": _drawn(explained, (model, method), i),
                }
                for model, method in pairs
            ],
            "ledgers": [_ledger(name, explanation, i) for name, explanation in ledgers.items()],
        }
        for i in range(count)
    ]


def _drawn(explained: Explained, pair: tuple[str, str], i: int) -> list[tuple[str, str]]:
    """What is shown, and its address, of the map of the decision, and of that of another class where there is one.

    Of a method that knows no class both are the same, so one is shown.
    """
    own = explained.maps[pair][i]
    maps = {"the decision": own} if find_method(pair[1]).of_decision else {SAME: own}
    if SAME not in maps and (*pair, OTHERS[0]) in explained.other_maps:
        maps["another class"] = explained.other_maps[*pair, OTHERS[0]][i]
    width = explained.maps[pair].shape[-1]
    averaged = [smoothed(one, smoothing(width)) for one in maps.values()]
    both = signed_map(torch.cat(averaged, -1), smooth=1)  # one picture, so one scale
    cut = (both.crop((n * width, 0, (n + 1) * width, both.height)) for n in range(len(maps)))
    return [(name, data_url(one.quantize(128, dither=Image.Dither.NONE))) for name, one in zip(maps, cut, strict=True)]


def _outline(mask: Tensor) -> str:
    """The address of a drawing of the border of a mask (H, W), cut at one half: white within black."""
    inside = np.pad((mask > 0.5).cpu().numpy(), 1).astype(np.int8)
    path = [f"M{start} {y}H{end}" for y, start, end in _runs(np.diff(inside, axis=0)[:, 1:-1] != 0)]
    path += [f"M{x} {start}V{end}" for x, start, end in _runs((np.diff(inside, axis=1)[1:-1] != 0).T)]
    line = f'd="{"".join(path)}" fill="none" stroke-linecap="square" vector-effect="non-scaling-stroke"'
    strokes = "".join(f'<path {line} stroke="{colour}" stroke-width="{w}"/>' for colour, w in OUTLINE)
    height, width = mask.shape
    drawing = f'<svg xmlns="{SVG}" viewBox="0 0 {width} {height}" preserveAspectRatio="none">{strokes}</svg>'
    return f"data:image/svg+xml;base64,{base64.b64encode(drawing.encode()).decode()}"


def _runs(lines: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(row, start, end) of every run of True in the rows of `lines`."""
    changes = np.diff(np.pad(lines.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (rows, starts), (_, ends) = np.nonzero(changes == 1), np.nonzero(changes == -1)
    yield from zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)


def _places(rows: Sequence[dict[str, Any]]) -> str:
    """Which models' maps are of places, and of how many."""
    counts = {row["model"]: row["places"] for row in rows if "places" in row}
    return "".join(f" (the {model}'s: from {count} places)" for model, count in counts.items())


def _ledger(model: str, explanation: Explanation, i: int) -> dict[str, Any]:
    row = explanation.row(i, 0)
    places = {} if explanation.places is None else {"places": math.prod(explanation.places)}
    return {
        **row,
        **places,
        "model": model,
        "constants": sum(row["constants"].values()),
        "largest": _largest(row["constants"]),
        "largest_carriers": _largest(row.get("carriers", {})),
    }


def _largest(shares: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(shares.items(), key=lambda item: -abs(item[1]))[:LARGEST]


def _seconds(evaluation: Evaluation) -> Table:
    cells = [
        (Cell(step.step, step.step), Cell(f"{step.wall:.1f}", step.wall), Cell(f"{step.cpu:.1f}", step.cpu))
        for step in evaluation.seconds
    ]
    return Table((("step", ""), ("seconds", ""), ("of CPU", "")), tuple(cells))


# --------------------------------------------------------------------------------------------------------------- curves


def _charts(evaluation: Evaluation) -> tuple[list[dict[str, Any]], list[tuple[str, str, str]]]:
    """One chart for each variant and order, and what the lines mean: (name, colour, solid or dashed)."""
    methods = list(dict.fromkeys(curve.method for curve in evaluation.curves))
    colour = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    groups: dict[tuple[str, str], list[Any]] = collections.defaultdict(list)
    for curve in evaluation.curves:
        groups[curve.variant, curve.order].append(curve)
    charts = [
        {"title": f"{variant}, {order} important first", "svg": _svg(curves, colour)}
        for (variant, order), curves in groups.items()
    ]
    pairs = dict.fromkeys((curve.model, curve.method) for curve in evaluation.curves)
    key = [(f"{model}: {m}", colour[m], "dashed" if model == "student" else "solid") for model, m in pairs]
    return charts, key


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Where a value lies in the drawing."""

    top: float
    width: int = 420
    height: int = 250
    left: int = 38
    bottom: int = 34

    def point(self, x: float, y: float) -> str:
        across = self.left + x * (self.width - self.left - 10)
        return f"{across:.1f},{10 + (1 - y / self.top) * (self.height - self.bottom - 10):.1f}"


def _svg(curves: Sequence[Any], colour: dict[str, str]) -> Markup:
    highest = max(
        max(value if high is None else high for value, high in zip(c.values, c.high, strict=True)) for c in curves
    )
    axes = _Axes(top=min(1.0, max(0.05, 1.05 * highest)))
    parts = [
        f'<svg viewBox="0 0 {axes.width} {axes.height}" role="img" aria-label="confidence over the share removed">'
    ]
    for step in range(5):
        value = axes.top * step / 4
        start, end = axes.point(0, value), axes.point(1, value)
        (x, y), (across, _) = start.split(","), end.split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{across}" y2="{y}" stroke="#e2e2e7"/>')
        parts.append(f'<text x="{float(x) - 5}" y="{float(y) + 4}" text-anchor="end" fill="#6e6e73">{value:.2f}</text>')
        x, y = axes.point(step / 4, 0).split(",")
        anchor = "end" if step == 4 else "middle"
        parts.append(f'<text x="{x}" y="{float(y) + 15}" text-anchor="{anchor}" fill="#6e6e73">{step * 25} %</text>')
    parts.append(
        f'<text x="{axes.width / 2}" y="{axes.height - 3}" text-anchor="middle" fill="#6e6e73">share removed</text>'
    )
    for curve in curves:
        stroke, dash = colour[curve.method], ' stroke-dasharray="6 4"' if curve.model == "student" else ""
        if None not in (*curve.low, *curve.high):
            around = [axes.point(x, y) for x, y in zip(curve.fractions, curve.high, strict=True)]
            around += [axes.point(x, y) for x, y in zip(curve.fractions, curve.low, strict=True)][::-1]
            parts.append(f'<polygon points="{" ".join(around)}" fill="{stroke}" opacity="0.07"/>')
        line = " ".join(axes.point(x, y) for x, y in zip(curve.fractions, curve.values, strict=True))
        name = f"<title>{curve.model}: {curve.method}</title>"
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{stroke}" stroke-width="2"{dash}>{name}</polyline>'
        )
    # Names are of methods and models of ours; nothing here comes from a file that a user gave.
    return Markup("".join([*parts, "</svg>"]))
