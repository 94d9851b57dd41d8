"""One module per model family, behind one small interface."""

from scviaduct.errors import UnsupportedModelError
from scviaduct.families.base import Covariates, Encoded, Encoder, Facts, Family
from scviaduct.families.scanvi import ScanviFamily
from scviaduct.families.scvi import ScviFamily

FAMILIES: dict[str, Family] = {found.name: found for found in (ScviFamily(), ScanviFamily())}
"""Name of the class, as scvi-tools saves it, to the family."""
_LATER = ("MRVI", "TOTALVI", "MULTIVI", "PEAKVI", "ContrastiveVI")


def family(name: str) -> Family:
    """The family of a model class, its name in any case.

    Raises
    ------
    UnsupportedModelError
        If it is not one that is mapped here.
    """
    for known, found in FAMILIES.items():
        if known.lower() == name.lower():
            return found
    later = " It comes in a later version." if name.upper() in map(str.upper, _LATER) else ""
    raise UnsupportedModelError(
        f"Models of class '{name}' are not mapped here.{later}", f"Known: {', '.join(FAMILIES)}."
    )


__all__ = ["FAMILIES", "Covariates", "Encoded", "Encoder", "Facts", "Family", "family"]
