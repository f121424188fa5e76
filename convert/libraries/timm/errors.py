"""What timm and the hub raise becomes one SourceError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from ....core.errors import SourceError

__all__ = ["translate_errors"]


@contextlib.contextmanager
def translate_errors(name: str) -> Iterator[None]:
    """Turns what timm and the hub raise into one SourceError with what to do next."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except SourceError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise SourceError(
            f"timm:{name}: the weights cannot be reached ({said[0]}). Check the connection, or pass "
            "--weights FILE.safetensors, or --no-pretrained for random weights, or use a local "
            "folder: timm:local-dir:PATH."
        ) from error
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError, SafetensorError) as error:
        raise SourceError(f"timm:{name}: timm cannot build it: {error}") from error
