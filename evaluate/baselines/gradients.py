"""From the picture's gradient: captum's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decisions import Decisions
from ..subject import Subject
from .registry import method
from .shared import captum_method, rows_of, scores_of, seeded


@method("input-x-gradient", 2, "Shrikumar et al. 2016, arXiv 1605.01713")
def _input_x_gradient(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    explainer = captum_method("InputXGradient")(scores_of(subject, decisions))
    return explainer.attribute(images.requires_grad_(), additional_forward_args=(rows_of(images),)).sum(1)


@method("integrated-gradients", 40, "Sundararajan et al. 2017, arXiv 1703.01365; 20 steps from the mean colour")
def _integrated_gradients(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    explainer = captum_method("IntegratedGradients")(scores_of(subject, decisions))
    return explainer.attribute(
        images,
        n_steps=20,
        internal_batch_size=max(subject.batch_size, len(images)),
        additional_forward_args=(rows_of(images),),
    ).sum(1)


@method(
    "smoothgrad", 32, "Smilkov et al. 2017, arXiv 1706.03825; input x gradient, 16 samples, noise 0.15 of the range"
)
def _smoothgrad(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """A picture at a time: its noise has its own range, and is the same in any batch."""
    explainer = captum_method("NoiseTunnel")(captum_method("InputXGradient")(scores_of(subject, decisions)))
    maps = []
    for row in rows_of(images).split(1):
        image = images[row].detach()
        span = float(image.max() - image.min())
        with seeded(seed, images.device):
            found = explainer.attribute(
                image.requires_grad_(),
                nt_type="smoothgrad",
                nt_samples=16,
                nt_samples_batch_size=4,  # fixed: what noise is drawn must not depend on the batch
                stdevs=0.15 * span,
                additional_forward_args=(row,),
            )
        maps.append(found.detach().sum(1))
    return torch.cat(maps)
