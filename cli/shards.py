"""`bcosify shards DIR OUT`: pack a folder of pictures into tar shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..core.words import one_line, printable
from ..data.pack import write_shards

__all__ = ["shards"]

SHOWN = 10  # skipped files on the terminal; all of them are in OUT/skipped.jsonl


def shards(
    folder: Path,
    out: Path,
    size: int | None = 256,
    per_shard: int = 1000,
    quality: int = 92,
    max_pixels: int | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Pack the pictures of a folder into tar shards to align or evaluate on.

    Args:
        folder: Folder of pictures; its subfolders are included, and become part of the keys.
        out: New folder for 00000.tar, 00001.tar, ...
        size: Shorter side in pixels; smaller pictures are not enlarged. Pass null to keep all sizes.
        per_shard: Pictures in a shard.
        quality: JPEG quality, 1 to 100. A JPEG that needs no change is copied as it is.
        max_pixels: Pictures with more pixels are skipped, or read smaller if they are JPEGs; 100000000 if not given.
        overwrite: Replace OUT where it exists.
        json: Print the result as JSON to stdout.
    """
    written = write_shards(
        folder, out, size=size, per_shard=per_shard, quality=quality, max_pixels=max_pixels, overwrite=overwrite
    )
    result = {**written._asdict(), "skipped": [item._asdict() for item in written.skipped]}
    say = f"{written.pictures} pictures in {written.shards} shards ({written.bytes / 1e6:.1f} MB): {written.out}"
    print(printable(say), file=sys.stderr)
    if written.skipped:
        where = printable(f"{written.out}/skipped.jsonl")
        print(f"{len(written.skipped)} could not be read (all in {where}):", file=sys.stderr)
    for item in written.skipped[:SHOWN]:
        print("  " + one_line(f"{item.path}: {item.reason}"), file=sys.stderr)
    return result
