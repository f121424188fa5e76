"""What open_clip and the hub raise becomes one SourceError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from ....core.errors import SourceError, first_line, translated

__all__ = ["FAILURES", "translate_errors"]

FAILURES = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)


@contextlib.contextmanager
def translate_errors(name: str) -> Iterator[None]:
    """Turns what open_clip and the hub raise into one SourceError with what to do next."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    reached = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError)

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

    with (
        translated(FAILURES, SourceError, not_built),
        translated(reached, SourceError, unreachable),
        translated(HFValidationError, SourceError, no_name),
    ):
        yield
