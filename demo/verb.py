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
from PIL import Image

from ..align import align, load_recipe
from ..convert import load
from ..convert.agreement import agreement_of
from ..convert.hub import shipped_students
from ..convert.layers import strength_spans
from ..core.errors import DataError
from ..core.files import check_free, new_file, read_json
from ..core.words import one_line
from ..data.pack import write_shards
from ..data.pictures import read_picture
from ..evaluate.report import data_url, render_page
from .photographs import CELLS, Models, Shown, show

__all__ = ["EXPLAINED", "STUDENT", "Demonstration", "demo", "photographs"]

(STUDENT,) = shipped_students()
# Explained, and never seen in training; crops of the rest of scikit-image's photographs are trained on.
EXPLAINED = {"chelsea.png": "a cat", "coffee.png": "a cup of coffee", "rocket.jpg": "a rocket"}
TRAINED = (
    "astronaut.png brick.png camera.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png "
    "motorcycle_left.png motorcycle_right.png retina.jpg"
).split()
CROPS = 8
RECORD = "demo.json"


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """What `demo` did.

    Attributes:
        student: its reference. `reference`: its teacher's. `agreement`: how far it stands for its teacher, in words.
        size: at which both see the photographs. `shown`: these.
        identity_error: of the conversion to class maps, which was not trained.
        fidelity: held-out, over the pictures of the alignment seen. `training_pictures`: of that alignment.
        report: the page.
    """

    student: str
    reference: str
    agreement: str
    b: float
    size: str
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
    photo: str | Path | Sequence[str | Path] = (),
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
    places = [photo] if isinstance(photo, str | Path) else photo
    own = [(one_line(Path(place).name), read_picture(place)) for place in places]
    given, resolved = photographs(), load_recipe(recipe)
    student = load(STUDENT)
    if overwrite:
        _clear(out)
    with new_file(out / RECORD) as scratch:  # from here on, the folder is this command's
        scratch.write_text(json.dumps({"student": STUDENT}))
    tell(f"1/4 {STUDENT} and its teacher, {student.source.reference}; class maps of the teacher, without training")
    models = Models.of(student)
    tell(f"    {agreement_of(student).words}")
    tell(f"2/4 explaining {len(own) + len(EXPLAINED)} photographs that were never trained on, erasing parts of them")
    shown, pictures = [], []
    for name, picture in [*own, *((name, given[name]) for name in EXPLAINED)]:
        facts, tiles = show(name, picture, models)
        shown.append(facts)
        pictures.append({key: data_url(tile, "JPEG") for key, tile in tiles.items()})
    tell(f"3/4 aligning the student further on {CROPS * len(TRAINED)} crops: {resolved.pressure}")
    _shards(given, out / "shards")
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
        b=strength_spans(student.model)["b"][1],
        size="{1} x {0} pixels".format(*student.preprocess.size),
        shown=tuple(shown),
        identity_error=models.class_maps.history.conversion.identity_error or 0.0,
        fidelity=aligned.curve,
        training_pictures=aligned.pictures,
        seconds=round(time.monotonic() - started),
        report=out / "report.html",
    )
    tell(f"4/4 {done.report}")
    with new_file(done.report) as scratch:
        scratch.write_text(
            render_page("demo.html", **vars(done), pictures=pictures, titles=EXPLAINED, cells=CELLS), "utf-8"
        )
    with new_file(out / RECORD) as scratch:
        scratch.write_text(json.dumps(dataclasses.asdict(done), default=str, indent=1))
    return done


# ------------------------------------------------------------------------------------------------------------- a folder


def _written(folder: Path) -> set[str] | None:
    """The names in `folder` that a demo wrote, by its record; None where there is none of it."""
    with contextlib.suppress(DataError):
        found = read_json(folder / RECORD, DataError) if (folder / RECORD).is_file() else None
        if isinstance(found, dict) and found.get("student") == STUDENT:
            return {RECORD, "shards", "aligned", "aligned.run", "report.html"}
    return None


def _clear(folder: Path) -> None:
    for name in (_written(folder) or set()) if folder.is_dir() else ():
        place = folder / name
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)


def photographs() -> dict[str, Image.Image]:
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


def _shards(given: Mapping[str, Image.Image], out: Path) -> None:
    """Crops of the photographs, the same on every machine, packed as train and val shards."""
    random = np.random.default_rng(0)
    for part, names in (("train", TRAINED), ("val", list(EXPLAINED))):
        with tempfile.TemporaryDirectory() as folder:
            for name, number in itertools.product(names, range(CROPS)):
                picture = given[name]
                side = int(min(picture.size) * random.uniform(0.5, 1.0))
                left, top = (int(random.integers(0, length - side + 1)) for length in picture.size)
                crop = picture.crop((left, top, left + side, top + side)).resize((256, 256))
                crop.save(Path(folder) / f"{Path(name).stem}-{number:03d}.jpg", quality=92)
            write_shards(folder, out / part, progress=False)
