"""Sample packing, attention that stays inside a sample, and a loss on chosen tokens.

This much needs numpy alone. `hermes_core.segments`, `.attention` and `.loss` need torch.
"""

from hermes_core._version import __version__
from hermes_core.dealing import Dealing, deal, row_costs
from hermes_core.loader import RowLoader
from hermes_core.packing import Packing, pack
from hermes_core.rows import Rows, build_rows
from hermes_core.samples import IGNORE_INDEX, Samples, Shard
from hermes_core.store import Store, StoreError, open_store
from hermes_core.store_writer import StoreWriter
from hermes_core.windows import PackedRows, WindowedPacker

__all__ = [
    "IGNORE_INDEX",
    "Dealing",
    "PackedRows",
    "Packing",
    "RowLoader",
    "Rows",
    "Samples",
    "Shard",
    "Store",
    "StoreError",
    "StoreWriter",
    "WindowedPacker",
    "__version__",
    "build_rows",
    "deal",
    "open_store",
    "pack",
    "row_costs",
]
