"""An explanation that knows its pictures, its scores and its model by name, and so can be shown, asked and saved."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageShow
from torch import Tensor

from ..convert import Preprocess
from ..core.errors import NotApplicable, TargetError
from ..core.files import check_free, finite, new_folder
from ..data.folders import unique
from ..data.pictures import as_rgb, read_picture
from ..data.progress import say
from .attribution import Explanation, joined
from .lettering import stacked
from .placement import crop_of, placed
from .questions import Facts
from .render import overlay, panel
from .results import ScoreLedger, as_disks_see_it, panels, stem, write_picture, written

__all__ = ["Context", "Explained", "Share", "together"]

SHOWN = 4  # pictures of a batch that are shown where none is named
GRIDS = ("input", "photo")
Region = Sequence[float] | np.ndarray | Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What was explained.

    Attributes:
        model: what the model is called.
        images: what each picture is called: its file, or `picture 0`.
        seen: each picture as the model saw it.
        facts: of each picture the names of its scores, and what else is known of each (see `Question`).
        photos: what each picture was made of, where that is known: a file, or a picture in memory.
        preprocess: how pictures were prepared, where that is known.
        about: what stands in every ledger. said: what is said of the model, in words.
        draw: `panel`, with what it says of the model.
        more: other maps of the batch, name -> (B, ...).
    """

    model: str
    images: tuple[str, ...]
    seen: tuple[Image.Image, ...]
    facts: Sequence[Sequence[Facts]]
    photos: tuple[Path | Image.Image | None, ...]
    preprocess: Preprocess | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    said: tuple[str, ...] = ()
    draw: Callable[..., Image.Image] = panel
    more: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Share:
    """What a region of a picture adds to a score, exactly.

    Attributes:
        adds: the sum of the contributions in the region. score: the whole score.
        input: what all pixels add to it, the region's among them.
        area: the region's share of the picture, in [0, 1].
        label: what is scored.
    """

    adds: float
    score: float
    input: float
    area: float
    label: str

    @property
    def of_score(self) -> float:
        """The region's part of the score; below 0 where it speaks against it, above 1 where others do."""
        return self.adds / self.score if self.score else float("nan")

    def __str__(self) -> str:
        return (
            f"this region ({self.area:.0%} of the picture) adds {self.adds:+.3g} of {self.score:.3g} to {self.label}; "
            f"all pixels add {self.input:+.3g}"
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Explained(Explanation):
    """An `Explanation` with its pictures. Methods take the place of a `picture` in the batch, and of a `score` of it.

    A map has two grids: `input`, the pixels that the model saw, and `photo`, the pixels of the photo that these were
    made of. There the map lies where the model's crop lies, with the same sum (see `placement`).
    """

    context: Context = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, explanation: Explanation, context: Context) -> Explained:
        values = {one.name: getattr(explanation, one.name) for one in dataclasses.fields(Explanation)}
        return cls(**values, context=context)

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.scores)

    @property
    def nbytes(self) -> int:
        """How much memory its maps take, those of `context.more` too."""
        held = (*vars(self).values(), *self.context.more.values())
        return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))

    @cached_property
    def ledgers(self) -> tuple[ScoreLedger, ...]:
        """A `ScoreLedger` for each picture and score, in order."""
        context = self.context
        return tuple(
            ScoreLedger(image=image, **known, **self.row(i, k), **context.about)
            for i, (image, facts) in enumerate(zip(context.images, context.facts, strict=True))
            for k, known in enumerate(facts)
        )

    # ------------------------------------------------------------------------------------------------------ to be asked

    def map(self, picture: int = 0, score: int = 0, on: str = "input") -> Tensor:
        """(H, W) what every pixel adds to a score, on the grid of the `input` or of the `photo`.

        Raises:
            TargetError: no such picture, score or grid; or `photo` of a picture that was normalised already.
        """
        self._check(picture, score, on)
        contributions = self.contributions[picture, score]
        if on == "input":
            return contributions
        preprocess, photo = self._photo(picture)

        def colours(ramps: Image.Image) -> Tensor:
            return preprocess.denormalise(preprocess.transform()(ramps))

        return placed(contributions, crop_of(colours, photo.size), photo.size)

    def region(self, region: Region, picture: int = 0, score: int = 0, on: str = "input") -> Share:
        """The exact share of a region in a score: the sum of what its pixels add.

        Args:
            region: a box (left, top, right, bottom) in whole pixels, right and bottom beyond the last; or a mask (H, W)
                of truth values, or of weights in [0, 1].
            on: whether these are pixels of the `input` (`explanation.context.seen`) or of the `photo`.

        Raises:
            TargetError: a region outside of the picture, an empty one, or a mask of another size.
        """
        contributions = self.map(picture, score, on).double().cpu()
        weights = _weights(region, contributions.shape, on)
        ledger = self._ledger(picture, score)
        adds = float((weights * contributions).sum())
        return Share(adds, ledger.score, ledger.input, float(weights.mean()), ledger.label)

    def top_constants(self, n: int = 5, picture: int = 0, score: int = 0) -> list[tuple[str, float]]:
        """The `n` constants that weigh most in a score, by size: what each is called, and what it adds."""
        self._check(picture, score)
        if n < 1:
            raise TargetError(f"n is {n}; pass 1 or more constants.")
        constants = self._ledger(picture, score).constants
        return sorted(constants.items(), key=lambda one: -abs(one[1]))[:n]

    def to_dict(self) -> dict[str, Any]:
        """The model, what is said of it, and all ledgers, as plain values that JSON takes."""
        rows = [ledger.row() for ledger in self.ledgers]
        return finite({"model": self.context.model, "said": list(self.context.said), "scores": rows})

    # ------------------------------------------------------------------------------------------------------ to be shown

    def panel(self, picture: int = 0) -> Image.Image:
        """Input, contributions and explanation of all scores of a picture, as the command draws them."""
        self._check(picture, 0)
        context = self.context
        return panels(context.seen[picture], self, picture, self._ledgers(picture), context.draw)

    def overlay(self, picture: int = 0, score: int = 0, on: str = "input", smooth: int | None = None) -> Image.Image:
        """The contributions over the picture in grey: red for the score, blue against it (see `render.overlay`)."""
        contributions = self.map(picture, score, on)
        behind = self.context.seen[picture] if on == "input" else self._photo(picture)[1]
        return overlay(behind, contributions, smooth=smooth)

    def plot(self, picture: int = 0, score: int = 0, ax: Any = None, on: str = "input") -> Any:
        """Draws `overlay` with its ledger as the title on matplotlib's axes `ax`, or new ones; returns these."""
        drawn = self.overlay(picture, score, on)
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise NotApplicable("plot() draws with matplotlib. Run: pip install matplotlib") from error
            ax = pyplot.subplots(layout="constrained")[1]
        ax.imshow(drawn)
        ax.set_title(str(self._ledger(picture, score)), fontsize="small")
        ax.set_axis_off()
        return ax

    def show(self, picture: int | None = None) -> None:
        """Shows the panels of a picture, or of the first four: in a notebook, else in the system's viewer."""
        display = _notebook()
        if display is not None:
            display(self if picture is None else self.panel(picture))
            return
        shown = self._sheet() if picture is None else self.panel(picture)
        windows = sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
        if not windows or not ImageShow.show(shown, title=repr(self)):
            say("There is no window to show pictures in. Write them: .save('maps'), or .panel().save('map.png').")

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Writes NAME.png, NAME.npz and NAME.json of every picture into the new `folder`, as `explain(out=)` does.

        Raises CheckpointError where there is such a folder; with `overwrite` only where it holds something else.
        """
        place = Path(folder)
        check_free(place, overwrite, written)
        names = list(unique((stem(Path(image)) for image in self.context.images), as_disks_see_it))
        with new_folder(place, overwrite, written) as new:
            self.write(new, names)
        return place

    def write(self, folder: Path, names: Sequence[str]) -> None:
        """Writes the three files of every picture, under these names, into a folder that is there."""
        context = self.context
        for i, name in enumerate(names):
            seen, ledgers = context.seen[i], self._ledgers(i)
            write_picture(folder, name, seen, self, i, ledgers, context.more, context.draw)

    def __repr__(self) -> str:
        """A line for the whole, and one for each of the first scores."""
        pictures, scores = self.scores.shape
        count = f"{pictures} picture{'s' * (pictures > 1)}, {scores} score{'s' * (scores > 1)} each"
        shown = [f"  {Path(one.image).name}  {one}" for one in self.ledgers[:SHOWN]]
        more = len(self.ledgers) - len(shown)
        lines = [f"Explanation by {self.context.model}: {count}", *shown]
        return "\n".join([*lines, f"  ... {more} more"] if more > 0 else lines)

    def _repr_png_(self) -> bytes:
        return _png(self._sheet())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(Path(one.image).name)}</td><td>{html.escape(str(one))}</td></tr>"
            for one in self.ledgers[: 2 * SHOWN]
        )
        more = f"<p>... {len(self) - SHOWN} more pictures</p>" if len(self) > SHOWN else ""
        picture = base64.b64encode(self._repr_png_()).decode()
        said = html.escape(repr(self).splitlines()[0])
        image = f'<img alt="{said}" style="max-width: 100%" src="data:image/png;base64,{picture}">'
        return f"<figure>{image}<figcaption>{said}<table>{rows}</table>{more}</figcaption></figure>"

    # ----------------------------------------------------------------------------------------------------------- within

    def _sheet(self) -> Image.Image:
        return stacked([self.panel(picture) for picture in range(min(SHOWN, len(self)))])

    def _ledgers(self, picture: int) -> tuple[ScoreLedger, ...]:
        scores = self.scores.shape[1]
        return self.ledgers[picture * scores : (picture + 1) * scores]

    def _ledger(self, picture: int, score: int) -> ScoreLedger:
        return self._ledgers(picture)[score]

    def _check(self, picture: int, score: int, on: str = "input") -> None:
        for name, place, count in (("picture", picture, len(self)), ("score", score, self.scores.shape[1])):
            if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < count:
                raise TargetError(f"there is no {name} {place!r}: there are {count}, numbered 0 to {count - 1}.")
        if on not in GRIDS:
            raise TargetError(f"on={on!r}: pixels are those of the 'input', as the model saw it, or of the 'photo'.")

    def _photo(self, picture: int) -> tuple[Preprocess, Image.Image]:
        """How a picture was prepared, and the upright photo that it was made of."""
        photo, preprocess = self.context.photos[picture], self.context.preprocess
        if photo is None or preprocess is None:
            raise TargetError(
                f"picture {picture} was given as a normalised tensor, so its photo is not known. Pass the file or the "
                "PIL picture to explain(), or stay with on='input'."
            )
        return preprocess, as_rgb(photo) if isinstance(photo, Image.Image) else read_picture(photo)


def together(parts: Sequence[Explained]) -> Explained:
    """The explanations of several batches of one call, as one."""
    contexts = [part.context for part in parts]
    return Explained.of(
        joined(parts),
        dataclasses.replace(
            contexts[0],
            images=sum((one.images for one in contexts), ()),
            seen=sum((one.seen for one in contexts), ()),
            facts=[row for one in contexts for row in one.facts],
            photos=sum((one.photos for one in contexts), ()),
            more={name: torch.cat([one.more[name] for one in contexts]) for name in contexts[0].more},
        ),
    )


def _weights(region: Region, shape: Sequence[int], on: str) -> Tensor:
    """(H, W) in [0, 1]: how much of every pixel belongs to the region."""
    height, width = shape
    try:
        given = torch.as_tensor(region.detach().cpu() if isinstance(region, Tensor) else np.asarray(region))
    except (TypeError, ValueError, RuntimeError):
        given = torch.empty(0)
    if given.dim() == 2:
        if tuple(given.shape) != (height, width):
            raise TargetError(
                f"region: the mask is {given.shape[0]}x{given.shape[1]} (rows x columns), and the {on} is "
                f"{height}x{width}. Pass a mask of that size, or on='{GRIDS[on == 'input']}' where it is one of that."
            )
        weights = given.double()
        if not ((weights >= 0) & (weights <= 1)).all():
            raise TargetError("region: a mask holds truth values, or weights from 0 to 1. Pass mask > 0, or divide.")
        if not weights.any():
            raise TargetError("region: the mask is empty. Mark some pixels.")
        return weights
    if given.shape != (4,) or given.is_complex() or given.dtype == torch.bool or bool((given != given.round()).any()):
        raise TargetError(
            f"region {region!r:.60} is neither a box nor a mask. Pass (left, top, right, bottom) in whole pixels of "
            f"the {on} ({width} wide, {height} high), or a mask ({height}, {width})."
        )
    left, top, right, bottom = (int(edge) for edge in given)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        other = GRIDS[on == "input"]
        raise TargetError(
            f"region ({left}, {top}, {right}, {bottom}) is empty or outside of the {on}, which is {width} wide and "
            f"{height} high. Pass (left, top, right, bottom) inside of it, or on='{other}' for pixels of the {other}."
        )
    weights = torch.zeros(height, width, dtype=torch.float64)
    weights[top:bottom, left:right] = 1
    return weights


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _notebook() -> Any:
    """IPython's `display` where a notebook's kernel runs; else None."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display  # pyright: ignore[reportMissingImports]

    return display
