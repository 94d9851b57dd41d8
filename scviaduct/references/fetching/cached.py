"""What this machine has fetched: whole versions of a place, checked before each use."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from scviaduct.errors import PackageError
from scviaduct.references.fetching.download import Expected, check, no_space

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

MANIFEST, ENCODER = "manifest.json", "encoder.safetensors"
"""A folder with both is a package; a manifest alone may be anything's."""
MODELS = ("model.pt", "model_params.pt")
"""What scvi-tools saves, and what it saved before 0.15; ``save(prefix=...)`` puts a prefix before the names."""
DATA = ("adata.h5ad", "mdata.h5mu")
"""What a model was trained on."""
CELLS = ("latents.parquet", "statistics.safetensors", "calibration.parquet")
"""What a package that was published carries of its own cells; fetched with the data."""
_CARRIED = ("_scvi_required_metadata.json", "README.md", "metrics.json", "LICENSE")
_LEGACY = ("attr.pkl", "var_names.csv")
_SHOWN = 8
_TRUE = ("1", "on", "yes", "true")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model's files on this machine.

    Attributes
    ----------
    folder
        Holds the files, and nothing else where they were fetched; read it, do not write into it.
    provenance
        Where they came from, for JSON: ``uri``, ``kind``, what pins the content, and ``files`` by name with ``size``
        and ``sha256``. It holds no token.
    """

    folder: Path
    provenance: dict[str, Any] = field(default_factory=dict)


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids requests; it holds for every kind of address."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE


def is_package(names: Collection[str]) -> bool:
    """Whether a folder with these files is a package."""
    return MANIFEST in names and ENCODER in names


def models_of(names: Iterable[str]) -> list[str]:
    """Which of a folder's files are models of scvi-tools, with any prefix; ``model.pt`` alone where it is there."""
    found = sorted(name for name in names if name.endswith(MODELS) and not name.startswith("."))
    return [MODELS[0]] if MODELS[0] in found else found


def holds_model(names: Collection[str]) -> bool:
    """Whether a folder with these files is a package or holds a model, or several."""
    return is_package(names) or bool(models_of(names))


def model_folders(paths: Iterable[str]) -> list[str]:
    """Folders that hold a model, of all files' paths below a place; the place itself is the empty name."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    return sorted(folder for folder, names in folders.items() if holds_model(names))


def prefix_of(names: Collection[str], place: str) -> str:
    """What precedes the names of the one model that a folder holds, mostly nothing.

    Parameters
    ----------
    names
        Files directly in the folder.
    place
        What the folder is called in messages.

    Raises
    ------
    PackageError
        If the folder holds several models.
    """
    found = models_of(names)
    if len(found) > 1:
        shown = [ascii(name[:80])[1:-1] for name in found[:_SHOWN]]  # names may be a stranger's
        listed = ", ".join(shown) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        raise PackageError(f"{place} holds several models in one folder: {listed}.", "Give each a folder of its own.")
    return next((name.removesuffix(end) for name in found for end in MODELS if name.endswith(end)), "")


def needed(names: Collection[str], *, data: bool, place: str) -> list[str]:
    """Which of a folder's files are fetched: all of a package, and of another model those that are read.

    Parameters
    ----------
    names
        Files directly in the folder.
    data
        Whether the training data are wanted.
    place
        What the folder is called in messages.

    Raises
    ------
    PackageError
        If the folder holds several models.
    """
    if is_package(names):
        return sorted(name for name in names if not name.startswith("."))
    prefix, models = prefix_of(names, place), models_of(names)
    parts = _LEGACY if any(model.endswith(MODELS[1]) for model in models) else ()
    wanted = {
        *models,
        *_CARRIED,
        *(f"{prefix}{name}" for name in parts),
        *((*data_names(prefix), *CELLS) if data else ()),
    }
    return sorted(wanted & set(names))


def data_names(prefix: str) -> tuple[str, ...]:
    """What a model's training data may be called, the preferred first."""
    return tuple(dict.fromkeys(f"{start}{name}" for start in (prefix, "") for name in DATA))


def no_model(place: str, found: list[str], chosen: str = "") -> PackageError:
    """The error for a place without a model.

    Parameters
    ----------
    place
        Repository, address or path.
    found
        Folders below that hold one.
    chosen
        The folder that was asked for, if any.
    """
    if found:
        shown = [ascii(folder[:80])[1:-1] for folder in found[:_SHOWN]]  # names may be a stranger's
        listed = ", ".join(shown) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        problem = f"has no model in '{chosen}', but in" if chosen else "holds its models in folders:"
        return PackageError(f"{place} {problem} {listed}.", f"Name one: {place}#{shown[0]}")
    return PackageError(
        f"{place} holds no model: there is no {', '.join(MODELS)} or package in it.",
        "Name a folder that model.save(), scvi-hub or scviaduct made, e.g. hf://scvi-tools/tabula-sapiens-heart-scvi.",
    )


class Shelf:
    """The versions of one place (a repository, an archive, a bucket's folder) that this machine has.

    A version is a folder and, written last, a record beside it; without the record the folder is an unfinished
    download, which the next call goes on with.

    Parameters
    ----------
    cache
        Where all shelves are.
    key
        Names of folders below it.
    """

    def __init__(self, cache: Path, *key: str) -> None:
        self.folder = cache.joinpath(*key)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other call fills this shelf, and keep it to this call."""
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise PackageError(
                f"The folder for downloads {self.folder} cannot be written ({error.strerror}).",
                "Set SCVIADUCT_HOME to a folder that can.",
            ) from error
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise no_space(self.folder, str(error.strerror)) from error
            raise
        finally:
            lock.release()

    def load(self, version: str) -> Fetched | None:
        """A version, if it is here and whole; a damaged one is taken away."""
        folder, record = self.folder / version, self.folder / f"{version}.json"
        if not record.exists():
            return None
        try:
            provenance: dict[str, Any] = dict(json.loads(record.read_text()))
            files: Mapping[str, Mapping[str, Any]] = provenance["files"]
            whole = folder.is_dir() and all(
                (folder / name).is_file()
                and not check(folder / name, Expected(int(told["size"]), str(told["sha256"])))[1]
                for name, told in files.items()
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            whole = False
        if not whole:
            record.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return Fetched(folder, provenance)

    def work(self, version: str) -> Path:
        """The folder to fill for a version, with what an interrupted call left in it."""
        work, there = self.folder / f".{version}.part", self.folder / version
        if there.is_dir() and not work.exists():
            there.rename(work)  # killed between the two steps of keep()
        try:
            work.mkdir(exist_ok=True)
        except OSError as error:
            raise no_space(self.folder, str(error.strerror)) from error
        return work

    def keep(self, version: str, provenance: Mapping[str, Any]) -> Fetched:
        """Make what :meth:`work` holds a version."""
        (self.folder / f".{version}.part").rename(self.folder / version)
        told = {**provenance, "fetched": datetime.now(UTC).isoformat(timespec="seconds")}
        _write(self.folder / f"{version}.json", told)
        return Fetched(self.folder / version, told)

    def recall(self, name: str) -> str:
        """The version that a name stood for when it was last asked for; empty if it never was."""
        return str(self._names().get(name, ""))

    def without_asking(self, name: str, place: str) -> Fetched:
        """What a name stood for when it was last asked for, without a request.

        Raises
        ------
        PackageError
            If it was not fetched before, or is damaged.
        """
        version = self.recall(name)
        kept = self.load(version) if version else None
        if kept is None:
            state = "is damaged on this machine" if version else "was not fetched before on this machine"
            raise PackageError(
                f"{place} {state}, and HF_HUB_OFFLINE forbids requests.",
                "Fetch it once with HF_HUB_OFFLINE=0, or copy the downloads folder of a machine that has it.",
            )
        return kept

    def remember(self, name: str, version: str) -> None:
        """Note what a name stands for."""
        names = self._names()
        if names.get(name) != version:
            _write(self.folder / "names.json", {**names, name: version})

    def _names(self) -> dict[str, Any]:
        path = self.folder / "names.json"
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise PackageError(f"{path} cannot be read ({error}).", f"Delete {self.folder} and fetch again.") from error


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def room_for(folder: Path, size: int) -> None:
    """Raise :class:`PackageError` if a folder's disk has less free space than ``size`` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise no_space(folder, f"{size:,} bytes are needed and {free:,} are free")
