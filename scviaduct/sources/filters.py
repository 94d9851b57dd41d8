"""SOMA's value-filter grammar, evaluated over any source.

``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=`` between a column and a constant (also chained: ``1 < n_genes < 9``),
``in [...]``, ``not in [...]``, joined by ``and``, ``or``, ``not``, ``&``, ``|`` and parentheses. A column is a bare
name or ``attr("orig.ident")``, a constant a string, a number, ``True``, ``False`` or ``None``. A missing value meets no
comparison but ``== None``. The model is ``tiledbsoma/_query_condition.py`` (TileDB-SOMA 2.3).
"""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scviaduct.errors import FilterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

EXAMPLE = "Write for example: tissue_general == 'lung' and n_genes > 500 and assay in [\"10x 3' v2\", \"10x 3' v3\"]."
_ROW = "row number"

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}


@dataclass(frozen=True, slots=True)
class ValueFilter:
    """A parsed filter.

    Attributes
    ----------
    text
        As written.
    columns
        Columns that it reads, in the order of appearance.
    expression
        The same over columns of plain strings, bool, int64 and double.
    """

    text: str
    columns: tuple[str, ...]
    expression: pc.Expression

    def check(self, available: Iterable[str], where: str) -> None:
        """Refuse columns that are not there.

        Raises
        ------
        FilterError
            Naming the column and what comes close.
        """
        known = list(available)
        for column in self.columns:
            if column not in known:
                close = get_close_matches(column, known, n=3) or sorted(known)[:8]
                raise FilterError(
                    f"Filter \"{self.text}\" names column '{column}', which {where} does not have.",
                    f"There are: {', '.join(close)}.",
                )

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Which rows pass, bool of shape ``(n_rows,)``; a row whose answer is missing does not.

        Raises
        ------
        FilterError
            If a column is compared with a constant of another type.
        """
        rows = pa.array(np.arange(len(table)))
        try:
            passed = table.select(list(self.columns)).append_column(_ROW, rows).filter(self.expression)[_ROW]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            types = ", ".join(f"{column} is {table.schema.field(column).type}" for column in self.columns)
            raise FilterError(f'Filter "{self.text}" compares unlike things ({types}).', EXAMPLE) from error
        mask = np.zeros(len(table), dtype=np.bool_)
        mask[passed.to_numpy()] = True
        return mask


def parse_filter(text: str) -> ValueFilter:
    """Parse a value filter; nothing in it is ever evaluated as Python.

    Raises
    ------
    FilterError
        If it does not parse or goes beyond the grammar.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise FilterError(f'Filter "{text}" does not parse ({error}).', EXAMPLE) from error
    translator = _Translator(text)
    expression = translator.condition(tree.body)
    return ValueFilter(text, tuple(dict.fromkeys(translator.columns)), expression)


class _Translator:
    """Walks the white-listed nodes of one filter."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: list[str] = []

    def refuse(self, node: ast.AST, why: str) -> FilterError:
        piece = ast.get_source_segment(self.text.strip(), node) or type(node).__name__
        return FilterError(f'Filter "{self.text}": {why} ("{piece}").', EXAMPLE)

    def condition(self, node: ast.expr) -> pc.Expression:
        """A condition: comparisons joined by and, or, not."""
        match node:
            case ast.BoolOp(op, values):
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                return reduce(join, [self.condition(value) for value in values])
            case ast.BinOp(left, ast.BitAnd(), right):
                return self.condition(left) & self.condition(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return self.condition(left) | self.condition(right)
            case ast.UnaryOp(ast.Not(), operand):
                return ~self.condition(operand)
            case ast.Compare(left, ops, comparators):
                return self.comparison(left, ops, comparators)
        raise self.refuse(node, "a comparison is expected, '&' and '|' need parentheses around theirs")

    def comparison(self, left: ast.expr, ops: list[ast.cmpop], comparators: list[ast.expr]) -> pc.Expression:
        """A comparison, or a chain of them."""
        if isinstance(ops[0], ast.In | ast.NotIn):
            if len(ops) > 1:
                raise self.refuse(comparators[-1], "'in' cannot be chained")
            return self.membership(left, comparators[0], negated=isinstance(ops[0], ast.NotIn))
        terms = [left, *comparators]
        links = zip(terms, ops, terms[1:], strict=False)
        return reduce(operator.and_, [self.link(first, op, second) for first, op, second in links])

    def link(self, first: ast.expr, op: ast.cmpop, second: ast.expr) -> pc.Expression:
        """One comparison of a column with a constant, either way round."""
        kind = type(op)
        if not self.is_column(first):
            first, second, kind = second, first, _MIRRORED.get(kind, kind)
        if kind not in _COMPARE:
            raise self.refuse(second, "the operators are ==, !=, <, <=, >, >=, in and not in")
        column, value = self.column(first), self.constant(second)
        if value is None:
            if kind not in (ast.Eq, ast.NotEq):
                raise self.refuse(second, "None can only be compared by == and !=")
            return column.is_null() if kind is ast.Eq else column.is_valid()
        return _COMPARE[kind](column, pc.scalar(value))

    def membership(self, left: ast.expr, right: ast.expr, *, negated: bool) -> pc.Expression:
        """``column in [...]``, never met by a missing value."""
        if not isinstance(right, ast.List) or not right.elts:
            raise self.refuse(right, "'in' takes a list of at least one value in brackets")
        column = self.column(left)
        values = [self.constant(value) for value in right.elts]
        found = reduce(operator.or_, [column == pc.scalar(value) for value in values])
        return ~found if negated else found

    @staticmethod
    def is_column(node: ast.expr) -> bool:
        match node:
            case ast.Name() | ast.Call(func=ast.Name(id="attr")):
                return True
        return False

    def column(self, node: ast.expr) -> pc.Expression:
        match node:
            case (
                ast.Name(id=name)
                | ast.Call(func=ast.Name(id="attr"), args=[ast.Constant(value=str(name))], keywords=[])
            ):
                self.columns.append(name)
                return pc.field((name,))
        raise self.refuse(node, 'a column is expected, a bare name or attr("orig.ident")')

    def constant(self, node: ast.expr) -> str | float | bool | None:
        match node:
            case ast.Constant(value=value) if value is None or isinstance(value, str | bool | int | float):
                return value
            case ast.UnaryOp(ast.USub(), ast.Constant(value=int() | float() as value)):
                return -value
            case ast.UnaryOp(ast.UAdd(), ast.Constant(value=int() | float() as value)):
                return value
            case ast.Call(func=ast.Name(id="val"), args=[inner], keywords=[]):
                return self.constant(inner)
        raise self.refuse(node, "a constant is expected; is a string in quotes?")
