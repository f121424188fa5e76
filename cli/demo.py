"""bcosify demo"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from .console import console, show_table

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
WHY = "the first five stages and the classifier stay plain and biases stay: two minutes of training do not carry more"


def demo(
    out: Path = Path("demo-out"), recipe: str = "demo", overwrite: bool = False, json: bool = False
) -> dict[str, Any]:
    """Converts, aligns and explains a real model in a few minutes on a CPU, and writes one report.html.

    The model is EfficientNet-Lite0 with its ImageNet weights; the pictures are the photographs inside scikit-image. The
    three that are explained are not trained on.

    Args:
        out: folder for everything: shards, student, aligned student, report.html.
        recipe: another recipe for the alignment.
        overwrite: replace the folder if it exists.
        json: print the table as JSON on stdout.
    """
    from ..align.recipe import load_recipe
    from ..align.trainer import AlignConfig, align
    from ..convert import convert, load, load_teacher, save
    from ..convert.methods.bcos import BcosConfig
    from ..core.files import check_free, new_file
    from ..evaluate.report import render_page

    started = time.monotonic()
    check_free(out, overwrite)
    photographs = _photographs()
    if overwrite:
        import shutil

        shutil.rmtree(out, ignore_errors=True)
    teacher = load_teacher(REFERENCE)
    resolved = load_recipe(recipe)
    console.print(f"1/4 {REFERENCE} -> {out / 'student'}")
    student = convert(teacher, BcosConfig(keep=KEPT))
    save(student, out / "student")
    error = student.history.conversion.identity_error
    swapped = sum(student.plan.counts().values())
    console.print(f"    {WHY}")
    console.print(f"    {swapped} layers swapped; at B=1 it is the teacher: relative error {error:.1e}")
    console.print(f"2/4 {len(TRAINED)} photographs -> {CROPS * len(TRAINED)} crops -> {out / 'shards'}")
    _shards(photographs, out / "shards")
    console.print(f"3/4 aligning, recipe {recipe}: {resolved.pressure}")
    summary = align(
        AlignConfig(
            out / "student", str(out / "shards" / "train"), out / "aligned", resolved, str(out / "shards" / "val")
        )
    )
    console.print("4/4 explaining three photographs that were not trained on")
    models = {"teacher": teacher.model, "start": student.model, "end": load(out / "aligned").model}
    rows, pictures = _explain(models, student, photographs)
    facts = {
        "reference": REFERENCE,
        "layers": student.plan.counts(),
        "identity_error": error,
        "recipe": recipe,
        "pressure": resolved.pressure,
        "why": WHY,
        "b": [resolved.phases[0].b[0], resolved.phases[-1].b[1]],
        "beta": [resolved.phases[0].beta[0], resolved.phases[-1].beta[1]],
        "fidelity": summary["curve"],
        "training_pictures": summary["pictures"],
        "seconds": round(time.monotonic() - started),
        "rows": rows,
    }
    with new_file(out / "report.html") as scratch:
        scratch.write_text(render_page("demo.html", **facts, pictures=pictures, explained=EXPLAINED))
    shown = "picture model label second ahead score input constants".split()
    show_table(
        f"{REFERENCE}: teacher, start (B={facts['b'][0]:g}) and end (B={facts['b'][1]:g}, biases "
        f"x {facts['beta'][1]:g})",
        ["picture", "model", "decides", "ahead of", "by", "score", "input", "constants", "residual"],
        [(*(row[key] for key in shown), f"{row['residual']:.0e}") for row in rows],
    )
    console.print(f"wrote {out / 'report.html'} in {facts['seconds']} s")
    return facts


def _photographs() -> dict[str, Any]:
    """Name -> picture, from scikit-image's own files (no download)."""
    from PIL import Image

    from ..core.errors import DataError

    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the demo's photographs are in scikit-image, which is not installed. Run: pip install 'bcosify[demo]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    missing = [name for name in (*EXPLAINED, *TRAINED) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"this scikit-image has no {', '.join(missing)}; the demo was made with 0.26.")
    return {name: Image.open(folder / name).convert("RGB") for name in (*EXPLAINED, *TRAINED)}


def _shards(photographs: dict[str, Any], out: Path) -> None:
    """Crops of the photographs, the same on every machine, packed as train and val shards."""
    import tempfile

    import numpy as np

    from ..data.pack import write_shards

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
    models: dict[str, Any], student: Any, photographs: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Ledger rows of the teacher's own decision in all three models, and a panel of each as a data URL."""
    import torch

    from ..evaluate.report import data_url
    from ..explain import explain
    from ..explain.render import panel
    from ..explain.targets import ClassTarget

    transform = student.preprocess.transform()
    shown = {name: photographs[name] for name in EXPLAINED}
    inputs = torch.stack([transform(picture) for picture in shown.values()])
    with torch.no_grad():
        decisions = models["teacher"](inputs).argmax(1, keepdim=True)
    rows, pictures = [], {}
    for kind, model in models.items():
        explanation = explain(model, inputs, ClassTarget(decisions))
        for i, name in enumerate(shown):
            best, second = explanation.outputs[i].topk(2).indices.tolist()
            ahead = float(explanation.outputs[i, best] - explanation.outputs[i, second])
            rows.append(
                {
                    "picture": name,
                    "model": kind,
                    "target": int(decisions[i]),
                    "target_label": student.labels[int(decisions[i])],
                    "decides": best,
                    "label": student.labels[best],
                    "second": student.labels[second],
                    "ahead": ahead,
                    "agrees": best == int(decisions[i]),
                    "score": float(explanation.scores[i, 0]),
                    "input": float(explanation.input_part[i, 0]),
                    "constants": float(explanation.constant_part[i, 0]),
                    "residual": float(explanation.residual[i, 0]),
                }
            )
            caption = f"{kind}: {student.labels[int(decisions[i])]}"
            pictures[f"{name}:{kind}"] = data_url(panel(_seen(student, inputs[i]), explanation, caption, picture=i))
    return rows, pictures


def _seen(student: Any, normalised: Any) -> Any:
    """The picture as the model saw it."""
    import torch
    from torchvision.transforms.functional import to_pil_image

    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (student.preprocess.mean, student.preprocess.std))
    return to_pil_image((normalised * std + mean).clamp(0, 1))
