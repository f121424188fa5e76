"""bcosify explain"""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .console import console, show_table


def explain(
    model: str,
    pictures: list[Path],
    out: Path = Path("maps"),
    target: list[str] | None = None,
    image_size: int | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    json: bool = False,
) -> list[dict[str, Any]]:
    """Explains scores of pictures exactly: what every pixel and every constant adds, and that it adds up.

    For each picture OUT gets NAME.png (picture, signed map, explanation in the picture's own colours), NAME.npz (the
    raw maps) and NAME.json (the ledger). Scores are logits, not probabilities.
    Example: bcosify explain runs/resnet50/aligned cat.jpg dog.jpg --target tabby 'golden retriever' --out maps

    Args:
        model: a converted folder; or any model reference (timm:NAME, bundled:NAME), explained as it is.
        pictures: picture files, or folders of them.
        out: folder for the results.
        target: what to explain: class numbers or names, `top1`, `top3`, ...; `self` for models without classes.
        image_size: side in pixels, where it is not the model's own.
        batch_size: pictures a forward pass.
        overwrite: replace the folder if it exists.
        json: print one row per picture and target as JSON on stdout.
    """
    from ..convert.files import check_free, new_folder

    check_free(out, overwrite)
    network, preprocess, labels = _open(model)
    preprocess = preprocess.at(image_size)
    chosen = _target(target, labels)
    files = list(_files(pictures))
    names = _unique([file.stem for file in files])
    opened = [_read(file) for file in files]
    rows: list[dict[str, Any]] = []
    with new_folder(out, overwrite) as folder:
        for start in range(0, len(files), batch_size):
            part = slice(start, start + batch_size)
            rows += _explained(network, preprocess, labels, chosen, files[part], names[part], opened[part], folder)
    show_table(
        f"{model}: scores and where they come from",
        ["picture", "target", "score", "input", "constants", "residual"],
        [
            (
                Path(r["image"]).name,
                r["label"],
                r["score"],
                r["input"],
                sum(r["constants"].values()),
                f"{r['residual']:.0e}",
            )
            for r in rows
        ],
    )
    console.print(f"wrote {len(files)} x (.png, .npz, .json) to {out}")
    return rows


def _open(model: str) -> tuple[Any, Any, Any]:
    """(module in eval mode, Preprocess, labels) of a converted folder or of a reference."""
    from ..convert import load, load_teacher
    from ..errors import SourceError

    opened: Any
    if (Path(model) / "bcosify.json").is_file():
        opened = load(model)
    elif Path(model).is_dir() or ":" not in model:
        raise SourceError(
            f"{model} is no converted folder (it holds no bcosify.json) and no reference such as timm:NAME."
        )
    else:
        opened = load_teacher(model)
    return opened.model.eval(), opened.preprocess, opened.labels


def _target(words: list[str] | None, labels: tuple[str, ...] | None) -> Any:
    from ..errors import TargetError
    from ..explain.targets import ClassTarget, SelfTarget, TopTarget, find_class

    words = words or (["top1"] if labels else ["self"])
    single = words[0]
    if single == "self" and len(words) == 1:
        return SelfTarget()
    if len(words) == 1 and single.startswith("top") and single[3:].isdecimal():
        if labels is None:
            raise TargetError(f"--target {single}: this model has no classes. Use --target self.")
        return TopTarget(int(single[3:]))
    if labels is None and not all(word.isdecimal() for word in words):
        raise TargetError(
            f"--target {' '.join(words)}: this model has no class names; pass numbers of outputs, or self."
        )
    return ClassTarget([int(word) if labels is None else find_class(labels, word) for word in words])


def _files(pictures: list[Path]) -> Iterator[Path]:
    from PIL import Image

    from ..errors import DataError

    Image.init()
    for path in pictures:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in Image.EXTENSION)
            if not found:
                raise DataError(f"{path} holds no pictures.")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise DataError(f"{path}: there is no such file or folder.")


def _read(file: Path) -> Any:
    from PIL import Image, ImageOps

    from ..errors import DataError

    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is no picture that can be read: {error}. Nothing was written.") from error


def _unique(stems: list[str]) -> list[str]:
    """File names without ending; a repeated one gets a number."""
    seen: dict[str, int] = {}
    names = []
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
        names.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return names


def _explained(
    network: Any,
    preprocess: Any,
    labels: Any,
    target: Any,
    files: list[Path],
    names: list[str],
    opened: list,
    folder: Path,
) -> list[dict[str, Any]]:
    """Explains one batch, writes its files, returns its ledger rows."""
    import numpy as np
    import torch
    from torchvision.transforms.functional import to_pil_image

    from ..explain import explain as explain_scores
    from ..explain.render import panel
    from ..explain.targets import ClassTarget, TopTarget

    transform = preprocess.transform()
    inputs = torch.stack([transform(picture) for picture in opened])
    explanation = explain_scores(network, inputs, target)
    count = explanation.scores.shape[1]
    if isinstance(target, TopTarget):
        classes: Any = target.classes(explanation.outputs).tolist()
    elif isinstance(target, ClassTarget):
        classes = [list(target.indices)] * len(files)  # type: ignore[arg-type]
    else:
        classes = [["self"] * count] * len(files)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    rows: list[dict[str, Any]] = []
    for i, (file, name) in enumerate(zip(files, names, strict=True)):
        ledger = [
            {
                "image": str(file),
                "target": classes[i][k],
                "label": labels[classes[i][k]] if labels and classes[i][k] != "self" else str(classes[i][k]),
                "score": float(explanation.scores[i, k]),
                "input": float(explanation.input_part[i, k]),
                "constants": {key: float(value[i, k]) for key, value in explanation.constants.items()},
                "residual": float(explanation.residual[i, k]),
            }
            for k in range(count)
        ]
        shown = to_pil_image((inputs[i] * std + mean).clamp(0, 1))
        panels = [panel(shown, explanation, row["label"], picture=i, score=k) for k, row in enumerate(ledger)]
        _stacked(panels).save(folder / f"{name}.png")
        np.savez_compressed(
            folder / f"{name}.npz",
            contributions=explanation.contributions[i].numpy(),
            encoded_inputs=explanation.encoded_inputs[i].numpy(),
            encoded_gradients=explanation.encoded_gradients[i].numpy(),
        )
        (folder / f"{name}.json").write_text(json_module.dumps(ledger, indent=2))
        rows += ledger
    return rows


def _stacked(panels: list[Any]) -> Any:
    """One picture of several of the same width, from top to bottom."""
    from PIL import Image

    sheet = Image.new("RGB", (panels[0].width, sum(panel.height for panel in panels)), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (0, sum(above.height for above in panels[:i])))
    return sheet
