"""`bcosify.explain`: scores of pictures, of a batch in memory or of files, with the command's options."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ..convert import Preprocess, Student, Teacher, load, load_teacher
from ..convert.history import History
from ..convert.hub import is_student
from ..convert.memory import laid_out
from ..convert.output import with_labels
from ..convert.trace import reads_colours, trace_forward
from ..core.errors import DataError, SourceError, TargetError
from ..core.files import check_free, new_folder
from ..core.ranges import AMOUNT, COUNT, SIDE, ranged
from ..data.pictures import check_picture, read_picture
from .attribution import Explanation, explain_scores
from .questions import Facts, Question, ask
from .results import ScoreLedger, write_picture
from .targets import Target

__all__ = ["explain"]

Model = nn.Module | Student | Teacher | str | Path
Classes = Target | int | str | Sequence[int | str] | Tensor | np.ndarray | np.integer
BATCH = 8  # pictures a forward pass, of files


@overload
def explain(
    model: Model,
    pictures: Tensor,
    target: Classes | None = None,
    *,
    text: str | Sequence[str] | None = None,
    templates: str | Path | Sequence[str] | None = None,
    like: str | Path | Sequence[str | Path] | None = None,
    direction: str | Path | Tensor | None = None,
    patch: str | tuple[int, int] | None = None,
    zero_shot: str | Path | Sequence[str] | None = None,
    labels: str | Path | Sequence[str] | None = None,
    head: str = "auto",
    image_size: int | None = None,
    batch_size: int | None = None,
    check: bool = True,
    tolerance: float = 1e-4,
) -> Explanation: ...


@overload
def explain(
    model: Model,
    pictures: str | Path | Sequence[str | Path],
    target: Classes | None = None,
    *,
    out: str | Path | None = None,
    text: str | Sequence[str] | None = None,
    templates: str | Path | Sequence[str] | None = None,
    like: str | Path | Sequence[str | Path] | None = None,
    direction: str | Path | Tensor | None = None,
    patch: str | tuple[int, int] | None = None,
    zero_shot: str | Path | Sequence[str] | None = None,
    labels: str | Path | Sequence[str] | None = None,
    head: str = "auto",
    image_size: int | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    tolerance: float = 1e-4,
) -> list[ScoreLedger]: ...


@ranged(image_size=SIDE, batch_size=COUNT, tolerance=AMOUNT)
def explain(
    model: Model,
    pictures: Tensor | str | Path | Sequence[str | Path],
    target: Classes | None = None,
    *,
    out: str | Path | None = None,
    text: str | Sequence[str] | None = None,
    templates: str | Path | Sequence[str] | None = None,
    like: str | Path | Sequence[str | Path] | None = None,
    direction: str | Path | Tensor | None = None,
    patch: str | tuple[int, int] | None = None,
    zero_shot: str | Path | Sequence[str] | None = None,
    labels: str | Path | Sequence[str] | None = None,
    head: str = "auto",
    image_size: int | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    tolerance: float = 1e-4,
) -> Explanation | list[ScoreLedger]:
    """Explains scores of pictures, and proves that the explanation adds up.

    Args:
        model: any nn.Module, converted or not; a Student or a Teacher; a converted model (a folder, or ORG/REPO[@rev]
            on the hub); or a model reference such as timm:NAME. What is given as an object is left as it is.
        pictures: normalised pictures (B, 3, H, W); or picture files and folders of them.
        target: what to explain: a `Target`; class numbers or names, `top1`, `top3`, ...; `self` for models without
            classes. A list is for every picture; an array or a tensor has a class for each (B,), or a row (B, K). By
            default the largest output of a classifier, the output of a regression, else `self`. A bare nn.Module needs
            a `Target` or numbers.
        out: for files: a new folder for NAME.png, NAME.npz and NAME.json of every picture.
        text: texts that the pictures are compared with, for CLIP and SigLIP models: the score is the cosine.
        templates: prompts to average each text over: `imagenet` (CLIP's eighty), a file of lines with a {}, or a list.
        like: other pictures; the score is the cosine of both embeddings.
        direction: directions in feature space (D,) or (K, D), or a file of them; the score is the projection.
        patch: (row, column) of a patch: its own feature is explained, along itself or along `direction`.
        zero_shot: labels, or a file with one a line: the best three are explained (or those of `target`).
        labels: names of the classes, or a file with one a line, where the model has none of its own.
        head, image_size: which output of a transformers model, and the side in pixels, where they are not its own.
        batch_size: pictures a forward pass; by default all of a tensor, eight files.
        overwrite: replace `out` if it exists.
        check: False returns explanations that do not add up, with their residual.
        tolerance: how much of max(1, |score|) may be unaccounted for.

    Returns:
        Of a tensor an `Explanation`, with all maps; of files a `ScoreLedger` for each picture and score, in order.

    Raises:
        LedgerError: input and constants do not add up to a score; names the operations that have no rule.
        TargetError, DataError, SourceError, CheckpointError: before anything is written.
    """
    _check_kind(pictures)
    if isinstance(pictures, Tensor) and (out is not None or overwrite):
        raise TargetError("out is for picture files; of a tensor the explanation is returned.")
    if out is not None:
        check_free(Path(out), overwrite)
    options = {
        "text": text,
        "templates": templates,
        "like": like,
        "direction": direction,
        "patch": patch,
        "zero_shot": zero_shot,
    }
    if isinstance(model, nn.Module):
        if not isinstance(pictures, Tensor) or any(value is not None for value in (*options.values(), labels)):
            raise TargetError(
                f"{type(model).__name__} does not say how pictures are prepared, nor what texts it knows. Pass a "
                "Student or a Teacher; or normalised pictures (B, 3, H, W) and a target."
            )
        if target is None:
            raise TargetError("target is missing. Pass a class, a Target such as TopTarget(), or SelfTarget().")
        _check_words(target)
        return explain_scores(model, pictures, target, check=check, tolerance=tolerance, batch_size=batch_size)
    opened = _opened(model, head, image_size)
    if labels is not None:
        opened = with_labels(opened, labels)
    question = _with_prototypes(ask(opened, target=target, **options), getattr(opened, "history", None))
    if isinstance(pictures, Tensor):
        return explain_scores(
            question.network, pictures, question.target, check=check, tolerance=tolerance, batch_size=batch_size
        )
    if question.target.rows(slice(0, 1)) is not question.target:
        raise TargetError("target: what differs from picture to picture goes with a tensor. Pass one for all files.")
    if not reads_colours(opened.model):
        trace_forward(opened.model, opened.preprocess.size)  # says what it reads
    files = list(_files(pictures))
    names = _unique([file.stem for file in files])
    for file in files:
        check_picture(file)  # its pixels are read when its turn comes
    size = BATCH if batch_size is None else batch_size
    ledgers: list[ScoreLedger] = []
    with contextlib.ExitStack() as stack:
        folder = None if out is None else stack.enter_context(new_folder(Path(out), overwrite))
        for start in range(0, len(files), size):
            part = slice(start, start + size)
            batch = _explained(question, opened.preprocess, files[part], names[part], folder, check, tolerance)
            ledgers += batch
    return ledgers


def _check_kind(pictures: Any) -> None:
    """Raises TargetError for pictures that are neither a tensor nor files."""
    if isinstance(pictures, Tensor):
        return
    single = isinstance(pictures, str | Path) or not isinstance(pictures, Sequence)
    for one in [pictures] if single else pictures:
        if not isinstance(one, str | Path):
            hint = "torch.from_numpy of it" if isinstance(one, np.ndarray) else "torch.stack of several"
            hint = "student.preprocess.transform()(picture)[None]" if isinstance(one, Image.Image) else hint
            raise TargetError(
                f"pictures are files, folders, or a normalised tensor (B, 3, H, W), not {type(one).__name__}. "
                f"Pass {hint}."
            )


def _check_words(target: Classes) -> None:
    """Raises TargetError for words, which need names."""
    words = [target] if isinstance(target, str) else target if isinstance(target, Sequence) else []
    if any(isinstance(word, str) for word in words):
        raise TargetError(f"target {target!r}: a bare module has no class names. Pass numbers, or a Target.")


def _with_prototypes(question: Question, history: History | None) -> Question:
    """The same question; of each class the ledger also says which training pictures its prototypes lie nearest to."""
    alignment = history and history.alignment
    found = alignment.fit.get("prototypes") if alignment else None
    if not found:
        return question

    def names(outputs: Tensor) -> list[list[Facts]]:
        return [
            [{**facts, "prototypes": [one for one in found if one["class"] == facts["target"]]} for facts in row]
            for row in question.names(outputs)
        ]

    return dataclasses.replace(question, names=names)


def _opened(model: Student | Teacher | str | Path, head: str, image_size: int | None) -> Student | Teacher:
    """The Student of a folder or repository, or the Teacher of a reference, in eval mode, at `image_size`."""
    opened: Student | Teacher
    if isinstance(model, Student | Teacher):
        opened = model
    else:
        reference = str(model)
        if is_student(reference):
            opened = load(model)
        elif Path(reference).is_dir() or ":" not in reference:
            raise SourceError(
                f"{model} is no converted folder (it holds no bcosify.json) and no reference such as timm:NAME."
            )
        else:
            opened = load_teacher(reference, head=head, image_size=image_size)
        laid_out(opened.model.eval())
    if image_size is not None:
        opened = dataclasses.replace(opened, preprocess=opened.preprocess.at(image_size))
        trace_forward(opened.model, opened.preprocess.size)
    return opened


def _files(pictures: str | Path | Sequence[str | Path]) -> Iterator[Path]:
    Image.init()
    for given in [pictures] if isinstance(pictures, str | Path) else pictures:
        path = Path(given)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in Image.EXTENSION)
            if not found:
                raise DataError(f"{path} holds no pictures.")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise DataError(f"{path}: there is no such file or folder.")


def _unique(stems: list[str]) -> list[str]:
    """File names without ending; a repeated one gets a number."""
    seen: dict[str, int] = {}
    names = []
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
        names.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return names


def _explained(
    question: Question,
    preprocess: Preprocess,
    files: list[Path],
    names: list[str],
    folder: Path | None,
    check: bool,
    tolerance: float,
) -> list[ScoreLedger]:
    """Explains one batch, writes its files, returns its ledgers; nothing else of it is kept."""
    transform = preprocess.transform()
    inputs = torch.stack([transform(read_picture(file)) for file in files])
    explanation = explain_scores(question.network, inputs, question.target, check=check, tolerance=tolerance)
    network: Any = question.network
    others: dict[str, Tensor] = network.extra_maps(inputs) if hasattr(network, "extra_maps") else {}
    facts = question.names(explanation.outputs)
    rows: list[ScoreLedger] = []
    for i, (file, name) in enumerate(zip(files, names, strict=True)):
        ledgers = [ScoreLedger(image=str(file), **known, **explanation.row(i, k)) for k, known in enumerate(facts[i])]
        if folder is not None:
            seen = to_pil_image(preprocess.denormalise(inputs[i]).clamp(0, 1))
            write_picture(folder, name, seen, explanation, i, ledgers, others)
        rows += ledgers
    return rows
