"""A reference as a package: a folder whose every file has a digest, from which any process loads the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from scviaduct.errors import PackageError
from scviaduct.families.base import Facts
from scviaduct.references.latents import ReferenceLatents, Statistics
from scviaduct.references.manifest import facts_of, file_digest, read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scviaduct.families import Encoder

MODEL, REGISTRY, ENCODER = "model.safetensors", "model.json", "encoder.safetensors"
TEMPLATE, LATENTS, STATISTICS = "template.h5ad", "latents.parquet", "statistics.safetensors"
CALIBRATION, MINIFIED = "calibration.parquet", ("minified.h5ad", "minified.h5mu")
TOLERANCE = 1e-4
"""Largest difference between what a template encodes to now and what it encoded to when the package was made, in
standard deviations of the latent. Another CPU sums float32 products in another order, which leaves about 1e-6."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference(Facts):
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
    files
        Names of the package's files.
    repairs
        What had to be mended of the saved model before it could be loaded.
    notes
        What a user should know of it.
    provenance
        Where it comes from, and how it was trained.
    """

    path: Path
    name: str
    digest: str
    family: str
    files: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_latents(self) -> bool:
        """Whether the package holds the reference's own latents."""
        return LATENTS in self.files

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
        return cls(
            path=folder,
            name=manifest["name"],
            digest=manifest["digest"],
            family=manifest["family"],
            files=tuple(manifest["files"]),
            repairs=tuple(manifest["repairs"]),
            notes=tuple(manifest["notes"]),
            provenance=manifest["provenance"],
            **facts_of(manifest["facts"]),
        )

    def encoder(self, device: str = "cpu") -> Encoder:
        """Load what the model encodes with: tensors alone, whose digest is checked. Needs no scvi-tools.

        Raises
        ------
        PackageError
            If the file is not the one that was packaged.
        """
        from scviaduct.families import family

        self.require(ENCODER)
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
        self.require(LATENTS)
        return ReferenceLatents.read(self.path / LATENTS)

    def statistics(self) -> Statistics:
        """Label-wise means and covariances of the reference's cells, and the influence of its genes.

        Raises
        ------
        PackageError
            If the package has no latents of its own, or the file was changed.
        """
        self.require(STATISTICS)
        return Statistics.read(self.path / STATISTICS)

    def require(self, *names: str) -> None:
        """Check that files of the package are those that were packaged.

        Raises
        ------
        PackageError
            If one is missing or was changed.
        """
        files = read_manifest(self.path)["files"]
        for name in names:
            told, path = files.get(name), self.path / name
            if told is None or not path.is_file():
                raise PackageError(f"{path} is missing.", "Add the reference again from where it came.")
            found, expected = file_digest(path), told["digest"]
            if found != expected:
                raise PackageError(
                    f"{path} has digest {found[:12]}, and the manifest says {expected[:12]}.",
                    "The file was changed or damaged: add the reference again from where it came.",
                )

    def export(self, folder: Path) -> Path:
        """Write the model as scvi-tools saves it, for whoever wants to load it there; a template stands for its data.

        Parameters
        ----------
        folder
            To make; it must be new or empty.

        Returns
        -------
        Path
            The folder: ``scvi.model.X.load(folder)`` loads it.
        """
        from scviaduct.references.exporting import export_model

        return export_model(self, folder)

    def damaged(self) -> tuple[str, ...]:
        """Files that are missing or not those that were packaged."""
        files = read_manifest(self.path)["files"]
        return tuple(file for file, told in files.items() if self._digest_of(file) != told["digest"])

    def _digest_of(self, file: str) -> str:
        path = self.path / file
        return file_digest(path) if path.is_file() else "missing"

    def verify(self) -> Verification:
        """Check every digest, load the model, and compare what it encodes with what was recorded.

        A template of synthetic cells is encoded twice: by the model, loaded through scvi-tools, and by the package's
        own encoder, which is what maps.
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
