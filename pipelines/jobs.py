"""Job files: a ``map`` run written down, to be kept under version control and submitted to a cluster."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scviaduct.errors import InputError

SHARD_CELLS = 16_384
"""Cells of a shard unless said otherwise: at 700 counts a cell a block takes 92 MB."""

_EXAMPLE = 'source = "cells.h5ad"\nreference = "pbmc"\nstore = "atlas-store"\nkeep_obs = ["tissue", "disease"]'


class MapJob(BaseModel):
    """Everything that a ``map`` run can be told. The command line's flags have the same names and win."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[str, Field(description="URI of the query cells")]
    reference: Annotated[str, Field(description="registered name of the reference, or path of a package")]
    store: Annotated[str, Field(description="folder of the store; made if absent")]
    keep_obs: Annotated[tuple[str, ...], Field(description="obs columns to keep beside the labels")] = ()
    shard_cells: Annotated[int, Field(ge=1, description="cells of a shard")] = SHARD_CELLS
    accept: Annotated[tuple[str, ...], Field(description="preflight findings to override")] = ()
    batch_key: Annotated[str, Field(description="obs column that plays the reference's batch")] = ""
    ambiguous_entropy: Annotated[float, Field(ge=0, description="entropy (nats) above which a label is ambiguous")] = (
        1.0
    )
    neighbors: Annotated[int, Field(ge=1, description="k of the label transfer without a classifier")] = 15
    engine: Annotated[Literal["ray", "inline"], Field(description="ray, or inline: in this process")] = "ray"
    address: Annotated[str | None, Field(description="Ray cluster: local, auto or HOST:PORT")] = None
    actors: Annotated[int | None, Field(ge=1, description="mapping actors")] = None
    readers: Annotated[int | None, Field(ge=1, description="reader tasks at a time")] = None
    gpus_per_actor: Annotated[float | None, Field(gt=0, description="GPU share of an actor")] = None

    @classmethod
    def of(cls, file: str | Path | None, flags: dict[str, Any]) -> MapJob:
        """Combine a job file with flags; a flag that is None was not given.

        Raises
        ------
        InputError
            If the file cannot be read, has an unknown key, or a value is missing or of the wrong kind.
        """
        told = {} if file is None else _load(Path(file))
        told |= {key: value for key, value in flags.items() if value is not None}
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            raise InputError(_explain(error, file), f"A job file reads:\n{_EXAMPLE}") from None


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"Job file '{path}' cannot be read: {error.strerror}.", "Give --job a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"Job file '{path}' is not TOML: {error}.", f"It reads:\n{_EXAMPLE}") from error


def _explain(error: ValidationError, file: str | Path | None) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            close = get_close_matches(key, MapJob.model_fields, n=1)
            lines.append(f"unknown key '{key}'" + (f" (do you mean '{close[0]}'?)" if close else ""))
        elif item["type"] == "missing":
            lines.append(f"'{key}' is missing")
        else:
            lines.append(f"'{key}' is {item['input']!r}: {item['msg'].lower()}")
    return f"The job{f' of {file}' if file else ''} cannot run: {'; '.join(lines)}."
