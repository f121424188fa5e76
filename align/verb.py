"""`bcosify.align`: a folder and shards become an aligned model, with the command's options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..convert import load
from ..convert.hub import student_folder
from ..core.errors import CheckpointError
from ..core.ranges import COUNT, SHARE, ranged
from .checks import choose_recipe
from .recipe import Recipe, load_recipe, scaled
from .run import AlignConfig
from .trainer import align as align_config

__all__ = ["Aligned", "align"]


@dataclasses.dataclass(frozen=True)
class Aligned:
    """What an alignment came to.

    Attributes:
        out: the aligned model. `work`: the run's folder beside it, with its recipe, metrics and checkpoints.
        pictures: how many were seen.
        start, final, curve: held-out fidelity, over pictures seen.
        bad_pictures: broken ones, listed in bad_samples.jsonl of `work`.
        seconds: spent on steps.
        stopped: by a signal; nothing was written to `out`, and `resume` goes on.
        guarded: agreement fell below the recipe's `min_agreement`, which ended the run.
        kept: with a floor (`keep`): where it ended.
        finished: with `resume`: the run had ended before, and nothing was left to do.
        recipe_name, recipe: as it was chosen, and as it was run.
    """

    out: Path
    pictures: int
    start: dict[str, Any] | None
    final: dict[str, Any] | None
    curve: list[dict[str, Any]]
    bad_pictures: int
    seconds: float
    stopped: bool
    guarded: bool
    kept: dict[str, Any] | None
    finished: bool
    work: Path
    recipe_name: str
    recipe: Recipe


@ranged(pictures=COUNT, keep=SHARE)
def align(
    run: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    recipe: str | Path = "auto",
    set: Mapping[str, Any] | Sequence[str] = (),
    pictures: int | None = None,
    keep: float | None = None,
    val: str | Path | Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    weights: str | Path | None = None,
    init_from: str | Path | None = None,
    tracker: str | Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    stream: bool = False,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Aligned:
    """Trains a converted student towards its frozen teacher, on pictures without labels.

    Held-out fidelity is measured before, during and after. Every process of `accelerate launch` calls this, and the
    main one writes. `trainer.align` takes a config of your own.

    Args:
        run: a converted model: a folder, or ORG/REPO[@rev] on the hub (then with `out`).
        data: shards: folders, globs, brace syntax, http(s):// URLs, pipe:COMMAND (run by your shell).
        recipe: name of a recipe that ships with bcosify, or a YAML file; `auto` picks the one for the student's family.
        set: changes to the recipe, such as {"phases.0.pictures": 800}; or `key=value` texts.
        pictures: stretch all phases so that together they see this many pictures.
        keep: a floor: B rises and biases leave only as fast as held-out agreement with the teacher stays above it.
        val: shards to measure fidelity on; without them some pictures of `data` are held out.
        out: folder for the aligned model; default RUN/aligned. Logs and checkpoints go to OUT.run beside it.
        weights: the teacher's state dict, where it was converted from a file and gains were calibrated since.
        init_from: another student of the same conversion, whose weights a new run starts from.
        tracker: also show the run in tensorboard, wandb or trackio.
        resume: go on from the newest checkpoint of OUT.run.
        overwrite: replace an earlier run.
        stream: read `data` from front to end and keep none of it; needs `val`.
        cache: folder where remote shards are kept.
        progress: show bars and held-out fidelity on stderr as the run goes.

    Raises:
        RecipeError, DataError, CheckpointError, SourceError: before the first step.
        DataError: too many pictures are broken. BcosifyError: the loss is no number any more.
    """
    folder = student_folder(run)
    if out is None and not Path(run).expanduser().is_dir():
        raise CheckpointError(f"--out FOLDER is missing: {run} is no folder here that the aligned model could lie in.")
    name = choose_recipe(load(folder)) if recipe == "auto" else str(recipe)
    changes = [f"{key}={json.dumps(value)}" for key, value in set.items()] if isinstance(set, Mapping) else list(set)
    resolved = load_recipe(name, [*changes, *([] if keep is None else [f"keep={keep}"])])
    resolved = resolved if pictures is None else scaled(resolved, pictures)
    config = AlignConfig(
        folder,
        _shards(data),
        folder / "aligned" if out is None else Path(out),
        resolved,
        None if val is None else _shards(val),
        resume,
        overwrite,
        quiet=not progress,
        weights=_path(weights),
        init_from=_path(init_from),
        trackers=(tracker,) if isinstance(tracker, str) else tuple(tracker),
        stream=stream,
        cache=_path(cache),
    )
    result = align_config(config)
    facts = {key: result[key] for key in result if key != "out"}
    return Aligned(out=config.out, work=config.work, recipe_name=name, recipe=resolved, **facts)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _shards(given: str | Path | Sequence[str | Path]) -> str:
    return str(given) if isinstance(given, str | Path) else "::".join(map(str, given))
