"""What transformers says: its reports are silenced, and its exceptions become one SourceError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from ....core.errors import SourceError, first_line, translated

__all__ = ["FAILURES", "quiet", "translate_errors"]

# What building and loading raise on a bad configuration or file.
FAILURES = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers reports every load on stderr; what matters of it is in our errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def translate_errors(reference: str) -> Iterator[None]:
    """Turns what transformers and the hub raise into one SourceError with what to do next."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    reached = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError)

    def no_name(error: Exception) -> str:
        return f"{reference}: no such folder, and no name of a hub repository (ORG/NAME): {error}"

    def unreachable(error: Exception) -> str:
        return (
            f"{reference}: the files cannot be reached ({first_line(error)}). Check the name and the connection, "
            "or use a local folder: hf:PATH."
        )

    def not_opened(error: Exception) -> str:
        return f"{reference}: transformers cannot open it: {first_line(error)}"

    with (
        translated(FAILURES, SourceError, not_opened),
        translated(reached, SourceError, unreachable),
        translated(HFValidationError, SourceError, no_name),
    ):
        yield
