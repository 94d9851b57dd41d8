"""The ``--where`` grammar: a small language of conditions over a store's columns, parsed into an Arrow expression.

::

    condition  = term { ("and" | "or") term } ; "and" binds closer than "or"
    term       = "not" term | "(" condition ")" | comparison
    comparison = column                                       ; a boolean column
               | column ("=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value
               | column ["not"] "in" "(" value { "," value } ")"
               | column "is" ["not"] "null"
    column     = name | '"' any text '"'
    value      = 'text' (a quote is doubled) | number | "true" | "false"

Words are read in any case. A comparison with null is false, ``not`` of it too, as in SQL's WHERE. A number is compared
in the column's own precision: ``probability = 0.9`` holds for a probability that is printed so. Nothing is ever handed
to a query language.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from scviaduct.errors import FilterError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*')|(?P<quoted>"[^"]+")|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<operator><>|!=|<=|>=|==|=|<|>|\(|\)|,)|(?P<word>[A-Za-z_][\w.]*))""",
    re.VERBOSE,
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_DEPTH = 100
"""Conditions within conditions, as deep as they are read: deeper ones would exhaust Python's stack."""
_COMPARISONS = 1_000
"""Comparisons of one condition: Arrow descends by recursion, and a chain of 12,000 ended the process."""
_EXAMPLE = "It reads like: tissue = 'lung' and (probability >= 0.9 or label in ('B cell', 'T cell'))."


@dataclass(frozen=True, slots=True)
class Condition:
    """A parsed condition.

    Attributes
    ----------
    expression
        What Arrow evaluates.
    columns
        Columns that it reads.
    terms
        Conditions that all hold where this one does, as ``and`` joins them; itself alone where it is no conjunction.
    """

    expression: pc.Expression
    columns: tuple[str, ...]
    terms: tuple[tuple[pc.Expression, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int

    def says(self, *words: str) -> bool:
        return self.kind in ("word", "operator") and self.text.lower() in words


def parse_where(text: str, schema: pa.Schema) -> Condition:
    """Parse a condition against the columns that there are.

    Parameters
    ----------
    text
        The condition.
    schema
        Columns and their types.

    Raises
    ------
    FilterError
        Pointing at what does not parse, naming the column that is unknown, or the value of another type.
    """
    return _Parser(text, schema).parse()


class _Parser:
    def __init__(self, text: str, schema: pa.Schema) -> None:
        self._text = text
        self._schema = schema
        self._tokens = self._scan()
        self._next = 0
        self._depth = self._comparisons = 0
        self._columns: dict[str, None] = {}
        self._terms: list[tuple[pc.Expression, tuple[str, ...]]] = []

    def _scan(self) -> list[_Token]:
        tokens, at, text = [], 0, self._text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None or match.lastgroup is None:
                start = at + len(text[at:]) - len(text[at:].lstrip())
                raise self._error("is not understood", start)
            tokens.append(_Token(match.lastgroup, match.group(match.lastgroup), match.start(match.lastgroup)))
            at = match.end()
        return [*tokens, _Token("end", "", len(text))]

    def _error(self, problem: str, at: int) -> FilterError:
        return FilterError(f"The condition {problem} at:\n  {self._text}\n  {' ' * at}^\n", _EXAMPLE)

    def parse(self) -> Condition:
        expression = self._or()
        token = self._tokens[self._next]
        if token.kind != "end":
            raise self._error("goes on where it should end", token.at)
        columns = tuple(self._columns)
        return Condition(expression, columns, tuple(self._terms) or ((expression, columns),))

    def _take(self, *words: str) -> bool:
        taken = self._tokens[self._next].says(*words)
        self._next += taken
        return taken

    def _need(self, word: str) -> None:
        if not self._take(word):
            raise self._error(f"lacks '{word}'", self._tokens[self._next].at)

    def _or(self) -> pc.Expression:
        left = self._and()
        while self._take("or"):
            left = left | self._and()
            if self._depth == 0:
                self._terms = []
        return left

    def _and(self) -> pc.Expression:
        left = self._term()
        while self._take("and"):
            left = left & self._term()
        return left

    def _term(self) -> pc.Expression:
        """A term, which is noted with its columns if no parentheses hold it."""
        if self._depth:
            return self._not()
        before, self._columns = self._columns, {}
        term = self._not()
        self._terms.append((term, tuple(self._columns)))
        self._columns = before | self._columns
        return term

    def _not(self) -> pc.Expression:
        token = self._tokens[self._next]
        if not token.says("not", "("):
            return self._comparison()
        self._next += 1
        self._depth += 1
        if self._depth > _DEPTH:
            raise self._error(f"is nested deeper than {_DEPTH} levels", token.at)
        if token.says("not"):
            inner = ~self._not()
        else:
            inner = self._or()
            self._need(")")
        self._depth -= 1
        return inner

    def _comparison(self) -> pc.Expression:
        token = self._tokens[self._next]
        self._comparisons += 1
        if self._comparisons > _COMPARISONS:
            raise self._error(f"has more than {_COMPARISONS:,} comparisons (a list in 'in' may be longer)", token.at)
        name = self._column()
        field, kind = pc.field(name), self._kind(name)
        if self._take("is"):
            negated = self._take("not")
            self._need("null")
            return field.is_valid() if negated else field.is_null()
        negated = self._take("not")
        if negated or self._tokens[self._next].says("in"):
            self._need("in")
            self._need("(")
            values = [self._value(name, kind)]
            while self._take(","):
                values.append(self._value(name, kind))
            self._need(")")
            plain, literals = self._comparable(name, kind, values)
            # Arrow says that a null is in no list; here it is unknown, as every other comparison with it.
            among = pc.if_else(field.is_valid(), plain.isin(literals), pa.scalar(None, pa.bool_()))
            return ~among if negated else among
        sign = self._tokens[self._next]
        if sign.kind == "operator" and sign.text in _COMPARE:
            self._next += 1
            plain, literals = self._comparable(name, kind, [self._value(name, kind)])
            return _COMPARE[sign.text](plain, literals[0])
        if kind != "bool":
            raise self._error(f"compares '{name}' with nothing", token.at)
        return field == pa.scalar(True)  # noqa: FBT003

    def _comparable(self, name: str, kind: str, values: Sequence[Any]) -> tuple[pc.Expression, pa.Array]:
        """A column and values of one type: a float column's own, or doubles where an integer meets a fraction."""
        field, own = pc.field(name), self._schema.field(name).type
        if kind == "text":
            return field.cast(pa.string()), pa.array(values, pa.string())
        if pa.types.is_floating(own):
            return field, pa.array([float(value) for value in values], own)
        if any(isinstance(value, float) for value in values):
            return field.cast(pa.float64(), safe=False), pa.array([float(value) for value in values], pa.float64())
        return field, pa.array(values)

    def _column(self) -> str:
        token = self._tokens[self._next]
        if token.kind not in ("word", "quoted") or token.says("and", "or", "not", "in", "is", "null", "true", "false"):
            raise self._error("lacks a column", token.at)
        name = token.text.strip('"')
        names = [field.name for field in self._schema if not pa.types.is_list(field.type)]
        if name not in names:
            close = get_close_matches(name, names, n=3) or names
            raise FilterError(f"There is no column '{name}' to filter on.", f"There are: {', '.join(close)}.")
        self._next += 1
        self._columns[name] = None
        return name

    def _kind(self, name: str) -> str:
        kind = self._schema.field(name).type
        if pa.types.is_boolean(kind):
            return "bool"
        return "number" if pa.types.is_integer(kind) or pa.types.is_floating(kind) else "text"

    def _value(self, name: str, kind: str) -> str | float | int | bool:
        token = self._tokens[self._next]
        self._next += 1
        if token.kind == "text" and kind == "text":
            return token.text[1:-1].replace("''", "'")
        if token.kind == "number" and kind == "number":
            number = float(token.text)
            whole = re.fullmatch(r"[+-]?\d+", token.text) and abs(number) < 2**63
            return int(token.text) if whole else number
        if token.says("true", "false") and kind == "bool":
            return token.text.lower() == "true"
        example = {"text": "'text'", "number": "a number", "bool": "true or false"}[kind]
        raise self._error(f"compares '{name}' with something else than {example}", token.at)
