"""`bcosify.explain`: scores of pictures, of a batch in memory or of files, with the command's options."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from ..convert.libraries import CLASSES, Prepared, files_of, only_files, prepared
from ..convert.memory import laid_out
from ..convert.output import OutputKind, with_labels
from ..convert.trace import reads_colours, trace_forward
from ..core.errors import DataError, SourceError, TargetError
from ..core.files import check_free, new_folder, paths_in
from ..core.pictures import fitted
from ..core.ranges import AMOUNT, COUNT, SIDE, ranged
from ..data.folders import Skipped, unique
from ..data.pictures import read_picture
from ..data.progress import say
from .attribution import Explanation, explain_scores
from .explained import Context, Explained, together
from .questions import Facts, Question, ask, named
from .render import panel
from .results import ScoreLedger, as_disks_see_it, stem, written
from .targets import ClassTarget, Target, target_of
from .views import Views, explain_views, views_of

__all__ = ["Ledgers", "explain"]

Model = nn.Module | Student | Teacher | str | Path
Classes = Target | Callable[[Tensor], Tensor] | int | str | Sequence[int | str] | Tensor | np.ndarray | np.integer
Picture = str | Path | Image.Image | np.ndarray | Tensor
BATCH = 8  # pictures a forward pass, of files
KEPT = 2**30  # bytes of maps that a call on files keeps, to be shown


class Ledgers(list[ScoreLedger]):
    """The ledgers of all pictures that could be read; and all that an `Explained` has: maps, `show()`, `region(...)`.

    Attributes:
        skipped: the pictures that could not, and why.
        agreement: how far a student that was explained stands for its teacher; None for other models.
        explained: the explanation of the pictures that could; None where its maps take more than a gibibyte.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[Skipped] = []
        self.agreement: Agreement | None = None
        self.explained: Explained | None = None

    @property
    def constant_share(self) -> float:
        """The mean share of constants in what scores are made of, in [0, 1], by size."""
        parts = [(abs(sum(one.constants.values())), abs(one.input)) for one in self]
        return sum(constants / (constants + pixels or 1.0) for constants, pixels in parts) / max(1, len(parts))

    def __getattr__(self, name: str) -> Any:
        """What `explained` has, such as `contributions`, `show` and `region`."""
        if name.startswith("__") or name == "explained" or not hasattr(Explained, name) and name not in FIELDS:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        if self.explained is None:
            images = len({one.image for one in self})
            raise TargetError(
                f".{name}: the maps of {images} pictures were not kept, as they take over {KEPT >> 30} GiB. Pass fewer "
                "pictures or out=FOLDER."
            )
        return getattr(self.explained, name)

    def __repr__(self) -> str:
        if self.explained is not None:
            return repr(self.explained)
        return f"{type(self).__name__}({len(self)} scores, {len(self.skipped)} pictures skipped)"


FIELDS = {one.name for one in dataclasses.fields(Explained)}


@overload
def explain(
    model: Model,
    pictures: str | Path | Sequence[str | Path],
    target: Classes | None = None,
    *,
    targets: Sequence[int | str] | None = None,
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


@overload
def explain(
    model: Model,
    pictures: Tensor | np.ndarray | Image.Image | Sequence[Picture],
    target: Classes | None = None,
    *,
    targets: Sequence[int | str] | None = None,
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
    check: bool = True,
    tolerance: float = 1e-4,
) -> Explained: ...


@ranged(image_size=SIDE, batch_size=COUNT, max_pixels=COUNT, tolerance=AMOUNT)
def explain(
    model: Model,
    pictures: Picture | Sequence[Picture],
    target: Classes | None = None,
    *,
    targets: Sequence[int | str] | None = None,
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
) -> Explained | Ledgers:
    """Explains scores of pictures, and proves that the explanation adds up.

    Args:
        model: any nn.Module, converted or not; a Student or a Teacher; a converted model (a folder, or ORG/REPO[@rev]
            on the hub); or a model reference such as timm:NAME. What is given as an object is left as it is.
        pictures: picture files and folders of them (see `data.folders`); PIL pictures, arrays of colours (H, W, 3),
            normalised pictures (B, 3, H, W), or a list of all these (see `convert.libraries.inputs`).
        target: what to explain: a class by number or name, `top1`, `top3`, ...; `self` for models without classes; a
            text for CLIP and SigLIP; a function of the output (B, D), such as `lambda y: y[:, 3] - y[:, 5]`; or a
            `Target`. An array or a tensor has a class for each picture (B,), or a row (B, K). By default the largest
            output of a classifier, the output of a regression, else `self`. A bare nn.Module needs numbers, a function
            or a `Target`.
        targets: classes by number or name, all of them for every picture.
        out: for files alone: a new folder for NAME.png, NAME.npz and NAME.json of every picture.
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
        `Explained`: an `Explanation` with all maps, which can be shown, asked and saved. Of files `Ledgers`: the same,
        and a list of a `ScoreLedger` for each picture and score, in order. Files that cannot be read are skipped, with
        a DataWarning; they are listed there, and in `out`/skipped.jsonl. Beside pictures in memory they are refused.

    Raises:
        DataError: none of the pictures can be read; nothing is written then.
        LedgerError: input and constants do not add up to a score; names the operations that have no rule.
        TargetError, DataError, SourceError, CheckpointError: before anything is written.
    """
    files = only_files(pictures)
    if isinstance(model, nn.Module):
        _check_kind(pictures)
    if not files and (out is not None or overwrite):
        raise TargetError("out is for picture files. Of other pictures the explanation is returned: save(FOLDER).")
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
                "Student or a Teacher, such as bcosify.convert.load_teacher('timm:NAME'); or normalised pictures "
                "(B, 3, H, W) and a target."
            )
        asked = _of_module(model, target, targets)
        about = About(type(model).__name__, None, several)
        return _explained(asked, about, Prepared(pictures, (None,) * len(pictures)), scores, batch_size)
    opened = _opened(model, head, image_size)
    if labels is not None:
        opened = with_labels(opened, labels)
    asked = ask(opened, target=target, targets=targets, **options)
    question = _with_prototypes(asked, getattr(opened, "history", None))
    about = About(opened.source.reference, opened.preprocess, several)
    if isinstance(opened, Student):
        aligned = opened.history.alignment is not None
        about = dataclasses.replace(about, agreement=agreement_of(opened), aligned=aligned)
    if isinstance(pictures, Tensor) and pictures.is_floating_point() and pictures.dim() == 4:
        return _explained(question, about, Prepared(pictures, (None,) * len(pictures)), scores, batch_size)
    if not reads_colours(opened.model):
        trace_forward(opened.model, opened.preprocess.size)  # says what it reads
    if not files:
        found = prepared(pictures, opened.preprocess.transform(), max_pixels)
        found = found._replace(inputs=fitted(found.inputs, opened.model))
        return _explained(question, about, found, scores, BATCH if batch_size is None else batch_size)
    return _of_files(question, about, pictures, scores, batch_size, max_pixels, out, overwrite)


def _of_files(
    question: Question,
    about: About,
    pictures: Any,
    scores: Callable[..., Explanation],
    batch_size: int | None,
    max_pixels: int | None,
    out: str | Path | None,
    overwrite: bool,
) -> Ledgers:
    """Explains files batch by batch, writes what is asked for, and keeps maps as far as there is room for them."""
    assert about.preprocess is not None
    files = files_of(pictures)
    names = list(unique(map(stem, files), as_disks_see_it))
    # One that cannot be read must not move the others' scores, where these differ from picture to picture.
    by_picture = len(files) > 0 and question.target.rows(slice(0, 1)) is not question.target
    if by_picture:
        _check_rows(question.target, len(files))
    size = 1 if by_picture else BATCH if batch_size is None else batch_size
    ledgers, kept, room = Ledgers(), [], KEPT
    ledgers.agreement = about.agreement
    with contextlib.ExitStack() as stack:
        folder = None if out is None else stack.enter_context(new_folder(Path(out), overwrite, written))
        for start in range(0, len(files), size):
            part = slice(start, start + size)
            inputs, skipped = _read(files[part], about.preprocess, max_pixels)
            ledgers.skipped += skipped
            if not inputs:
                continue
            shown = [(file, name) for file, name in zip(files[part], names[part], strict=True) if file in inputs]
            one = _explained(
                question.rows(part),
                about,
                Prepared(torch.stack([inputs[file] for file, _ in shown]), tuple(file for file, _ in shown)),
                scores,
                views_kept=folder is not None,
            )
            if folder is not None:
                one.write(folder, [name for _, name in shown])
            ledgers += one.ledgers
            room -= one.nbytes
            kept = [*kept, one] if room > 0 else []
        _check_skipped(ledgers.skipped, len(files), folder)
    ledgers.explained = together(kept) if room > 0 and kept else None
    return ledgers


def _check_rows(target: Target, count: int) -> None:
    """Raises TargetError where a target that differs from picture to picture is not of `count` files."""
    rows = getattr(target, "indices", getattr(target, "directions", None))
    if rows is not None and len(rows) != count:
        raise TargetError(
            f"target: there are {len(rows)} targets that differ from picture to picture, and {count} pictures. Pass "
            "one for each, or targets=[...] for every picture."
        )


def _of_module(model: nn.Module, target: Classes | None, targets: Sequence[int | str] | None) -> Question:
    """What is asked of a bare module, whose classes are known by their numbers."""
    if target is None and targets is None:
        raise TargetError("target is missing. Pass a class, a Target such as TopTarget(), or SelfTarget().")
    if target is not None and targets is not None:
        raise TargetError("target and targets are two answers to one question. Pass one of them.")
    _check_words(cast(Any, target if targets is None else targets))
    asked = target_of(target) if targets is None else ClassTarget(cast(Any, list(targets)))

    def of(asked: Target) -> Question:
        def names(outputs: Tensor) -> list[list[Facts]]:
            return named(asked, outputs, OutputKind(CLASSES, outputs.shape[1]))

        return Question(model, asked, names, lambda pictures: of(asked.rows(pictures)))

    return of(asked)


@dataclasses.dataclass(frozen=True)
class About:
    """What holds for all explanations of a call: the model's name, how its pictures are prepared (None: not known),
    over which views they are means; of a student, how far it stands for its teacher, and whether it is aligned."""

    model: str
    preprocess: Preprocess | None
    views: Views | None
    agreement: Agreement | None = None
    aligned: bool = False

    def row(self) -> dict[str, Any]:
        """For each ledger."""
        return {} if self.views is None else {"views": dataclasses.asdict(self.views)}

    @property
    def said(self) -> tuple[str, ...]:
        """What is said of the model and of views, in words."""
        views = () if self.views is None else (f"{self.views}",)
        return views if self.agreement is None else (*views, self.agreement.words)

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
        if not isinstance(model, str | Path):
            raise SourceError(
                f"model is a {type(model).__name__}. Pass a reference such as timm:NAME, a converted folder, a "
                "Student, a Teacher or a torch module."
            )
        reference = str(model)
        if is_student(reference):
            opened = load(model)
        elif Path(reference).is_dir() or ":" not in reference:
            raise SourceError(
                f"{model} is no converted folder (it holds no bcosify.json) and no reference such as timm:NAME."
                + ("" if {"/", "."} & {*reference} else f" Did you mean 'timm:{reference}'?")
            )
        else:
            opened = load_teacher(reference, head=head, image_size=image_size)
        laid_out(opened.model.eval())
    if image_size is not None:
        opened = dataclasses.replace(opened, preprocess=opened.preprocess.at(image_size))
        trace_forward(opened.model, opened.preprocess.size)
    return opened


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
    about: About,
    given: Prepared,
    scores: Callable[..., Explanation],
    batch_size: int | None = None,
    views_kept: bool = False,
) -> Explained:
    """Explains pictures, with all that is known of them.

    Args:
        scores: `explain_scores`, or the mean over views. views_kept: keep the views themselves, too.
    """
    inputs = given.inputs
    explanation = scores(question.network, inputs, question.target, batch_size=batch_size)
    network: Any = question.network
    more: dict[str, Tensor] = network.extra_maps(inputs) if hasattr(network, "extra_maps") else {}
    if about.views is not None and views_kept:
        more = {**more, "views": torch.stack([pictures for pictures, _, _ in about.views.of(inputs)], 1)}
    context = Context(
        model=about.model,
        images=tuple(str(photo) if isinstance(photo, Path) else f"picture {i}" for i, photo in enumerate(given.photos)),
        seen=tuple(_seen(one, about.preprocess) for one in inputs),
        facts=question.names(explanation.outputs),
        photos=given.photos,
        preprocess=about.preprocess,
        about=about.row(),
        said=about.said,
        draw=about.panel,
        more=more,
    )
    return Explained.of(explanation, context)


def _seen(one: Tensor, preprocess: Preprocess | None) -> Image.Image:
    """A normalised picture (3, H, W) as colours; where its normalisation is not known, from least to largest value."""
    if preprocess is not None:
        return preprocess.seen(one)
    colours = one.detach().cpu().float()
    low, high = colours.amin(), colours.amax()
    colours = (colours - low) / (high - low).clamp_min(1e-12)
    return to_pil_image(colours if len(colours) in (1, 3) else colours.mean(0, keepdim=True))
