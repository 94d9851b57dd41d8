"""The system of record: two Delta tables a space, their commits, index, search and export."""

from scviaduct.store.reading import Snapshot
from scviaduct.store.space import Space
from scviaduct.store.staging import Completion, Stager
from scviaduct.store.store import RunRecord, Store

__all__ = ["Completion", "RunRecord", "Snapshot", "Space", "Stager", "Store"]
