"""CELLxGENE Census releases: live, from a mirror, or a local collection of the same schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cellxgene_census
import requests
import tiledbsoma

from scviaduct.errors import SourceError
from scviaduct.sources.soma import SomaSource
from scviaduct.sources.somacounts import SOMA_ERRORS, buffers
from scviaduct.sources.unreadable import NothingThereError, reading, refused
from scviaduct.sources.uri import local_path, quoted_url

if TYPE_CHECKING:
    from scviaduct.sources.uri import Address

KEY = "observation_joinid"
DATASET = "dataset_id"
_MOVING = ("latest", "stable")


class CensusSource(SomaSource):
    """One organism of a Census release.

    ``census:latest`` and ``census:stable`` are resolved once; the canonical URI names the release. A live release is
    pinned by its date, because a release never changes. With ``uri=`` nobody vouches for that: the version is the
    release's name and a fingerprint of the collection.

    Parameters
    ----------
    address
        Decoded; the location is the release.

    Raises
    ------
    SourceError
        If the release, the organism or the collection is not there, or the release directory cannot be reached.
    """

    def _open_experiment(self, address: Address) -> Any:
        self._mirror = address.parameters.get("uri")
        self._organism = address.parameters.get("organism", "homo_sapiens")
        context = cellxgene_census.get_default_soma_context(tiledb_config=buffers())
        if self._mirror:
            self._release, collection = address.location, self._open_mirror(self._mirror, context)
        else:
            self._release, collection = _open_release(address.location, context)
        self._collection = self._handles.enter_context(collection)
        self._where = quoted_url(self._mirror) if self._mirror else f"census:{self._release}"
        if "census_data" not in collection:
            raise SourceError(
                f"{self._where} is not a Census: it has no census_data.", "Write soma:PATH for another experiment."
            )
        if self._mirror and self._release in _MOVING:
            self._release = _build_date(collection, self._where)
        organisms = tuple(collection["census_data"].keys())
        if self._organism not in organisms:
            raise SourceError(
                f"{self._where} has no organism '{self._organism}'.", f"There are: {', '.join(sorted(organisms))}."
            )
        return collection["census_data"][self._organism]

    @staticmethod
    def _open_mirror(mirror: str, context: Any) -> Any:
        try:
            return cellxgene_census.open_soma(uri=str(local_path(mirror) or mirror), context=context)
        except (*SOMA_ERRORS, KeyError) as error:
            kind = NothingThereError if isinstance(error, tiledbsoma.DoesNotExistError) else SourceError
            raise kind(
                f"No Census collection opens at {quoted_url(mirror)} ({str(error).partition(chr(10))[0]}).",
                "Check uri=, the folder that holds census_info and census_data.",
            ) from error

    def _namespace(self, measurement: str) -> str:
        return f"census:{self._organism}" if measurement == "RNA" else f"census:{self._organism}#{measurement}"

    def _open_arrays(self, experiment: Any, address: Address) -> Address:
        for column in (KEY, DATASET):
            if column not in experiment.obs.schema.names:
                raise SourceError(
                    f"{self._where} has no obs column '{column}'.",
                    "Name a release of 2024 or later, or open it as soma:PATH with key= and dataset=.",
                )
        spelled = super()._open_arrays(experiment, address)
        # The schema of a Census names both, so they are no choice and no parameter.
        return spelled.pinned(key=None, dataset=None, organism=self._organism).at(self._release)

    def _pin(self, address: Address) -> tuple[str, Address]:
        if not self._mirror:
            return self._release, address
        version, pinned = super()._pin(address)
        return f"{self._release}+{version}", pinned

    def dataset_versions(self) -> dict[str, str]:
        """``dataset_version_id`` of each dataset; empty where the collection does not say."""
        return self._told("datasets", "dataset_id", "dataset_version_id")

    def schema_version(self) -> str:
        """``census_schema_version``: how the release was made of its datasets; empty where it does not say."""
        return self._told("summary", "label", "value").get("census_schema_version", "")

    def _told(self, name: str, key: str, value: str) -> dict[str, str]:
        """Two columns of a table of ``census_info``."""
        if "census_info" not in self._collection or name not in self._collection["census_info"]:
            return {}
        frame = self._collection["census_info"][name]
        if not {key, value} <= {*frame.schema.names}:
            return {}
        with refused(), reading(f"census_info/{name} of {self._where}", SOMA_ERRORS):
            table = frame.read(column_names=[key, value]).concat()
        return dict(zip(table[key].to_pylist(), table[value].to_pylist(), strict=True))

    def describe(self) -> dict[str, str]:
        """See :meth:`~scviaduct.sources.source.Source.describe`."""
        return {**super().describe(), "kind": "census", "release": self._release, "organism": self._organism}


def _open_release(release: str, context: Any) -> tuple[str, Any]:
    """Release date of a name, and the open collection."""
    try:
        date = str(cellxgene_census.get_census_version_description(release)["release_build"])
        return date, cellxgene_census.open_soma(census_version=date, context=context)
    except ValueError as error:
        raise SourceError(
            f"There is no Census release '{release}', or it was retracted ({error}).",
            "List the releases: cellxgene_census.get_census_version_directory().",
        ) from error
    except (requests.RequestException, tiledbsoma.SOMAError, RuntimeError) as error:
        raise SourceError(
            f"Census release '{release}' cannot be reached ({str(error).partition(chr(10))[0]}).",
            "Check the network, or name a mirror or a local copy: census:RELEASE?uri=PATH.",
        ) from error


def _build_date(collection: Any, where: str) -> str:
    """What the collection itself says its release is."""
    summary = collection["census_info"]["summary"].read().concat()
    told = dict(zip(summary["label"].to_pylist(), summary["value"].to_pylist(), strict=True))
    if "census_build_date" not in told:
        raise SourceError(f"{where} does not say which release it is.", "Name it: census:2025-11-08?uri=PATH.")
    return str(told["census_build_date"])
