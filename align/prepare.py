"""What a run needs before its first step: all checks, the teacher, the shards, the run's folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn

from ..convert import Student, load
from ..convert.libraries import find_library
from ..core.errors import CheckpointError, DataError, RecipeError
from ..core.files import json_text, new_file
from ..data.index import ShardIndex, index_shards
from ..data.names import expand
from ..data.order import copies, overlap, split, without
from ..data.progress import say
from ..data.remote import shown
from ..data.stream import Stream, fingerprints
from . import state
from .log import METRICS
from .recipe import difference, dump, saved_recipe
from .sheets import EXPLANATIONS
from .trackers import TRACKED

if TYPE_CHECKING:
    from .run import AlignConfig

__all__ = [
    "RESULT",
    "checkpoint_gradients",
    "find_data",
    "finished",
    "prepare_folder",
    "start_from",
    "without_checkpointing",
]

# What a resumed run may have otherwise, and adds numbers up in another order by.
ROUNDED = ("accumulate", "gradient_checkpointing")
RECIPE, RESULT = "recipe.yaml", "result.json"  # of a run: what was asked, and what it came to


def start_from(student: Student, folder: Path | None) -> None:
    """Takes the weights of another student of the same source and plan."""
    if folder is None:
        return
    other = load(folder)
    ours, theirs = ((s.source.architecture, s.plan.swaps) for s in (student, other))
    if ours != theirs:
        raise CheckpointError(
            f"--init-from {folder}: a student of {other.source.reference} by another plan than that of "
            f"{student.source.reference}. Convert both with the same options."
        )
    student.model.load_state_dict(other.model.state_dict())


def checkpoint_gradients(model: nn.Module, library: str, on: bool = True) -> None:
    """Turns the own gradient checkpointing of the source's library on or off."""
    if not find_library(library).set_checkpointing(model, on):
        raise RecipeError(
            f"gradient_checkpointing: {type(model).__name__} does not know it. Take it out, and use accumulate."
        )


@contextlib.contextmanager
def without_checkpointing(model: nn.Module, library: str) -> Iterator[None]:
    """Inside, gradient checkpointing is off: it runs blocks again where an explanation cannot see them."""
    checkpoint_gradients(model, library, False)
    try:
        yield
    finally:
        checkpoint_gradients(model, library)


def find_data(config: AlignConfig) -> tuple[ShardIndex | Stream, ShardIndex]:
    """The pictures to train on, and those to measure on."""
    shards = expand(config.data)
    index = functools.partial(index_shards, progress=not config.quiet, cache=config.cache)
    if config.stream:
        if config.val is None:
            raise DataError(
                "--stream holds no pictures back, as it does not know which will come: pass --val SHARDS. "
                "They are downloaded and indexed, so a few hundred pictures are enough."
            )
        val = index(expand(config.val))
        return Stream(shards, held_out=fingerprints(val)), val
    train = index(shards)
    if config.val is not None:
        val = index(expand(config.val))
        if same := overlap(train, val):
            pairs = ", ".join(f"{ours} = {theirs}" for ours, theirs in same[:5])
            raise DataError(
                f"--val is no measure: {len(same)} of its pictures are in --data too ({pairs}). Take them out "
                "of one of the two, or leave --val out, and some pictures of --data are held out."
            )
        return train, val
    return _parted(*split(train, config.recipe.held_out, config.recipe.seed))


def _parted(train: ShardIndex, val: ShardIndex) -> tuple[ShardIndex, ShardIndex]:
    """Both parts without pictures in `train` that are in `val` too, under another key; says how many."""
    if not (same := copies(train, val)):
        return train, val
    ours, theirs = same[0]
    say(
        f"{len(same)} pictures of --data are copies of held-out ones under another key "
        f"({train.key(ours)} = {val.key(theirs)}), so they are not trained on."
    )
    if len(same) == len(train):
        raise DataError("All pictures of --data are copies of held-out ones. Pass more pictures, or --val SHARDS.")
    return without(train, [i for i, _ in same]), val


def finished(config: AlignConfig) -> dict[str, Any] | None:
    """What the run in `work` came to, where --resume finds that it has ended and its model is there; else None.

    Raises RecipeError where that was a run by another recipe.
    """
    if not config.resume or not (config.out / "bcosify.json").is_file() or not (config.work / RECIPE).is_file():
        return None
    if (config.work / RESULT).is_file():
        with contextlib.suppress(ValueError, OSError):
            found = json.loads((config.work / RESULT).read_text("utf-8"))
            _check_same_recipe(config)
            return {**found, "out": str(config.out)} if isinstance(found, dict) else None
    progress = state.newest_progress(config.work / state.CHECKPOINTS)  # runs of before wrote no result
    if progress is None or len(progress.ends) < len(config.recipe.phases):
        return None
    _check_same_recipe(config)
    first, last = (progress.curve[0], progress.curve[-1]) if progress.curve else (None, None)
    told = {"pictures": progress.step * config.recipe.batch_size, "start": first, "final": last}
    none = {"bad_pictures": 0, "seconds": 0.0, "stopped": False, "guarded": False, "kept": None}
    return {"out": str(config.out), **told, "curve": list(progress.curve), **none}


def _check_same_recipe(config: AlignConfig) -> None:
    begun = saved_recipe(config.work / RECIPE)
    if changed := difference(begun, config.recipe):
        raise RecipeError(
            f"--resume goes on with the recipe that the run was started with; this one differs:\n{changed}"
        )
    told = [name for name in ROUNDED if getattr(begun, name) != getattr(config.recipe, name)]
    if told:
        warnings.warn(f"resumed with another {', '.join(told)}, so no longer bit for bit", stacklevel=3)


def prepare_folder(
    config: AlignConfig, accelerator: Accelerator, train: ShardIndex | Stream
) -> tuple[Path, state.Progress] | None:
    """Makes `work`, or checks that it belongs to the same run; returns the checkpoint to go on from."""
    written = config.work / RECIPE
    if config.resume and written.is_file():
        _check_same_recipe(config)
        found = state.latest(config.work / state.CHECKPOINTS)
        if found and found[1].data != train.digest:
            raise RecipeError(
                f"--resume: {shown(config.data)} is not the data that the run was started with "
                f"({'its shards or --stream differ' if config.stream else 'its index differs'})."
            )
        if found:
            _cut_metrics(config.work / METRICS, found[1].step, config.recipe.batch_size, accelerator)
            return found
    elif config.resume:
        raise CheckpointError(f"--resume: there is no run in {config.work}. Leave --resume out to start one.")
    elif written.is_file() and not config.overwrite:
        raise CheckpointError(
            f"{config.work} holds an earlier run. Pass --resume to go on, --overwrite, or another --out."
        )
    elif not written.is_file():
        _check_not_ours(config.work)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        config.work.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, RESULT, "bad_samples.jsonl"):
            (config.work / name).unlink(missing_ok=True)
        for name in (state.CHECKPOINTS, EXPLANATIONS, TRACKED):
            shutil.rmtree(config.work / name, ignore_errors=True)
        with new_file(written) as scratch:
            scratch.write_text(dump(config.recipe))
    accelerator.wait_for_everyone()
    return None


def _check_not_ours(work: Path) -> None:
    """Raises CheckpointError where a folder without a run's recipe holds what a new run would remove there."""
    names = (METRICS, RESULT, "bad_samples.jsonl", state.CHECKPOINTS, EXPLANATIONS, TRACKED)
    if work.is_symlink() or (found := [name for name in names if os.path.lexists(work / name)]):
        what = "is a link" if work.is_symlink() else f"holds {found[0]}, but no recipe.yaml, so it is no run's"
        raise CheckpointError(f"{work} {what}. Nothing was removed; move it away, or pass another --out.")


def _cut_metrics(path: Path, step: int, batch_size: int, accelerator: Accelerator) -> None:
    """Drops rows from after the checkpoint: the resumed run writes them again."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and path.is_file():
        rows = filter(None, map(_row, path.read_text("utf-8", errors="replace").splitlines()))
        kept = [row for row in rows if _pictures(row) <= step * batch_size]
        with new_file(path) as scratch:
            scratch.write_text("".join(json_text(row) + "\n" for row in kept))
    accelerator.wait_for_everyone()


def _row(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that was torn when the run was killed, whatever is left of it."""
    try:
        row = json.loads(line)
        _pictures(row)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return row


def _pictures(row: dict[str, Any]) -> int:
    """How many pictures were seen when `row` was written."""
    return int(row.get("pictures", row.get("held_out", {}).get("pictures", 0)))
