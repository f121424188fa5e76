"""Imported by the fork server alone, when it starts: it stays until the last worker has ended (see `workers`)."""

from . import loader as _forked_with  # noqa: F401 - so that workers need not import it each
from .workers import ignore_stop_signals

ignore_stop_signals()
