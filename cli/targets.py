"""What `bcosify explain` is asked: options of the command line become a target, the names of its scores, and facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Question", "ask"]

Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Question:
    """What is explained of every picture.

    Attributes:
        network: the module whose output is scored.
        target: an `explain.targets.Target`.
        names: outputs (B, D) -> for each picture the names of its scores, and what else is known of each.
    """

    network: Any
    target: Any
    names: Callable[[Any], list[list[Facts]]]


def ask(
    opened: Any,
    read: Callable[[Path], Any],
    *,
    target: list[str] | None = None,
    text: list[str] | None = None,
    templates: str | None = None,
    like: list[Path] | None = None,
    direction: Path | None = None,
    patch: str | None = None,
    zero_shot: Path | None = None,
) -> Question:
    """The question that the options ask of `opened`, a Student or Teacher at the size that it is used at.

    Args:
        read: opens a picture file.

    Raises:
        TargetError: options that exclude each other, or that this model cannot answer.
        DataError: a file that cannot be read.
    """
    from ..core.errors import TargetError

    given = {"--target": target, "--text": text, "--like": like, "--direction": direction, "--zero-shot": zero_shot}
    chosen = [option for option, value in given.items() if value]
    # Zero-shot labels are classes, so `--target` may choose among them.
    if len(chosen) > 1 and chosen != ["--target", "--zero-shot"]:
        raise TargetError(f"{' and '.join(chosen)} are different questions. Pass one of them, and run again.")
    if patch and chosen not in ([], ["--direction"]):
        raise TargetError(f"--patch goes alone or with --direction, not with {chosen[0]}: a patch has no such scores.")
    if templates and not (text or zero_shot):
        raise TargetError("--templates is for --text and --zero-shot. Leave it out.")
    if zero_shot:
        return _zero_shot(opened, zero_shot, templates, target)
    if text:
        return _texts(opened, text, templates)
    if like:
        return _likes(opened, like, read)
    if patch:
        return _patch(opened, patch, direction)
    if direction:
        return _directions(opened.model, direction)
    return _classes(opened.model, target, opened.labels)


# -------------------------------------------------------------------------------------------------------- questions


def _classes(network: Any, words: list[str] | None, labels: Sequence[str] | None) -> Question:
    target = _choice(words, labels, default="top1")
    return Question(network, target, lambda outputs: _named(target, outputs, labels))


def _texts(opened: Any, texts: list[str], templates: str | None) -> Question:
    from ..convert import probabilities
    from ..explain.targets import SimilarityTarget

    target = SimilarityTarget(_embedded(opened, texts, templates, "--text"))

    def names(outputs: Any) -> list[list[Facts]]:
        shares = probabilities(opened.text, target.scores(outputs))
        return [
            [{"target": one, "label": one, "probability": float(p)} for one, p in zip(texts, row, strict=True)]
            for row in shares
        ]

    return Question(opened.model, target, names)


def _zero_shot(opened: Any, file: Path, templates: str | None, words: list[str] | None) -> Question:
    from ..convert import probabilities
    from ..explain.targets import ZeroShotTarget

    labels = _lines(file, "--zero-shot")
    chosen = _choice(words, labels, default=f"top{min(3, len(labels))}")
    target = ZeroShotTarget(_embedded(opened, labels, templates, "--zero-shot"), chosen)

    def names(outputs: Any) -> list[list[Facts]]:
        similarities = target.similarities(outputs)
        shares = probabilities(opened.text, similarities)
        rows = _named(chosen, similarities, labels)
        for i, row in enumerate(rows):
            order = similarities[i].argsort(descending=True).tolist()
            ranking = [
                {"label": labels[k], "similarity": float(similarities[i, k]), "probability": float(shares[i, k])}
                for k in order
            ]
            for facts in row:
                facts["probability"] = float(shares[i, facts["target"]])
            row[0]["zero_shot"] = ranking
        return rows

    return Question(opened.model, target, names)


def _likes(opened: Any, files: list[Path], read: Callable[[Path], Any]) -> Question:
    import torch

    from ..explain.attribution import main_output
    from ..explain.targets import SimilarityTarget

    transform = opened.preprocess.transform()
    with torch.no_grad():
        others = main_output(opened.model(torch.stack([transform(read(file)) for file in files])))
    return _fixed(opened.model, SimilarityTarget(others), [f"like {file.name}" for file in files])


def _directions(network: Any, file: Path) -> Question:
    from ..explain.targets import DirectionTarget

    directions = _read_directions(file)
    count = len(directions)
    return _fixed(
        network, DirectionTarget(directions), [f"{file.name}:{k}" if count > 1 else file.name for k in range(count)]
    )


def _patch(opened: Any, place: str, direction: Path | None) -> Question:
    from functools import partial

    from ..convert import token_grid
    from ..core.errors import TargetError
    from ..explain.targets import PatchFeature, SelfTarget

    row, _, column = place.partition(",")
    if not (row.strip().isdecimal() and column.strip().isdecimal()):
        raise TargetError(f"--patch {place} is no ROW,COLUMN of the grid of patches. Pass two numbers, such as 7,7.")
    network = PatchFeature(opened.model, partial(token_grid, opened.source), int(row), int(column)).eval()
    question = _directions(network, direction) if direction else _fixed(network, SelfTarget(), ["self"])
    return dataclasses.replace(question, names=lambda outputs: _at(place, question.names(outputs)))


def _at(place: str, rows: list[list[Facts]]) -> list[list[Facts]]:
    return [[{**facts, "label": f"patch {place}, {facts['label']}"} for facts in row] for row in rows]


def _fixed(network: Any, target: Any, names: Sequence[str]) -> Question:
    """The same names for every picture."""
    return Question(network, target, lambda outputs: [[{"target": n, "label": n} for n in names] for _ in outputs])


def _choice(words: list[str] | None, labels: Sequence[str] | None, default: str) -> Any:
    """The target that `--target` words name among classes."""
    from ..core.errors import TargetError
    from ..explain.targets import ClassTarget, SelfTarget, TopTarget, find_class

    words = words or ([default] if labels else ["self"])
    single = words[0]
    if single == "self" and len(words) == 1:
        return SelfTarget()
    if len(words) == 1 and single.startswith("top") and single[3:].isdecimal():
        if labels is None:
            raise TargetError(f"--target {single}: this model has no classes. Use --target self.")
        return TopTarget(int(single[3:]))
    if labels is None and not all(word.isdecimal() for word in words):
        raise TargetError(
            f"--target {' '.join(words)}: this model has no class names; pass numbers of outputs, or self."
        )
    return ClassTarget([int(word) if labels is None else find_class(labels, word) for word in words])


def _named(target: Any, outputs: Any, labels: Sequence[str] | None) -> list[list[Facts]]:
    from ..explain.targets import ClassTarget, TopTarget

    if isinstance(target, TopTarget):
        classes: list[list[int]] = target.classes(outputs).tolist()
    elif isinstance(target, ClassTarget):
        classes = [list(target.indices)] * len(outputs)  # type: ignore[arg-type]
    else:
        return [[{"target": "self", "label": "self"}] for _ in outputs]
    return [[{"target": k, "label": labels[k] if labels else str(k)} for k in row] for row in classes]


# ------------------------------------------------------------------------------------------------------------ files


def _embedded(opened: Any, texts: list[str], templates: str | None, option: str) -> Any:
    """(T, D) unit text embeddings by the model's own text tower."""
    from ..convert import embed_texts
    from ..core.errors import TargetError

    if opened.text is None:
        raise TargetError(
            f"{option}: {opened.source.reference} has no text tower, so texts cannot be compared with its pictures. "
            "Use a CLIP or SigLIP model (open_clip:ARCH/TAG, hf:ORG/NAME), or --like PICTURE, or --direction FILE."
        )
    if not all(text.strip() for text in texts):
        raise TargetError(f"{option}: an empty text says nothing. Pass some words.")
    return embed_texts(opened.text, texts, _templates(templates))


def _templates(name: str | None) -> Sequence[str]:
    """Prompts with a `{}`: none, CLIP's eighty of ImageNet, or the lines of a file."""
    from ..core.errors import TargetError

    if name is None:
        return ("{}",)
    if name == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    lines = _lines(Path(name), "--templates")
    wrong = [line for line in lines if "{}" not in line]
    if wrong:
        raise TargetError(f"--templates {name}: {wrong[0]!r} has no {{}} where the text goes.")
    return lines


def _lines(file: Path, option: str) -> list[str]:
    """The lines of a text file that hold something."""
    from ..core.errors import DataError

    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {file}: cannot be read as text: {error}.") from error
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{option} {file} is empty. Write one line for each.")
    twice = next((line for line in lines if lines.count(line) > 1), None)
    if twice:
        raise DataError(f"{option} {file} has {twice!r} twice. Leave one of them out.")
    return lines


def _read_directions(file: Path) -> Any:
    """(K, D) from a .npy array or the one tensor of a .safetensors file."""
    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..core.errors import DataError

    try:
        if file.suffix == ".npy":
            found = torch.from_numpy(np.load(file, allow_pickle=False))
        elif file.suffix == ".safetensors":
            tensors = load_file(file)
            if len(tensors) != 1:
                raise DataError(f"--direction {file} holds {len(tensors)} tensors. Write one, (D,) or (K, D).")
            (found,) = tensors.values()
        else:
            raise DataError(f"--direction {file}: a direction is a .npy or .safetensors file, never a pickle.")
        directions = torch.atleast_2d(found.float())
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DataError(f"--direction {file} cannot be read: {error}.") from error
    if directions.dim() != 2 or not directions.isfinite().all() or not directions.any(1).all():
        raise DataError(f"--direction {file} must be (D,) or (K, D), finite and not 0; it is {tuple(found.shape)}.")
    return directions
