"""Pictures and shards of them: naming, packing, indexing, fetching, order, batches. `shards` packs a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports

if TYPE_CHECKING:
    from .pack import Written
    from .pack import write_shards as shards
    from .pictures import read_picture

__all__ = ["Written", "read_picture", "shards"]

PLACES = {"Written": ".pack", "read_picture": ".pictures", "shards": ".pack:write_shards"}
__getattr__ = lazy_exports(__name__, PLACES)
