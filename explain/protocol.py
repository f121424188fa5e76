"""Our attribution as other libraries call theirs: captum's `Attribution`, and the function that Quantus asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..convert import Student, Teacher
from ..core.errors import TargetError
from ..core.pictures import fitted
from .attribution import attribute

__all__ = ["Attribution"]


class Attribution:
    """Exact contributions, as captum's attribution methods are called and as Quantus calls an `explain_func`.

        exact = Attribution(student)
        captum.metrics.sensitivity_max(exact.attribute, images, target=classes)
        quantus.Complexity()(model=exact.forward_func, x_batch=images, y_batch=classes, explain_func=exact)

    Neither library is imported here. The sum over a picture is what the input adds to the score, which is the score
    less the constants; there is no baseline.

    Attributes:
        forward_func: the module: normalised pictures (B, 3, H, W) -> outputs (B, D).
    """

    multiplies_by_inputs = True

    def __init__(self, model: nn.Module | Student | Teacher) -> None:
        found = model.model if isinstance(model, Student | Teacher) else model
        if not isinstance(found, nn.Module):
            raise TargetError(
                f"Attribution takes a Student, a Teacher or a module, not a {type(model).__name__}. Pass "
                "bcosify.convert(...) or bcosify.load(...)."
            )
        self.forward_func: Callable[..., Any] = found
        self.model = found

    def attribute(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None, **ignored: Any
    ) -> Tensor | tuple[Tensor, ...]:
        """What every channel of every pixel adds to the score, in the shape of `inputs` (see `attribute`).

        Args:
            inputs: normalised pictures (B, 3, H, W), or a tuple of one such tensor, as captum hands them on.
            target: a class for all pictures, or one for each: a list, an array or a tensor (B,).

        Raises:
            TargetError: several inputs, further arguments of the forward pass, or no target.
        """
        whole = isinstance(inputs, tuple)
        if (whole and len(inputs) != 1) or additional_forward_args is not None or ignored:
            more = "further inputs" if whole and len(inputs) != 1 else "additional_forward_args"
            raise TargetError(
                f"attribute() takes one tensor of pictures and a target. Leave {', '.join(ignored) or more} out."
            )
        if target is None:
            raise TargetError("attribute() needs a target. Pass target=, a class or one for each picture.")
        found = attribute(self.model, inputs[0] if whole else inputs, target)
        return (found,) if whole else found

    def __call__(self, model: nn.Module | None = None, inputs: Any = None, targets: Any = None, **options: Any) -> Any:
        """(B, 3, H, W) as Quantus asks for it: an array, of the module that it passes, on arrays or tensors.

        Quantus has options of its own for what it calls, such as `device`; none of them changes what is exact.
        """
        asked = self.model if model is None else model
        pictures = fitted(torch.as_tensor(inputs), asked)
        return attribute(asked, pictures, np.asarray(targets).reshape(-1)).cpu().numpy()

    def has_convergence_delta(self) -> bool:
        """False: captum's delta is to a baseline, and there is none. `Explanation.residual` is our own."""
        return False

    @classmethod
    def get_name(cls) -> str:
        """What captum's pages call it."""
        return "Exact contributions"
