"""The device that is asked for, or one line that says that it is not there."""

from __future__ import annotations

import torch

from .errors import OptionError

__all__ = ["find_device"]


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one, else the CPU.

    Raises OptionError where torch knows no such device, or cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # devices that hold no values, such as `meta`, have none to give
    # A build without CUDA raises an AssertionError, a backend that is missing a NotImplementedError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        there = ", ".join(["auto", "cpu", *found])
        none = "" if found else f"; torch {torch.__version__} finds no CUDA GPU here"
        raise OptionError({"device": f"must be one of {there}; got {name!r}{none}"}) from error
    return device
