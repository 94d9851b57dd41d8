"""What a file holds, AnnData (with proteins in obsm or without) or MuData, as one obs and one list of features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.errors import SourceError
from scviaduct.sources.features import Features, Part, checked
from scviaduct.sources.layers import choose_layer
from scviaduct.sources.modalities import OTHER, canonical, chosen_layers, chosen_modalities, token
from scviaduct.sources.mucells import MuObs, cell_rows
from scviaduct.sources.obs import normal
from scviaduct.sources.ondisk import REWRITE, Frame
from scviaduct.sources.proteins import open_proteins

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scviaduct.sources.layers import Layer

_KIND_COLUMNS = ("feature_types", "modality")
"""Columns of var that say what a feature is: of 10x and scanpy, and of scvi-tools."""


@dataclass(frozen=True, slots=True)
class Container:
    """An open file.

    Attributes
    ----------
    kind
        ``AnnData`` or ``MuData``.
    obs
        Its cells.
    features
        Its features.
    pinned
        Parameters of the URI that spell the choices.
    left_out
        Modalities that are not read.
    """

    kind: str
    obs: Frame | MuObs
    features: Features
    pinned: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def open_container(root: Any, parameters: Mapping[str, str], where: str) -> Container:
    """Open what a root group holds.

    Parameters
    ----------
    root
        h5py or zarr group.
    parameters
        Of the URI: ``layer``, ``modality``, ``proteins``.
    where
        The file, for messages.

    Raises
    ------
    SourceError
        If it is neither AnnData nor MuData, or lacks what the parameters name.
    """
    if "obs" not in root:
        raise SourceError(f"{where} is not an AnnData file: it has no obs.", REWRITE)
    if "mod" in root and hasattr(root["mod"], "keys"):
        return _open_mudata(root, parameters, where)
    return _open_anndata(root, parameters, where)


def _open_anndata(root: Any, parameters: Mapping[str, str], where: str) -> Container:
    obs = Frame(root["obs"], f"obs of {where}")
    layer = choose_layer(root, parameters.get("layer"), where)
    if layer.matrix.shape[0] != len(obs):
        raise SourceError(f"{layer.name} of {where} has {layer.matrix.shape[0]} cells, its obs {len(obs)}.", REWRITE)
    pinned = {"layer": layer.name}
    modality, unselected = _modality_of(layer, parameters.get("modality"), where, pinned)
    key = parameters.get("proteins")
    if key is None:
        part = Part("", modality, layer.matrix, layer.var, f"var of {where}", layer.name, layer.why)
        return Container("AnnData", obs, Features([part], unselected), pinned)
    if "protein" in modality:
        raise SourceError(
            f"proteins={key}: var of {where} names proteins already.",
            "Leave proteins= out, or take only the genes of X: modality=rna.",
        )
    modality = modality or ("rna",) * len(layer.var)
    name = "X" if len(set(modality)) > 1 else modality[0] if modality else "X"
    part = Part(name, modality, layer.matrix, layer.var, f"var of {where}", layer.name, layer.why)
    proteins = open_proteins(root, key, len(obs), where)
    if unselected is not None:
        unselected = np.concatenate((unselected, np.zeros(len(proteins.var), np.bool_)))
    return Container("AnnData", obs, Features([part, proteins], unselected), pinned)


def _modality_of(layer: Layer, wanted: str | None, where: str, pinned: dict[str, str]) -> tuple[tuple[str, ...], Any]:
    """Modality of each gene of an AnnData file, and a mask of those that ``modality=`` leaves out."""
    kinds = _kinds(layer.var, where)
    if wanted is None:
        return tuple(canonical(kind) or (OTHER if kind else "") for kind in kinds), None
    if not kinds:
        if not canonical(wanted):
            raise SourceError(
                f"modality={wanted}: var of {where} does not say of what modality each feature is.",
                "Name the one that X is of, such as modality=atac; proteins= names those in obsm.",
            )
        pinned["modality"] = canonical(wanted)
        return (canonical(wanted),) * len(layer.var), None
    chosen = chosen_modalities(wanted, tuple(dict.fromkeys(kind for kind in kinds if kind)), f"var of {where}")
    pinned["modality"] = ",".join(token(name, modality) for name, modality in chosen.items())
    unselected = np.array([kind not in chosen for kind in kinds], np.bool_)
    return tuple(chosen.get(kind, OTHER) for kind in kinds), unselected if unselected.any() else None


def _kinds(var: Frame, where: str) -> Sequence[str]:
    """What var says that each feature is; empty if it says nothing that is known."""
    for column in _KIND_COLUMNS:
        if column in var.columns and var.is_text(column):
            values = normal(var.read(column, 0, len(var)), column, f"var of {where}").fill_null("").to_pylist()
            if any(canonical(value) for value in set(values)):
                return [str(value) for value in values]
    return ()


def _open_mudata(root: Any, parameters: Mapping[str, str], where: str) -> Container:
    if "proteins" in parameters:
        raise SourceError(
            f"proteins={parameters['proteins']}: {where} is MuData, whose proteins are a modality.",
            "Name it: modality=rna,NAME:protein.",
        )
    if int(root.attrs.get("axis", 0)) != 0:
        raise SourceError(
            f"{where} is MuData of modalities that share genes (axis={root.attrs['axis']}), not cells.",
            "Write each as a file of its own: mdata.mod[NAME].write_h5ad('NAME.h5ad'); give their folder.",
        )
    there = _names(root["mod"])
    modalities = chosen_modalities(parameters.get("modality"), there, where)
    layers = chosen_layers(parameters.get("layer"), modalities, where)
    whole = Frame(root["obs"], f"obs of {where}")
    parts, own = [], {}
    for name, modality in modalities.items():
        part, frame = _open_modality(root, name, modality, layers.get(name), whole, where)
        parts.append(part)
        own[name] = frame, part.at
    pinned = {
        "modality": ",".join(token(name, modality) for name, modality in modalities.items()),
        "layer": ",".join(f"{part.name}:{part.layer}" for part in parts),
    }
    left_out = tuple(name for name in there if name not in modalities)
    return Container("MuData", MuObs(whole, own), Features(parts), pinned, left_out)


def _names(held: Any) -> tuple[str, ...]:
    """Modalities in the order that MuData gives them, which is not that of HDF5."""
    names = tuple(held.keys())
    told = [name.decode() if isinstance(name, bytes) else str(name) for name in held.attrs.get("mod-order", ())]
    return tuple(told) if sorted(told) == sorted(names) else names


def _open_modality(
    root: Any, name: str, modality: str, layer_wanted: str | None, whole: Frame, where: str
) -> tuple[Part, Frame]:
    group, place = root["mod"][name], f"modality {name} of {where}"
    if "obs" not in group or "var" not in group:
        raise SourceError(f"{place} is not AnnData: it has no obs or no var.", "Write it with a current mudata.")
    own = Frame(group["obs"], f"obs of {place}")
    layer = choose_layer(group, layer_wanted, place)
    for what in (name, layer.name):
        if "," in what or ":" in what:
            raise SourceError(
                f"'{what}' in {where} holds a comma or a colon, which a URI could not tell from its own.",
                "Rename it in the file.",
            )
    at = cell_rows(root, name, whole, own, where)
    named = (modality,) * len(layer.var)
    part = Part(name, named, layer.matrix, layer.var, f"var of {place}", layer.name, layer.why, at)
    return checked(part, layer.matrix.shape, len(own), place), own
