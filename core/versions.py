"""The versions of the libraries whose code decides what a model computes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

__all__ = ["versions", "versions_text"]

VERSIONED = ("bcosify", "torch", "timm", "open_clip_torch", "transformers")


def versions() -> dict[str, str]:
    """Name -> installed version of every library whose code decides what a model computes."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def versions_text(found: Mapping[str, str]) -> str:
    """For messages: `torch 2.15.0, timm 1.0.31, ...`."""
    return ", ".join(f"{name} {version}" for name, version in found.items())
