"""The grammar of ``--where`` against pandas and three-valued logic worked out by hand."""

from __future__ import annotations

import operator
from contextlib import suppress

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scviaduct.errors import FilterError
from scviaduct.store.where import parse_where

TABLE = pa.table(
    {
        "n": pa.array(range(6), pa.int32()),
        "label": pa.array(["B cell", None, "it's", "T cell", "", "B cell"]).dictionary_encode(),
        "tissue": ["lung", "LUNG", None, "skin", 'a "b"', "ю%_"],
        "age": pa.array([1, 2, None, -4, 2**60 + 1, 0]),
        "probability": pa.array([0.9, 0.1, None, 0.5, 0.3, 1], pa.float32()),
        "score": pa.array([0.1, None, 0.3, -1e300, 0, 5]),
        "primary": [True, False, None, True, False, None],
        "cell type (x)": ["a", "b", "a", "b", None, "c"],
        "in": ["p", "q", "r", "s", "t", "u"],
        "nothing": pa.nulls(6, pa.string()),
        "latent": pa.array([[1.0]] * 6, pa.list_(pa.float32())),
    }
)


def rows_of(text, table=TABLE):
    return table.filter(parse_where(text, table.schema).expression)["n"].to_pylist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # comparisons of text, also where it is dictionary encoded
        ("tissue = 'lung'", [0]),
        ("tissue == 'lung'", [0]),
        ("tissue != 'lung'", [1, 3, 4, 5]),
        ("tissue <> 'lung'", [1, 3, 4, 5]),
        ("label = 'B cell'", [0, 5]),
        ("label > 'B cell'", [2, 3]),
        ("label <= 'B cell'", [0, 4, 5]),
        ("label = ''", [4]),
        # a quote is doubled; nothing else is special inside a text
        ("label = 'it''s'", [2]),
        ("tissue = 'a \"b\"'", [4]),
        ("tissue = 'ю%_'", [5]),
        ("tissue = '%'", []),
        ("tissue = 'lung'' or 1 = 1 --'", []),
        ("tissue = '''; drop table cells; --'", []),
        ("tissue = '\\'", []),
        ("tissue in (''' or true or ''', 'skin')", [3]),
        # numbers
        ("age = 1", [0]),
        ("age=1", [0]),
        ("age = +1", [0]),
        ("age = 1.0", [0]),
        ("age > 1.5", [1, 4]),
        ("age >= -4", [0, 1, 3, 4, 5]),
        ("age < 1e0", [3, 5]),
        ("age = 1152921504606846977", [4]),
        ("age < 99999999999999999999", [0, 1, 3, 4, 5]),
        ("age > -99999999999999999999 and age in (99999999999999999999, 0)", [5]),
        ("n > 3000000000", []),
        ("score = .1", [0]),
        ("score < -1e299", [3]),
        ("score <= 1e999", [0, 2, 3, 4, 5]),
        # in the precision of the column: 0.9 is not a float32, but the nearest one is what is meant
        ("probability = 0.9", [0]),
        ("probability >= 0.9", [0, 5]),
        ("probability < 0.9", [1, 3, 4]),
        ("probability in (0.9, 0.1)", [0, 1]),
        ("probability = 1", [5]),
        # truths
        ("primary", [0, 3]),
        ("primary = true", [0, 3]),
        ("primary = FALSE", [1, 4]),
        ("primary != true", [1, 4]),
        ("primary in (true)", [0, 3]),
        ("not primary", [1, 4]),
        # lists
        ("age in (1, 2)", [0, 1]),
        ("age in (1, 2.5)", [0]),
        ("age not in (1, 2)", [3, 4, 5]),
        ("label in ('B cell', 'it''s')", [0, 2, 5]),
        ("label NOT IN ('B cell')", [2, 3, 4]),
        # null is neither so nor not so
        ("label is null", [1]),
        ("label is not null", [0, 2, 3, 4, 5]),
        ("not label is null", [0, 2, 3, 4, 5]),
        ("nothing is null", [0, 1, 2, 3, 4, 5]),
        ("nothing = 'a' or not nothing = 'a'", []),
        ("nothing in ('a') or nothing not in ('a')", []),
        ("not age in (1)", [1, 3, 4, 5]),
        ("not (age not in (1))", [0]),
        ("not (age = 1)", [1, 3, 4, 5]),
        ("primary or not primary", [0, 1, 3, 4]),
        ("primary or n = 2", [0, 2, 3]),
        ("not (primary and n = 5)", [0, 1, 2, 3, 4]),
        # "and" binds closer than "or", "not" closer than both
        ("n = 0 or n = 1 and n = 2", [0]),
        ("(n = 0 or n = 1) and n = 2", []),
        ("n = 1 and n = 2 or n = 3", [3]),
        ("not n = 0 and n < 2", [1]),
        ("not (n = 0 and n < 2)", [1, 2, 3, 4, 5]),
        ("not n = 0 or n = 0", [0, 1, 2, 3, 4, 5]),
        ("not not n = 0", [0]),
        ("NOT n = 0 And\n\tn < 2", [1]),
        # columns of any name
        ("\"cell type (x)\" = 'a'", [0, 2]),
        ("\"in\" in ('q')", [1]),
        ('"n" = 3', [3]),
    ],
)
def test_what_is_selected(text, expected):
    assert rows_of(text) == expected


@pytest.mark.parametrize(
    ("text", "problem", "at"),
    [
        ("", "lacks a column", ""),
        ("  ", "lacks a column", ""),
        ("and", "lacks a column", "and"),
        ("tissue = 'lung' and", "lacks a column", ""),
        ("= 'lung'", "lacks a column", "= 'lung'"),
        ("1 = age", "lacks a column", "1 = age"),
        ("tissue = 'lung' or not", "lacks a column", ""),
        ("(tissue = 'lung'", "lacks ')'", ""),
        ("tissue = 'lung')", "goes on where it should end", ")"),
        ("tissue = 'lung' tissue", "goes on where it should end", "tissue"),
        ("tissue = 'lung", "is not understood", "'lung"),
        ("tissue = 'lung'; drop", "is not understood", "; drop"),
        ("tissue = 'lung' -- end", "is not understood", "-- end"),
        ("tissue is nul", "lacks 'null'", "nul"),
        ("tissue not 'lung'", "lacks 'in'", "'lung'"),
        ("tissue in 'lung'", "lacks '('", "'lung'"),
        ("tissue in ()", "compares 'tissue' with something else than 'text'", ")"),
        ("tissue in ('lung' 'skin')", "lacks ')'", "'skin')"),
        ("tissue", "compares 'tissue' with nothing", "tissue"),
        ("n = 1 or age", "compares 'age' with nothing", "age"),
        ("tissue =", "compares 'tissue' with something else than 'text'", ""),
        ("tissue = 1", "compares 'tissue' with something else than 'text'", "1"),
        ('tissue = "lung"', "compares 'tissue' with something else than 'text'", '"lung"'),
        ("tissue = label", "compares 'tissue' with something else than 'text'", "label"),
        ("age = 'old'", "compares 'age' with something else than a number", "'old'"),
        ("age in (1, true)", "compares 'age' with something else than a number", "true)"),
        ("primary = 1", "compares 'primary' with something else than true or false", "1"),
        ("primary = null", "compares 'primary' with something else than true or false", "null"),
    ],
)
def test_an_error_points_at_the_place(text, problem, at):
    with pytest.raises(FilterError) as error:
        parse_where(text, TABLE.schema)
    told, shown, arrow, _ = error.value.problem.split("\n")
    assert told == f"The condition {problem} at:"
    assert shown[2:] == text
    assert arrow.index("^") - 2 == len(text.rstrip()) - len(at)
    assert error.value.remedy.startswith("It reads like: tissue = 'lung'")


@pytest.mark.parametrize(
    ("text", "column", "hint"),
    [
        ("tisue = 'lung'", "tisue", "There are: tissue."),
        ("Tissue = 'lung'", "Tissue", "There are: tissue."),
        ("\"cell type\" = 'a'", "cell type", "cell type (x)"),
        ("latent is null", "latent", "There are: "),
    ],
)
def test_a_column_that_is_not_there(text, column, hint):
    with pytest.raises(FilterError, match=f"no column '{column}'") as error:
        parse_where(text, TABLE.schema)
    assert hint in error.value.remedy
    assert "latent" not in error.value.remedy


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("(" * 101 + "n = 1" + ")" * 101, "deeper than 100"),
        ("not " * 5000 + "n = 1", "deeper than 100"),
        (" or ".join(["n = 1"] * 1001), "more than 1,000"),
    ],
)
def test_what_would_exhaust_the_stack_is_refused(text, problem):
    with pytest.raises(FilterError, match=problem):
        parse_where(text, TABLE.schema)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100 + "n = 1" + ")" * 100,
        " or ".join(["(not (n = 0) and n < 2)"] * 400),
        f"n in ({', '.join(['1'] * 20_000)})",
    ],
)
def test_what_is_long_but_allowed(text):
    assert rows_of(text) == [1]


def test_the_condition_names_its_columns_once():
    assert parse_where("age > 1 and (primary or age is null)", TABLE.schema).columns == ("age", "primary")


# Conditions as trees: each renders itself as text, and says of a DataFrame row by row: true, false or (None) unknown.

COLUMNS = {
    "text": st.text("ab'\"\\ ", max_size=3),
    "whole": st.integers(-3, 3),
    "real": st.integers(-3, 3).map(lambda value: value / 2),
    "single": st.sampled_from([0.1, 0.9, -0.3, 2.0]).map(lambda value: float(np.float32(value))),
    "truth": st.booleans(),
}
TYPES = {"text": pa.string(), "whole": pa.int64(), "real": pa.float64(), "single": pa.float32(), "truth": pa.bool_()}
COMPARE = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def literal(value):
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def each(column, judge):
    return lambda frame: [None if value is None else judge(value) for value in frame[column]]


def negated(holds):
    return lambda frame: [None if value is None else not value for value in holds(frame)]


def both(left, right):
    def judge(a, b):
        return False if a is False or b is False else None if a is None or b is None else True

    return lambda frame: [judge(a, b) for a, b in zip(left(frame), right(frame), strict=True)]


def either(left, right):
    return negated(both(negated(left), negated(right)))


@st.composite
def comparisons(draw):
    column = draw(st.sampled_from(list(COLUMNS)))
    kind = draw(st.sampled_from(["compare", "in", "not in", "is null", "is not null"]))
    if kind.startswith("is"):
        wanted = kind == "is null"
        return f"{column} {kind}", lambda frame: [(value is None) == wanted for value in frame[column]]
    if kind == "compare":
        sign, value = draw(st.sampled_from(list(COMPARE))), draw(COLUMNS[column])
        return f"{column} {sign} {literal(value)}", each(column, lambda cell: COMPARE[sign](cell, value))
    values = draw(st.lists(COLUMNS[column], min_size=1, max_size=3))
    text = f"{column} {kind} ({', '.join(map(literal, values))})"
    return text, each(column, lambda cell: (cell in values) == (kind == "in"))


# The text of a tree carries the parentheses that precedence asks for, and no more.
LEVELS = {"or": 0, "and": 1, "not": 2, "leaf": 3}


def wrapped(text, level, least):
    return f"({text})" if level < least else text


@st.composite
def joined(draw, children):
    how = draw(st.sampled_from(["and", "or", "not"]))
    (text, level, holds) = draw(children)
    if how == "not":
        return f"not {wrapped(text, level, 2)}", 2, negated(holds)
    (other, other_level, other_holds) = draw(children)
    own = LEVELS[how]
    text = f"{wrapped(text, level, own)} {how} {wrapped(other, other_level, own)}"
    return text, own, (both if how == "and" else either)(holds, other_holds)


CONDITIONS = st.recursive(comparisons().map(lambda leaf: (leaf[0], 3, leaf[1])), joined, max_leaves=8)


@st.composite
def frames(draw):
    rows = draw(st.lists(st.fixed_dictionaries({n: st.none() | v for n, v in COLUMNS.items()}), max_size=12))
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=object) for name in COLUMNS})


@settings(max_examples=200, deadline=None)
@given(CONDITIONS, frames())
def test_any_condition_selects_what_pandas_says(condition, frame):
    text, _, holds = condition
    columns = {name: pa.array(frame[name].tolist(), TYPES[name]) for name in COLUMNS}
    columns["text"] = columns["text"].dictionary_encode()
    table = pa.table(columns | {"n": pa.array(np.arange(len(frame)))})
    expected = frame.index[[value is True for value in holds(frame)]].tolist() if len(frame) else []
    assert rows_of(text, table) == expected, text


WORDS = (*"(),=<;'\"", "tissue", "age", "primary", "and", "or", "not", "in", "is", "null", "'a'", "1", "true")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_stays_a_text(value):
    table = pa.table({"tissue": [value, value + "x", None], "n": [0, 1, 2]})
    assert rows_of(f"tissue = {literal(value)}", table) == [0]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS)))
def test_any_words_parse_or_are_refused(words):
    with suppress(FilterError):
        rows_of(" ".join(words))
