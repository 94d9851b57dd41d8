"""Compiled kernels: the arithmetic of PyTorch, and a cell's bits whatever its company, its place and the processor."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from scipy import sparse

import scviaduct
from scviaduct import compiling
from scviaduct.errors import DataError, PackageError
from scviaduct.families import activations, kernels
from scviaduct.families import compiled as module
from scviaduct.families.base import KERNELS, Covariates
from scviaduct.families.compiled import CompiledEncoder, Packed, aligned
from scviaduct.families.network import ACTIVATIONS, VARIANCES, Layer, Network
from scviaduct.families.sparse import SparseEncoder
from scviaduct.families.vae import VaeEncoder

N = 96
SIZES = (5, 3)
"""Categories of two covariates."""


def layer(n_in, n_out, activation="", *, norm=False, tables=()):
    made = Layer(torch.randn(n_out, n_in) / n_in**0.5, torch.randn(n_out), tables, activation=activation)
    return replace(made, norm=(torch.rand(n_out) + 0.5, torch.randn(n_out)), norm_eps=1e-5) if norm else made


def network(genes=300, hidden=(33, 70), latent=7, activation="ReLU()", *, norm=False, deep=True, numbers=0, **told):
    """A network whose sizes fill no tile."""
    torch.manual_seed(0)
    layers, n_in = [], genes + numbers
    for i, n_out in enumerate(hidden):
        tables = tuple(torch.randn(size, n_out) for size in SIZES) if deep or i == 0 else (None, None)
        layers.append(layer(n_in, n_out, activation, norm=norm, tables=tables))
        n_in = n_out
    classifier = (layer(latent, 50, "ReLU()"), layer(50, 9))
    ends = layer(n_in, latent), layer(n_in, latent)
    return Network(tuple(layers), *ends, genes, classifier=classifier, labels=tuple("abcdefghi"), **told)


def cells(genes=300, n=N, density=0.3):
    """Counts, some of cells with none, and some not whole; codes and numbers."""
    rng = np.random.default_rng(0)
    made = sparse.random(n, genes, density, "csr", np.float32, rng, data_rvs=lambda size: rng.geometric(0.3, size))
    made.data[::7] += np.float32(0.3)
    full = made.tolil()
    full[3] = full[n - 1] = 0
    made = full.tocsr().astype(np.float32)
    made.sort_indices()
    codes = [rng.integers(0, size, n) for size in SIZES]
    return made, codes, rng.normal(size=(n, 2)).astype(np.float32)


def encode(encoder, matrix, codes, numbers=None):
    parts = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data
    return [part.numpy() for part in encoder(*parts, codes, numbers)]


CONFIGURATIONS = {
    "one layer": {"hidden": (40,)},
    "three layers": {"hidden": (10, 64, 129)},
    "layer norm": {"norm": True},
    "tables of the first layer": {"deep": False},
    "numbers": {"numbers": 2},
    "counts as they are": {"log_variational": False},
    "all genes of two tiles, in blocks": {"genes": 4100, "hidden": (192,)},
    **{f"{name[:-1]}": {"activation": name} for name in ACTIVATIONS},
    **{f"variance by {name}": {"variance_activation": name} for name in VARIANCES},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.inference_mode()
def test_what_pytorch_computes_and_bits_of_its_own(name):
    told = CONFIGURATIONS[name]
    made = network(**told)
    matrix, codes, numbers = cells(made.n_genes)
    numbers = numbers if told.get("numbers") else None
    encoder = CompiledEncoder(made)
    whole = encode(encoder, matrix, codes, numbers)
    tensors = [torch.from_numpy(part) for part in (matrix.indptr.astype(np.int64), matrix.indices, matrix.data)]
    # In float64, of which the kernels and PyTorch's float32 are equally far.
    double = replace(
        made,
        layers=tuple(_double(one) for one in made.layers),
        mean=_double(made.mean),
        variance=_double(made.variance),
    )
    expected = SparseEncoder(double)(
        *tensors[:2],
        tensors[2].double(),
        [torch.from_numpy(code) for code in codes],
        None if numbers is None else torch.from_numpy(numbers).double(),
    )
    for found, exact in zip(whole, expected, strict=True):
        assert found.shape == exact.shape == (N, 7)
        assert np.abs(found - exact.numpy()).max() <= 3e-6 * np.abs(exact.numpy()).max()
    rng = np.random.default_rng(1)
    for rows in [np.arange(n) for n in range(32, N, 32)] + [rng.permutation(N)[:64], np.arange(6, 38)]:
        own = None if numbers is None else numbers[rows]
        for found, told_whole in zip(
            encode(encoder, matrix[rows], [code[rows] for code in codes], own), whole, strict=True
        ):
            assert np.array_equal(found, told_whole[rows]), name


def _double(one):
    tables = tuple(table if table is None else table.double() for table in one.tables)
    norm = None if one.norm is None else tuple(part.double() for part in one.norm)
    return replace(one, weight=one.weight.double(), bias=one.bias.double(), tables=tables, norm=norm)


@pytest.mark.parametrize("activation", ["ReLU()", "GELU(approximate='none')", "ELU(alpha=1.0)"])
def test_every_number_of_rows(activation, monkeypatch):
    """From no cell to more than several tiles and passes, first, last and in the middle; labels, too."""
    monkeypatch.setattr(module, "_TOGETHER", 36)
    monkeypatch.setattr(module, "_CELLS", 10)
    encoder = VaeEncoder({"latent": network(activation=activation)})
    matrix, codes, _ = cells()
    told = np.stack(codes, axis=1)

    def run(rows):
        part = matrix[rows]
        covariates = Covariates(told[rows, 0], told[rows, 1:])
        found = encoder.encode(part.indptr.astype(np.int64), part.indices, part.data, covariates)
        return found.mean, found.variance, encoder.classify(found.location)

    whole = run(np.arange(N))
    for n in range(N):
        for rows in (np.arange(n), np.arange(N - n, N), (np.arange(n) * 3) % N):
            for found, expected in zip(run(rows), whole, strict=True):
                assert np.array_equal(found, expected[rows]), n
    assert encoder.arithmetic == KERNELS
    pointers, own = matrix.indptr[40:71].astype(np.int64), told[40:70]  # of a part of the rows
    part = encoder.encode(pointers, matrix.indices, matrix.data, Covariates(own[:, 0], own[:, 1:]))
    assert np.array_equal(part.mean, whole[0][40:70])


@pytest.mark.parametrize(
    "counts",
    [np.arange(70_000), np.geomspace(1e-7, 3.4e38, 100_001), np.linspace(0, 3, 10_001)],
    ids=["whole", "all sizes", "small"],
)
def test_logarithms(counts):
    counts = counts.astype(np.float32)
    found = np.empty_like(counts)
    kernels.logarithms(counts, found)
    exact = np.log1p(counts.astype(np.float64))
    assert (np.abs(found - exact) <= 2e-7 * exact).all()
    alone = np.empty(1, np.float32)
    for at in range(0, len(counts), 997):
        kernels.logarithms(counts[at : at + 1], alone)
        assert alone[0] == found[at]


def test_logarithms_that_are_looked_up_are_those_that_are_computed():
    """A cell's bits do not depend on whether a count beside it is not in the table."""
    made = network(deep=False)
    matrix, codes, _ = cells()
    matrix.data = np.floor(matrix.data)
    alone = encode(CompiledEncoder(made), matrix, codes)
    for beside in (0.5, len(kernels.LOGARITHMS), 3e38):
        matrix.data[matrix.indptr[50]] = beside
        others = np.arange(N) != 50
        for found, expected in zip(encode(CompiledEncoder(made), matrix, codes), alone, strict=True):
            assert (found[others] == expected[others]).all()
            assert (found[50] != expected[50]).any()
    assert kernels.LOGARITHMS[-1] == np.float32(np.log(len(kernels.LOGARITHMS)))


@pytest.mark.parametrize("n_out", [1, 20, 32, 33, 64, 70])
@pytest.mark.parametrize("n_in", [3, 48, 130])
def test_products_of_every_width(n_in, n_out):
    """Narrow layers are summed in other tiles, and the last one is filled up."""
    rng = np.random.default_rng(2)
    weight, bias = (torch.from_numpy(rng.normal(size=size).astype(np.float32)) for size in ((n_out, n_in), (n_out,)))
    values = rng.normal(size=(40, n_in)).astype(np.float32)
    packed = Packed.of(weight, bias)
    assert packed.weights.shape[2] == (32 if n_out <= 32 else 64)
    found = packed.multiply(values, packed.sums(len(values)))
    assert len(found) == 48
    exact = values.astype(np.float64) @ weight.numpy().astype(np.float64).T + bias.numpy()
    assert np.abs(found[:40, :n_out] - exact).max() <= 2e-7 * n_in**0.5 * np.abs(exact).max()
    added = found.copy()
    kernels.multiply(added, module._filled(values, 48, packed.weights), packed.weights, np.empty(0, np.float32))
    np.testing.assert_allclose(added[:40, :n_out], 2 * exact - bias.numpy(), atol=1e-5 * np.abs(exact).max())


def test_activations_are_pytorchs():
    values = np.concatenate([np.linspace(-100, 100, 20_001), np.geomspace(1e-6, 90, 999), [np.inf, -np.inf, np.nan]])
    values = np.resize(values.astype(np.float32), (21, 1024))
    assert {*activations.CODES} == {"", *ACTIVATIONS}
    assert {*activations.VARIANCES} == {*VARIANCES}
    for name, function in ACTIVATIONS.items():
        found = values.copy()
        activations.activate(found, activations.CODES[name])
        expected = function(torch.from_numpy(values).double()).numpy()
        np.testing.assert_allclose(found, expected, rtol=3e-7, atol=2e-7, err_msg=name)
    for name, function in VARIANCES.items():
        mean, variance = np.empty((21, 500), np.float32), np.empty((21, 500), np.float32)
        with np.errstate(over="ignore"):
            activations.posterior(values, mean, variance, activations.VARIANCES[name], 1e-4)
            expected = (function(torch.from_numpy(values[:, 500:1000]).double()) + 1e-4).numpy().astype(np.float32)
        assert np.array_equal(mean, values[:, :500], equal_nan=True)
        np.testing.assert_allclose(variance, expected, rtol=3e-7, err_msg=name)


@pytest.mark.parametrize("n", [1, 7, 8, 130])
def test_layer_norm_is_pytorchs(n):
    rng = np.random.default_rng(3)
    values = (rng.normal(size=(50, 192)) * 4 + 30).astype(np.float32)
    weight, bias = (rng.normal(size=n).astype(np.float32) for _ in range(2))
    found = values.copy()
    activations.normalise(found, weight, bias, 1e-5)
    parts = (torch.from_numpy(part).double() for part in (values[:, :n], weight, bias))
    first, *told = parts
    exact = torch.nn.functional.layer_norm(first, (n,), *told, 1e-5).numpy()
    assert np.abs(found[:, :n] - exact).max() <= 1e-5
    assert np.array_equal(found[:, n:], values[:, n:])


@pytest.mark.parametrize("n", [1, 2, 17, 50])
def test_probabilities_are_pytorchs(n):
    rng = np.random.default_rng(4)
    logits = (rng.normal(size=(30, 64)) * 20).astype(np.float32)
    logits[3, 0], logits[4, n - 1] = 200, np.nan
    found = np.empty((30, n), np.float32)
    activations.softmax(logits, found)
    exact = torch.softmax(torch.from_numpy(logits[:, :n]).double(), dim=-1).numpy()
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-37)  # a difference of 100 is rounded by 6e-6


def test_genes_that_are_not_in_order():
    """A cell's counts are summed as they lie: other bits, the same latent."""
    made = network(genes=4100)
    matrix, codes, _ = cells(4100)
    whole = encode(CompiledEncoder(made), matrix, codes)
    for cell in range(N):
        matrix.indices[matrix.indptr[cell] : matrix.indptr[cell + 1]] = np.flip(matrix[cell].indices)
        matrix.data[matrix.indptr[cell] : matrix.indptr[cell + 1]] = np.flip(matrix[cell].data)
    for found, expected in zip(encode(CompiledEncoder(made), matrix, codes), whole, strict=True):
        assert np.allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_what_lies_outside_is_refused():
    encoder = CompiledEncoder(network())
    matrix, codes, _ = cells()
    pointers, genes = matrix.indptr.astype(np.int64), matrix.indices.copy()
    for bad in (300, -1):
        genes[5] = bad
        with pytest.raises(DataError, match=rf"count of gene {bad}, and the encoder reads 300.*Align"):
            encoder(pointers, genes, matrix.data, codes)
    for wrong in (pointers + 1, pointers[:-2], np.flip(pointers)):
        with pytest.raises(DataError, match="Row pointers run from"):
            encoder(wrong, matrix.indices, matrix.data, codes)
    with pytest.raises(DataError, match=r"category is 0 or 5, and a layer has 5"):
        encoder(pointers, matrix.indices, matrix.data, [codes[0] + (codes[0] == 4), codes[1]])
    with pytest.raises(DataError, match=r"96 cells, and a covariate of 95.*Give one each"):
        encoder(pointers, matrix.indices, matrix.data, [codes[0], codes[1][:-1]])
    with pytest.raises(DataError, match=r"8 dimensions, and the latent 7"):
        encoder.classify(np.ones((3, 8), np.float32))
    with pytest.raises(DataError, match=r"1 values of each cell, and a layer reads 2.*every continuous covariate"):
        CompiledEncoder(network(numbers=2))(pointers, matrix.indices, matrix.data, codes, np.ones((N, 1), np.float32))


def short(one, **parts):
    """A layer with some of its parts cut off by one."""
    return replace(one, **{name: getattr(one, name)[..., :-1] for name in parts.pop("cut")}, **parts)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda made: replace(made, n_genes=301),
        lambda made: replace(made, mean=short(made.mean, cut=["bias"])),
        lambda made: replace(made, variance=layer(70, 6)),
        lambda made: replace(made, layers=(made.layers[0], short(made.layers[1], cut=["weight"]))),
        lambda made: replace(made, layers=(replace(made.layers[0], norm=(torch.ones(65),) * 2), made.layers[1])),
        lambda made: replace(made, layers=(replace(made.layers[0], tables=(torch.ones(5, 34),)), made.layers[1])),
        lambda made: replace(made, classifier=(layer(8, 50), layer(50, 9))),
        lambda made: replace(made, labels=tuple("abcdefghij")),
    ],
)
def test_layers_that_do_not_fit_each_other_are_refused(wrong):
    """As a damaged package may have them, or a stranger's: the kernels would read behind an array's end."""
    made = network()
    with pytest.raises(PackageError, match="layers of an encoder do not fit each other"):
        CompiledEncoder(wrong(made))
    with pytest.raises(PackageError, match="layers of an encoder do not fit each other"):
        CompiledEncoder(made).reading(wrong(made))


def test_sums_begin_at_a_cache_line():
    for shape in ((1, 64), (7, 128), (3, 5, 64)):
        found = aligned(*shape)
        assert found.shape == shape
        assert found.ctypes.data % kernels.ALIGNMENT == 0


def test_where_nothing_can_be_kept_every_process_compiles_and_says_so(monkeypatch):
    """As numba fails where it can write neither beside the module nor in the user's cache."""

    def without_cache(signatures, *, cache=False, nogil=False):
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available for file 'kernels.py'")
        return numba.njit(signatures)

    monkeypatch.setattr(compiling, "njit", without_cache)
    monkeypatch.setattr(compiling, "unkept", [])
    monkeypatch.setattr(module, "unkept", compiling.unkept)
    assert compiling.compiled(numba.types.int64(numba.types.int64))(lambda x: 2 * x)(4) == 8
    assert CompiledEncoder(network()).arithmetic.startswith(f"{KERNELS}, compiled anew in every process: cannot cache")


SCRIPT = """
import sys, numpy as np, torch
sys.path.insert(0, {tests!r})
import test_compiled as t
from scviaduct.compiling import unkept
before = torch.get_num_threads()
matrix, codes, _ = t.cells(4100)
found = t.encode(t.CompiledEncoder(t.network(genes=4100)), matrix, codes)
assert torch.get_num_threads() == before
assert "scvi" not in sys.modules
np.savez({out!r}, *found, *t.others(), unkept=np.array(unkept))
"""


def others():
    """What further kernels give: norms, activations, softplus, narrow layers, labels."""
    found = []
    for name in ("ELU(alpha=1.0)", "SiLU()", "Tanh()", "Softplus(beta=1.0, threshold=20.0)"):
        encoder = CompiledEncoder(network(norm=True, activation=name, variance_activation="softplus", hidden=(70, 20)))
        matrix, codes, _ = cells()
        mean, variance = encode(encoder, matrix, codes)
        found += [mean, variance, encoder.classify(mean).numpy()]
    return found


def elsewhere(tmp_path, tests, **env):
    out = tmp_path / "found.npz"
    code = SCRIPT.format(tests=str(tests), out=str(out))
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | env)
    with np.load(out) as found:
        return [found[f"arr_{i}"] for i in range(len(found.files) - 1)], found["unkept"].tolist()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names a processor of x86-64")
def test_a_processor_without_avx512_gives_the_same_bits(tmp_path, request):
    matrix, codes, _ = cells(4100)
    here = encode(CompiledEncoder(network(genes=4100)), matrix, codes)
    told = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    there, unkept = elsewhere(tmp_path, request.path.parent, **told)
    assert not unkept
    for found, expected in zip(there, [*here, *others()], strict=True):
        assert (found == expected).all()


def test_what_is_compiled_into_other_files_is_part_of_what_is_kept():
    """Every file of which another one calls something that numba compiles is told to :mod:`scviaduct.compiling`."""
    folder = Path(scviaduct.__file__).parent
    files = {path: path.read_text() for path in folder.rglob("*.py")}
    made = {path: {one.name for one in ast.walk(ast.parse(text)) if _is_compiled(one)} for path, text in files.items()}
    shared = set()
    for path, text in files.items():
        for one in ast.walk(ast.parse(text)) if made[path] else ():
            if isinstance(one, ast.ImportFrom) and one.module and one.module.startswith("scviaduct."):
                source = folder.parent / f"{one.module.replace('.', '/')}.py"
                if made.get(source, set()) & {name.name for name in one.names}:
                    shared.add(source.relative_to(folder).as_posix())
    assert shared <= {*compiling.SHARED}
    assert "lanes.py" in shared


def _is_compiled(node):
    """Whether a function is one that numba compiles, or generates code in those that it compiles."""
    told = [ast.unparse(one) for one in node.decorator_list] if isinstance(node, ast.FunctionDef) else []
    return any("compiled" in one or "intrinsic" in one for one in told)
