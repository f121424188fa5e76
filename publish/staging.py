"""What goes up is put together and checked in a folder of its own first; nothing else is uploaded."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, get_token

from ..align.recipe import known_values
from ..convert import Student, load, save
from ..convert.checkpoint import PICKLES, read_record, written
from ..convert.hub import CONFIG, RECORD, TEXT
from ..convert.library_files import config_of
from ..convert.output import output_kind
from ..core.errors import PublishError, RecipeError
from ..core.pictures import fitted, noise_pictures
from ..data.pictures import read_picture
from ..evaluate.record import FILE, Evaluation, read_evaluation
from ..evaluate.subject import weights_digest
from ..explain import explain_scores, panel
from ..explain.questions import ask
from ..explain.standing import standing_in_words
from .card import Shown, card_of, load_lines
from .licences import Licence, base_of, choose_licence

__all__ = ["CARD", "Release", "Request", "stage", "written_release"]

CARD, PICTURE, RECIPE = "README.md", "explanation.png", "recipe.yaml"
TEXTS = (".json", ".yaml", ".md", ".txt", ".jinja")
LARGER, LARGE = 4, 1024  # times a model's own side, and pixels, that it may be shown at
REQUIRED = ("license", "library_name", "pipeline_tag", "tags")
REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to publish, and what to say of it.

    Attributes:
        folder: of a converted model.
        repo: ORG/NAME.
        licence, licence_link: where the base model's own is not carried over.
        evaluation: folder or file that `bcosify evaluate` wrote for these weights.
        picture: a photograph to explain in the card.
        data: what pictures it was aligned and measured on, in words.
    """

    folder: Path
    repo: str
    licence: str | None = None
    licence_link: str | None = None
    evaluation: Path | None = None
    picture: Path | None = None
    data: str | None = None


@dataclasses.dataclass(frozen=True)
class Release:
    """A folder that passed every check.

    Attributes:
        files: path in the repository -> size in bytes.
        left_out: what lies beside the model and is not part of it.
        anew: the model was saved once more for this, as others could not open it, or it names a place of this machine.
        doors: name -> the lines that load it.
    """

    folder: Path
    repo: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    anew: bool
    licence: Licence
    doors: dict[str, str]
    headline: dict[str, float]


def stage(request: Request, out: Path) -> Release:
    """Fills the empty folder `out` with what is to be published of `request`, checked.

    Raises:
        CheckpointError: the model does not load strictly, or computes something else than when it was saved.
        LedgerError: an explanation of it does not add up.
        PublishError: licence, names, an evaluation of other weights, paths of this machine, a pickle.
    """
    if not REPO.fullmatch(request.repo):
        raise PublishError(
            f"{request.repo!r} is not the name of a repository. Pass ORG/NAME, such as my-lab/bcos-dino."
        )
    pickles = sorted({path.name for pattern in PICKLES for path in request.folder.glob(f"**/{pattern}")})
    if pickles:
        raise PublishError(
            f"{request.folder} holds {', '.join(pickles)}: pickles can run code and are not published. Move them away."
        )
    found = load(request.folder)
    base = base_of(found.source)
    licence = choose_licence(base, request.licence, request.licence_link)
    student = _named_for_others(found)
    evaluation = None if request.evaluation is None else _evaluation(request.evaluation, student)
    recipe = _recipe(request.folder)
    size = evaluation.model["size"] if evaluation else (recipe or {}).get("image_size")
    shown = _explained(_shown_at(student, size), request.picture, out / PICTURE)
    anew = not _as_saved_now(request.folder, student)
    with tempfile.TemporaryDirectory(prefix="bcosify-save-") as scratch:
        _copy_model(save(student, Path(scratch) / "model") if anew else request.folder, out)
    if anew:
        load(out)
    if evaluation is not None:
        evaluation.write(out)
    if recipe is not None:
        (out / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False, width=120), "utf-8")
    card = card_of(
        student, request.repo, base, licence, evaluation=evaluation, recipe=recipe, data=request.data, shown=shown
    )
    card.save(out / CARD)
    _check_card(out / CARD)
    _check_paths(out)
    _check_tokens(out)
    files = {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    beside = (path.relative_to(request.folder).as_posix() for path in request.folder.rglob("*") if path.is_file())
    return Release(
        out,
        request.repo,
        files,
        tuple(sorted(set(beside) - set(_own_files(request.folder)))),
        anew,
        licence,
        load_lines(student, request.repo),
        {} if evaluation is None else evaluation.headline(),
    )


def written_release(folder: Path) -> set[str] | None:
    """The names in `folder` that `publish` put together there, by the model's record; None where there is none."""
    model = written(folder)
    return None if model is None or CARD not in os.listdir(folder) else {*model, CARD, PICTURE, RECIPE, FILE}


def _own_files(folder: Path) -> list[str]:
    """What the record of a converted model lists, and the record."""
    record = read_record(folder)
    return [RECORD, *record["files"], *(f"{TEXT}/{name}" for name in record.get("text") or ())]


def _copy_model(folder: Path, out: Path) -> None:
    for name in _own_files(folder):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)


def _named_for_others(student: Student) -> Student:
    """The same student; of a source in a folder of this machine only the folder's name is told."""
    # open_clip's adapter calls an architecture by its folder, too; nothing is built by that name.
    told = {key: _last_part(getattr(student.source, key)) for key in ("reference", "architecture")}
    return dataclasses.replace(student, source=dataclasses.replace(student.source, **told))


def _last_part(reference: str) -> str:
    """`scheme:/a/b/c` -> `scheme:c`; other references as they are."""
    scheme, separator, place = reference.rpartition(":")
    return f"{scheme}{separator}{Path(place).name}" if place.startswith(("/", "~")) else reference


def _as_saved_now(folder: Path, student: Student) -> bool:
    """Whether `folder` is what saving `student` would make: not so in folders of older versions."""
    known = json.loads(json.dumps([dataclasses.asdict(student.source), config_of(student)]))
    return known == [read_record(folder)["source"], json.loads((folder / CONFIG).read_text("utf-8"))]


def _recipe_of(folder: Path) -> Path:
    """Where `bcosify align` keeps the recipe of the run that made `folder`."""
    return folder.with_name(f"{folder.name}.run") / RECIPE


def _recipe(folder: Path) -> dict[str, Any] | None:
    path = _recipe_of(folder)
    if not os.path.lexists(path):
        return None
    run = path.parent.resolve()
    if path.parent.is_symlink() or not path.resolve().is_relative_to(run):
        raise PublishError(
            f"{path} is a link out of its folder. It is not followed; put the recipe itself there, or move the link "
            "away, and the card says that the recipe is missing."
        )
    try:
        return known_values(path)
    except RecipeError as error:
        raise PublishError(f"{error}\nMove {path} away, and the card says that it is missing.") from error


def _evaluation(path: Path, student: Student) -> Evaluation:
    evaluation = read_evaluation(path)
    kinds = {"size": list, "student_weights": str}
    if wrong := [key for key, kind in kinds.items() if not isinstance(evaluation.model.get(key), kind)]:
        raise PublishError(f"{path} does not say of what it is an evaluation: model has no {', '.join(wrong)}.")
    if not all(isinstance(evaluation.data.get(key), int) for key in ("pictures", "explained")):
        raise PublishError(f"{path} does not say on how many pictures it was made.")
    measured, here = evaluation.model.get("student_weights"), weights_digest(student.model)
    if measured != here:
        raise PublishError(
            f"{path} is an evaluation of other weights (sha256 {str(measured)[:12]}) than these ({here[:12]}). "
            "Evaluate this model: bcosify evaluate DIR --data SHARDS --out report."
        )
    return dataclasses.replace(evaluation, model={**evaluation.model, "reference": student.source.reference})


# --------------------------------------------------------------------------------------------------------- explanation


def _shown_at(student: Student, size: Any) -> Student:
    """`student` at the size that an evaluation or a recipe names; raises PublishError for a size that it is not of."""
    largest = max(LARGER * max(student.preprocess.size), LARGE)
    sides = size if isinstance(size, list | tuple) else [size, size]
    if size is not None and not (len(sides) == 2 and all(type(side) is int and 1 <= side <= largest for side in sides)):
        raise PublishError(
            f"the evaluation or the recipe is of pictures of {size!r} pixels; this model is shown pictures of at most "
            f"{largest:,}. Nothing was uploaded."
        )
    return student if size is None else dataclasses.replace(student, preprocess=student.preprocess.at(tuple(sides)))


def _explained(student: Student, picture: Path | None, out: Path) -> Shown | None:
    """Proves the ledger on `picture`, or on noise, which is not drawn; raises LedgerError where it does not add up."""
    preprocess = student.preprocess
    opened = None if picture is None else preprocess.transform()(read_picture(picture))
    inputs = noise_pictures(1, preprocess.size) if opened is None else opened[None]
    question = ask(student)  # what `bcosify explain` asks where nothing else is said
    explanation = explain_scores(student.model, fitted(inputs, student.model), question.target)
    if opened is None:
        return None
    facts = question.names(explanation.outputs)[0][0]
    name = facts["label"]
    caption = name if output_kind(student).count else "the feature along itself"
    aligned = student.history.alignment is not None
    said, seen = standing_in_words(facts), preprocess.seen(opened)
    panel(seen, explanation, caption, standing=said, own_colours=aligned).save(out)
    return Shown(caption, explanation.row(0, 0))


# -------------------------------------------------------------------------------------------------------------- checks


def _check_card(path: Path) -> None:
    facts = ModelCard.load(path).data.to_dict()
    missing = [name for name in REQUIRED if not facts.get(name)]
    if facts.get("license") == "other":
        missing += [name for name in ("license_name", "license_link") if not facts.get(name)]
    if missing:
        raise PublishError(f"The card lacks {', '.join(missing)}. This is a fault of bcosify: nothing was uploaded.")


def _check_paths(folder: Path) -> None:
    """Raises PublishError where a text of `folder` names a place on this machine."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in TEXTS:
            for place in _places(path):
                raise PublishError(
                    f"{path.relative_to(folder)} would publish {place!r}, a path of this machine. Convert again from a "
                    "name on the hub or a relative path, or leave out what names it. Nothing was uploaded."
                )


# What tokens and keys look like: the hub's, those of code hosts, clouds and model providers, and private keys.
TOKENS = re.compile(
    rb"\b(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
    rb"|glpat-[\w-]{20,}|AKIA[A-Z0-9]{16}|ASIA[A-Z0-9]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{20,}|sk-[\w-]{32,})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def _check_tokens(folder: Path) -> None:
    """Raises PublishError where a file of `folder` holds what looks like a token, or is the token of this machine.

    Of weights their header is searched, where words may stand.
    """
    own = (get_token() or "").encode()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else -1
            text = file.read(length) if length >= 0 else path.read_bytes()
        if TOKENS.search(text) or (len(own) >= 8 and own in text):
            raise PublishError(
                f"{path.relative_to(folder)} would publish what looks like a token or a private key. It is not shown "
                "here; take it out, and have it replaced where it may have been seen. Nothing was uploaded."
            )


# What a path may follow: a beginning, a space, a quote, a bracket, or the colon of `local-dir:`.
ABSOLUTE = re.compile(r"(?:^|(?<=[\s\"'`(=:,]))(?:/[\w.@+-]+(?:/[\w.@+ -]*)+|~/\w|[A-Za-z]:\\\w)")
ELSEWHERE = ("home", "Users", "root", "mnt", "tmp")


def _places(path: Path) -> Iterator[str]:
    """Absolute paths in a file: those whose first folder this machine has, or that any machine's users have."""
    roots = {entry.name for entry in os.scandir("/")} | set(ELSEWHERE)
    texts = _strings(json.loads(path.read_text("utf-8"))) if path.suffix == ".json" else [path.read_text("utf-8")]
    for text in texts:
        for found in ABSOLUTE.findall(text):
            if not found.startswith("/") or found.split("/")[1] in roots:
                yield found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value
