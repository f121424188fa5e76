"""The methods that a user would otherwise reach for, all on the same tensors: maps (B, H, W) of signed contributions.

`explanation` is our own: contributions in explanation mode, exact, of any model. On an unconverted model its rules are
those of AttnLRP (Achtibat et al. 2024, arXiv 2402.05602) as a linearised gradient, and add up to the score.
captum has Input x Gradient, Integrated Gradients, LIME and Occlusion. Own code: Grad-CAM (captum's has no token grids),
attention and rollout (fused attention hides its weights from hooks), RISE (captum has none).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..convert.taps import find_blocks
from ..core.errors import NotApplicable, TargetError, near_miss
from ..core.hooks import hooked
from ..core.pictures import fitted
from ..explain import Views, explain_scores, explain_views
from ..explain.self_explaining import main_output
from .decisions import Decisions
from .subject import Subject

__all__ = ["CONTROLS", "METHODS", "Method", "find_method", "maps_of"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to explain a decision.

    Attributes:
        run: (subject, images (B, 3, H, W), decisions of B, seed) -> signed maps (B, H, W).
        passes: forward and backward passes for one picture, roughly: how dear it is.
        in_score_units: whether a region's contributions say by how much the score would fall without it.
        shared: whether several decisions about one picture, standing side by side in a batch, share their passes.
        control: it knows nothing of the decision, or is what calmer maps look like: what others should beat.
        source: paper.
    """

    name: str
    run: Callable[[Subject, Tensor, Decisions, int], Tensor]
    passes: int
    source: str
    in_score_units: bool = True
    shared: bool = False
    control: bool = False

    @property
    def cheap(self) -> bool:
        """Cheap enough for what explains every picture many times over."""
        return self.passes <= 4


METHODS: dict[str, Method] = {}


def find_method(name: str) -> Method:
    """The method of that name; raises TargetError with what comes close."""
    if name not in METHODS:
        raise TargetError(f"no method is called {name!r}.{near_miss(name, METHODS)} There are: {', '.join(METHODS)}.")
    return METHODS[name]


def maps_of(method: Method, subject: Subject, images: Tensor, decisions: Decisions, seed: int = 0) -> Tensor:
    """Maps (N, H, W) on the CPU, a batch at a time; each picture's is the same whatever the batch size.

    Raises NotApplicable where the method has no meaning for the model, or gives maps that are not finite.
    """
    parts = []
    for rows in torch.arange(len(images)).split(subject.batch_size):
        batch = fitted(images[rows], subject.model)
        parts.append(method.run(subject, batch, decisions.rows(rows), seed).detach().float().cpu())
    maps = torch.cat(parts)
    if wrong := int((~maps.isfinite()).flatten(1).any(1).sum()):
        raise NotApplicable(f"{wrong} of {len(maps)} maps hold NaN or infinite contributions")
    return maps


def _method(
    name: str, passes: int, source: str, in_score_units: bool = True, shared: bool = False, control: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def keep(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        METHODS[name] = Method(name, run, passes, source, in_score_units, shared, control)
        return run

    return keep


# -------------------------------------------------------------------------------------------------------------- our own


@_method("explanation", 2, "this project; on unconverted models AttnLRP's rules, arXiv 2402.05602")
def _explanation(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    return explain_scores(subject.model, images, decisions.target(), check=False).contributions[:, 0]


# --------------------------------------------------------------------------------------------------------------- captum


def _forward(subject: Subject, decisions: Decisions) -> Callable[[Tensor, Tensor], Tensor]:
    """(images (M, 3, H, W), rows (M,)) -> scores (M,): captum repeats the rows as it repeats the pictures."""
    return lambda images, rows: decisions.rows(rows).scores(main_output(subject.model(images)))


def _shared_forward(subject: Subject, decisions: Decisions) -> Callable[[Tensor, Tensor], Tensor]:
    """`_forward` without gradients: pictures that are equal to the one before them, as in GridPG, share its pass."""

    def scores(images: Tensor, rows: Tensor) -> Tensor:
        new = torch.ones(len(images), dtype=torch.bool, device=images.device)
        new[1:] = (images[1:] != images[:-1]).flatten(1).any(1)
        outputs = main_output(subject.model(images[new]))
        return decisions.rows(rows).scores(outputs[new.cumsum(0) - 1])

    return scores


def _captum(name: str) -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise NotApplicable("captum is not installed; run: pip install 'bcosify[evaluate]'") from error
    return getattr(captum.attr, name)


def _rows(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device)


@_method("input-x-gradient", 2, "Shrikumar et al. 2016, arXiv 1605.01713")
def _input_x_gradient(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    explainer = _captum("InputXGradient")(_forward(subject, decisions))
    return explainer.attribute(images.requires_grad_(), additional_forward_args=(_rows(images),)).sum(1)


@_method("integrated-gradients", 40, "Sundararajan et al. 2017, arXiv 1703.01365; 20 steps from the mean colour")
def _integrated_gradients(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    explainer = _captum("IntegratedGradients")(_forward(subject, decisions))
    return explainer.attribute(
        images,
        n_steps=20,
        internal_batch_size=max(subject.batch_size, len(images)),
        additional_forward_args=(_rows(images),),
    ).sum(1)


@_method("occlusion", 50, "Zeiler and Fergus 2014, arXiv 1311.2901; 7 x 7 squares of grey", shared=True)
@torch.no_grad()
def _occlusion(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    side = -(-min(images.shape[-2:]) // 7)
    maps = _captum("Occlusion")(_shared_forward(subject, decisions)).attribute(
        images,
        sliding_window_shapes=(3, side, side),
        strides=(3, side, side),
        baselines=subject.normalised(torch.full_like(images[:1], 0.5)),
        additional_forward_args=(_rows(images),),
        perturbations_per_eval=max(1, subject.batch_size // len(images)),
    )
    # captum gives every pixel of a square, in every channel, the whole square's drop.
    return maps[:, 0] / side**2


@_method("lime", 201, "Ribeiro et al. 2016, arXiv 1602.04938; 7 x 7 squares, 200 samples, ridge")
@torch.no_grad()
def _lime(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    try:
        from captum._utils.models.linear_model import SkLearnRidge

        ridge = SkLearnRidge(alpha=1.0)
    except ImportError as error:
        raise NotApplicable("captum or scikit-learn is not installed; run: pip install 'bcosify[evaluate]'") from error
    height, width = images.shape[-2:]
    square = (torch.arange(height) * 7 // height)[:, None] * 7 + torch.arange(width) * 7 // width
    sizes = square.flatten().bincount()
    explainer = _captum("Lime")(_forward(subject, decisions), interpretable_model=ridge)
    maps = []
    for row in _rows(images).split(1):
        with _seeded(seed, images.device):
            found = explainer.attribute(
                images[row],
                baselines=subject.normalised(torch.full_like(images[:1], 0.5)),
                feature_mask=square.to(images.device).expand(1, 3, -1, -1),
                additional_forward_args=(row,),
                n_samples=200,
                perturbations_per_eval=subject.batch_size,
            )
        maps.append(found[:, 0] / sizes[square].to(found))
    return torch.cat(maps)


# ----------------------------------------------------------------------------------------------------------------- RISE


@_method("rise", 500, "Petsiuk et al. 2018, arXiv 1806.07421; 500 masks of 8 x 8, half kept", in_score_units=False)
@torch.no_grad()
def _rise(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """Mean of the masks weighted by the confidence under them, minus the plain mean: signed, 0 where none matters."""
    number, cells = 500, 8
    height, width = images.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    total = images.new_zeros(len(images), height, width)
    plain, weights = images.new_zeros(height, width), images.new_zeros(len(images))
    together = max(1, subject.batch_size // len(images))
    for start in range(0, number, together):
        masks = _rise_masks(min(together, number - start), cells, (height, width), generator).to(images)
        shown = (images[:, None] * masks[None, :, None]).flatten(0, 1)
        rows = _rows(images).repeat_interleave(len(masks))
        outputs = main_output(subject.model(shown))
        confidence = decisions.rows(rows).confidence(outputs).view(len(images), len(masks))
        total += torch.einsum("bm,mhw->bhw", confidence, masks)
        plain += masks.sum(0)
        weights += confidence.sum(1)
    return (total - weights[:, None, None] * plain / number) / number


def _rise_masks(count: int, cells: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(count, H, W) in [0, 1]: random grids, enlarged smoothly and shifted by up to a cell."""
    coarse = (torch.rand(count, 1, cells, cells, generator=generator) < 0.5).float()
    step = [-(-length // cells) for length in size]
    large = F.interpolate(coarse, [(cells + 1) * length for length in step], mode="bilinear")[:, 0]
    shifts = [torch.randint(length, (count,), generator=generator).tolist() for length in step]
    return torch.stack(
        [mask[top : top + size[0], left : left + size[1]] for mask, top, left in zip(large, *shifts, strict=True)]
    )


# ------------------------------------------------------------------------------------------------------------- Grad-CAM


@_method("grad-cam", 2, "Selvaraju et al. 2017, arXiv 1610.02391", in_score_units=False)
def _grad_cam(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """On the last block's maps, or, for tokens, on what goes into the last block: of what comes out of it, only the
    class token counts in many models."""
    blocks = find_blocks(subject.model)
    last = subject.model.get_submodule(blocks[-1])
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept[:] = [args[0] if args[0].dim() == 3 else output]

    with hooked([(last, keep)]), torch.enable_grad():
        # The picture asks for a gradient, so that activations have one in frozen models too.
        score = decisions.scores(main_output(subject.model(images.requires_grad_())))
        (features,) = kept
        (gradient,) = torch.autograd.grad(score.sum(), features)
    if features.dim() == 3:
        rows, columns = _grid(subject, images)
        features, gradient = (_patches(tokens, rows, columns) for tokens in (features, gradient))
    elif features.dim() == 4 and features.shape[1] == features.shape[2] != features.shape[3]:
        features, gradient = (maps.movedim(-1, 1) for maps in (features, gradient))
    elif features.dim() != 4:
        raise NotApplicable(f"the last block, {blocks[-1]}, gives no map and no tokens")
    cam = (features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    return _enlarged(cam, images)


def _grid(subject: Subject, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    if subject.tokens is None:
        raise NotApplicable("this model's grid of patches is not known")
    with torch.no_grad():
        rows, columns = subject.tokens(subject.model, images[:1]).shape[-2:]
    return rows, columns


def _patches(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(B, C, rows, columns) of tokens (B, N, C): the last ones, after class token and registers."""
    if tokens.shape[1] < rows * columns:
        raise NotApplicable(f"the last block has {tokens.shape[1]} tokens, not {rows} x {columns} patches")
    return tokens[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


def _enlarged(maps: Tensor, images: Tensor) -> Tensor:
    """(B, H, W) of maps (B, 1, rows, columns)."""
    return F.interpolate(maps, images.shape[-2:], mode="bilinear")[:, 0]


# ------------------------------------------------------------------------------------------------------------ attention


class AttentionWeights(TorchFunctionMode):
    """Records the attention matrices (B, heads, N, N) of all calls inside, fused or not, from any library."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            self.found.append(func(**{**given, "need_weights": True, "average_attn_weights": False})[1].detach())
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.found.append(_attention(*args, **kwargs))
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in SOFTMAX and output.dim() == 4 and output.shape[-1] == output.shape[-2]:
            self.found.append(output.detach())
        return output


SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **named: Any) -> Tensor:
    logits = q @ k.transpose(-1, -2) * (named.get("scale") or q.shape[-1] ** -0.5)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1).detach()


def _recorded(subject: Subject, images: Tensor) -> list[Tensor]:
    """(B, N, N) of every layer, mean over heads."""
    with torch.no_grad(), AttentionWeights() as mode:
        subject.model(images)
    layers = [weights.mean(1) for weights in mode.found if weights.shape[-1] == weights.shape[-2]]
    if not layers:
        raise NotApplicable("no attention over all tokens was seen in this model")
    if len({layer.shape for layer in layers}) > 1 or len(layers[0]) != len(images):
        raise NotApplicable("its attention is within windows, or between tokens of several sizes")
    return layers


def _from_tokens(subject: Subject, images: Tensor, attention: Tensor) -> Tensor:
    """The class token's row of attention (B, N, N) over patches, or the mean row where no token stands before them."""
    rows, columns = _grid(subject, images)
    prefix = attention.shape[-1] - rows * columns
    if prefix < 0:
        raise NotApplicable(f"its attention is between {attention.shape[-1]} tokens, not {rows} x {columns} patches")
    row = attention[:, 0] if prefix else attention.mean(1)
    return _enlarged(row[:, prefix:].unflatten(1, (rows, columns))[:, None], images)


@_method("attention", 1, "the last layer's, mean over heads", in_score_units=False)
def _raw_attention(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    return _from_tokens(subject, images, _recorded(subject, images)[-1])


@_method("rollout", 1, "Abnar and Zuidema 2020, arXiv 2005.00928", in_score_units=False)
def _rollout(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    return _from_tokens(subject, images, rollout(_recorded(subject, images)))


def rollout(layers: list[Tensor]) -> Tensor:
    """(B, N, N): the product, last layer first, of half attention (B, N, N) and half identity (residual)."""
    identity = torch.eye(layers[0].shape[-1]).to(layers[0])
    return functools.reduce(lambda total, layer: (layer + identity) / 2 @ total, layers, identity)


# ------------------------------------------------------------------------------------------------------------- controls


@_method("centre", 1, "control: a Gaussian at the centre, whatever the picture", in_score_units=False, control=True)
def _centre(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """Its standard deviation is a quarter of the side."""
    height, width = (torch.linspace(-2, 2, length).to(images) for length in images.shape[-2:])
    return torch.exp(-(height[:, None] ** 2 + width**2) / 2).expand(len(images), -1, -1)


@_method("edges", 1, "control: Sobel's gradient of the grey picture", in_score_units=False, control=True)
def _edges(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    return F.conv2d(grey, torch.stack([across, across.T])[:, None]).norm(dim=1)


@_method("averaged", 18, "control: the mean of the exact maps of nine noisy views (`Views`)", control=True)
def _averaged_views(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    views = Views(9, "noise", seed=seed)
    return explain_views(subject.model, images, decisions.target(), views, check=False).contributions[:, 0]


CONTROLS = tuple(name for name, method in METHODS.items() if method.control)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """captum draws from torch's global generator; it is put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
