"""Every latent that the store's first column of it leaves out, and how sure the encoder is of the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, override

from scviaduct.analysis.base import Output, Part, Shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from scviaduct.analysis.base import Analysis, Cells
    from scviaduct.families.base import Facts

VARIANCE = "variance"
"""Matrix of the posterior's variance."""


@dataclass(frozen=True, slots=True)
class LatentsOptions:
    """Nothing is to be told."""


class Latents(Output):
    """Further latents of a family under their own names, and the posterior's variance of the first.

    MRVI gives ``z``, ContrastiveVI ``salient``, MULTIVI of several modalities ``expression``, ``accessibility`` and
    ``protein``. ``variance`` is that of the normal posterior in the space of :attr:`Encoded.location`: of a
    logistic-normal latent, before the softmax.
    """

    name = "latents"
    families = ("SCVI", "SCANVI", "TOTALVI", "MULTIVI", "PEAKVI", "POISSONVI", "MRVI", "ContrastiveVI")
    about = "further latents of the reference, and the variance of the first"
    options = LatentsOptions

    @override
    def shape(self, facts: Facts, options: LatentsOptions) -> Shape:
        sizes = dict(list(facts.latent_sizes.items())[1:]) | {VARIANCE: facts.n_latent}
        return Shape(matrices={name: tuple(f"z{i}" for i in range(size)) for name, size in sizes.items()})

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: LatentsOptions) -> Part:
        return Part(matrices={**cells.encoded.others, VARIANCE: cells.encoded.variance})


ANALYSES: tuple[Analysis, ...] = (Latents(),)
