"""What open_clip and the hub raise becomes one SourceError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ....core.errors import first_line
from ..errors import FAILURES, translate_library_errors

__all__ = ["FAILURES", "translate_errors"]


@contextlib.contextmanager
def translate_errors(name: str) -> Iterator[None]:
    """Turns what open_clip and the hub raise into one SourceError with what to do next."""

    def no_name(error: Exception) -> str:
        return f"open_clip:{name}: no name of a hub repository (ORG/NAME): {error}"

    def unreachable(error: Exception) -> str:
        return (
            f"open_clip:{name}: the files cannot be reached ({first_line(error)}). Check the name and the connection, "
            "or pass --weights FILE.safetensors, or --no-pretrained for random weights, or use a local folder: "
            "open_clip:local-dir:PATH."
        )

    def not_built(error: Exception) -> str:
        return f"open_clip:{name}: open_clip cannot build it: {first_line(error, 3)}"

    with translate_library_errors(no_name=no_name, unreachable=unreachable, not_built=not_built):
        yield
