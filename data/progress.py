"""Progress bars for what takes long, where someone looks at them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import track

from ..core.errors import DataWarning

__all__ = ["say", "tracked", "watched"]


def tracked(items: Iterable[Any], total: int, title: str, progress: bool, few: int = 256) -> Iterable[Any]:
    """`items` with a progress bar, where there is much to do and someone to look at it."""
    console = Console(stderr=True)
    show = total > few and watched(console, progress)
    return track(items, title, total, console=console, transient=True) if show else items


def watched(console: Console, progress: bool) -> bool:
    """Whether there is a terminal, and this is the process that may write on it."""
    return progress and console.is_terminal and os.environ.get("LOCAL_RANK", "0") == "0"


def say(text: str) -> None:
    """Warns, in one process of several."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(text, DataWarning, stacklevel=3)
