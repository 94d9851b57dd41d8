"""Job files: a ``map`` or ``train`` run written down, to be kept under version control and submitted to a cluster."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from scviaduct.errors import InputError

SHARD_CELLS = 16_384
"""Cells of a shard unless said otherwise: at 700 counts a cell a block takes 92 MB."""


class _Job(BaseModel):
    """A run written down. The command line's flags have the same names and win."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    example: ClassVar[str]

    @classmethod
    def of(cls, file: str | Path | None, flags: dict[str, Any]) -> Self:
        """Combine a job file with flags; a flag that is None was not given.

        Raises
        ------
        InputError
            If the file cannot be read, has an unknown key, or a value is missing or of the wrong kind.
        """
        told = {} if file is None else _load(Path(file), cls.example)
        told |= {key: value for key, value in flags.items() if value is not None}
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            known = [field.alias or name for name, field in cls.model_fields.items()]
            raise InputError(_explain(error, file, known), f"A job file reads:\n{cls.example}") from None


class MapJob(_Job):
    """Everything that a ``map`` run can be told. The command line's flags have the same names and win."""

    example = 'source = "cells.h5ad"\nreference = "pbmc"\nstore = "atlas-store"\nkeep_obs = ["tissue", "disease"]'

    source: Annotated[str, Field(description="URI of the query cells")]
    reference: Annotated[
        str | Annotated[tuple[str, ...], Field(min_length=1)],
        Field(description="registered name of the reference, or path of a package; or a list of them"),
    ]
    store: Annotated[str, Field(description="folder of the store; made if absent")]
    keep_obs: Annotated[tuple[str, ...], Field(description="obs columns to keep beside the labels")] = ()
    shard_cells: Annotated[int, Field(ge=1, description="cells of a shard")] = SHARD_CELLS
    accept: Annotated[tuple[str, ...], Field(description="preflight findings to override")] = ()
    batch_key: Annotated[str, Field(description="obs column that plays the reference's batch")] = ""
    sample_key: Annotated[str, Field(description="obs column that plays the reference's sample (MRVI)")] = ""
    ambiguous_entropy: Annotated[float, Field(ge=0, description="entropy (nats) above which a label is ambiguous")] = (
        1.0
    )
    neighbors: Annotated[int, Field(ge=1, description="k of the label transfer without a classifier")] = 15
    surgery: Annotated[Literal["auto", "decoder", "off"], Field(description="auto, decoder or off")] = "auto"
    surgery_cells: Annotated[int | None, Field(ge=1, description="cells of a batch to fit its adapter on")] = None
    surgery_epochs: Annotated[int | None, Field(ge=1, description="epochs of an adapter, at most")] = None
    background: Annotated[tuple[str, ...], Field(description="controls of a ContrastiveVI's query: column=value")] = ()
    engine: Annotated[Literal["ray", "inline"], Field(description="ray, or inline: in this process")] = "ray"
    address: Annotated[str | None, Field(description="Ray cluster: local, auto or HOST:PORT")] = None
    actors: Annotated[int | None, Field(ge=1, description="mapping actors")] = None
    readers: Annotated[int | None, Field(ge=1, description="reader tasks at a time")] = None
    gpus_per_actor: Annotated[float | None, Field(gt=0, description="GPU share of an actor")] = None
    land: Annotated[str | None, Field(description="folder of a landing to write while the cells are read")] = None


def _texts(value: Any) -> Any:
    """Model arguments as the command line gives them: TOML's numbers and truth values become text."""
    return (
        {key: item if isinstance(item, str) else repr(item) for key, item in value.items()}
        if isinstance(value, dict)
        else value
    )


Texts = Annotated[dict[str, str], BeforeValidator(_texts)]


class TrainJob(_Job):
    """Everything that a ``train`` run can be told. The command line's flags have the same names and win."""

    example = (
        'source = "cells.h5ad"\nfamily = "scanvi"\nout = "lung-v1"\nlabels_key = "cell_type"\nbatch_key = "donor"\n\n'
        "[settings]\nn_latent = 20\n\n[plan]\nlr = 0.0005"
    )

    source: Annotated[str, Field(description="URI of the training cells")]
    family: Annotated[str, Field(description="name of the model's class, in any case")]
    out: Annotated[str, Field(description="folder of the package; new or empty")]
    recipe: Annotated[str, Field(description="default, scarches or census")] = "default"
    start: Annotated[str | None, Field(alias="from", description="reference that training starts from")] = None
    labels_key: Annotated[str | None, Field(description="obs column of labels")] = None
    unlabeled_category: Annotated[str | None, Field(description="label that means none: unknown")] = None
    samples_per_label: Annotated[int | None, Field(description="labelled cells per label and epoch")] = None
    batch_key: Annotated[str | None, Field(description="obs column of batches")] = None
    sample_key: Annotated[str | None, Field(description="obs column of samples")] = None
    panel_key: Annotated[str | None, Field(description="obs column of protein panels")] = None
    background: Annotated[tuple[str, ...], Field(description="cells of the background, as column=value")] = ()
    layer: Annotated[str | None, Field(description="where raw counts are")] = None
    categorical_covariates: Annotated[tuple[str, ...], Field(description="obs columns")] = ()
    continuous_covariates: Annotated[tuple[str, ...], Field(description="obs columns")] = ()
    size_factor_key: Annotated[str | None, Field(description="obs column of size factors")] = None
    genes: Annotated[int | None, Field(description="highly variable genes; 0 for all; 2000")] = None
    min_cells_per_peak: Annotated[float | None, Field(description="share of cells with a peak; 0.01")] = None
    epochs: Annotated[int | None, Field(description="epochs of the model")] = None
    scanvi_epochs: Annotated[int | None, Field(description="epochs of a SCANVI after its SCVI")] = None
    batch_size: Annotated[int | None, Field(description="cells of a mini-batch; 128")] = None
    train_size: Annotated[float | None, Field(description="share of the cells to train on; 0.9")] = None
    validation_size: Annotated[float | None, Field(description="share of the cells to validate on")] = None
    early_stopping: Annotated[bool | None, Field(description="end when validation no longer improves")] = None
    patience: Annotated[int | None, Field(description="epochs without improvement before the end")] = None
    monitor: Annotated[str | None, Field(description="metric that must improve")] = None
    device: Annotated[str | None, Field(description="auto, cpu or cuda")] = None
    precision: Annotated[str | None, Field(description="32-true, 16-mixed or bf16-mixed")] = None
    loader_workers: Annotated[int | None, Field(description="processes that load mini-batches; 0")] = None
    seed: Annotated[int | None, Field(description="seed of everything random; 0")] = None
    calibrate_by: Annotated[str | None, Field(description="obs column of held-out groups, or none")] = None
    with_counts: Annotated[bool | None, Field(description="keep the counts in the minified data")] = None
    settings: Annotated[Texts, Field(description="model arguments")] = {}
    plan: Annotated[Texts, Field(description="arguments of the training plan")] = {}
    checkpoint_minutes: Annotated[float, Field(description="minutes between checkpoints")] = 10.0
    tensorboard: Annotated[str | None, Field(description="folder for TensorBoard")] = None
    out_of_core: Annotated[Literal["auto", "yes", "no"], Field(description="whether counts stay on disk")] = "auto"
    engine: Annotated[Literal["inline", "ray"] | None, Field(description="inline: in this process; ray")] = None
    address: Annotated[str | None, Field(description="Ray cluster: local, auto or HOST:PORT")] = None
    cpus: Annotated[int | None, Field(ge=1, description="CPUs of each process that trains")] = None
    gpus: Annotated[int | None, Field(ge=1, description="processes that train together, a GPU each")] = None
    tune: Annotated[int | None, Field(ge=1, description="trials of a search for hyperparameters")] = None
    tune_metric: Annotated[Literal["loss", "scib"], Field(description="what the best trial is best by")] = "loss"
    tune_epochs: Annotated[int | None, Field(ge=1, description="epochs of a trial at most")] = None
    search: Annotated[tuple[str, ...], Field(description="what is searched, as NAME=VALUES")] = ()


def _load(path: Path, example: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Job file '{path}' cannot be read: {error.strerror}.", "Give --job a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"Job file '{path}' is not TOML: {error}.", f"It reads:\n{example}") from error


def _explain(error: ValidationError, file: str | Path | None, known: list[str]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            close = get_close_matches(key, known, n=1)
            lines.append(f"unknown key '{key}'" + (f" (do you mean '{close[0]}'?)" if close else ""))
        elif item["type"] == "missing":
            lines.append(f"'{key}' is missing")
        else:
            lines.append(f"'{key}' is {item['input']!r}: {item['msg'].lower()}")
    return f"The job{f' of {file}' if file else ''} cannot run: {'; '.join(lines)}."
