"""The work folder of a training: what a run that was killed leaves behind, so that the same command goes on.

``.NAME.training`` beside the package holds ``record.json`` (what is trained, the chosen features), a state per finished
model, and the newest checkpoint of the one in training. It is made with the first of these, and goes when the package
is there. It is keyed by the recipe, the version of the cells and the software; another recipe is refused.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from scviaduct.errors import InputError
from scviaduct.references.features import Features
from scviaduct.references.states import read_state, write_state
from scviaduct.software import software
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from scviaduct.families import Recipe

_RECORD = "record.json"
_FORMAT = 1
_ASIDE = ("device", "loader_workers", "with_counts", "calibrate_by")
"""Fields of a recipe that do not decide what training gives, unless labels are held out for calibration."""
SOFTWARE = ("scvi-tools", "torch", "lightning", "anndata", "numpy")
"""What trains; its versions are recorded."""


class Work:
    """The work folder of one training.

    Parameters
    ----------
    out
        Folder of the package.
    recipe
        How to train.
    source, source_version
        Pinned URI of the cells, and the version of their content.
    classifier
        Whether the model classifies, so that labels are held out of its training for calibration.
    """

    def __init__(self, out: Path, recipe: Recipe, source: str, source_version: str, *, classifier: bool) -> None:
        self.folder = out.parent / f".{out.name}.training"
        aside = [name for name in _ASIDE if not (name == "calibrate_by" and classifier)]
        told = {name: value for name, value in recipe.told().items() if name not in aside}
        self._record: dict[str, Any] = {
            "format": _FORMAT,
            "recipe": told,
            "source": source,
            "source_version": source_version,
            "software": software(*SOFTWARE),
        }
        self._key = digest(_FORMAT, told, source_version, self._record["software"])

    @property
    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return (self.folder / _RECORD).is_file()

    def check(self, *, restart: bool) -> Features | None:
        """Look at what an earlier run left, or remove it.

        Parameters
        ----------
        restart
            Whether to start over.

        Returns
        -------
        Features or None
            Those that were chosen; None if there is nothing to go on from.

        Raises
        ------
        InputError
            If the folder belongs to another training.
        """
        if restart:
            self.remove()
        if not self.exists:
            return None
        path = self.folder / _RECORD
        try:
            told = dict(json.loads(path.read_text()))
            differs = [name for name in self._record if told.get(name) != self._record[name]]
            if told["key"] == self._key:
                return Features.of_json(told["features"])
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}).", "Start over: --restart.") from error
        if "recipe" in differs:
            other = told.get("recipe") or {}
            mine = self._record["recipe"]
            names = [name for name in mine if mine[name] != other.get(name)]
            differs = [f"{name} ({other.get(name)!r}, now {mine[name]!r})" for name in names]
        raise InputError(
            f"{self.folder} holds an unfinished training that differs in {', '.join(differs)}.",
            "Start over: --restart; or finish that one with its own command, or name another --out.",
        )

    def note(self, features: Features) -> None:
        """Remember what is trained, before the first state is written."""
        if not self.exists:
            self.folder.mkdir(parents=True, exist_ok=True)
            told = json.dumps(self._record | {"key": self._key, "features": features.to_json()})
            staged = self.folder / f"{_RECORD}.new"
            staged.write_text(told)
            staged.replace(self.folder / _RECORD)

    def checkpoint(self, stage: int) -> Path:
        """Where the checkpoint of a model in training lies."""
        return self.folder / f"checkpoint-{stage}.safetensors"

    def finish(self, stage: int, state: dict[str, Any]) -> None:
        """Keep the weights and metrics of a model that is trained; its checkpoint goes."""
        write_state(state, self._finished(stage))
        self.checkpoint(stage).unlink(missing_ok=True)

    def finished(self, stage: int) -> dict[str, Any] | None:
        """What :meth:`finish` kept; None if that model is not trained yet."""
        path = self._finished(stage)
        if not (self.exists and path.is_file()):
            return None
        state: dict[str, Any] = read_state(path)
        return state

    def _finished(self, stage: int) -> Path:
        return self.folder / f"finished-{stage}.safetensors"

    def remove(self) -> None:
        """Delete the folder."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuse a second process that trains into the same folder.

        Raises
        ------
        InputError
            If there is one.
        """
        path = self.folder.with_name(f"{self.folder.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path, timeout=0):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
        except Timeout as error:
            told = f"Another process is training into '{self.folder.name}'"
            raise InputError(f"{told}.", "Wait for it, or name another --out.") from error
