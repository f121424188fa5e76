"""What open_clip and the hub raise becomes one SourceError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from ....core.errors import CheckpointError, SourceError

__all__ = ["FAILURES", "translate_errors"]

FAILURES = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)


@contextlib.contextmanager
def translate_errors(name: str) -> Iterator[None]:
    """Turns what open_clip and the hub raise into one SourceError with what to do next."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    reached = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError)
    try:
        yield
    except (SourceError, CheckpointError):
        raise
    except HFValidationError as error:
        raise SourceError(f"open_clip:{name}: no name of a hub repository (ORG/NAME): {error}") from error
    except reached as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise SourceError(
            f"open_clip:{name}: the files cannot be reached ({said[0]}). Check the name and the connection, or pass "
            "--weights FILE.safetensors, or --no-pretrained for random weights, or use a local folder: "
            "open_clip:local-dir:PATH."
        ) from error
    except FAILURES as error:
        said = " ".join(line.strip() for line in str(error).splitlines()[:3]) or type(error).__name__
        raise SourceError(f"open_clip:{name}: open_clip cannot build it: {said}") from error
