"""The adapters of a run, as workers are told of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scviaduct.mapping.adapters import Shelf
    from scviaduct.mapping.batches import QueryBatch


@dataclass(frozen=True, slots=True)
class Fleet:
    """The adapters of a run; picklable, without tensors.

    Attributes
    ----------
    shelf
        Where they lie.
    addresses
        Query batch to the address of its adapter.
    failures
        Query batch to why there is no adapter for it.
    decoder
        Whether batches that only decoding depends on have one, too.
    """

    shelf: Shelf
    addresses: Mapping[QueryBatch, str]
    failures: Mapping[QueryBatch, str] = field(default_factory=dict)
    decoder: bool = False

    def digest(self, batches: Iterable[QueryBatch]) -> str:
        """What a unit's id says of the adapters of its cells; empty for none."""
        told = [(batch.values, self.addresses.get(batch, "")) for batch in sorted(batches)]
        return digest(told) if told else ""
