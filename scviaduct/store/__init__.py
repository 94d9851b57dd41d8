"""The system of record: two Delta tables a space, their commits, derived sets, index, search and export."""

from scviaduct.store.derived import Derived, DerivedSet, DerivedState
from scviaduct.store.derivedfolder import DerivedFolder
from scviaduct.store.derivedstaging import DerivedCompletion, DerivedStager, settled_key
from scviaduct.store.reading import Snapshot
from scviaduct.store.space import Space
from scviaduct.store.staging import Completion, Stager
from scviaduct.store.store import RunRecord, Store

__all__ = [
    "Completion",
    "Derived",
    "DerivedCompletion",
    "DerivedFolder",
    "DerivedSet",
    "DerivedStager",
    "DerivedState",
    "RunRecord",
    "Snapshot",
    "Space",
    "Stager",
    "Store",
    "settled_key",
]
