"""What transformers says: its reports are silenced, and its exceptions become one SourceError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ....core.errors import first_line
from ..errors import FAILURES, translate_library_errors

__all__ = ["FAILURES", "quiet", "translate_errors"]


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

    def no_name(error: Exception) -> str:
        return f"{reference}: no such folder, and no name of a hub repository (ORG/NAME): {error}"

    def unreachable(error: Exception) -> str:
        return (
            f"{reference}: the files cannot be reached ({first_line(error)}). Check the name and the connection, "
            "or use a local folder: hf:PATH."
        )

    def not_opened(error: Exception) -> str:
        return f"{reference}: transformers cannot open it: {first_line(error)}"

    with translate_library_errors(no_name=no_name, unreachable=unreachable, not_built=not_opened):
        yield
