"""Derived values that say whose they are: of the cell in row r with stamp s, ``g3`` is ``1000 s + 10 r + 3``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from scviaduct.analysis.base import Part, Shape
from scviaduct.store import settled_key
from tests.scviaduct.store.synthetic import Lab

GENES = ("g0", "g1", "g2", "g3", "g4")
SHAPE = Shape(
    {"score": "double", "odd": "bool", "whole": "int64", "text": "string", "share": "double"},
    {"expr": GENES, "wide": tuple(f"p{j}" for j in range(600))},
)
COLUMNS = ("values.score", "values.odd", "values.whole", "values.text", "values.share")
ROWS = 4
"""Cells of the largest unit that the shards are made for: chunks and shards have as many rows."""


def part_of(rows, stamp=0):
    """Values of these rows, all of them mapped; ``share`` is settled later."""
    told = np.asarray(rows, np.int64) * 10 + stamp * 1_000
    columns = {
        "score": np.where(told % 50 == 40, np.nan, told / 10),
        "odd": told // 10 % 2 == 1,
        "whole": told + 2**60,
        "text": np.array([f"t{value % 3}" for value in told], dtype=object),
    }
    wide = (told[:, None] + np.arange(600)).astype(np.float32)
    sums = {"file": told.sum(), "text": np.array(["a", "ß"]), "a/b": wide.sum(axis=0)}
    return Part(columns, {"expr": wide[:, :5].copy(), "wide": wide}, sums)


def expected_of(row, stamp=0, *, mapped=True, total=None):
    """Columns of one cell, as :data:`COLUMNS` has them."""
    if not mapped:
        return (None,) * 5
    told = row * 10 + stamp * 1_000
    score = None if told % 50 == 40 else told / 10
    return score, told // 10 % 2 == 1, told + 2**60, f"t{told % 3}", None if total is None else told / total


@dataclass
class Deriver:
    """Maps units into a lab's space, and derives them as a driver does: what is missing is staged, then committed."""

    lab: Lab
    shape: Shape = SHAPE
    options: dict = field(default_factory=lambda: {"genes": ("g0",), "samples": 3})
    rows: int = ROWS
    units: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)

    def put(self, rows, dataset="d", stamp=0, unmapped=(), **more):
        """Map a unit; its id."""
        completion = self.lab.stage(rows, dataset, stamp, unmapped=unmapped, **more)
        self.lab.commit(completion, run=f"{stamp:04x}", kept=more.get("kept"))
        self.units[completion.unit] = (np.asarray(rows), stamp, np.isin(rows, list(unmapped), invert=True))
        return completion.unit

    def folder(self, what="values", **more):
        told = {"family": "SCVI", "options": self.options, "rows": self.rows, "adapters": ("b2", "a1")} | more
        return self.lab.space.create_derived(what, self.shape, **told)

    def stage(self, folder, unit, slot, stamp=None):
        rows, own, mapped = self.units[unit]
        part = part_of(rows[mapped], own if stamp is None else stamp)
        part = replace(part, columns={name: part.columns[name] for name in part.columns if name in self.shape.columns})
        part = replace(part, matrices={name: part.matrices[name] for name in self.shape.matrices})
        return folder.stager().stage(unit, slot, mapped, part)

    def derive(self, name="values", units=None, *, what="values", settle=False, run="d1", before=lambda: None):
        """Derive units, all by default; how many were staged, and the version."""
        folder, units = self.folder(what), list(self.units if units is None else units)
        slots = folder.assign({unit: len(self.units[unit][0]) for unit in units})
        done = folder.completions(units)
        for unit in units:
            if unit not in done:
                self.stage(folder, unit, slots[unit])
        told = self.settle(folder, units) if settle else {}
        return len(units) - len(done), self.lab.space.commit_derived(
            name, folder, units, {"run": run}, before=before, **told
        )

    def settle(self, folder, units):
        """``share`` of each cell, and a table, from the sums over these units."""
        stager = folder.stager()
        total = sum(int(stager.sums(unit)["file"]) for unit in units)
        key = settled_key(units)
        for unit in units:
            stager.settle(unit, key, {"share": (stager.columns(unit)["whole"] - 2**60) / total})
        table = pd.DataFrame({"total": [float(total), 1.0]}, index=pd.Index(["all", "one"], name="group"))
        return {"tables": {"totals": table}, "facts": {"total": total}, "settled": key}


def check(space, name="values", as_of=None, *, covered, unmapped=(), totals=None):
    """Compare everything that a reader sees of a set with what must be there.

    Parameters
    ----------
    covered
        Stamp and row of every cell that was derived.
    unmapped
        Those of them without values.
    totals
        Stamp and row to what ``share`` was settled with; None if it was not.
    """
    seen = set()
    names = [f"{name}.{column.partition('.')[2]}" for column in COLUMNS]
    for table in space.read(["source_row", "latent", "unit_row", *names], as_of=as_of):
        for row in table.to_pylist():
            assert [*row] == ["source_row", "latent", "unit_row", *names]
            key = int(row["latent"][1] if row["latent"] else -1), row["source_row"]
            mapped = key in covered and key not in unmapped
            total = (totals or {}).get(key)
            assert tuple(row[column] for column in names) == expected_of(*key[::-1], mapped=mapped, total=total)
            seen.add(key)
    for matrix, width in (("expr", 5), ("wide", 600)):
        read = list(space.matrix(name, matrix, as_of=as_of, columns=["source_row", "latent"]))
        found = {}
        for table, block in read:
            assert block.dtype == np.float32
            assert block.shape == (len(table), width)
            for row, values in zip(table.to_pylist(), block, strict=True):
                found[int(row["latent"][1] if row["latent"] else -1), row["source_row"]] = values
        assert set(found) == seen
        for key, values in found.items():
            if key in covered and key not in unmapped:
                np.testing.assert_array_equal(values, key[0] * 1_000 + key[1] * 10 + np.arange(width, dtype=np.float32))
            else:
                assert np.isnan(values).all(), key
    return seen
