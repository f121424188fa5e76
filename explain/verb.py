"""`bcosify.explain`: scores of pictures, of a batch in memory or of files, with the command's options."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ..convert import Agreement, Preprocess, Student, Teacher, agreement_of, load, load_teacher
from ..convert.history import History
from ..convert.hub import is_student
from ..convert.memory import laid_out
from ..convert.output import with_labels
from ..convert.trace import reads_colours, trace_forward
from ..core.errors import DataError, SourceError, TargetError
from ..core.files import check_free, new_folder, paths_in
from ..core.ranges import AMOUNT, COUNT, SIDE, ranged
from ..data.folders import Skipped, pictures_in, unique
from ..data.pictures import read_picture
from ..data.progress import say
from .attribution import Explanation, explain_scores
from .questions import Facts, Question, ask
from .render import panel
from .results import ScoreLedger, write_picture, written
from .targets import Target
from .views import Views, explain_views, views_of

__all__ = ["Ledgers", "explain"]

Model = nn.Module | Student | Teacher | str | Path
Classes = Target | int | str | Sequence[int | str] | Tensor | np.ndarray | np.integer
BATCH = 8  # pictures a forward pass, of files
LONGEST = 200  # bytes of a file name that a result keeps: with an ending and a number, 255 are possible


class Ledgers(list[ScoreLedger]):
    """The ledgers of all pictures that could be read.

    Attributes:
        skipped: the pictures that could not, and why.
        agreement: how far a student that was explained stands for its teacher; None for other models.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[Skipped] = []
        self.agreement: Agreement | None = None

    @property
    def constant_share(self) -> float:
        """The mean share of constants in what scores are made of, in [0, 1], by size."""
        parts = [(abs(sum(one.constants.values())), abs(one.input)) for one in self]
        return sum(constants / (constants + pixels or 1.0) for constants, pixels in parts) / max(1, len(parts))


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
    views: Views | int | str | None = None,
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
    views: Views | int | str | None = None,
    max_pixels: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    tolerance: float = 1e-4,
) -> Ledgers: ...


@ranged(image_size=SIDE, batch_size=COUNT, max_pixels=COUNT, tolerance=AMOUNT)
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
    views: Views | int | str | None = None,
    max_pixels: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    tolerance: float = 1e-4,
) -> Explanation | Ledgers:
    """Explains scores of pictures, and proves that the explanation adds up.

    Args:
        model: any nn.Module, converted or not; a Student or a Teacher; a converted model (a folder, or ORG/REPO[@rev]
            on the hub); or a model reference such as timm:NAME. What is given as an object is left as it is.
        pictures: normalised pictures (B, 3, H, W); or picture files and folders of them (see `data.folders`).
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
        views: the mean over so many views of each picture, which differ by noise; or `Views`, `shift:9`, `flip` (see
            `views`). Maps are calmer then, and still add up, to the mean of the scores.
        max_pixels: larger picture files are skipped, or read smaller if they are JPEGs (see `data.pictures`).
        overwrite: replace `out` if it exists.
        check: False returns explanations that do not add up, with their residual.
        tolerance: how much of max(1, |score|) may be unaccounted for.

    Returns:
        Of a tensor an `Explanation`, with all maps; of files `Ledgers`, a `ScoreLedger` for each picture and score, in
        order. Pictures that cannot be read are skipped, with a DataWarning; they are listed there, and in
        `out`/skipped.jsonl.

    Raises:
        DataError: none of the pictures can be read; nothing is written then.
        LedgerError: input and constants do not add up to a score; names the operations that have no rule.
        TargetError, DataError, SourceError, CheckpointError: before anything is written.
    """
    _check_kind(pictures)
    if isinstance(pictures, Tensor) and (out is not None or overwrite):
        raise TargetError("out is for picture files; of a tensor the explanation is returned.")
    if out is not None:
        lists = [one for one in (templates, zero_shot, labels) if isinstance(one, str | Path)]
        check_free(Path(out), overwrite, written, paths_in(model, pictures, like, direction, lists))
    options = {
        "text": text,
        "templates": templates,
        "like": like,
        "direction": direction,
        "patch": patch,
        "zero_shot": zero_shot,
    }
    several = None if views is None or views_of(views).count == 1 else views_of(views)
    scores = partial(explain_scores, check=check, tolerance=tolerance)
    if several is not None:
        scores = partial(explain_views, views=several, check=check, tolerance=tolerance)
    if isinstance(model, nn.Module):
        if not isinstance(pictures, Tensor) or any(value is not None for value in (*options.values(), labels)):
            raise TargetError(
                f"{type(model).__name__} does not say how pictures are prepared, nor what texts it knows. Pass a "
                "Student or a Teacher; or normalised pictures (B, 3, H, W) and a target."
            )
        if target is None:
            raise TargetError("target is missing. Pass a class, a Target such as TopTarget(), or SelfTarget().")
        _check_words(target)
        return scores(model, pictures, cast(Any, target), batch_size=batch_size)
    opened = _opened(model, head, image_size)
    if labels is not None:
        opened = with_labels(opened, labels)
    question = _with_prototypes(ask(opened, target=target, **options), getattr(opened, "history", None))
    if isinstance(pictures, Tensor):
        return scores(question.network, pictures, question.target, batch_size=batch_size)
    if question.target.rows(slice(0, 1)) is not question.target:
        raise TargetError("target: what differs from picture to picture goes with a tensor. Pass one for all files.")
    if not reads_colours(opened.model):
        trace_forward(opened.model, opened.preprocess.size)  # says what it reads
    files = _files(pictures)
    about = About(several)
    if isinstance(opened, Student):
        about = About(several, agreement_of(opened), aligned=opened.history.alignment is not None)
    names = list(unique(map(_stem, files), _as_disks_see_it))
    size = BATCH if batch_size is None else batch_size
    ledgers = Ledgers()
    ledgers.agreement = about.agreement
    with contextlib.ExitStack() as stack:
        folder = None if out is None else stack.enter_context(new_folder(Path(out), overwrite, written))
        for start in range(0, len(files), size):
            part = slice(start, start + size)
            inputs, skipped = _read(files[part], opened.preprocess, max_pixels)
            ledgers.skipped += skipped
            if inputs:
                shown = [(file, name) for file, name in zip(files[part], names[part], strict=True) if file in inputs]
                ledgers += _explained(question, opened.preprocess, inputs, shown, folder, scores, about)
        _check_skipped(ledgers.skipped, len(files), folder)
    return ledgers


@dataclasses.dataclass(frozen=True)
class About:
    """What holds for all explanations of a call: over which views they are means; of a student, how far it stands for
    its teacher, and whether it is aligned."""

    views: Views | None
    agreement: Agreement | None = None
    aligned: bool = False

    def row(self) -> dict[str, Any]:
        """For each ledger."""
        return {} if self.views is None else {"views": dataclasses.asdict(self.views)}

    def panel(self, *args: Any, **options: Any) -> Image.Image:
        """`render.panel`, with what it says of the model and of views."""
        lines = [] if self.views is None else [f"{self.views}"]
        doubts = []
        if self.agreement is not None:
            (doubts if self.agreement.low else lines).append(self.agreement.words)
        return panel(*args, lines=lines, doubts=doubts, own_colours=self.aligned, **options)


def _check_skipped(skipped: Sequence[Skipped], count: int, folder: Path | None) -> None:
    """Lists and says which of `count` pictures were skipped; raises DataError where that is all."""
    if not skipped:
        return
    first = skipped[0]
    if len(skipped) == count:
        which = "" if count == 1 else f"None of the {count} pictures can be read. The first: "
        raise DataError(f"{which}{first.reason}")
    say(f"{len(skipped)} of {count} pictures could not be read and were skipped. The first: {first.reason}")
    if folder is not None:
        lines = "".join(json.dumps(one._asdict()) + "\n" for one in skipped)
        (folder / "skipped.jsonl").write_text(lines, "utf-8")


def _check_kind(pictures: Any) -> None:
    """Raises TargetError for pictures that are neither a tensor nor files."""
    if isinstance(pictures, Tensor):
        return
    single = isinstance(pictures, str | Path) or not isinstance(pictures, Sequence)
    several: Any = [pictures] if single else pictures
    for one in several:
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


def _files(pictures: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files as they are, and what belongs to folders; raises DataError where there is no such file or folder."""
    files: list[Path] = []
    for given in [pictures] if isinstance(pictures, str | Path) else pictures:
        path = Path(given)
        if "\0" not in str(given) and path.is_dir():
            found = pictures_in(path)
            if found.left_out:
                say(f"Left out of {path}: {found.left_out}.")
            files += [path / name for name in found.pictures]
        elif "\0" not in str(given) and path.exists():
            files.append(path)
        else:
            raise DataError(f"{str(given)!r}: there is no such file or folder.")
    return files


def _stem(file: Path) -> str:
    """What results of `file` are called, without ending."""
    return file.stem.encode("utf-8", "surrogateescape")[:LONGEST].decode("utf-8", "ignore") or "picture"


def _as_disks_see_it(name: str) -> str:
    """Those of Macs and Windows take `A` and `a` for one name, and some take two spellings of a letter for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _read(
    files: Sequence[Path], preprocess: Preprocess, max_pixels: int | None
) -> tuple[dict[Path, Tensor], list[Skipped]]:
    """Each file's picture as the model takes it, (3, H, W), and the files that cannot be read."""
    transform, inputs, skipped = preprocess.transform(), {}, []
    for file in files:
        try:
            inputs[file] = transform(read_picture(file, max_pixels))
        except DataError as error:
            skipped.append(Skipped(str(file), str(error)))
    return inputs, skipped


def _explained(
    question: Question,
    preprocess: Preprocess,
    read: dict[Path, Tensor],
    shown: Sequence[tuple[Path, str]],
    folder: Path | None,
    scores: Callable[..., Explanation],
    about: About,
) -> list[ScoreLedger]:
    """Explains one batch, writes its files, returns its ledgers; nothing else of it is kept.

    Args:
        read: the pictures of the batch. shown: in which order, and under which names.
        scores: `explain_scores`, or the mean over views.
    """
    inputs = torch.stack([read[file] for file, _ in shown])
    explanation = scores(question.network, inputs, question.target)
    network: Any = question.network
    others: dict[str, Tensor] = network.extra_maps(inputs) if hasattr(network, "extra_maps") else {}
    if about.views is not None and folder is not None:
        others = {**others, "views": torch.stack([pictures for pictures, _, _ in about.views.of(inputs)], 1)}
    facts = question.names(explanation.outputs)
    rows: list[ScoreLedger] = []
    for i, (file, name) in enumerate(shown):
        ledgers = [
            ScoreLedger(image=str(file), **known, **explanation.row(i, k), **about.row())
            for k, known in enumerate(facts[i])
        ]
        if folder is not None:
            seen = to_pil_image(preprocess.denormalise(inputs[i]).clamp(0, 1))
            write_picture(folder, name, seen, explanation, i, ledgers, others, about.panel)
        rows += ledgers
    return rows
