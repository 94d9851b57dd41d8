"""Sources transcoded once into sharded, compressed, integer CSR zarr, which later runs read many times faster.

A landing is a folder. ``landing.json`` says what was landed and names the pieces that hold it; it is replaced whole, so
that a reader sees the landing before or after. Everything else is written once and never changed: ``pieces/`` (counts),
``obs/`` (cells) and ``genes/`` (gene tables), each addressed by what determines it. A landing is read as a source:
:mod:`scviaduct.landing.source`.
"""

from scviaduct.landing.folder import Landing
from scviaduct.landing.manifest import Manifest, Part, Piece
from scviaduct.landing.planning import LandingPlan, plan_landing
from scviaduct.landing.writing import Lineage, PieceJob, land_block, land_piece

__all__ = [
    "Landing",
    "LandingPlan",
    "Lineage",
    "Manifest",
    "Part",
    "Piece",
    "PieceJob",
    "land_block",
    "land_piece",
    "plan_landing",
]
