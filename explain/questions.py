"""What can be asked of a picture: options become a target, the names of its scores, and facts about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..convert import Student, Teacher, Text, embed_texts, probabilities, token_grid
from ..convert.libraries import CLASSES, FEATURES
from ..convert.output import OutputKind, output_kind
from ..core.errors import CheckpointError, DataError, TargetError, translated
from ..core.files import check_file, read_text
from ..data.pictures import read_picture
from .self_explaining import main_output
from .standing import probabilities_of, standing
from .targets import (
    ClassTarget,
    DirectionTarget,
    PatchFeature,
    SelfTarget,
    SimilarityTarget,
    Target,
    TopTarget,
    ZeroShotTarget,
    check_list,
    find_class,
    target_of,
)

__all__ = ["Facts", "Question", "ask", "named"]

LINES = 2**24  # bytes of a file of labels or templates

Facts = dict[str, Any]
Classes = Target | Callable[[Tensor], Tensor] | int | str | Sequence[int | str] | Tensor | np.ndarray | np.integer
Templates = str | Path | Sequence[str] | None
Names = Callable[[Tensor], list[list[Facts]]]


@dataclasses.dataclass(frozen=True)
class Question:
    """What is explained of every picture.

    Attributes:
        network: the module whose output is scored.
        target: what is scored of it.
        names: outputs (B, D) -> for each picture the names of its scores, and what else is known of each.
        part: the same question of some pictures of the batch, where what is scored differs from picture to picture.
    """

    network: nn.Module
    target: Target
    names: Names
    part: Callable[[slice], Question] | None = None

    def rows(self, pictures: slice) -> Question:
        """The same question of some pictures of the batch."""
        return self if self.part is None else self.part(pictures)


def ask(
    opened: Student | Teacher,
    *,
    target: Classes | None = None,
    targets: Sequence[int | str] | None = None,
    text: str | Sequence[str] | None = None,
    templates: Templates = None,
    like: str | Path | Sequence[str | Path] | None = None,
    direction: str | Path | Tensor | None = None,
    patch: str | tuple[int, int] | None = None,
    zero_shot: str | Path | Sequence[str] | None = None,
) -> Question:
    """The question that the options ask of `opened`, at the size that it is used at. See `explain` for the options.

    Raises:
        TargetError: options that exclude each other, or that this model cannot answer.
        DataError: a file that cannot be read.
    """
    if targets is not None and _asked(target):
        raise TargetError("target and targets are two answers to one question. Pass one of them.")
    if isinstance(target, str) and _is_text(opened, target) and not _asked(text):
        target, text = None, target
    target = _one_list(target) if targets is None else _all_of(targets)
    given = {"--target": target, "--text": text, "--like": like, "--direction": direction, "--zero-shot": zero_shot}
    chosen = [option for option, value in given.items() if _asked(value)]
    # Zero-shot labels are classes, so `--target` may choose among them.
    if len(chosen) > 1 and chosen != ["--target", "--zero-shot"]:
        raise TargetError(f"{' and '.join(chosen)} are different questions. Pass one of them, and run again.")
    if _asked(patch) and chosen not in ([], ["--direction"]):
        raise TargetError(f"--patch goes alone or with --direction, not with {chosen[0]}: a patch has no such scores.")
    if templates is not None and not (_asked(text) or _asked(zero_shot)):
        raise TargetError("--templates is for --text and --zero-shot. Leave it out.")
    if zero_shot is not None and _asked(zero_shot):
        return _zero_shot(opened, zero_shot, templates, target)
    if text is not None and _asked(text):
        return _texts(opened, [text] if isinstance(text, str) else list(text), templates)
    if like is not None and _asked(like):
        return _likes(opened, [Path(file) for file in ([like] if isinstance(like, str | Path) else like)])
    if patch is not None and _asked(patch):
        return _patch(opened, patch, direction)
    if direction is not None and _asked(direction):
        return _directions(opened.model, direction)
    return _classes(opened, target)


def _asked(value: object) -> bool:
    """Whether an option was given: an empty list or text asks nothing."""
    return len(value) > 0 if isinstance(value, Sequence) else value is not None


# -------------------------------------------------------------------------------------------------------- questions


def _is_text(opened: Student | Teacher, word: str) -> bool:
    """Whether a target is a text: the model compares texts, and `word` is not what asks for a feature."""
    known = word == "self" or word.removeprefix("top").isdecimal()
    return opened.text is not None and not known and output_kind(opened).kind == FEATURES


def _one_list(target: Classes | None) -> Classes | None:
    """`target`, where it is no list that could mean two things (see `target_of`)."""
    if isinstance(target, Sequence) and not isinstance(target, str) and len(target) > 1:
        if all(isinstance(one, str | SupportsIndex) for one in target):
            check_list(target, "classes")
    return target


def _all_of(targets: Any) -> Classes:
    """The words or the classes of `targets`, for every picture."""
    if isinstance(targets, str) or not isinstance(targets, Sequence) or not len(targets):
        raise TargetError(f"targets {targets!r:.80} is no list of classes for every picture. Pass target=, or a list.")
    return targets if any(isinstance(one, str) for one in targets) else ClassTarget(list(targets))


def _classes(opened: Student | Teacher, words: Classes | None) -> Question:
    output = output_kind(opened)

    def asked(target: Target) -> Question:
        def names(outputs: Tensor) -> list[list[Facts]]:
            if output.count not in (0, outputs.shape[1]):
                raise TargetError(
                    f"{opened.source.reference} is said to have {output.count:,} outputs, but it gives "
                    f"{outputs.shape[1]:,}: its head was replaced. Build the model with "
                    f"num_classes={outputs.shape[1]}, or pass the module itself, with a target."
                )
            rows, shares = named(target, outputs, output), probabilities_of(outputs, output)
            if shares is None or not isinstance(target, TopTarget | ClassTarget):
                return rows
            return [
                [facts | standing(shares[i], facts["target"], output.name) for facts in row]
                for i, row in enumerate(rows)
            ]

        return Question(opened.model, target, names, lambda pictures: asked(target.rows(pictures)))

    return asked(_choice(words, output, _usual(output)))


def _usual(output: OutputKind) -> Target:
    """What is explained where nothing else is said."""
    if output.kind == FEATURES:
        return SelfTarget()
    return TopTarget() if output.chooses else ClassTarget(range(output.count))


def _texts(opened: Student | Teacher, texts: list[str], templates: Templates) -> Question:
    tower = _tower(opened, "--text")
    target = SimilarityTarget(_embedded(tower, texts, templates, "--text"))

    def names(outputs: Tensor) -> list[list[Facts]]:
        shares = probabilities(tower, target.scores(outputs))
        rows = [
            [{"target": one, "label": one, "probability": float(p)} for one, p in zip(texts, row, strict=True)]
            for row in shares
        ]
        if len(texts) == 1:  # the softmax over one text is 1 whatever the picture
            return rows
        return [[facts | standing(shares[i], k) for k, facts in enumerate(row)] for i, row in enumerate(rows)]

    return Question(opened.model, target, names)


def _zero_shot(
    opened: Student | Teacher, given: str | Path | Sequence[str], templates: Templates, words: Classes | None
) -> Question:
    labels = _lines(given, "--zero-shot")
    output = OutputKind(CLASSES, len(labels), tuple(labels))
    chosen = _choice(words, output, TopTarget(min(3, len(labels))))
    if not isinstance(chosen, TopTarget | ClassTarget):
        raise TargetError("--zero-shot: its labels are classes. Choose with --target top3, or by some of the labels.")
    tower = _tower(opened, "--zero-shot")
    target = ZeroShotTarget(_embedded(tower, labels, templates, "--zero-shot"), chosen)

    def names(outputs: Tensor) -> list[list[Facts]]:
        similarities = target.similarities(outputs)
        shares = probabilities(tower, similarities)
        rows = named(chosen, similarities, output)
        for i, row in enumerate(rows):
            order = similarities[i].argsort(descending=True).tolist()
            ranking = [
                {"label": labels[k], "similarity": float(similarities[i, k]), "probability": float(shares[i, k])}
                for k in order
            ]
            for facts in row:
                facts |= standing(shares[i], facts["target"], output.name)
            row[0]["zero_shot"] = ranking
        return rows

    return Question(opened.model, target, names)


def _likes(opened: Student | Teacher, files: list[Path]) -> Question:

    transform = opened.preprocess.transform()
    with torch.no_grad():
        others = main_output(opened.model(torch.stack([transform(read_picture(file)) for file in files])))
    return _fixed(opened.model, SimilarityTarget(others), [f"like {file.name}" for file in files])


def _directions(network: nn.Module, given: str | Path | Tensor) -> Question:
    name, found = ("direction", given) if isinstance(given, Tensor) else (Path(given).name, _read_directions(given))
    directions = torch.atleast_2d(found.float())
    if directions.dim() != 2 or not directions.isfinite().all() or not directions.any(1).all():
        where = "direction" if isinstance(given, Tensor) else given
        raise DataError(f"--direction {where} must be (D,) or (K, D), finite and not 0; it is {tuple(found.shape)}.")
    count = len(directions)
    return _fixed(network, DirectionTarget(directions), [f"{name}:{k}" if count > 1 else name for k in range(count)])


def _patch(opened: Student | Teacher, place: str | tuple[int, int], direction: str | Path | Tensor | None) -> Question:
    place = place if isinstance(place, str) else ",".join(map(str, place))
    row, _, column = place.partition(",")
    if not (row.strip().isdecimal() and column.strip().isdecimal()):
        raise TargetError(f"--patch {place} is no ROW,COLUMN of the grid of patches. Pass two numbers, such as 7,7.")
    network = PatchFeature(opened.model, partial(token_grid, opened.source), int(row), int(column)).eval()
    along = _fixed(network, SelfTarget(), ["self"]) if direction is None else _directions(network, direction)
    return dataclasses.replace(along, names=lambda outputs: _at(place, network, along.names(outputs)))


def _at(place: str, network: PatchFeature, rows: list[list[Facts]]) -> list[list[Facts]]:
    """With the patch in their labels, and where it lies: row, column, and of how many rows and columns."""
    where = [network.row, network.column, *(network.grid or ())]
    return [[{**facts, "label": f"patch {place}, {facts['label']}", "patch": where} for facts in row] for row in rows]


def _fixed(network: nn.Module, target: Target, names: Sequence[str]) -> Question:
    """The same names for every picture."""
    return Question(network, target, lambda outputs: [[{"target": n, "label": n} for n in names] for _ in outputs])


def _choice(chosen: Classes | None, output: OutputKind, usual: Target) -> Target:
    """The target that `--target` names among the outputs; or the one that is given; `usual` where nothing is."""
    if chosen is None or (isinstance(chosen, Sequence) and not len(chosen)):
        return usual
    if isinstance(chosen, np.ndarray) and chosen.dtype.kind == "U":  # a name for each picture
        return ClassTarget([[_number(str(word), output)] for word in chosen.ravel()])
    words = [chosen] if isinstance(chosen, str) else chosen
    if isinstance(words, Sequence) and any(isinstance(word, str) for word in words):
        return _named_classes([str(word) for word in words], output)
    return target_of(chosen)


def _named_classes(words: list[str], output: OutputKind) -> Target:
    single = words[0]
    if single == "self" and len(words) == 1:
        return SelfTarget()
    if len(words) == 1 and single.startswith("top") and single[3:].isdecimal():
        if not output.count:
            raise TargetError(f"--target {single}: this model has no classes. Use --target self.")
        return TopTarget(int(single[3:]))
    return ClassTarget([_number(word, output) for word in words])


def _number(word: str, output: OutputKind) -> int:
    """The number of the output that is called `word`."""
    if output.names is not None:
        return find_class(output.names, word)
    number = word.strip().casefold().removeprefix("class ")
    if not number.isdecimal():
        way = "" if output.kind == FEATURES else ", or name the outputs with --labels FILE"
        raise TargetError(f"--target {word}: this model has no class names; pass numbers of outputs{way}.")
    return int(number)


def named(target: Target, outputs: Tensor, output: OutputKind) -> list[list[Facts]]:
    if isinstance(target, SelfTarget):
        return [[{"target": "self", "label": "self"}] for _ in outputs]
    if isinstance(target, TopTarget):
        classes: list[list[int]] = target.classes(outputs).tolist()
    elif isinstance(target, ClassTarget):
        classes = target.classes(outputs).tolist()
    else:
        count = target.scores(outputs).shape[1]
        called = getattr(getattr(target, "function", None), "__name__", "score")
        words = "score" if called == "<lambda>" else called
        labels = [f"{words} {k}" if count > 1 or words == "score" else words for k in range(count)]
        return [[{"target": label, "label": label} for label in labels] for _ in outputs]
    features = output.kind == FEATURES
    return [[{"target": k, "label": f"feature {k}" if features else output.name(k)} for k in row] for row in classes]


# ------------------------------------------------------------------------------------------------------------ files


def _tower(opened: Student | Teacher, option: str) -> Text:
    if opened.text is None:
        raise TargetError(
            f"{option}: {opened.source.reference} has no text tower, so texts cannot be compared with its pictures. "
            "Use a CLIP or SigLIP model (open_clip:ARCH/TAG, hf:ORG/NAME), or --like PICTURE, or --direction FILE."
        )
    return opened.text


def _embedded(tower: Text, texts: list[str], templates: Templates, option: str) -> Tensor:
    """(T, D) unit text embeddings by the model's own text tower."""
    if not all(text.strip() for text in texts):
        raise TargetError(f"{option}: an empty text says nothing. Pass some words.")
    return embed_texts(tower, texts, _templates(templates))


def _templates(given: Templates) -> Sequence[str]:
    """Prompts with a `{}`: none, CLIP's eighty of ImageNet, or the lines of a file or a list."""
    if given is None:
        return ("{}",)
    if given == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    lines = _lines(given, "--templates")
    if wrong := [line for line in lines if "{}" not in line]:
        where = f"--templates {given}" if isinstance(given, str | Path) else "--templates"
        raise TargetError(f"{where}: {wrong[0]!r} has no {{}} where the text goes.")
    return lines


def _lines(given: str | Path | Sequence[str], option: str) -> list[str]:
    """The lines of a text file, or those given, that hold something."""
    where = f"{option} {given}" if isinstance(given, str | Path) else option
    with translated(CheckpointError, DataError, lambda error: f"{where}: cannot be read: {error}", ours=DataError):
        found = read_text(Path(given), most=LINES).splitlines() if isinstance(given, str | Path) else given
    lines = [line.strip() for line in found if line.strip()]
    if not lines:
        raise DataError(f"{where} is empty. Write one line for each.")
    twice = next((line for line in lines if lines.count(line) > 1), None)
    if twice:
        raise DataError(f"{where} has {twice!r} twice. Leave one of them out.")
    return lines


def _read_directions(given: str | Path) -> Tensor:
    """(D,) or (K, D) from a .npy array or the one tensor of a .safetensors file."""
    with translated(CheckpointError, DataError, lambda error: f"--direction {error}", ours=DataError):
        file = check_file(Path(given))
    try:
        if file.suffix == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False))
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            if len(tensors) != 1:
                raise DataError(f"--direction {file} holds {len(tensors)} tensors. Write one, (D,) or (K, D).")
            return next(iter(tensors.values()))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DataError(f"--direction {file} cannot be read: {error}.") from error
    raise DataError(f"--direction {file}: a direction is a .npy or .safetensors file, never a pickle.")
