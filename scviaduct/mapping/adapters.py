"""An adapter: what surgery learnt of one query batch on one reference, and nothing of the reference itself."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from scviaduct.errors import StoreError
from scviaduct.mapping.batches import QueryBatch
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from scviaduct.mapping.surgery import Surgery

FORMAT = 1
"""Version of the files, and of the method: part of every address, so that a new one fits again."""
_MANIFEST, _TENSORS = "adapter.json", "adapter.safetensors"
_ENCODER, _VECTORS = "encoder", "vectors"
_DAMAGED = "Remove it (scviaduct adapter drop STORE DIGEST --force) and map again: it is fitted anew."


def address(reference_digest: str, batch: QueryBatch, sample_digest: str, surgery: Surgery) -> str:
    """Digest of what determines an adapter: the reference, the batch, its sampled cells, and how it is fitted."""
    told = asdict(surgery)
    told.pop("mode")  # says which batches are fitted, not how
    return digest("adapter", FORMAT, reference_digest, batch.values, sample_digest, told)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What surgery learnt of one query batch.

    Attributes
    ----------
    digest
        Its address.
    reference
        Digest of the reference.
    batch
        The query batch.
    encoder
        Covariate to what the reference's encoder looks up for the batch (:meth:`Encoder.rows`); without those that it
        does not read.
    vectors
        Covariate to slot of scvi-tools' module to vector: what widens a model that decodes.
    facts
        JSON-serialisable: cells seen and sampled, epochs, losses, settings, software, time.
    """

    digest: str
    reference: str
    batch: QueryBatch
    encoder: Mapping[str, Mapping[str, torch.Tensor]]
    vectors: Mapping[str, Mapping[str, torch.Tensor]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write a folder that appears whole or not at all; one that is there stays."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        names: dict[str, dict[str, dict[str, str]]] = {}
        for part, told in ((_ENCODER, self.encoder), (_VECTORS, self.vectors)):
            names[part] = {}
            for covariate, vectors in told.items():
                names[part][covariate] = {}
                for name, vector in vectors.items():
                    key = f"{part}.{len(tensors)}"
                    tensors[key], names[part][covariate][name] = vector.contiguous(), key
        document = {
            "format": FORMAT,
            "digest": self.digest,
            "reference": self.reference,
            "batch": self.batch.values,
            "tensors": names,
            "facts": dict(self.facts),
        }
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        staged.mkdir()
        try:
            save_file(tensors, staged / _TENSORS)
            (staged / _MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
            for file in staged.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            with suppress(OSError):  # another process was first with the same content
                staged.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        StoreError
            If it is not there, or is not an adapter.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            told = read_manifest(folder)
            tensors = load_file(folder / _TENSORS)
            parts = {
                part: {
                    covariate: {name: tensors[key] for name, key in names.items()}
                    for covariate, names in told["tensors"][part].items()
                }
                for part in (_ENCODER, _VECTORS)
            }
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise StoreError(f"{folder} holds no adapter ({error}).", _DAMAGED) from error
        return cls(told["digest"], told["reference"], batch_of(told), parts[_ENCODER], parts[_VECTORS], told["facts"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an adapter says of itself, without its tensors.

    Raises
    ------
    StoreError
        If it is not there, or of another format.
    """
    try:
        told: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        if told["format"] == FORMAT:
            return told
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder} holds no adapter ({error}).", _DAMAGED) from error
    raise StoreError(f"{folder} has format {told['format']}, this version reads {FORMAT}.", _DAMAGED)


def batch_of(told: Mapping[str, Any]) -> QueryBatch:
    """The query batch that a manifest names."""
    return QueryBatch(tuple((name, value) for name, value in told["batch"]))


@dataclass(frozen=True, slots=True)
class Shelf:
    """The adapters of a space; picklable.

    Attributes
    ----------
    folder
        ``adapters`` in the space's folder.
    """

    folder: str

    def path(self, address: str) -> Path:
        """Folder of an adapter."""
        return Path(self.folder, address[:2], address)

    def has(self, address: str) -> bool:
        """Whether it is there."""
        return (self.path(address) / _MANIFEST).is_file()

    def get(self, address: str) -> Adapter:
        """Read an adapter.

        Raises
        ------
        StoreError
            If it is not there, or damaged.
        """
        return Adapter.load(self.path(address))

    def put(self, adapter: Adapter) -> None:
        """Keep an adapter; one of the same address that is there stays."""
        adapter.save(self.path(adapter.digest))

    def manifests(self) -> list[dict[str, Any]]:
        """What each adapter says of itself, with its size in ``bytes``; the oldest first."""
        found = []
        for manifest in Path(self.folder).glob(f"??/*/{_MANIFEST}"):
            told = read_manifest(manifest.parent)
            size = sum(file.stat().st_size for file in manifest.parent.iterdir())
            found.append({**told, "bytes": size, "modified": manifest.stat().st_mtime})
        return sorted(found, key=lambda told: (told["modified"], told["digest"]))

    def drop(self, address: str) -> None:
        """Remove an adapter; whoever has it open keeps it."""
        folder = self.path(address)
        gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def recall(self, key: str) -> str | None:
        """Address that some shards' sample led to the last time; None if it is not known, or gone.

        A digest of a sample is known only once its cells are read. Shards pin what they hold, so that the same shards
        need not be read again to find that nothing changed.
        """
        try:
            found = self._memo(key).read_text().strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found if self.has(found) else None

    def remember(self, key: str, address: str) -> None:
        """Note the address that some shards' sample led to."""
        path = self._memo(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        staged.write_text(address)
        staged.replace(path)

    def _memo(self, key: str) -> Path:
        return Path(self.folder, "samples", key[:2], key)
