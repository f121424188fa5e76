"""Where a student lies: a folder on this machine, or a hub repository, which is fetched as one snapshot of it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError, first_line, near_miss

__all__ = [
    "ARCHITECTURE",
    "CONFIG",
    "OPEN_CLIP",
    "PROBE",
    "RECORD",
    "TEXT",
    "WEIGHTS",
    "is_student",
    "is_text_file",
    "shipped_students",
    "student_folder",
]

# As what other libraries know a student.
ARCHITECTURE = "bcosify"
WEIGHTS, RECORD, PROBE = "model.safetensors", "bcosify.json", "probe.safetensors"
CONFIG, OPEN_CLIP, TEXT = "config.json", "open_clip_config.json", "text"
# All that a repository is asked for. Never code, never a pickle.
KINDS = ("json", "safetensors", "txt", "model", "jinja")
FETCHED = (RECORD, CONFIG, OPEN_CLIP, WEIGHTS, PROBE, *(f"{TEXT}/*.{kind}" for kind in KINDS))
# Students that this package carries, each in the folder of its name.
BUNDLED, SHIPPED = "bundled:", ("bcos-efficientnet-lite0",)
STUDENTS = Path(__file__).resolve().parents[1] / "students"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_text_file(name: str) -> bool:
    """Whether a text tower may have a file of that name: weights, settings and vocabularies, never code."""
    return name.rpartition(".")[2] in KINDS and not name.startswith(".")


def student_folder(reference: str | Path, *, revision: str | None = None, **options: Any) -> Path:
    """The folder of the student that `reference` names; a hub repository is fetched, or taken from the cache.

    Args:
        reference: a folder, `ORG/REPO[@rev]`, or `bundled:NAME` for a student that this package carries. What exists
            as a folder is never looked for on the hub; `local-dir:` and `hf-hub:` in front say which of both is meant,
            and `hf:` is allowed in front of all.
        revision: branch, tag or commit, where the reference names none.
        options: of `huggingface_hub.snapshot_download`: cache_dir, token, local_files_only, force_download.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had, or a repository of something else.
    """
    if not isinstance(reference, str | os.PathLike):
        kind = type(reference).__name__
        way = "Write it first: student.save('runs/mine')" if kind == "Student" else "Convert it first, with out=FOLDER"
        raise CheckpointError(
            f"a {kind} is no folder and no repository of a converted model. {way}, and pass the folder."
        )
    text = str(reference)
    if text.startswith(BUNDLED):
        return _shipped(text)
    name = text.removeprefix("hf:")
    place = name.removeprefix("hf-hub:").removeprefix("local-dir:")
    folder = Path(place).expanduser()
    if isinstance(reference, Path) or name.startswith("local-dir:") or (place == name and folder.is_dir()):
        return folder
    if not REPOSITORY.fullmatch(place):
        raise CheckpointError(
            f"{text} is not a converted model: {RECORD} is missing, as there is no such folder, and no hub repository "
            "can have that name (ORG/REPO or ORG/REPO@revision). `bcosify convert` makes a converted model."
        )
    repository, _, tagged = place.partition("@")
    return _snapshot(text, repository, tagged or revision, options)


def is_student(reference: str) -> bool:
    """Whether `reference` is a converted model: a folder with a record, or a hub repository, which is asked.

    Raises:
        CheckpointError: a name that can only be a student's, and cannot be had.
    """
    scheme, separator, _ = reference.partition(":")
    if reference in shipped_students():
        return True
    if separator and scheme not in ("hf", "hf-hub", "local-dir"):
        return False
    try:
        return (student_folder(reference) / RECORD).is_file()
    except CheckpointError:
        if scheme == "hf" and separator:  # perhaps a model of transformers', whose adapter says what is wrong with it
            return False
        if not separator and not REPOSITORY.fullmatch(reference):  # no name of a repository: something else altogether
            return False
        raise


def shipped_students() -> tuple[str, ...]:
    """References of the students that this package carries: `bundled:NAME`."""
    return tuple(f"{BUNDLED}{name}" for name in SHIPPED)


def _shipped(reference: str) -> Path:
    """The folder of a student that this package carries, whole."""
    known = shipped_students()
    if reference not in known:
        raise CheckpointError(
            f"{reference} is no converted model that comes with bcosify.{near_miss(reference, known)} There are: "
            f"{', '.join(known)}."
        )
    folder = STUDENTS / reference.removeprefix(BUNDLED)
    if missing := [name for name in (RECORD, WEIGHTS, PROBE) if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{reference}: this installation of bcosify lacks {', '.join(missing)} of it. Run: pip install "
            "--force-reinstall --no-deps bcosify"
        )
    return folder


def _snapshot(reference: str, repository: str, revision: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    try:
        # The record first: it is small, tells a student from other repositories, and pins the commit of the rest.
        record = Path(hf_hub_download(repository, RECORD, revision=revision, **options))
        commit = record.parent.name
        return Path(snapshot_download(repository, revision=commit, allow_patterns=list(FETCHED), **options))
    except HFValidationError as error:
        raise CheckpointError(f"{reference}: no name of a hub repository (ORG/REPO): {error}") from error
    except RemoteEntryNotFoundError as error:
        raise CheckpointError(
            f"{reference}: the hub's repository {repository} holds no {RECORD}, so it is not a converted model. "
            f"`bcosify convert hf:{repository} --out FOLDER` makes one of it (or timm:hf-hub:{repository}, or "
            f"open_clip:hf-hub:{repository})."
        ) from error
    except OSError as error:  # all that huggingface_hub raises about a hub that it cannot reach, or that says no
        raise CheckpointError(
            f"{reference}: there is no such folder, and the hub's repository {repository} cannot be had "
            f"({first_line(error)}). Check the name, the connection, and the token of a private one (HF_TOKEN). What "
            "was fetched once is read from the cache (HF_HOME) without a connection."
        ) from error
