"""What timm and the hub raise becomes one SourceError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from ....core.errors import SourceError, first_line, translated

__all__ = ["translate_errors"]


@contextlib.contextmanager
def translate_errors(name: str) -> Iterator[None]:
    """Turns what timm and the hub raise into one SourceError with what to do next."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    reached = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError)
    failures = (RuntimeError, TypeError, ValueError, AssertionError, KeyError, SafetensorError)

    def unreachable(error: Exception) -> str:
        return (
            f"timm:{name}: the weights cannot be reached ({first_line(error)}). Check the connection, or pass "
            "--weights FILE.safetensors, or --no-pretrained for random weights, or use a local "
            "folder: timm:local-dir:PATH."
        )

    def not_built(error: Exception) -> str:
        return f"timm:{name}: timm cannot build it: {error}"

    with translated(failures, SourceError, not_built), translated(reached, SourceError, unreachable):
        yield
