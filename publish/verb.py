"""`bcosify.publish`: a folder becomes a checked release, and the release a commit on the hub."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..core.errors import PublishError
from ..core.files import check_free, new_folder, paths_in
from .hub import Published, Target, upload
from .licences import Licence
from .staging import Release, Request, stage, written_release

__all__ = ["Publication", "publish"]


@dataclasses.dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Attributes:
        files: path in the repository -> size in bytes.
        licence: under which it is published.
        headline: the few numbers of the evaluation that the card begins with.
        doors: name of a library -> the lines that load the model with it.
        left_out: what lies beside the model and is not part of it.
        anew: the model was saved once more for this, as others could not open it, or it named a place of this machine.
        folder: where a copy of it is kept.
        published: what is on the hub now; None of a dry run.
    """

    repo: str
    files: dict[str, int]
    licence: Licence
    headline: dict[str, float]
    doors: dict[str, str]
    left_out: tuple[str, ...]
    anew: bool
    folder: Path | None = None
    published: Published | None = None


def publish(
    folder: str | Path,
    repo: str,
    *,
    evaluation: str | Path | None = None,
    picture: str | Path | None = None,
    data: str | None = None,
    license: str | None = None,
    license_link: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    staged: Callable[[Release], object] | None = None,
) -> Publication:
    """Publishes a converted model with a card, so that bcosify, timm, transformers or open_clip open it in one line.

    All is put together and checked in a folder of its own first: strict loading, the probe, an explanation that adds
    up, the licence, the card, no pickle, no path of this machine. The upload is one commit, then a tag; what is on the
    hub already is not sent again, and an interrupted upload can be repeated.

    Args:
        folder: of a converted model.
        repo: ORG/NAME; made where it does not exist.
        evaluation: folder that `evaluate` wrote for this model; without, the card says that there is none.
        picture: a photograph to explain in the card.
        data: what pictures it was aligned and measured on, for the card, in a sentence.
        license: licence to publish under, as the hub names it; needed where the base model's is not a permissive one.
        license_link: address of its text.
        private: make a new repository private.
        create_pr: propose the commit as a pull request.
        revision: branch to commit to, in place of main.
        tag: name of this release; default the next free one of v1, v2, ...
        endpoint: address of the hub, in place of HF_ENDPOINT or huggingface.co.
        dry_run: check everything, and send nothing.
        out: keep what is published in this folder.
        overwrite: replace that folder if it exists.
        staged: is called with the checked release before anything is sent; what it raises ends the call.

    Raises:
        CheckpointError, LedgerError, PublishError, DataError: says what failed, what is on the hub now, what to do.
    """
    if not isinstance(folder, str | Path):
        raise PublishError(
            f"publish takes the folder of a converted model, not a {type(folder).__name__}. Save it first: "
            "bcosify.save(student, FOLDER), then bcosify.publish(FOLDER, 'ORG/NAME')."
        )
    report, photograph = (None if path is None else Path(path) for path in (evaluation, picture))
    request = Request(Path(folder), repo, license, license_link, report, photograph, data)
    target = Target(repo, private, create_pr, revision, tag)
    if out is not None:
        check_free(Path(out), overwrite, written_release, paths_in(folder, evaluation, picture))
    with tempfile.TemporaryDirectory(prefix="bcosify-publish-") as scratch:
        release = stage(request, Path(scratch))
        if staged is not None:
            staged(release)
        published = None if dry_run else upload(release, target, endpoint)
        if out is not None:
            with new_folder(Path(out), overwrite, written_release) as kept:
                shutil.copytree(scratch, kept, dirs_exist_ok=True)
    return Publication(
        repo,
        release.files,
        release.licence,
        release.headline,
        release.doors,
        release.left_out,
        release.anew,
        None if out is None else Path(out),
        published,
    )
