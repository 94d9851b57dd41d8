"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

SOURCE_HELP = """\
Where cells come from (quote it; values are percent-encoded):\n
- `census:2025-11-08?organism=homo_sapiens&filter=tissue_general == 'lung'` (`uri=` for a mirror)\n
- `soma:PATH_OR_URL?measurement=RNA&layer=raw&filter=...` (`measurement=RNA,ATAC` for several)\n
- `cells.h5ad`, `cells.h5mu`, `cells.zarr`, a folder or a glob of them, local or by URL\n
- `cells.h5mu?modality=rna,protein&layer=rna:counts,protein:raw` (all modalities of a usual name by default)\n
- `landing:PATH?filter=...`, or the folder itself: what `scviaduct land` wrote\n
- `cells.h5ad?proteins=protein_expression` (proteins in obsm), `peaks.h5ad?modality=atac` (what X is)
"""
Source = Annotated[str, Argument(metavar="SOURCE", help=SOURCE_HELP)]
StorePath = Annotated[str, Argument(metavar="STORE", help="Folder of the store.")]
Ref = Annotated[str, Option("--reference", help="Registered name of the reference, or path of a package.")]
RefArgument = Annotated[str, Argument(metavar="NAME", help="Registered name, or path of a package.")]
SpaceOf = Annotated[
    str | None, Option("--reference", help="Space of the store, by its reference; needed if the store has several.")
]
Json = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, Option("--quiet", help="No progress and no notices.")]
Where = Annotated[
    str | None, Option(help="Keep cells for which this holds, e.g. \"tissue = 'lung' and probability >= 0.9\".")
]
AsOf = Annotated[int | None, Option(help="Read this version instead of the newest.")]
BatchKey = Annotated[str | None, Option(help="obs column of the query that plays the reference's batch.")]
SampleKey = Annotated[str | None, Option(help="obs column of the query that plays the reference's sample (mrvi).")]
SurgeryMode = Annotated[
    str | None,
    Option(
        help="What is done about new batches, samples and covariates: auto fits an adapter for each that the encoder"
        " reads; decoder also where only decoding does; off. [default: auto]"
    ),
]
Accept = Annotated[str | None, Option(help="Preflight findings to override, by name, comma-separated.")]


def listed(text: str | None) -> tuple[str, ...]:
    """Comma-separated values, without blanks."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
