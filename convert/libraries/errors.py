"""What a library and the hub raise on a model becomes one SourceError; what it says is the library's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from safetensors import SafetensorError

from ...core.errors import SourceError, translated

__all__ = ["FAILURES", "translate_library_errors"]

# What building and loading raise on a bad configuration or file.
FAILURES = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)

Message = Callable[[Exception], str]


@contextlib.contextmanager
def translate_library_errors(*, no_name: Message, unreachable: Message, not_built: Message) -> Iterator[None]:
    """Inside, errors become a SourceError: for what is no name of a repository, for a hub that does not answer, and for
    a model that the library cannot build."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    reached = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError)
    with (
        translated(FAILURES, SourceError, not_built),
        translated(reached, SourceError, unreachable),
        translated(HFValidationError, SourceError, no_name),
    ):
        yield
