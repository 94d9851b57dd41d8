"""Where query cells come from, cut into shards: Census, SOMA, h5ad, h5mu and zarr.

:func:`open_source` opens a URI, :meth:`Source.scan` cuts it into shards, and any process reads a shard through
:func:`open_shard`.
"""

from scviaduct.sources.opening import close_shards, open_shard, open_source
from scviaduct.sources.source import Source

__all__ = ["Source", "close_shards", "open_shard", "open_source"]
