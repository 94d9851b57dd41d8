"""One scan for several references, and what each is told of it."""

from __future__ import annotations

import pytest

from pipelines.query import Asked, scan_query
from scviaduct.mapping.surgery import Surgery
from scviaduct.references.package import Reference
from scviaduct.sources import open_source
from scviaduct.values import GeneTable, Settings


@pytest.fixture
def asked(tmp_path):
    """A reference that encodes batch and assay, one that encodes another column, and one that encodes nothing."""

    def make(name, **more):
        facts = {"genes": GeneTable({"index": ("g",)}), "n_latent": 2, "scvi_version": "1.5.1"}
        facts |= {"encode_covariates": bool(more), **more}
        return Asked(Reference(path=tmp_path, name=name, digest=name * 8, family="SCVI", **facts), Surgery())

    both = make("both", batch_key="batch", batch_categories=("b", "c"), categorical_covariates={"assay": ("a",)})
    donor = make("donor", batch_key="cell_subtype", batch_categories=("d", "e"), continuous_covariates=("absent",))
    return [both, donor, make("none")]


def test_of_one_scan_each_reference_is_told_what_a_scan_for_it_alone_says(asked, symphony):
    with open_source(str(symphony)) as source:
        together, settings = scan_query(source, asked, Settings(), ["cell_type"], 400)
        alone = [scan_query(source, [one], Settings(), ["cell_type"], 400) for one in asked]
    assert together == [scan for (scan,), _ in alone]
    assert [told for _, told in alone] == [settings] * 3
    assert settings.keep_obs == {"cell_type": "string"}
    assert {len(values) for shard in together[0].groups for values in shard} == {2}
    assert {len(values) for shard in together[1].groups for values in shard} == {1}
    assert (list(together[1].missing), together[2].groups) == (["absent"], ())
