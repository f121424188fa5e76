"""Explanation mode: a model whose graph is affine in its input, and the ledger of its constants (see `mode`)."""

from __future__ import annotations

from .mode import Linearised, dynamic_linear, gated, input_encoding

__all__ = ["Linearised", "dynamic_linear", "gated", "input_encoding"]
