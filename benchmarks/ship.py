"""Puts a finished student into the package: half precision, evaluated, with its card, checked as a release.

    python benchmarks/ship.py --aligned FOLDER --data FOLDER --size 160 --trained-on "WORDS" [--against grad-cam]

FOLDER of `--data` holds val-*.tar and objects-*.tar. What is written is students/NAME: the model, README.md (the card),
evaluation.json, explanation.png and recipe.yaml. `readme_strip.py` and `gallery.py` draw their pictures from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from pathlib import Path

import skimage
import torch
from bcosify.convert import load, save
from bcosify.convert.hub import SHIPPED, STUDENTS
from bcosify.evaluate import evaluate
from bcosify.publish import publish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--aligned", type=Path, required=True, help="what `bcosify align` wrote; its .run lies beside it"
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True, help="side in pixels at which it is shipped and measured")
    parser.add_argument("--trained-on", required=True, help="for the card, in a sentence")
    parser.add_argument("--against", nargs="*", default=["grad-cam"])
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--report", type=Path, help="keep the evaluation here, or take one that is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (name,) = SHIPPED
    with tempfile.TemporaryDirectory() as scratch:
        model, staged = Path(scratch) / name, Path(scratch) / "staged"
        student = load(args.aligned)
        sized = dataclasses.replace(student, preprocess=student.preprocess.at(args.size))
        save(sized, model, parameters=torch.float16)
        (run := model.with_name(f"{name}.run")).mkdir()
        shutil.copy(args.aligned.with_name(f"{args.aligned.name}.run") / "recipe.yaml", run)
        report = args.report or Path(scratch) / "report"
        if not report.exists():
            data, masks = (str(args.data / f"{kind}-*.tar") for kind in ("val", "objects"))
            evaluate(
                model,
                data=data,
                masks=masks,
                against=args.against,
                pictures=args.pictures,
                out=report,
                progress=True,
            )
        picture = Path(skimage.__file__).parent / "data" / "coffee.png"
        repo = f"my-lab/{name}"
        publish(model, repo, evaluation=report, picture=picture, data=args.trained_on, dry_run=True, out=staged)
        shutil.rmtree(STUDENTS / name, ignore_errors=True)
        shutil.copytree(staged, STUDENTS / name)
    size = sum(file.stat().st_size for file in (STUDENTS / name).iterdir())
    print(f"wrote {STUDENTS / name}: {size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
