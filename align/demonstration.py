"""`bcosify.demo`: what the student that comes with the package shows on photographs, and half a minute of alignment.

Everything here is made by the functions that the verbs use: nothing is prepared but the student itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ..convert import FaCnnConfig, Preprocess, Student, convert, fold, load, load_teacher
from ..convert.agreement import agreement_of
from ..convert.hub import shipped_students
from ..convert.output import OutputKind, output_kind
from ..core.errors import DataError
from ..core.files import check_free, new_file, read_json
from ..data.pack import write_shards
from ..data.pictures import read_picture
from ..evaluate.baselines import find_method, maps_of
from ..evaluate.decisions import ClassDecisions
from ..evaluate.fills import FILLS
from ..evaluate.report import data_url, render_page
from ..evaluate.subject import Subject
from ..explain import ClassTarget, Explanation, explain_scores, overlay
from .recipe import load_recipe
from .verb import align

__all__ = ["Demonstration", "demo"]

(STUDENT,) = shipped_students()
# Explained, and never seen in training; crops of the rest of scikit-image's photographs are trained on.
EXPLAINED = {"chelsea.png": "a cat", "coffee.png": "a cup of coffee", "rocket.jpg": "a rocket"}
TRAINED = (
    "astronaut.png brick.png camera.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png "
    "motorcycle_left.png motorcycle_right.png retina.jpg"
).split()
CROPS = 12
SIDE = 320  # pixels of a shown picture
CELLS = 5  # regions are rectangles of cells of a grid of so many a side
SMOOTH = 21  # pixels of it: one smoothing for every map
RECORD = "demo.json"


@dataclasses.dataclass(frozen=True)
class Decision:
    """Of a classifier: the class, its probability (softmax), and the next class."""

    label: str
    probability: float
    second: str


@dataclasses.dataclass(frozen=True)
class Ledger:
    """A score in four parts that add up to it: pixels for and against it, carried biases, constants."""

    label: str
    score: float
    pixels_for: float
    pixels_against: float
    carried: float
    constants: float
    residual: float


@dataclasses.dataclass(frozen=True)
class Region:
    """A rectangle of cells, and what became of the score when its pixels were erased.

    Attributes:
        box: left, top, right, bottom in cells. share: what it adds to the score, by the map.
        erased: the score with the region in the mean colour. decides: what the student then decides.
    """

    box: tuple[int, int, int, int]
    share: float
    erased: float
    decides: str


@dataclasses.dataclass(frozen=True)
class Shown:
    """A photograph and what the models say of it. `student` and the ledgers are of the student's own decision, and of
    the class that comes next; `regions` are of its decision."""

    name: str
    teacher: Decision
    class_maps: Decision
    student: Decision
    agrees: bool
    ledgers: tuple[Ledger, Ledger]
    regions: tuple[Region, ...]


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """What `demo` did.

    Attributes:
        student: its reference. `reference`: its teacher's. `agreement`: how far it stands for its teacher, in words.
        shown: the photographs. `identity_error`: of the conversion to class maps, which was not trained.
        fidelity: held-out, over the pictures of the alignment seen. `training_pictures`: of that alignment.
        report: the page.
    """

    student: str
    reference: str
    agreement: str
    b: float
    shown: tuple[Shown, ...]
    identity_error: float
    fidelity: list[dict[str, Any]]
    training_pictures: int
    seconds: int
    report: Path


def demo(
    out: str | Path = "demo-out",
    recipe: str = "demo",
    *,
    photo: Sequence[str | Path] = (),
    overwrite: bool = False,
    say: Callable[[str], object] | None = None,
) -> Demonstration:
    """Shows on photographs what the finished student decides and why, aligns it for half a minute, and writes a page.

    The student is the one that comes with this package; its teacher is EfficientNet-Lite0 with its ImageNet weights.
    The photographs are inside scikit-image.

    Args:
        out: folder for everything: report.html, demo.json, shards, the student that was aligned further.
        recipe: another recipe for the alignment.
        photo: photographs of one's own, which are shown first.
        overwrite: replace the folder if it exists.
        say: is told every step as it begins; the alignment then also shows how it goes, on stderr.

    Raises:
        DataError: a photograph that cannot be read, or scikit-image is missing.
        CheckpointError: the folder exists, or the package lacks the student.
    """
    started, out = time.monotonic(), Path(out)
    tell = say or (lambda line: None)
    check_free(out, overwrite, _written)
    own = {str(place): read_picture(Path(place)) for place in photo}
    photographs = _photographs()
    student, resolved = load(STUDENT), load_recipe(recipe)
    if overwrite:
        _clear(out)
    tell(f"1/4 {STUDENT} and its teacher, {student.source.reference}; class maps of the teacher, without training")
    teacher = load_teacher(student.source.reference)
    class_maps = convert(load_teacher(student.source.reference), FaCnnConfig())
    error = class_maps.history.conversion.identity_error or 0.0
    tell(f"    {agreement_of(student).words}")
    tell(f"2/4 explaining {len(own) + len(EXPLAINED)} photographs that were never trained on, erasing parts of them")
    quick = dataclasses.replace(student, model=fold(student))
    shown, pictures = [], []
    for name, picture in [*own.items(), *((name, photographs[name]) for name in EXPLAINED)]:
        facts, tiles = _show(name, picture, teacher, class_maps, quick)
        shown.append(facts)
        pictures.append({key: data_url(tile, "JPEG") for key, tile in tiles.items()})
    tell(f"3/4 aligning the student further on {CROPS * len(TRAINED)} crops: {resolved.pressure}")
    with new_file(out / RECORD) as scratch:  # from here on, the folder is this command's
        scratch.write_text(json.dumps({"student": STUDENT}))
    _shards(photographs, out / "shards")
    aligned = align(
        STUDENT,
        data=out / "shards" / "train",
        recipe=recipe,
        val=out / "shards" / "val",
        out=out / "aligned",
        progress=say is not None,
    )
    done = Demonstration(
        student=STUDENT,
        reference=student.source.reference,
        agreement=agreement_of(student).words,
        b=resolved.phases[-1].b[1],
        shown=tuple(shown),
        identity_error=error,
        fidelity=aligned.curve,
        training_pictures=aligned.pictures,
        seconds=round(time.monotonic() - started),
        report=out / "report.html",
    )
    tell(f"4/4 {done.report}")
    with new_file(done.report) as scratch:
        scratch.write_text(render_page("demo.html", **vars(done), pictures=pictures, titles=EXPLAINED, cells=CELLS))
    with new_file(out / RECORD) as scratch:
        scratch.write_text(json.dumps(dataclasses.asdict(done), default=str, indent=1))
    return done


# ------------------------------------------------------------------------------------------------------------- a folder


def _written(folder: Path) -> set[str] | None:
    """The names in `folder` that a demo wrote, by its record; None where there is none of it."""
    with contextlib.suppress(DataError):
        if (folder / RECORD).is_file() and read_json(folder / RECORD, DataError).get("student") == STUDENT:
            return {RECORD, "shards", "aligned", "aligned.run", "report.html"}
    return None


def _clear(folder: Path) -> None:
    for name in (_written(folder) or set()) if folder.is_dir() else ():
        place = folder / name
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)


def _photographs() -> dict[str, Image.Image]:
    """Name -> picture, from scikit-image's own files (no download)."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the demo's photographs are in scikit-image, which is not installed. Run: pip install 'bcosify[demo]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    missing = [name for name in (*EXPLAINED, *TRAINED) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"this scikit-image has no {', '.join(missing)}; the demo was made with 0.26.")
    return {name: read_picture(folder / name) for name in (*EXPLAINED, *TRAINED)}


def _shards(photographs: Mapping[str, Image.Image], out: Path) -> None:
    """Crops of the photographs, the same on every machine, packed as train and val shards."""
    random = np.random.default_rng(0)
    for part, names in (("train", TRAINED), ("val", list(EXPLAINED))):
        with tempfile.TemporaryDirectory() as folder:
            for name, number in itertools.product(names, range(CROPS)):
                picture = photographs[name]
                side = int(min(picture.size) * random.uniform(0.5, 1.0))
                left, top = (int(random.integers(0, length - side + 1)) for length in picture.size)
                crop = picture.crop((left, top, left + side, top + side)).resize((256, 256))
                crop.save(Path(folder) / f"{Path(name).stem}-{number:03d}.jpg", quality=92)
            write_shards(folder, out / part, progress=False)


# -------------------------------------------------------------------------------------------------------- a photograph


def _show(
    name: str, photograph: Image.Image, teacher: Any, class_maps: Student, student: Student
) -> tuple[Shown, dict[str, Image.Image]]:
    """What the models say of a photograph, and the pictures of it: as it was seen, and one for each map."""
    output = output_kind(student)
    large, small = (opened.preprocess.transform()(photograph)[None] for opened in (teacher, student))
    seen = _seen(teacher.preprocess, large[0])
    original = _subject("teacher", teacher.model, teacher.preprocess)
    with torch.no_grad():
        decided = teacher.model(large)
    cam = maps_of(find_method("grad-cam"), original, large, ClassDecisions(decided.argmax(1)))[0]
    free = explain_scores(class_maps.model, large, ClassTarget(decided.argmax(1, keepdim=True)))
    with torch.no_grad():
        best, second = student.model(small)[0].topk(2).indices.tolist()
    explanation = explain_scores(student.model, small, ClassTarget(torch.tensor([[best, second]])))
    tiles = {
        "seen": seen,
        "grad_cam": _tile(seen, cam),
        "class_maps": _tile(seen, free.contributions[0, 0]),
        "decision": _tile(seen, explanation.contributions[0, 0]),
        "second": _tile(seen, explanation.contributions[0, 1]),
    }
    facts = Shown(
        name=Path(name).name,
        teacher=_decision(decided[0], output),
        class_maps=_decision(free.outputs[0], output),
        student=_decision(explanation.outputs[0], output),
        agrees=int(decided.argmax()) == best,
        ledgers=(_ledger(explanation, 0, output.name(best)), _ledger(explanation, 1, output.name(second))),
        regions=_regions(_subject("student", student.model, student.preprocess), small, explanation, best, output),
    )
    return facts, tiles


def _subject(name: str, model: nn.Module, preprocess: Preprocess) -> Subject:
    return Subject(name, model, None, preprocess.mean, preprocess.std, classifier=True)


def _decision(output: Tensor, names: OutputKind) -> Decision:
    best, second = output.topk(2).indices.tolist()
    return Decision(names.name(best), float(output.softmax(0)[best]), names.name(second))


def _ledger(explanation: Explanation, score: int, label: str) -> Ledger:
    """The parts of a score; pixels count for and against it by their direct contributions."""
    direct, row = explanation.direct_contributions[0, score], explanation.row(0, score)
    return Ledger(
        label=label,
        score=row["score"],
        pixels_for=float(direct.clamp_min(0).sum()),
        pixels_against=float(direct.clamp_max(0).sum()),
        carried=row.get("carried", 0.0),
        constants=sum(row["constants"].values()),
        residual=row["residual"],
    )


@torch.no_grad()
def _regions(
    subject: Subject, image: Tensor, explanation: Explanation, decision: int, output: OutputKind
) -> tuple[Region, ...]:
    """Every rectangle of cells of `image` (1, 3, H, W): its exact share, and what erasing it really does."""
    contributions = explanation.contributions[0, 0]
    fill = FILLS["mean"](subject, image)
    spans = [(start, stop) for start in range(CELLS) for stop in range(start + 1, CELLS + 1)]
    boxes = [(left, top, right, bottom) for top, bottom in spans for left, right in spans]
    masks = torch.stack([_mask(box, image.shape[-2:]) for box in boxes])
    outputs = torch.cat([subject.model(torch.where(part[:, None], fill, image)) for part in masks.split(25)])
    return tuple(
        Region(box, float(contributions[mask].sum()), float(row[decision]), output.name(int(row.argmax())))
        for box, mask, row in zip(boxes, masks, outputs, strict=True)
    )


def _mask(box: tuple[int, int, int, int], shape: Sequence[int]) -> Tensor:
    """(H, W), true inside a box in cells."""
    height, width = shape
    left, top, right, bottom = box
    rows, columns = (torch.arange(length) * CELLS // length for length in (height, width))
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))


def _tile(seen: Image.Image, contributions: Tensor) -> Image.Image:
    """A map (H, W), enlarged to the picture that it lies over."""
    large = F.interpolate(contributions[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
    return overlay(seen, large, smooth=SMOOTH)


def _seen(preprocess: Preprocess, normalised: Tensor) -> Image.Image:
    """The picture as the model saw it."""
    picture = to_pil_image(preprocess.denormalise(normalised).clamp(0, 1))
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
