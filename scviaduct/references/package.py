"""A reference as a package: a folder whose every file has a digest, from which any process loads the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow.parquet as pq

from scviaduct.errors import PackageError
from scviaduct.references.manifest import file_digest, read_manifest
from scviaduct.values import GeneTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scviaduct.families import Encoder
    from scviaduct.values import FloatArray

MODEL, ENCODER = "model.pt", "encoder.safetensors"
TEMPLATE, LATENTS = "template.h5ad", "latents.parquet"
TOLERANCE = 1e-4
"""Largest difference between what a template encodes to now and what it encoded to when the package was made, in
standard deviations of the latent. Another CPU sums float32 products in another order, which leaves about 1e-6."""


@dataclass(frozen=True, slots=True)
class ReferenceLatents:
    """The reference's own cells.

    Attributes
    ----------
    latent
        float32, shape ``(n_cells, n_latent)``.
    labels
        One per cell; None for a cell without.
    """

    latent: FloatArray
    labels: list[str | None]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was verified."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What verifying a package found."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return all(check.ok for check in self.checks)


@dataclass(frozen=True, slots=True)
class Reference:
    """A pretrained model as a verified package; picklable, without handles.

    Attributes
    ----------
    path
        Folder of the package.
    name
        Name it is registered under, or that of the folder.
    digest
        Of every file and fact; two packages with the same digest map alike.
    family
        Name of scvi-tools' class.
    scvi_version
        Version of scvi-tools that saved the model.
    genes
        Identifiers of its genes, in the order of its first layer.
    batch_key, batch_categories, labels_key, labels, unlabeled_category, n_latent, encode_covariates, \
categorical_covariates, continuous_covariates, size_factor_key, layer
        See :class:`scviaduct.families.Facts`.
    has_latents
        Whether the package holds the reference's own latents.
    notes
        What a user should know of it.
    provenance
        Where it comes from, and how it was trained.
    """

    path: Path
    name: str
    digest: str
    family: str
    scvi_version: str
    genes: GeneTable
    n_latent: int
    encode_covariates: bool
    batch_key: str = ""
    batch_categories: tuple[str, ...] = ()
    labels_key: str = ""
    labels: tuple[str, ...] = ()
    unlabeled_category: str = ""
    categorical_covariates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    continuous_covariates: tuple[str, ...] = ()
    size_factor_key: str = ""
    layer: str = ""
    has_latents: bool = False
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a package's manifest; cheap, the model is not touched.

        Raises
        ------
        PackageError
            If there is no package, or its manifest is not what it says.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        facts = dict(manifest["facts"])
        columns = {key: tuple(values) for key, values in facts.pop("genes").items()}
        for key in ("batch_categories", "labels", "continuous_covariates"):
            facts[key] = tuple(facts[key])
        categorical = facts.pop("categorical_covariates")
        return cls(
            path=folder,
            name=manifest["name"],
            digest=manifest["digest"],
            family=manifest["family"],
            genes=GeneTable(columns),
            categorical_covariates={key: tuple(values) for key, values in categorical.items()},
            has_latents=LATENTS in manifest["files"],
            notes=tuple(manifest["notes"]),
            provenance=manifest["provenance"],
            **facts,
        )

    def encoder(self, device: str = "cpu") -> Encoder:
        """Load what the model encodes with: tensors alone, whose digest is checked. Needs no scvi-tools.

        Raises
        ------
        PackageError
            If the file is not the one that was packaged.
        """
        from scviaduct.families import family

        self._require(ENCODER)
        return family(self.family).open(self.path / ENCODER, device)

    def latents(self) -> ReferenceLatents:
        """The reference's own latents and labels.

        Raises
        ------
        PackageError
            If the package has none, or the file was changed.
        """
        if not self.has_latents:
            remedy = "Add it again from a folder that has its data (adata.h5ad)."
            raise PackageError(f"Reference '{self.name}' has no latents of its own.", remedy)
        self._require(LATENTS)
        table = pq.read_table(self.path / LATENTS, columns=["latent", "label"])
        flat = table["latent"].combine_chunks().flatten().to_numpy()
        return ReferenceLatents(flat.reshape(len(table), self.n_latent), table["label"].to_pylist())

    def _require(self, file: str) -> None:
        told = read_manifest(self.path)["files"].get(file)
        path = self.path / file
        if told is None or not path.is_file():
            raise PackageError(f"{path} is missing.", "Add the reference again from where it came.")
        found, expected = file_digest(path), told["digest"]
        if found != expected:
            raise PackageError(
                f"{path} has digest {found[:12]}, and the manifest says {expected[:12]}.",
                "The file was changed or damaged: add the reference again from where it came.",
            )

    def damaged(self) -> tuple[str, ...]:
        """Files that are missing or not those that were packaged."""
        files = read_manifest(self.path)["files"]
        return tuple(file for file, told in files.items() if self._digest_of(file) != told["digest"])

    def _digest_of(self, file: str) -> str:
        path = self.path / file
        return file_digest(path) if path.is_file() else "missing"

    def verify(self) -> Verification:
        """Check every digest, load the model, and compare what it encodes with what was recorded.

        A template of synthetic cells is encoded twice: by the model in ``model.pt``, loaded through scvi-tools, and by
        the package's own encoder, which is what maps.
        """
        from scviaduct.references.template import verify_encoding

        manifest = read_manifest(self.path)
        checks = []
        for file, told in manifest["files"].items():
            found = self._digest_of(file)
            detail = (
                f"{told['size']:,} bytes" if found == told["digest"] else f"{found[:12]}, not {told['digest'][:12]}"
            )
            checks.append(Check(f"digest of {file}", found == told["digest"], detail))
        if all(check.ok for check in checks):
            recorded = np.array(manifest["template_latent"], np.float32)
            for what, difference in verify_encoding(self, recorded).items():
                detail = f"largest difference {difference:.1e} sd over {len(recorded)} template cells"
                checks.append(Check(what, difference <= TOLERANCE, detail))
        return Verification(tuple(checks))
