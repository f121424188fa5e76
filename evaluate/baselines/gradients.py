"""From the picture's gradient: captum's."""

from __future__ import annotations

from torch import Tensor

from ..decisions import Decisions
from ..subject import Subject
from .registry import method
from .shared import captum_method, rows_of, scores_of


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
