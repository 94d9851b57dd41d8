"""The first layer of an encoder on a device, from counts as they travelled: genes' weights gathered and summed.

Where Triton is installed, one kernel looks ``log1p`` up, gathers, sums, and adds bias and covariates
(:mod:`scviaduct.families.gather_kernel`). Elsewhere PyTorch does the same in a dozen steps by ``embedding_bag``.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.families.lane import Sent
    from scviaduct.families.network import Network

type Kernel = Literal["triton", "torch"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a program of the kernel does.

    Attributes
    ----------
    columns
        Hidden units that it sums.
    genes
        Genes that it gathers side by side.
    warps
        Of 32 threads each.
    """

    columns: int = 64
    genes: int = 8
    warps: int = 1


def kernel_of(device: torch.device) -> tuple[Kernel, str]:
    """Which first layer a device runs, and why not the kernel; an empty reason where it does."""
    if device.type != "cuda":
        return "torch", "not a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "torch", "Triton is not installed"
    if not (
        os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    ):  # its launcher is compiled on the spot
        return "torch", "Triton needs a C compiler, and there is neither CC, gcc nor clang"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (7, 0):
        return "torch", f"Triton needs compute capability 7.0, and the GPU has {capability[0]}.{capability[1]}"
    return "triton", ""


class FirstLayer:
    """The first layer of a network: bias and categorical covariates included, neither norm nor activation.

    Parameters
    ----------
    network
        On the device.
    kernel
        What runs it.
    dtype
        What the weights are held as; sums are float32.
    """

    def __init__(self, network: Network, kernel: Kernel, dtype: torch.dtype = torch.float32) -> None:
        first = network.layers[0]
        self.n_genes, self.kernel = network.n_genes, kernel
        self.shape = Shape()
        self._log = network.log_variational
        self._weight = first.weight[:, : network.n_genes].T.to(dtype).contiguous()
        self._tell(network)

    def _tell(self, network: Network) -> None:
        first = network.layers[0]
        self._bias = first.bias
        tables = {i: table for i, table in enumerate(first.tables) if table is not None}
        offsets = itertools.accumulate((len(table) for table in tables.values()), initial=0)
        self._read = list(zip(tables, offsets, strict=False))
        self._table = torch.cat(list(tables.values())) if tables else first.bias[None]

    def reading(self, network: Network) -> FirstLayer:
        """The layer of a network with further categories; the genes' weights are shared."""
        other = FirstLayer.__new__(FirstLayer)
        vars(other).update(vars(self))
        other._tell(network)  # noqa: SLF001
        return other

    def rows(self, codes: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Where each cell's rows lie in the tables, which lie behind each other.

        Parameters
        ----------
        codes
            Per categorical covariate, batch first: int32 of shape ``(n_rows,)``.

        Returns
        -------
        torch.Tensor
            int32, shape ``(n_covariates, n_rows)``, of the covariates that the layer reads; None if it reads none.
        """
        found = [codes[i] + offset for i, offset in self._read if i < len(codes)]
        return torch.stack(found) if found else None

    @cached_property
    def _values(self) -> torch.Tensor:
        """What the layer multiplies a whole number with, float32 of shape ``(65536,)``."""
        whole = torch.arange(1 << 16, dtype=torch.float32, device=self._weight.device)
        return torch.log1p(whole) if self._log else whole

    def __call__(self, sent: Sent, codes: torch.Tensor | None, out: torch.Tensor) -> None:
        """Write the layer's sums for a piece.

        Parameters
        ----------
        sent
            The piece. Counts that travelled as float32 are overwritten by their logarithm.
        codes
            Those of :meth:`rows` of the piece's cells.
        out
            float32, shape ``(n_cells, n_hidden)``, contiguous.
        """
        run = self._gathered if self.kernel == "triton" else self._bagged
        run(sent, codes, out)

    def _gathered(self, sent: Sent, codes: torch.Tensor | None, out: torch.Tensor) -> None:
        from scviaduct.families.gather_kernel import gather_sum

        (cells, hidden), shape = out.shape, self.shape
        whole = sent.counts.dtype != torch.float32
        counts = sent.counts if whole or not self._log else torch.log1p(sent.counts)
        gather_sum[cells, -(-hidden // shape.columns)](
            *(sent.pointers, sent.genes, counts, self._values, self._weight, self._bias, self._table),
            *(sent.pointers if codes is None else codes, out, hidden, 0 if codes is None else codes.stride(0)),
            LOOKED_UP=whole,
            COVARIATES=0 if codes is None else len(codes),
            COLUMNS=shape.columns,
            ROWS=shape.genes,
            num_warps=shape.warps,
            enable_fp_fusion=True,  # said, because Triton's default is about to change, and with it a cell's bits
        )

    def _bagged(self, sent: Sent, codes: torch.Tensor | None, out: torch.Tensor) -> None:
        counts = sent.counts.float()
        values = torch.log1p(counts) if self._log else counts
        bags = nn.functional.embedding_bag(
            sent.genes.int(),
            self._weight,
            sent.pointers,
            mode="sum",
            per_sample_weights=values.to(self._weight.dtype),
            include_last_offset=True,
        )
        torch.add(bags, self._bias, out=out)
        for code in () if codes is None else codes:
            out += self._table[code]
