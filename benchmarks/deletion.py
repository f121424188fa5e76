"""Deletion curves here and in Quantus, the same case, paired in one run: seconds of both, and that they agree.

    python benchmarks/deletion.py --pictures 8 --out deletion.json

Two cases. `steps`: both measure the same curve at the same removed shares, pixel by pixel in order of the map, so both
run the model equally often. `curve`: both give the area under the deletion curve of whole pictures; Quantus takes one
step for every `--features` values of the picture, as it has no other, and ours its nine shares of patches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import quantus
import torch
from bcosify.convert import load_teacher
from bcosify.core.pictures import noise_pictures
from bcosify.evaluate.baselines import find_method, maps_of
from bcosify.evaluate.decisions import decide
from bcosify.evaluate.metrics.perturbation import FRACTIONS, area, removal_curve
from bcosify.evaluate.subject import Subject, outputs_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default="bundled:efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=96, help="a multiple of 12")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--features", type=int, default=288, help="values a step of Quantus in the case `curve`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    teacher = load_teacher(given.reference, image_size=given.image_size)
    preprocess = teacher.preprocess
    model = teacher.model.requires_grad_(False)
    subject = Subject("teacher", model, None, preprocess.mean, preprocess.std, True)
    images = noise_pictures(given.pictures, preprocess.size)
    decisions = decide(outputs_of(subject, images.split(32)), classifier=True)
    maps = maps_of(find_method("input-x-gradient"), subject, images, decisions)

    def theirs(features: int) -> np.ndarray:
        """Quantus' confidences (N, steps) after each step of so many values, three a pixel, filled with mean colour."""
        metric = quantus.PixelFlipping(
            features_in_step=features,
            perturb_baseline=0.0,
            abs=False,
            normalise=False,
            disable_warnings=True,
            display_progressbar=False,
        )
        found = metric(
            model=model,
            x_batch=images.numpy(),
            y_batch=decisions.classes.numpy(),
            a_batch=maps[:, None].numpy(),
            softmax=True,
            batch_size=32,
        )
        return np.asarray(found)

    # Quantus wants a divisor of H · W, and whole pixels are three values.
    steps = 9
    values = 3 * given.image_size**2
    shares = tuple((k + 1) / steps for k in range(steps))

    def ours(fractions: tuple[float, ...], unit: int) -> torch.Tensor:
        return removal_curve(subject, images, maps, decisions, "most", fractions=fractions, unit=unit, fill="mean")

    every = (0.0, *FRACTIONS, 1.0)
    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "steps": (lambda: ours(shares, 1), lambda: theirs(values // steps)),
        "curve": (lambda: area(ours(every, given.image_size // 8), every), lambda: theirs(given.features)),
    }
    rows = []
    for name, pair in cases.items():
        seconds: list[list[float]] = [[], []]
        for _ in range(given.repeats):  # in turns, so that a busy machine is as busy for both
            for which, run in enumerate(pair):
                start = time.process_time()
                run()
                seconds[which].append(time.process_time() - start)
        best = [min(several) for several in seconds]
        rows.append({"case": name, "ours": best[0], "quantus": best[1], "times": best[1] / best[0]})
        print(f"{name:6} ours {best[0]:8.2f} s   Quantus {best[1]:8.2f} s   {best[1] / best[0]:6.1f} x   CPU")
    difference = float(np.abs(ours(shares, 1).numpy() - theirs(values // steps)).max())
    print(f"largest difference of a confidence at the same steps: {difference:.1e}")
    if given.out:
        given.out.write_text(json.dumps({"rows": rows, "difference": difference, **vars(given)}, indent=2, default=str))


if __name__ == "__main__":
    main()
