"""`bcosify.demo`: a real model converted, aligned and explained on a few photographs, and a page about it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ..convert import BcosConfig, Student, convert, load, load_teacher
from ..convert.checkpoint import read_record
from ..convert.output import output_kind
from ..core.errors import CheckpointError, DataError
from ..core.files import check_free, new_file
from ..data.pack import write_shards
from ..data.pictures import read_picture
from ..evaluate.report import data_url, render_page
from ..explain import ClassTarget, explain_scores, panel
from .recipe import load_recipe
from .verb import align

__all__ = ["Demonstration", "demo"]

# Explained at the end, and never seen in training; the rest of scikit-image's photographs is trained on.
EXPLAINED = {"chelsea.png": "a cat", "coffee.png": "a cup of coffee", "rocket.jpg": "a rocket"}
TRAINED = (
    "astronaut.png brick.png camera.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png "
    "motorcycle_left.png motorcycle_right.png retina.jpg"
).split()
CROPS = 60
REFERENCE = "bundled:efficientnet_lite0"
# Two minutes on twelve photographs do not carry a CNN to B = 2 without biases (recipe bcos/cnn and far more pictures do
# better). So the early stages and the classifier stay plain, biases stay, and the ledger shows what they add.
KEPT = (*(f"blocks.{stage}" for stage in range(5)), "classifier")
WHY = (
    "The first five stages, the classifier and the biases stay as they are: two minutes of training do not carry more."
)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """What `demo` did.

    Attributes:
        layers: class of converted layers -> how many there are. `why`: what stayed as it was, and why.
        pressure: the recipe's, in a sentence.
        b, beta: both strengths at the start and at the end.
        fidelity: held-out, over pictures seen.
        rows: for each picture and model (teacher, start, end) what it decides, and the ledger of that score.
        report: the page.
    """

    reference: str
    layers: dict[str, int]
    identity_error: float
    recipe: str
    pressure: str
    why: str
    b: list[float]
    beta: list[float]
    fidelity: list[dict[str, Any]]
    training_pictures: int
    seconds: int
    rows: list[dict[str, Any]]
    report: Path


def demo(
    out: str | Path = "demo-out",
    recipe: str = "demo",
    *,
    overwrite: bool = False,
    say: Callable[[str], object] | None = None,
) -> Demonstration:
    """Converts, aligns and explains a real model in a few minutes on a CPU, and writes one report.html.

    The model is EfficientNet-Lite0 with its ImageNet weights; the pictures are the photographs inside scikit-image. The
    three that are explained are not trained on.

    Args:
        out: folder for everything: shards, student, aligned student, report.html.
        recipe: another recipe for the alignment.
        overwrite: replace the folder if it exists.
        say: is told every step as it begins; the alignment then also shows how it goes, on stderr.
    """
    started, out = time.monotonic(), Path(out)
    tell = say or (lambda line: None)
    check_free(out, overwrite, _written)
    photographs = _photographs()
    if overwrite and out.is_dir():
        for name in _written(out) or ():
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "report.html").unlink(missing_ok=True)
    teacher = load_teacher(REFERENCE)
    resolved = load_recipe(recipe)
    tell(f"1/4 {REFERENCE} -> {out / 'student'}")
    student = convert(teacher, BcosConfig(keep=KEPT), out=out / "student")
    error = student.history.conversion.identity_error or 0.0
    swapped = sum(student.plan.counts().values())
    tell(f"    {WHY}")
    tell(f"    {swapped} layers swapped; at B=1 it is the teacher: relative error {error:.1e}")
    tell(f"2/4 {len(TRAINED)} photographs -> {CROPS * len(TRAINED)} crops -> {out / 'shards'}")
    _shards(photographs, out / "shards")
    tell(f"3/4 aligning, recipe {recipe}: {resolved.pressure}")
    aligned = align(
        out / "student",
        data=out / "shards" / "train",
        recipe=recipe,
        val=out / "shards" / "val",
        out=out / "aligned",
        progress=say is not None,
    )
    tell("4/4 explaining three photographs that were not trained on")
    models = {"teacher": teacher.model, "start": student.model, "end": load(out / "aligned").model}
    rows, pictures = _explain(models, student, photographs)
    first, last = resolved.phases[0], resolved.phases[-1]
    done = Demonstration(
        reference=REFERENCE,
        layers=student.plan.counts(),
        identity_error=error,
        recipe=recipe,
        pressure=resolved.pressure,
        why=WHY,
        b=[first.b[0], last.b[1]],
        beta=[first.beta[0], last.beta[1]],
        fidelity=aligned.curve,
        training_pictures=aligned.pictures,
        seconds=round(time.monotonic() - started),
        rows=rows,
        report=out / "report.html",
    )
    with new_file(done.report) as scratch:
        scratch.write_text(render_page("demo.html", **vars(done), pictures=pictures, explained=EXPLAINED))
    return done


def _written(folder: Path) -> set[str] | None:
    """The names in `folder` that a demo wrote, by its student; None where there is none of it."""
    with contextlib.suppress(CheckpointError):
        if read_record(folder / "student").get("source", {}).get("reference") == REFERENCE:
            return {"student", "shards", "aligned", "aligned.run", "report.html"}
    return None


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


def _shards(photographs: dict[str, Image.Image], out: Path) -> None:
    """Crops of the photographs, the same on every machine, packed as train and val shards."""

    random = np.random.default_rng(0)
    for part, names in (("train", TRAINED), ("val", list(EXPLAINED))):
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                picture = photographs[name]
                for number in range(CROPS):
                    side = int(min(picture.size) * random.uniform(0.5, 1.0))
                    left, top = (int(random.integers(0, length - side + 1)) for length in picture.size)
                    crop = picture.crop((left, top, left + side, top + side)).resize((256, 256))
                    crop.save(Path(folder) / f"{Path(name).stem}-{number:03d}.jpg", quality=92)
            write_shards(folder, out / part, progress=False)


def _explain(
    models: dict[str, nn.Module], student: Student, photographs: dict[str, Image.Image]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Ledger rows of the teacher's own decision in all three models, and a panel of each as a data URL."""

    transform = student.preprocess.transform()
    shown = {name: photographs[name] for name in EXPLAINED}
    inputs = torch.stack([transform(picture) for picture in shown.values()])
    with torch.no_grad():
        decisions = models["teacher"](inputs).argmax(1, keepdim=True)
    name_of = output_kind(student).name
    rows, pictures = [], {}
    for kind, model in models.items():
        explanation = explain_scores(model, inputs, ClassTarget(decisions))
        for i, name in enumerate(shown):
            ledger = explanation.row(i, 0)
            best, second = explanation.outputs[i].topk(2).indices.tolist()
            ahead = float(explanation.outputs[i, best] - explanation.outputs[i, second])
            rows.append(
                {
                    "picture": name,
                    "model": kind,
                    "target": int(decisions[i]),
                    "target_label": name_of(int(decisions[i])),
                    "decides": best,
                    "label": name_of(best),
                    "second": name_of(second),
                    "ahead": ahead,
                    "agrees": best == int(decisions[i]),
                    "score": ledger["score"],
                    "input": ledger["input"],
                    "constants": sum(ledger["constants"].values()),
                    "residual": ledger["residual"],
                }
            )
            caption = f"{kind}: {name_of(int(decisions[i]))}"
            drawn = panel(_seen(student, inputs[i]), explanation, caption, picture=i, own_colours=kind == "end")
            pictures[f"{name}:{kind}"] = data_url(drawn)
    return rows, pictures


def _seen(student: Student, normalised: Tensor) -> Image.Image:
    """The picture as the model saw it."""
    return to_pil_image(student.preprocess.denormalise(normalised).clamp(0, 1))
