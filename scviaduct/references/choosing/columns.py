"""What obs columns are called, and which of them are labels, batches, samples or perturbations.

A column is known by its name and by how many values it has; what the values of a label column are is never used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from scviaduct.values import ColumnSummary, Scan

LABELS = (
    *("cell_type", "celltype", "cell_types", "celltypes", "cell_type_name", "author_cell_type", "cell_annotation"),
    *("annotation", "annotations", "final_annotation", "cell_label", "cell_labels", "cell_type_broad", "cell_subtype"),
    *("ann_finest_level", "cell_ontology_class", "cell_identity", "cell_type_ontology_term_id", "labels", "label"),
)
"""Usual names of label columns, the preferred first."""
SAMPLES = (
    *("donor_id", "donor", "patient_id", "patient", "individual", "individual_id", "subject_id", "subject"),
    *("participant", "participant_id", "mouse_id", "mouse", "animal_id", "animal"),
)
"""Names that say that every value is a donor."""
UNSURE_SAMPLES = ("sample_id", "sample", "biosample_id", "biosample", "specimen", "orig_ident", "library_id")
"""Names that may mean a donor, and as well a tissue piece, a library or a lane."""
BATCHES = (
    *("batch", "batch_id", "batch_key", "dataset_id", "dataset", "study", "study_id", "library_id", "library"),
    *("sample_id", "sample", "orig_ident", "channel", "lane", "run", *SAMPLES),
    *("assay", "technology", "tech", "platform", "chemistry", "suspension_type"),
)
"""Usual names of batch columns: batch and dataset before library, donor and technology."""
PERTURBATIONS = (
    *("perturbation", "perturbations", "perturbation_name", "target_gene", "gene_target", "guide_target", "guide"),
    *("guide_id", "guide_identity", "grna", "grna_id", "sgrna", "sgrna_id", "treatment", "drug", "compound"),
    *("product_name", "cytokine", "stimulation", "stim", "condition"),
)
"""Usual names of columns that say what was done to a cell."""
CONDITIONS = (
    *("disease", "condition", "diagnosis", "disease_status", "status", "treatment", "group", "genotype", "phenotype"),
    *("severity", "stage", "timepoint", "time_point", "development_stage", "age_group", "sex"),
)
"""Usual names of columns that say what sets samples apart."""
ORGANISMS = ("organism", "species", "organism_ontology_term_id")
TISSUES = ("tissue_general", "tissue", "organ")

_UNTOLD = {
    *("", "unknown", "unassigned", "unlabeled", "unlabelled", "unannotated", "undefined", "undetermined", "nan"),
    *("na", "none", "notavailable", "notassigned", "ambiguous", "multiplet", "doublet"),
}
_CONTROL = re.compile(
    r"(nontarget(ing)?|nontargetingcontrol|nt|ntc|negctrl|negativecontrol|scrambled?|safetarget(ing)?"
    r"|control|ctrl|ctl|vehicle|dmso|pbs|mock|untreated|unstimulated|unperturbed)(g|guide|grna|sgrna)?\d*"
)
MIN_GROUP = 10
"""Cells that a batch has on average, and a label or a control at least, for its column to be taken."""
MIN_LABELLED = 0.1
"""Share of the cells that have a label, for a classifier to be trained on them."""


@dataclass(frozen=True, slots=True)
class Column:
    """An obs column in a role.

    Attributes
    ----------
    name
        As in obs.
    values
        Value to number of cells, without those that mean that nothing is known.
    missing
        Cells without a value.
    untold
        Values that mean that nothing is known, such as ``unassigned``, to number of cells; the most frequent first.
    controls
        Values that are controls, of a column of perturbations.
    sure
        False where the name does not say that this is its role.
    """

    name: str
    values: Mapping[str, int]
    missing: int = 0
    untold: Mapping[str, int] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    sure: bool = True

    @property
    def told(self) -> int:
        """Cells with a value that says something."""
        return sum(self.values.values())

    @property
    def lacking(self) -> int:
        """Cells without such a value."""
        return self.missing + sum(self.untold.values())

    @property
    def in_control(self) -> int:
        """Cells of the controls."""
        return sum(self.values[name] for name in self.controls)


def plain(name: str) -> str:
    """A column's name without the modality that MuData puts before it, in small letters joined by underscores."""
    return re.sub(r"[.\- ]+", "_", name.rpartition(":")[2].strip().lower())


def is_untold(value: str) -> bool:
    """Whether a value means that nothing is known."""
    return _letters(value) in _UNTOLD


def is_control(value: str) -> bool:
    """Whether a value means that nothing was done to the cell: ``non-targeting``, ``NTg7``, ``DMSO``."""
    return _CONTROL.fullmatch(_letters(value)) is not None


def _letters(value: str) -> str:
    return re.sub(r"[^a-z0-9]", "", value.lower())


def named(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of the columns that have one of the names, in the order of the names."""
    there: dict[str, str] = {}
    for column in columns:
        there.setdefault(plain(column), column)
    return [there[name] for name in names if name in there]


def candidates(columns: Sequence[str]) -> list[str]:
    """obs columns that may have a role; only these are summarised."""
    roles = (LABELS, BATCHES, SAMPLES, UNSURE_SAMPLES, PERTURBATIONS, CONDITIONS, ORGANISMS, TISSUES)
    return list(dict.fromkeys(column for role in roles for column in named(columns, role)))


def columns_of(scan: Scan, names: Sequence[str]) -> list[Column]:
    """Columns of a role that every file has and that hold categories, in the order of the names."""
    there = [column for column in scan.columns if column not in scan.missing]
    found = [(column, scan.columns[column]) for column in named(there, names)]
    return [_column(name, summary) for name, summary in found if summary.counts and not summary.truncated]


def _column(name: str, summary: ColumnSummary) -> Column:
    values = {value: count for value, count in summary.counts.items() if count and not is_untold(value)}
    untold = {value: count for value, count in summary.counts.items() if count and is_untold(value)}
    ordered = dict(sorted(untold.items(), key=lambda item: -item[1]))
    return Column(name, values, summary.nulls, ordered)


def labels_of(scan: Scan) -> list[Column]:
    """Label columns with at least two labels, and not one of its own for every other cell."""
    found = columns_of(scan, LABELS)
    return [column for column in found if len(column.values) > 1 and column.told >= MIN_GROUP * len(column.values)]


def complete_enough(labels: Column, cells: int) -> bool:
    """Whether a classifier can be trained: labels on a share of the cells, and two of them on enough."""
    frequent = sum(count >= MIN_GROUP for count in labels.values.values())
    return labels.told >= MIN_LABELLED * cells and frequent > 1


def batches_of(scan: Scan) -> list[Column]:
    """Batch columns, those of at least two values and enough cells in each first."""
    found = [column for column in columns_of(scan, BATCHES) if column.values]
    return sorted(found, key=lambda column: not splits(column))


def splits(column: Column) -> bool:
    """Whether a column cuts the cells into batches."""
    return len(column.values) > 1 and column.told >= MIN_GROUP * len(column.values)


def samples_of(scan: Scan) -> list[Column]:
    """Columns of samples, those whose name says that they are donors first."""
    sure = [column for column in columns_of(scan, SAMPLES) if splits(column)]
    unsure = [column for column in columns_of(scan, UNSURE_SAMPLES) if splits(column)]
    return sure + [Column(c.name, c.values, c.missing, c.untold, (), sure=False) for c in unsure]


def perturbations_of(scan: Scan) -> list[Column]:
    """Columns of perturbations; those with a control first, and of these the one with the fewest controls."""
    found = []
    for c in columns_of(scan, PERTURBATIONS):
        controls = tuple(value for value in c.values if is_control(value))
        if len(c.values) > 1:
            found.append(Column(c.name, c.values, c.missing, c.untold, controls))
    return sorted(found, key=lambda column: (not has_control(column), len(column.controls)))


def has_control(column: Column) -> bool:
    """Whether there are enough control cells, and enough others."""
    return column.in_control >= MIN_GROUP and column.told - column.in_control >= MIN_GROUP
