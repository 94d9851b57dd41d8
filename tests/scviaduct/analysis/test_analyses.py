"""Analyses are found by themselves, and a wrong name is answered with the right ones."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from scviaduct.analysis import Comparison, Output, analyses, analysis
from scviaduct.errors import InputError


def test_every_analysis_is_found_once_a_family():
    found = analyses()
    assert {"normalised-expression", "differential-expression", "posterior-predictive", "accessibility"} <= {*found}
    for name, several in found.items():
        families = [family for one in several for family in one.families]
        assert len(families) == len({*families}), name
        assert name == name.lower()
        for one in several:
            assert isinstance(one, Output | Comparison)
            assert one.about
            assert one.options.__dataclass_params__.frozen
            one.options()  # every field has a default
            told = {field.name for field in dataclasses.fields(one.options)}
            assert not isinstance(one, Comparison) or {"select", "against", "cells"} <= told, name


def test_one_name_is_another_computation_for_another_family():
    assert analysis("accessibility", "peakvi") is not analysis("accessibility", "POISSONVI")
    assert analysis("differential-expression", "SCVI") is analysis("differential-expression", "scanvi")


@pytest.mark.parametrize(
    ("name", "family", "told"),
    [
        (
            "accessibilty",
            "PEAKVI",
            "'accessibilty'. Did you mean 'accessibility'.*Of a PEAKVI, there are: accessibility",
        ),
        ("accessibility", "SCVI", r"is for references of .*PEAKVI.* of SCVI. Of a SCVI.*normalised-expression"),
        ("zzz", "NONEVI", "no analysis 'zzz'. There is none of a NONEVI"),
    ],
)
def test_a_name_that_is_none_is_answered_with_those_that_are(name, family, told):
    with pytest.raises(InputError, match=told):
        analysis(name, family)


def test_finding_them_imports_nothing_heavy():
    heavy = ("torch", "scvi", "scanpy", "mudata", "anndata", "ray")
    code = f"import sys; from scviaduct.analysis import analyses; analyses(); print(*({{*{heavy}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
