"""Fitting what a reference does not know of a query batch: scArches surgery, of one batch and nothing else.

scArches (Lotfollahi et al., Nature Biotechnology 2022) widens a model by columns for new categories and trains these
alone. scvi-tools (1.5.1) does so for all batches of a query at once, and its optimiser, its random numbers and what it
leaves trainable (norms of the decoder and the classifier, the encoder of library sizes) are shared by them. Here each
batch is fitted by itself, so that a batch comes to the same whatever else there is.

All cells of a fit are of one new category, and a layer adds one and the same vector to each of them for it. So nothing
is widened: the cells go through the reference as if they were of its first category, and a hook adds the difference
between the vector in training and that category's. Gradients of everything else are never computed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch.nn.utils import parametrize

from scviaduct.analysis.using import registered

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from scviaduct.families import Family
    from scviaduct.families.slots import Slot
    from scviaduct.mapping.layout import Laid
    from scviaduct.values import LongArray

_CHUNK = 512
_WIDE = 256
"""Columns above which rows are kept sparse."""


@dataclass(frozen=True, slots=True)
class Training:
    """How an adapter is fitted.

    Attributes
    ----------
    epochs
        At most.
    batch_size
        Cells of a mini-batch.
    lr
        Step size of Adam.
    held_out
        Share of the sample that early stopping is judged by.
    patience
        Epochs without a better loss of the held-out cells before the end.
    seed
        Of mini-batches and of the latent's noise.
    kl_weight
        Weight of the divergences in the loss: that with which the reference's own training ended. With more than that
        its latents are drawn towards the prior: those of a ContrastiveVI of 25 epochs (weight .06) lost half of their
        salient length at weight 1, while the loss of held-out cells rose.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.01
    held_out: float = 0.1
    patience: int = 10
    seed: int = 0
    kl_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit gave.

    Attributes
    ----------
    vectors
        Covariate to slot to vector: those that were trained, and the means of the reference's categories that stand
        for the batch's further covariates.
    epochs
        That were run.
    best
        The one whose vectors were kept.
    loss_before, loss_after
        Of the held-out cells, per cell, with the reference's mean and with what was kept; of all cells where they are
        too few to hold some out.
    cell_epochs
        Cells that were trained on, times epochs.
    """

    vectors: Mapping[str, Mapping[str, torch.Tensor]]
    epochs: int
    best: int
    loss_before: float
    loss_after: float
    cell_epochs: int


class Rows:
    """The tensors that scvi-tools makes of cells, taken once; wide ones are kept sparse.

    Parameters
    ----------
    model
        Of scvi-tools.
    laid
        Cells that are registered with it.
    device
        Where rows are handed out.
    """

    def __init__(self, model: Any, laid: Laid, device: str) -> None:
        parts: dict[str, list[Any]] = {name: [values] for name, values in laid.flags.items()}
        for tensors in model._make_data_loader(laid.data, batch_size=_CHUNK, shuffle=False):  # noqa: SLF001 - scvi-tools' own
            for key, value in tensors.items():
                wide = value.ndim == 2 and value.shape[1] > _WIDE
                parts.setdefault(key, []).append(sparse.csr_matrix(value.numpy()) if wide else value)
        self._sparse = {key: sparse.vstack(chunks).tocsr() for key, chunks in parts.items() if _is_sparse(chunks)}
        self._dense = {key: torch.cat(chunks).to(device) for key, chunks in parts.items() if not _is_sparse(chunks)}
        self._device = device
        self.n_cells: int = laid.data.n_obs

    def take(self, rows: LongArray) -> dict[str, torch.Tensor]:
        """Tensors of some cells, by the names of scvi-tools."""
        index = torch.as_tensor(rows, device=self._device)
        found = {key: value[index] for key, value in self._dense.items()}
        wide = {key: torch.from_numpy(value[rows].toarray()) for key, value in self._sparse.items()}
        return found | {key: value.to(self._device) for key, value in wide.items()}


def _is_sparse(chunks: Sequence[Any]) -> bool:
    return sparse.issparse(chunks[0])


def mean_of(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    """Mean of a slot's categories; zero where a covariate of one category has no column."""
    if not slot.count:
        return torch.zeros_like(tensor.select(slot.dim, 0))
    return tensor.narrow(slot.dim, slot.start, slot.count).mean(dim=slot.dim).detach().clone()


class _Column(torch.nn.Module):
    """A tensor whose first category is replaced by a vector."""

    def __init__(self, vector: torch.Tensor, slot: Slot) -> None:
        super().__init__()
        self.vector = vector
        self._dim, self._start = slot.dim, slot.start

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        index = torch.tensor([self._start], device=tensor.device)
        return tensor.index_copy(self._dim, index, self.vector.unsqueeze(self._dim))


@contextlib.contextmanager
def replaced(module: Any, slots: Mapping[str, Sequence[tuple[Slot, torch.Tensor]]]) -> Iterator[None]:
    """A module whose cells of the first category of some covariates get these vectors instead of that category's.

    Parameters
    ----------
    module
        Of scvi-tools; as it was, in the end.
    slots
        Covariate to its slots, each with a vector; gradients reach the vectors.
    """
    with contextlib.ExitStack() as stack:
        for pairs in slots.values():
            for slot, vector in pairs:
                stack.enter_context(_one_replaced(module, slot, vector))
        yield


@contextlib.contextmanager
def _one_replaced(module: Any, slot: Slot, vector: torch.Tensor) -> Iterator[None]:
    path, _, name = slot.name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, torch.nn.Linear | torch.nn.Embedding):
        weight = owner.weight.detach()
        first = weight.select(slot.dim, slot.start) if slot.count else torch.zeros_like(vector)
        handle = owner.register_forward_hook(lambda _module, _inputs, out: out + (vector - first))
        try:
            yield
        finally:
            handle.remove()
    elif name in dict(owner.named_buffers(recurse=False)):
        held = getattr(owner, name)
        setattr(owner, name, _Column(vector, slot)(held))
        try:
            yield
        finally:
            setattr(owner, name, held)
    else:
        parametrize.register_parametrization(owner, name, _Column(vector, slot), unsafe=True)
        try:
            yield
        finally:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)


def fit(
    model: Any, found: Family, slots: Sequence[Slot], laid: Laid, training: Training, device: str = "cpu"
) -> Fitted:
    """Fit the vectors of one query batch.

    Parameters
    ----------
    model
        Of scvi-tools, in evaluation mode; it is as it was in the end.
    found
        Its family.
    slots
        Of the model.
    laid
        A sample of the batch's cells. A sample without a cell gives the means of the reference.
    training
        How.
    device
        ``"cpu"`` or a CUDA device.

    Notes
    -----
    The loss is that of scvi-tools, and nothing decays. The vectors kept are those
    of the epoch with the least loss of the held-out cells; these see the same noise in every epoch.
    """
    module = model.module.to(device)
    frozen = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)  # noqa: FBT003 - torch takes it by position
    state = _Fit(module, found, slots, laid, training, device)
    try:
        if not laid.data.n_obs:
            return Fitted(state.vectors(), 0, 0, float("nan"), float("nan"), 0)
        with registered(model, laid.data), found.fitting(model, laid.data):
            return state.run(Rows(model, laid, device))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)  # noqa: FBT003


class _Fit:
    """The state of one fit."""

    def __init__(
        self, module: Any, found: Family, slots: Sequence[Slot], laid: Laid, training: Training, device: str
    ) -> None:
        self._module, self._family, self._training, self._device = module, found, training, device
        held = module.state_dict()
        new = (*laid.trained, *laid.averaged)
        self._pairs: dict[str, list[tuple[Slot, torch.Tensor]]] = {name: [] for name in new}
        self._trained: list[torch.Tensor] = []
        for slot in slots:
            if slot.covariate in self._pairs:
                counted = laid.given.get(slot.name) if slot.covariate in laid.trained else None
                vector = (mean_of(held[slot.name], slot) if counted is None else counted).to(device)
                if slot.covariate in laid.trained and slot.fitted:
                    vector.requires_grad_(True)  # noqa: FBT003
                    self._trained.append(vector)
                self._pairs[slot.covariate].append((slot, vector))

    def run(self, rows: Rows) -> Fitted:
        """Train until the held-out cells gain nothing more."""
        training = self._training
        rng = np.random.default_rng(training.seed)
        order = rng.permutation(rows.n_cells)
        held_out = round(training.held_out * rows.n_cells)
        judged, used = (order[:held_out], order[held_out:]) if held_out >= MIN_HELD_OUT else (order, order)
        optimiser = torch.optim.Adam(self._trained, lr=training.lr, weight_decay=0.0)
        devices = [self._device] if self._device != "cpu" else []
        with replaced(self._module, self._pairs), torch.random.fork_rng(devices=devices):
            torch.manual_seed(training.seed)
            before = least = self._judge(rows, judged)
            kept, best, epoch = self.vectors(), 0, 0
            for epoch in range(1, training.epochs + 1):
                for part in _minibatches(rng.permutation(used), training.batch_size):
                    loss = self._loss(rows, part)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                now = self._judge(rows, judged)
                if now < least:
                    least, best, kept = now, epoch, self.vectors()
                elif epoch - best >= training.patience:
                    break
        return Fitted(kept, epoch, best, before, least, epoch * len(used))

    def _loss(self, rows: Rows, part: LongArray) -> Any:
        return self._family.loss(self._module, rows.take(part), self._training.kl_weight)

    @torch.no_grad()
    def _judge(self, rows: Rows, judged: LongArray) -> float:
        """Loss per cell, under noise that is the same every time."""
        devices = [self._device] if self._device != "cpu" else []
        total, size = 0.0, self._training.batch_size
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._training.seed)
            for part in _minibatches(judged, size):
                total += float(self._loss(rows, part)) * len(part)
        return total / len(judged)

    def vectors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Covariate to slot to vector, as they are now."""
        return {
            name: {slot.name: vector.detach().cpu().clone() for slot, vector in pairs}
            for name, pairs in self._pairs.items()
        }


MIN_HELD_OUT = 16
"""Cells below which none are held out: the loss of a few would be noise."""


def _minibatches(order: LongArray, size: int) -> Iterator[LongArray]:
    """Cells in pieces of nearly one size: a last one of a few cells would move the vectors as much as a full one."""
    yield from np.array_split(order, max(1, round(len(order) / size)))
