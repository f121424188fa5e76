"""bcosify align"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import console, show_agreement, show_table

# What --json prints of an `Aligned`.
RESULT = (
    "out",
    "pictures",
    "start",
    "final",
    "curve",
    "bad_pictures",
    "seconds",
    "stopped",
    "guarded",
    "kept",
    "finished",
)


def align(
    run: str,
    *,
    data: str,
    recipe: str = "auto",
    set: list[str] | None = None,
    pictures: int | None = None,
    keep: float | None = None,
    val: str | None = None,
    out: Path | None = None,
    weights: Path | None = None,
    init_from: Path | None = None,
    tracker: list[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stream: bool = False,
    cache: Path | None = None,
    json: bool = False,
) -> dict[str, Any] | None:
    """Trains a converted student towards its frozen teacher, on pictures without labels.

    The held-out fidelity is measured before, during and after. Works alone or under accelerate:
    accelerate launch --multi_gpu --num_processes 2 -m bcosify.cli align RUN --data 'shards/{00000..00099}.tar'
    Example: bcosify align runs/dino-s --data 'shards/*.tar'

    Args:
        run: a converted model: a folder, or ORG/REPO[@rev] on the hub (then with --out).
        data: shards: a folder, a glob, brace syntax, http(s):// URLs, pipe:COMMAND (run by your shell, as you typed
            it), or several of these joined by ::
        recipe: a recipe that ships with bcosify (bcos/vit, bcos/cnn, coda/cnn, kmeans/fit, smoke and others: a wrong
            name lists them) or a YAML file; `auto` picks the one for the student's family.
        set: changes to the recipe, such as phases.0.pictures=800 or batch_size=8.
        pictures: stretch all phases so that together they see this many pictures.
        keep: a floor: B rises and biases leave only as fast as held-out agreement with the teacher stays above it, such
            as 0.5; the run ends at the furthest point above it, and says which it is.
        val: shards to measure fidelity on; without them some pictures of --data are held out.
        out: folder for the aligned model; default RUN/aligned. Logs and checkpoints go to OUT.run beside it.
        weights: the teacher's state dict, where it was converted from a file and gains were calibrated since.
        init_from: another student of the same conversion, whose weights a new run starts from.
        tracker: also show the run in tensorboard, wandb or trackio (several may be given).
        resume: go on from the newest checkpoint of OUT.run.
        overwrite: replace an earlier run.
        stream: read --data from front to end and keep none of it, for what does not fit on a disk; needs --val.
        cache: folder where remote shards are kept; default $BCOSIFY_CACHE/shards, else ~/.cache/bcosify/shards.
        json: print the result as JSON on stdout.
    """
    from accelerate import PartialState

    from ..align import align as align_run

    done = align_run(
        run,
        data=data,
        recipe=recipe,
        set=set or (),
        pictures=pictures,
        keep=keep,
        val=val,
        out=out,
        weights=weights,
        init_from=init_from,
        tracker=tracker or (),
        resume=resume,
        overwrite=overwrite,
        stream=stream,
        cache=cache,
        progress=True,
    )
    from ..convert import measured_agreement

    if not PartialState().is_main_process:
        return None  # one of several processes speaks
    columns = [name for name in (done.curve[-1] if done.curve else ()) if name not in ("phase", "objective")]
    rows = [[point.get(name, "") for name in columns] for point in done.curve]
    show_table(f"held-out fidelity, {done.recipe_name}", [name.replace("_", " ") for name in columns], rows)
    if done.bad_pictures:
        console.print(f"{done.bad_pictures} broken pictures: see {done.work / 'bad_samples.jsonl'}")
    if done.guarded:
        last = done.final or {}
        console.print(
            f"agreement fell below min_agreement {done.recipe.min_agreement}: the run ended early, with the student of "
            f"{last.get('weights_of', done.pictures)} pictures"
        )
    if done.kept and not done.stopped:
        _show_floor(done.kept)
    if done.finished:
        console.print(f"this run is finished ({done.pictures} pictures): its model is {done.out}")
    elif done.stopped:
        console.print(f"stopped by a signal at {done.pictures} pictures; go on with the same command and --resume")
    else:
        show_agreement(measured_agreement(done.final or {}, done.pictures))
        console.print(f"wrote {done.out}")
    facts = vars(done)
    return {name: facts[name] for name in RESULT}


def _show_floor(kept: dict[str, Any]) -> None:
    """Where a run with a floor ended."""
    from ..convert.layers import described

    place = described({name: kept[name] for name in ("b", "beta", "carry", "window", "spread") if name in kept})
    below = kept["agreement"] < kept["floor"]
    found = "no student stayed above it, so the start is handed on," if below else "the furthest student above it is"
    console.print(
        f"floor {kept['floor']:g}: {found} at {place}, after {kept['pictures']} pictures; it agrees on "
        f"{kept['agreement']:.3f} ({kept['share_of_path']:.0%} of the way)"
    )
