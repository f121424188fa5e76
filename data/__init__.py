"""Pictures and shards of them: naming, packing, indexing, fetching, order, batches. `shards` packs a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports

if TYPE_CHECKING:
    from .pack import Written
    from .pack import write_shards as shards

__all__ = ["Written", "shards"]

__getattr__ = lazy_exports(__name__, {"Written": ".pack", "shards": ".pack:write_shards"})
