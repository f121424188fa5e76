"""Explain scores exactly: one forward pass in explanation mode, one backward pass for each target.

For a score s of a picture whose explained channels are x (C, H, W):

    s = Σ_chw x · W(x) + Σ_j c_j + residual,    contributions (H, W) = Σ_c x · W(x)

with W(x) the gradient in explanation mode, c_j the named constants, and a residual that is float rounding, or else the
explanation is refused. x is what the model encodes of the picture, six channels [r, 1 - r] in converted models, and
the normalised picture itself in models that were not converted. Where layers carry their biases, the input's part is
two: what reaches the score through no carried bias is direct, the rest is carried.

A model may know better: one that is `SelfExplaining` says in its own forward pass what each place of the picture adds
to each output, and then no backward pass goes through it. Only the target is linearised, as a function of the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from ..core.errors import LedgerError, TargetError
from ..linearise import Linearised
from .self_explaining import Own, SelfExplaining, main_output, self_explaining, unwrapped, vectors
from .targets import Target, target_of

__all__ = ["Explanation", "MapsOf", "attribute", "cover", "explain_scores", "joined"]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """K scores of each of B pictures, and where they come from. All tensors are copies that require no grad."""

    outputs: Tensor
    """(B, D): the model's output, of which the scores are made."""
    scores: Tensor
    """(B, K)."""
    contributions: Tensor
    """(B, K, H, W): input times gradient, summed over the channels; or what the model itself says of every place."""
    constants: dict[str, Tensor]
    """name -> (B, K): the share of each bias, table and token in the scores."""
    residual: Tensor
    """(B, K): scores - input part - constant part."""
    encoded_inputs: Tensor | None = None
    """(B, C, H, W): what is explained; [r, 1 - r] in B-cos models, once for each time that they encode. None where the
    model explains itself: its maps are of places, which have no channels."""
    encoded_gradients: Tensor | None = None
    """(B, K, C, H, W): the row W(x) of each score; None as above."""
    direct: Tensor | None = None
    """(B, K, H, W): the part of `contributions` that reaches the score through no carried bias; None where there are
    none, so that all is direct."""
    carried: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """name -> (B, K): what each carried bias adds to the scores. Where a constant reaches what carries it, that counts
    here too, so the sum may differ from `carried_part` by as much."""
    direct_residual: Tensor | None = None
    """(B, K): scores - direct part - carried biases - constants that reach them through no carrier; None as above."""
    places: tuple[int, int] | None = None
    """(h, w) where the model explains itself: of how many places its maps are, each shared out over its pixels."""

    @property
    def direct_contributions(self) -> Tensor:
        """(B, K, H, W): what reaches the score through no carried bias."""
        return self.contributions if self.direct is None else self.direct

    @property
    def carried_contributions(self) -> Tensor:
        """(B, K, H, W): what reaches the score through carried biases; with the direct ones, all contributions."""
        return self.contributions - self.direct_contributions

    @property
    def direct_part(self) -> Tensor:
        """(B, K): direct part + carried part + constant part = scores."""
        return self.direct_contributions.sum((-2, -1))

    @property
    def carried_part(self) -> Tensor:
        """(B, K): the share of the input in the scores that goes through carried biases."""
        return self.carried_contributions.sum((-2, -1))

    @property
    def input_part(self) -> Tensor:
        """(B, K): the share of the input in the scores, which is the sum of its contributions."""
        return self.contributions.sum((-2, -1))

    @property
    def carried_share(self) -> Tensor:
        """(B, K) in [0, 1]: the carried part's size over the sizes of all three parts."""
        sizes = [part.abs() for part in (self.carried_part, self.direct_part, self.constant_part)]
        return sizes[0] / sum(sizes, torch.zeros_like(self.scores)).clamp_min(1e-12)

    @property
    def constant_part(self) -> Tensor:
        """(B, K): the share of all constants in the scores."""
        return sum(self.constants.values(), torch.zeros_like(self.scores))

    @property
    def constant_share(self) -> Tensor:
        """(B, K) in [0, 1]: the constant part's size over its own and that of the input's part."""
        sizes = self.constant_part.abs(), self.input_part.abs()
        return sizes[0] / (sizes[0] + sizes[1]).clamp_min(1e-12)

    def row(self, picture: int, score: int) -> dict[str, Any]:
        """The ledger of one score of one picture, as plain values: its parts by name, which add up to `score`.

        `input` is the sum of the contributions; where biases are carried it is `direct` + `carried`, and `carriers`
        says what each carried bias adds.
        """

        def number(part: Tensor) -> float:
            return float(part[picture, score])

        row: dict[str, Any] = {"score": number(self.scores), "input": number(self.input_part)}
        if self.direct is not None:
            row |= {"direct": number(self.direct_part), "carried": number(self.carried_part)}
            row["carriers"] = {name: number(share) for name, share in self.carried.items()}
        row["constants"] = {name: number(share) for name, share in self.constants.items()}
        return {**row, "residual": number(self.residual)}

    def __repr__(self) -> str:
        pictures, scores = self.scores.shape
        size = "x".join(map(str, self.contributions.shape[-2:]))
        worst = float(self.residual.abs().max()) if self.residual.numel() else 0.0
        return f"{type(self).__name__}(pictures={pictures}, scores={scores}, maps={size}, largest residual {worst:.0e})"

    def balanced(self, tolerance: float = 1e-4) -> Tensor:
        """(B, K): whether |residual| <= tolerance · max(1, |score|), of both sums where biases are carried."""
        residual = self.residual.abs()
        if self.direct_residual is not None:
            residual = residual.maximum(self.direct_residual.abs())
        return residual <= tolerance * self.scores.abs().clamp_min(1)


def explain_scores(
    model: nn.Module,
    images: Tensor,
    target: Target | int | Sequence[int] | Tensor,
    *,
    check: bool = True,
    tolerance: float = 1e-4,
    batch_size: int | None = None,
    parts: bool = True,
) -> Explanation:
    """Explains scores of `model` on normalised `images` (B, 3, H, W), and proves that the explanation adds up.

    Any model will do, converted or not; a `SelfExplaining` one is asked itself, also inside of wrappers. It is left as
    it is, in its train or eval state; in eval mode, pictures of a batch do not depend on each other. Class numbers
    stand for a `ClassTarget` (see `target_of`). Where `batch_size` is given, that many pictures are explained at once.
    Without `parts` it is not found out what carried biases add, which takes a backward pass a score (`direct` is None).

    Raises LedgerError where input and constants do not add up to a score within `tolerance` · max(1, |score|), and
    names the operations that have no rule; `check=False` returns such an explanation with its residual.
    """
    target = target_of(target)
    model = unwrapped(model)
    _check_pictures(model, images)
    if batch_size is not None and batch_size < len(images):
        return joined(
            [
                explain_scores(model, images[rows], target.rows(rows), check=check, tolerance=tolerance, parts=parts)
                for rows in (slice(start, start + batch_size) for start in range(0, len(images), batch_size))
            ]
        )
    with torch.inference_mode(False), torch.autocast(images.device.type, enabled=False):
        own = self_explaining(model, images)
        explanation, cause = _explained(model, images, target, parts) if own is None else _read_off(own, images, target)
    if explanation.balanced(tolerance).all():
        return explanation
    if len(images) > 1 and not cause:
        # Some models do not keep pictures along the first axis, so that shares cannot be told apart in a batch.
        single = explain_scores(model, images, target, check=False, batch_size=1, parts=parts)
        if single.balanced(tolerance).all() and torch.allclose(single.scores, explanation.scores, 1e-3, 1e-4):
            return single
    if check:
        raise LedgerError(_imbalance(model, explanation, cause, tolerance))
    return explanation


class MapsOf(nn.Module):
    """A `SelfExplaining` model and its explanation as one function of tensors, without gradients.

    (images (B, 3, H, W), classes (B,)) -> outputs (B, D), and what every pixel adds to the output of that number
    (B, H, W).
    """

    def __init__(self, model: SelfExplaining) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        output, maps, _ = self.model.output_maps(images)
        chosen = classes.view(-1, 1, 1, 1).expand(-1, 1, maps.shape[-2], maps.shape[-1])
        return output, _spread(maps.gather(1, chosen), images.shape[-2:])[:, 0]


def attribute(model: nn.Module, inputs: Tensor, target: Target | int | Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Contributions in the shape of `inputs` (B, 3, H, W), as captum's `attribute(inputs, target)`.

    `target` is a class for all pictures, or one each (a list, an array or a tensor (B,)), or a target with one score.
    Of six encoded channels, a colour r and its complement 1 - r are added. What a `SelfExplaining` model says of a
    place is shared out evenly among its channels.
    """
    explanation = explain_scores(model, inputs, target_of(target, by_picture=True))
    if explanation.scores.shape[1] != 1:
        raise TargetError(f"attribute() takes one score a picture, not {explanation.scores.shape[1]}; use explain().")
    if explanation.encoded_inputs is None or explanation.encoded_gradients is None:
        return (explanation.contributions / inputs.shape[1]).expand_as(inputs)
    contributions = explanation.encoded_inputs * explanation.encoded_gradients[:, 0]
    if contributions.shape[-2:] != inputs.shape[-2:] or contributions.shape[1] % inputs.shape[1]:
        raise TargetError(
            f"The model encodes {tuple(inputs.shape)} as {tuple(contributions.shape)}; use explain() instead."
        )
    return contributions.unflatten(1, (-1, inputs.shape[1])).sum(1)


def _explained(model: nn.Module, images: Tensor, target: Target, in_parts: bool) -> tuple[Explanation, str]:
    """The explanation, checked or not, and why it cannot add up, where that is known."""
    with torch.enable_grad():
        with Linearised(model) as mode:
            output = vectors(main_output(model(mode.follow(images))), images)
            scores = target.scores(output)
        leaves = [leaf.detach() for leaf in mode.inputs]
        if any(leaf.shape != leaves[0].shape for leaf in leaves):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise LedgerError(
                f"{type(model).__name__} encodes its input several times, in shapes that differ: {shapes}."
            )
        encoded = torch.cat(leaves, 1)
        batch, channels, *size = encoded.shape
        # One target after the other into its place: nothing is held twice.
        gradients = encoded.new_empty(batch, scores.shape[1], channels, *size)
        contributions = encoded.new_empty(batch, scores.shape[1], *size)
        # What goes through no carrier; pulled first, as the last pull may write over the graph.
        wanted = in_parts and mode.has_carriers and scores.requires_grad
        parts = [mode.pull_direct(scores[:, k].sum()) for k in range(scores.shape[1])] if wanted else []
        direct = [torch.einsum("bchw,bchw->bhw", encoded, torch.cat(found, 1)) for found, _, _ in parts]
        shares = []
        for k, (found, constants) in enumerate(_pulled(model, mode, scores)):
            torch.cat(found, 1, out=gradients[:, k])
            contributions[:, k] = torch.einsum("bchw,bchw->bhw", encoded, gradients[:, k])
            shares.append(constants)

    explanation = _explanation(output, scores, contributions, shares)
    explanation = dataclasses.replace(explanation, encoded_inputs=encoded, encoded_gradients=gradients)
    if parts:
        explanation = _in_parts(explanation, torch.stack(direct, 1), parts)
    return explanation, _cause(mode, scores)


def _in_parts(
    explanation: Explanation, direct: Tensor, parts: Sequence[tuple[Any, Mapping[str, Tensor], Mapping[str, Tensor]]]
) -> Explanation:
    """With its `direct` map (B, K, H, W) and the carried biases, from one pull with carriers as constants a score."""
    values = explanation.scores
    constants, carried = (_by_name([part[i] for part in parts], values) for i in (1, 2))
    rest = sum([*constants.values(), *carried.values()], torch.zeros_like(values))
    residual = values - direct.sum((-2, -1)) - rest
    return dataclasses.replace(explanation, direct=direct, carried=carried, direct_residual=residual)


def _read_off(model: Own, images: Tensor, target: Target) -> tuple[Explanation, str]:
    """As `_explained`, from what a model says of itself; what makes scores of its output is linearised."""
    mode, scores, own, whole = Linearised(), torch.empty(0), [], torch.empty(0)

    def weights(output: Tensor) -> Tensor:
        nonlocal scores, whole
        with torch.enable_grad():
            with mode:
                whole = model.output(images, mode.follow(output))
                scores = target.scores(whole)
            with torch._C.DisableTorchFunction():  # modes that the model is in must not see how this one is pulled
                pulled = list(_pulled(model.whole, mode, scores))
        own.extend(constants for _, constants in pulled)
        return torch.stack([gradient for (gradient,), _ in pulled], 1)

    with Linearised(model.whole):  # without anything to follow: keeps gradients out, and the model as it was
        _, maps, constants = model.inside.output_maps(model.given, weights)
    contributions = _spread(maps.detach(), images.shape[-2:])
    shares = [
        {**of_target, **{name: share.detach().expand(len(images), -1)[:, k] for name, share in constants.items()}}
        for k, of_target in enumerate(own)
    ]
    explanation = _explanation(whole, scores, contributions, shares)
    return dataclasses.replace(explanation, places=(maps.shape[-2], maps.shape[-1])), _cause(mode, scores)


def _spread(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, K, h, w) on the pixels (H, W) of `size`, of which each cell covers its share; all sums are kept."""
    rows, columns = (cover(cells, pixels).to(maps) for cells, pixels in zip(maps.shape[-2:], size, strict=True))
    return rows @ maps @ columns.T


def cover(cells: int, pixels: int, start: float = 0.0, end: float | None = None) -> Tensor:
    """(pixels, cells): which share of every cell lies on every pixel, where cells tile a line from `start` to `end`.

    By default that is the line of all pixels. What lies outside of it counts to the first or the last pixel, so that
    every cell's shares add up to 1.
    """
    edges = torch.linspace(start, pixels if end is None else end, cells + 1, dtype=torch.float64)
    edge = torch.arange(pixels + 1, dtype=torch.float64)[:, None]
    edge[0], edge[-1] = -torch.inf, torch.inf
    overlap = torch.minimum(edges[1:], edge[1:]) - torch.maximum(edges[:-1], edge[:-1])
    return overlap.clamp_min(0) / (edges[1:] - edges[:-1])


def _explanation(
    output: Tensor, scores: Tensor, contributions: Tensor, shares: Sequence[Mapping[str, Tensor]]
) -> Explanation:
    """The explanation, with its residual, from the shares (B,) by name that constants have in each of K scores."""
    values = scores.detach().clone()
    constants = _by_name(shares, values)
    return Explanation(
        outputs=output.detach().clone(),
        scores=values,
        contributions=contributions,
        constants=constants,
        residual=values - contributions.sum((-2, -1)) - sum(constants.values(), torch.zeros_like(values)),
    )


def _pulled(model: nn.Module, mode: Linearised, scores: Tensor) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
    """For each of K scores (B, K): the gradients at the explained inputs, and the shares of the constants."""
    last = scores.shape[1] - 1
    for k in range(last + 1):
        if not scores.requires_grad:
            yield [torch.zeros_like(leaf) for leaf in mode.inputs], {}
            continue
        try:
            yield mode.pull(scores[:, k].sum(), retain_graph=k < last)
        except CheckpointError as error:
            raise LedgerError(
                f"{type(model).__name__} recomputes activations in the backward pass, outside explanation mode. "
                "Turn gradient checkpointing off, in timm with `model.set_grad_checkpointing(False)`."
            ) from error


def _cause(mode: Linearised, scores: Tensor) -> str:
    """Why what was run in `mode` cannot add up; empty where it should."""
    if mode.unknown:
        calls = ", ".join(f"{name} ({count} calls)" for name, count in sorted(mode.unknown.items()))
        return f"No rule is known for: {calls}."
    if not scores.requires_grad:
        return f"The score is not linear in the input at all, it is a {mode.name(scores)}; explain what goes into it."
    return ""


def _by_name(shares: Sequence[Mapping[str, Tensor]], scores: Tensor) -> dict[str, Tensor]:
    """Of the shares (B,) by name for each of K scores: name -> (B, K), without those that are 0 throughout."""
    nothing = torch.zeros_like(scores[:, 0])
    names = dict.fromkeys(name for of_score in shares for name in of_score)
    columns = {name: torch.stack([of_score.get(name, nothing) for of_score in shares], 1) for name in names}
    # One question to the device, not one a name.
    something = torch.stack([*columns.values()]).flatten(1).any(1).tolist() if columns else []
    return {name: column for (name, column), kept in zip(columns.items(), something, strict=True) if kept}


def joined(parts: Sequence[Explanation]) -> Explanation:
    """The explanations of several parts of a batch, as one."""

    def named(field: str) -> dict[str, Tensor]:
        columns = [getattr(part, field) for part in parts]
        names = dict.fromkeys(name for column in columns for name in column)
        pairs = list(zip(columns, parts, strict=True))
        return {
            name: torch.cat([column.get(name, torch.zeros_like(part.scores)) for column, part in pairs])
            for name in names
        }

    tensors = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Explanation)
        if isinstance(getattr(parts[0], field.name), Tensor)
    }
    return Explanation(**tensors, constants=named("constants"), carried=named("carried"), places=parts[0].places)


def _check_pictures(model: nn.Module, images: Any) -> None:
    """Raises TargetError for what are no normalised pictures where `model` lies, LedgerError for half precision."""
    if not isinstance(images, Tensor):
        hint = "torch.from_numpy(pictures)" if hasattr(images, "__array__") else "torch.stack of them"
        raise TargetError(
            f"Pictures are a tensor (B, C, H, W), normalised; pass {hint}, not a {type(images).__name__}."
        )
    if images.dim() != 4 or not images.numel():
        raise TargetError(f"Images must be (B, C, H, W) with B > 0, not {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise TargetError(
            f"Pictures are {images.dtype}, as files hold them; models take them normalised. Pass what "
            "student.preprocess.transform()(picture) makes, or what you feed the model with."
        )
    weights = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    kinds = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    # Half precision rounds more than the tolerance allows.
    for dtype in {images.dtype, *kinds} - {torch.float32, torch.float64}:
        raise LedgerError(
            f"{type(model).__name__} cannot be explained exactly in {dtype}: "
            "use float32 for model and images (`model.float()`, `images.float()`)."
        )
    if len(kinds) == 1 and images.dtype not in kinds:
        (wanted,) = kinds
        raise TargetError(f"Pictures are {images.dtype}, and the model {wanted}. Pass pictures.to({wanted}).")
    places = {tensor.device for tensor in weights}
    if len(places) == 1 and images.device not in places:
        (place,) = places
        raise TargetError(
            f"Pictures are on {images.device}, and the model on {place}. Pass pictures.to({str(place)!r})."
        )


def _imbalance(model: nn.Module, explanation: Explanation, cause: str, tolerance: float) -> str:
    """What to say of an explanation that does not add up, at its worst score."""
    wrong = torch.where(explanation.balanced(tolerance), 0, explanation.residual.abs().nan_to_num(torch.inf, torch.inf))
    picture, score = divmod(int(wrong.flatten().argmax()), wrong.shape[1])
    parts = (explanation.scores, explanation.input_part, explanation.constant_part, explanation.residual)
    total, of_input, of_constants, missing = (float(part[picture, score]) for part in parts)
    sizes = [explanation.contributions[picture, score], *(c[picture, score] for c in explanation.constants.values())]
    size = sum(float(part.abs().sum()) for part in sizes)
    if abs(missing) <= 1e-6 * size:
        cause = cause or f"That is rounding: parts of {size:.3g} in all cancel. Use float64 for model and images."
    hidden = (
        "Every torch call had a rule, so something does not show as a torch call: TorchScript, compiled code, gradient "
        "checkpointing, or an autograd.Function."
    )
    return (
        f"The explanation of {type(model).__name__} does not add up. Picture {picture}, score {score}: {total:.6g} = "
        f"{of_input:.6g} (input) + {of_constants:.6g} (constants) + {missing:.6g} (unaccounted for). {cause or hidden} "
        "Pass check=False to get the explanation with its residual."
    )
