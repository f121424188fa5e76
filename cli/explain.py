"""bcosify explain"""

from __future__ import annotations

import contextlib
import dataclasses
import json as json_module
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import console, show_table
from .targets import Question, ask

if TYPE_CHECKING:
    from ..convert.history import History


def explain(
    model: str,
    pictures: list[Path],
    out: Path = Path("maps"),
    target: list[str] | None = None,
    text: list[str] | None = None,
    templates: str | None = None,
    like: list[Path] | None = None,
    direction: Path | None = None,
    patch: str | None = None,
    zero_shot: Path | None = None,
    head: str = "auto",
    image_size: int | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    json: bool = False,
) -> list[dict[str, Any]]:
    """Explains scores of pictures exactly: what every pixel and every constant adds, and that it adds up.

    For each picture OUT gets NAME.png (picture, signed map, explanation in the picture's own colours), NAME.npz (the
    raw maps) and NAME.json (the ledger). Scores are logits or cosines, not probabilities.
    Example: bcosify explain runs/resnet50/aligned cat.jpg dog.jpg --target tabby 'golden retriever' --out maps

    Args:
        model: a converted model (a folder, or ORG/REPO[@rev] on the hub); or any model reference, explained as it
            is ({references}).
        pictures: picture files, or folders of them.
        out: folder for the results.
        target: what to explain: class numbers or names, `top1`, `top3`, ...; `self` for models without classes.
        text: texts that the pictures are compared with, for CLIP and SigLIP models: the score is the cosine.
        templates: prompts to average each text over: `imagenet` (CLIP's eighty), or a file of lines with a {}.
        like: other pictures; the score is the cosine of both embeddings.
        direction: a .npy or .safetensors file of one or more directions in feature space; the score is the projection.
        patch: ROW,COLUMN of a patch: its own feature is explained, along itself or along --direction.
        zero_shot: a file with one label a line: the best three are explained (or those of --target), all are ranked.
        head: which output of a transformers model: `classifier`, `embedding`, `pooled`; `auto` is its checkpoint's.
        image_size: side in pixels, where it is not the model's own.
        batch_size: pictures a forward pass.
        overwrite: replace the folder if it exists.
        json: print one row per picture and target as JSON on stdout.
    """
    from ..core.files import check_free, new_folder

    check_free(out, overwrite)
    opened = _open(model, head, image_size)
    question = ask(
        opened,
        _read,
        target=target,
        text=text,
        templates=templates,
        like=like,
        direction=direction,
        patch=patch,
        zero_shot=zero_shot,
    )
    question = _with_prototypes(question, getattr(opened, "history", None))
    files = list(_files(pictures))
    names = _unique([file.stem for file in files])
    for file in files:
        _check(file)
    rows: list[dict[str, Any]] = []
    with new_folder(out, overwrite) as folder:
        for start in range(0, len(files), batch_size):
            part = slice(start, start + batch_size)
            rows += _explained(question, opened.preprocess, files[part], names[part], folder)
    parts = ("direct", "carried") if any("direct" in row for row in rows) else ("input",)
    shown = [*(["probability"] if any("probability" in row for row in rows) else []), "score", *parts]
    show_table(
        f"{model}: scores and where they come from",
        ["picture", "target", *shown, "constants", "residual"],
        [
            (
                Path(r["image"]).name,
                r["label"],
                *(r[name] for name in shown),
                sum(r["constants"].values()),
                f"{r['residual']:.0e}",
            )
            for r in rows
        ],
    )
    console.print(f"wrote {len(files)} x (.png, .npz, .json) to {out}")
    return rows


def _with_prototypes(question: Question, history: History | None) -> Question:
    """The same question; of each class the ledger also says which training pictures its prototypes lie nearest to."""
    alignment = history and history.alignment
    found = alignment.fit.get("prototypes") if alignment else None
    if not found:
        return question

    def names(outputs: Any) -> list[list[dict[str, Any]]]:
        return [
            [{**facts, "prototypes": [one for one in found if one["class"] == facts["target"]]} for facts in row]
            for row in question.names(outputs)
        ]

    return dataclasses.replace(question, names=names)


def _open(model: str, head: str, image_size: int | None) -> Any:
    """The Student of a folder or repository, or the Teacher of a reference, in eval mode, at `image_size`."""
    from ..convert import load, load_teacher
    from ..convert.hub import is_student
    from ..convert.memory import laid_out
    from ..convert.trace import trace_forward
    from ..core.errors import SourceError

    opened: Any
    if is_student(model):
        opened = load(model)
    elif Path(model).is_dir() or ":" not in model:
        raise SourceError(
            f"{model} is no converted folder (it holds no bcosify.json) and no reference such as timm:NAME."
        )
    else:
        opened = load_teacher(model, head=head, image_size=image_size)
    laid_out(opened.model.eval())
    if image_size is not None:
        opened = dataclasses.replace(opened, preprocess=opened.preprocess.at(image_size))
        trace_forward(opened.model, opened.preprocess.size)
    return opened


def _files(pictures: list[Path]) -> Iterator[Path]:
    from PIL import Image

    from ..core.errors import DataError

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


def _check(file: Path) -> None:
    """Raises DataError for what is no picture. Of what is, the pixels are read when its turn comes."""
    from PIL import Image

    with _readable(file), Image.open(file):
        pass


def _read(file: Path) -> Any:
    from PIL import Image, ImageOps

    with _readable(file), Image.open(file) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    from PIL import Image

    from ..core.errors import DataError

    try:
        yield
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
    question: Question, preprocess: Any, files: list[Path], names: list[str], folder: Path
) -> list[dict[str, Any]]:
    """Explains one batch, writes its files, returns its ledger rows; nothing else of it is kept."""
    import numpy as np
    import torch
    from torchvision.transforms.functional import to_pil_image

    from ..explain import explain as explain_scores
    from ..explain.render import panel

    transform = preprocess.transform()
    inputs = torch.stack([transform(_read(file)) for file in files])
    explanation = explain_scores(question.network, inputs, question.target)
    others = question.network.extra_maps(inputs) if hasattr(question.network, "extra_maps") else {}
    facts = question.names(explanation.outputs)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    rows: list[dict[str, Any]] = []
    for i, (file, name) in enumerate(zip(files, names, strict=True)):
        ledger = [
            {
                "image": str(file),
                **known,
                **explanation.row(i, k),
            }
            for k, known in enumerate(facts[i])
        ]
        shown = to_pil_image((inputs[i] * std + mean).clamp(0, 1))
        panels = [panel(shown, explanation, row["label"], picture=i, score=k) for k, row in enumerate(ledger)]
        _stacked(panels).save(folder / f"{name}.png")
        stored = ("contributions", "direct", "encoded_inputs", "encoded_gradients")
        maps = {key: getattr(explanation, key) for key in stored}
        maps |= others
        np.savez_compressed(
            folder / f"{name}.npz", **{key: value[i].numpy() for key, value in maps.items() if value is not None}
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
