"""Whether two versions of the code give the same numbers, to the bit: run it on both and compare what it prints.

    python benchmarks/unchanged.py > before.txt    # then on the other version, and compare

Every row is a command (convert, align, explain, evaluate, publish --dry-run) on real weights with a digest of what it
wrote: tensors by name, maps, ledgers, metrics, without times, paths and versions. One thread, about ten minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bcosify.cli.main import main as bcosify
from PIL import Image
from safetensors.torch import load_file
from skimage import data

CNN, VIT = "bundled:efficientnet_lite0", "bundled:dinov2_small"
# Converted students: name -> (teacher, method). Each is explained.
STUDENTS = {
    "cnn-bcos": (CNN, "bcos"),
    "cnn-coda": (CNN, "coda"),
    "cnn-fa-cnn": (CNN, "fa-cnn"),
    "cnn-ca-stream": (CNN, "ca-stream"),
    "cnn-kmeans": (CNN, "kmeans"),
    "vit-bcos": (VIT, "bcos"),
    "vit-coda": (VIT, "coda"),
    "vit-ca-stream": (VIT, "ca-stream"),
}
# Aligned: recipe and changes. Each is explained too.
BASE = ["batch_size=4", "workers=0", "probe_pictures=0", "held_out=8", "evaluate_every=16", "checkpoint_every=16"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "cnn-bcos": ("bcos/cnn", ["image_size=64"]),
    "vit-bcos": ("bcos/vit", ["image_size=42"]),
    "cnn-coda": ("coda/cnn", ["image_size=64"]),
    "vit-coda": ("coda/vit", ["image_size=42"]),
    "cnn-ca-stream": ("ca-stream/cnn", ["image_size=64"]),
}
# Keys whose values depend on the hour, the place or the version.
PASSING = (
    "second",
    "time",
    "path",
    "version",
    "created",
    "date",
    "folder",
    "file",
    "speed",
    "memory",
    "per_s",
    "machine",
)


def pictures(folder: Path) -> None:
    """32 crops of photographs from scikit-image."""
    folder.mkdir()
    for name, array in {"cat": data.chelsea(), "coffee": data.coffee()}.items():
        picture = Image.fromarray(array)
        for i in range(16):
            left, top = 12 * i, 6 * i
            picture.crop((left, top, left + 180, top + 180)).resize((128, 128)).save(folder / f"{name}-{i:02}.jpg")


def lasting(value: Any) -> Any:
    """A JSON value without what depends on the hour or the place."""
    if isinstance(value, dict):
        kept = {key: lasting(inner) for key, inner in value.items() if not any(word in key for word in PASSING)}
        return dict(sorted(kept.items()))
    if isinstance(value, list):
        return [lasting(inner) for inner in value]
    return None if isinstance(value, str) else value


def arrays(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor and map below a folder, with its name; checkpoints of a run are left out."""
    for file in sorted(folder.rglob("*")):
        if "checkpoints" in file.parts or file.name.startswith(("probe", "fingerprint")):
            continue
        if file.suffix == ".safetensors":
            yield from ((f"{name}", tensor.numpy()) for name, tensor in sorted(load_file(file).items()))
        elif file.suffix == ".npz":
            with np.load(file) as held:
                yield from ((f"{file.stem}/{name}", held[name]) for name in sorted(held.files))


def digest(parts: Iterable[bytes]) -> str:
    """Twelve hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:12]


def of_arrays(folder: Path) -> str:
    return digest(part for name, array in arrays(folder) for part in (name.encode(), np.ascontiguousarray(array).data))


def of_numbers(text: str) -> str:
    """Of one JSON value, or of one a line."""
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.splitlines()]
    return digest([json.dumps(lasting(found)).encode()])


def run(*arguments: object) -> str:
    """What a command prints on stdout."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            ended = bcosify([str(argument) for argument in arguments])
        except SystemExit as stop:
            ended = stop.code
    if ended:
        raise SystemExit(f"bcosify {' '.join(map(str, arguments))} ended with {ended}:\n{stderr.getvalue()}")
    return stdout.getvalue()


def report(name: str, *found: str) -> None:
    print(f"{name:<28} {' '.join(found)}", flush=True)


def explained(name: str, model: Path, photo: Path, out: Path) -> None:
    text = run("explain", model, photo, "--out", out, "--image-size", 70, "--json")
    report(f"explain {name}", of_arrays(out), of_numbers(text))


def main() -> None:
    torch.set_num_threads(1)
    only = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        os.environ["BCOSIFY_CACHE"] = str(root / "cache")  # features kept by an earlier run differ in their last digits
        pictures(root / "pictures")
        run("shards", root / "pictures", root / "shards")
        photo = root / "pictures" / "cat-00.jpg"
        for name, (teacher, method) in STUDENTS.items():
            if only and name not in only:
                continue
            run("convert", teacher, "--out", root / name, "--method", method)
            report(f"convert {name}", of_arrays(root / name))
            explained(name, root / name, photo, root / f"{name}-maps")
        for name, (recipe, changes) in RUNS.items():
            if only and name not in only:
                continue
            aligned = root / f"{name}-aligned"
            run(
                *("align", root / name, "--data", root / "shards", "--recipe", recipe, "--pictures", 48),
                *("--out", aligned, "--set", *BASE, *changes),
            )
            metrics = (root / f"{name}-aligned.run" / "metrics.jsonl").read_text()
            report(f"align {name}", of_arrays(aligned), of_numbers(metrics))
            explained(f"{name} aligned", aligned, photo, root / f"{name}-aligned-maps")
        for name in ("cnn-bcos", "vit-bcos"):
            if only and name not in only:
                continue
            aligned, out = root / f"{name}-aligned", root / f"{name}-evaluation"
            size = ("--image-size", 64 if name.startswith("cnn") else 42)
            few = ("--pictures", 4, "--grids", 1, "--against", "input-x-gradient")
            run("evaluate", aligned, "--data", root / "shards", *size, *few, "--out", out)
            report(f"evaluate {name}", of_numbers((out / "evaluation.json").read_text()))
            staged = root / f"{name}-staged"
            run("publish", aligned, f"lab/{name}", "--dry-run", "--out", staged, "--license", "apache-2.0")
            report(f"publish {name}", of_arrays(staged))


if __name__ == "__main__":
    main()
