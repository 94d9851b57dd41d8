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

Words are read in any case. A comparison with null is false, ``not`` of it too, as in SQL's WHERE. Nothing is ever
handed to a query language.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from scviaduct.errors import FilterError

if TYPE_CHECKING:
    from collections.abc import Callable

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*')|(?P<quoted>"[^"]+")|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<operator><>|!=|<=|>=|==|=|<|>|\(|\)|,)|(?P<word>[A-Za-z_][\w.]*))""",
    re.VERBOSE,
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
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
    """

    expression: pc.Expression
    columns: tuple[str, ...]


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
        self._columns: dict[str, None] = {}

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
        return Condition(expression, tuple(self._columns))

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
        return left

    def _and(self) -> pc.Expression:
        left = self._not()
        while self._take("and"):
            left = left & self._not()
        return left

    def _not(self) -> pc.Expression:
        if self._take("not"):
            return ~self._not()
        if self._take("("):
            inner = self._or()
            self._need(")")
            return inner
        return self._comparison()

    def _comparison(self) -> pc.Expression:
        token = self._tokens[self._next]
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
            among = self._plain(field, kind).isin(pa.array(values))
            # Without this, a null is "not in" every list, while every other comparison with it is false.
            return (~among if negated else among) & field.is_valid()
        operator = self._tokens[self._next]
        if operator.kind == "operator" and operator.text in _COMPARE:
            self._next += 1
            return _COMPARE[operator.text](self._plain(field, kind), pa.scalar(self._value(name, kind)))
        if kind != "bool":
            raise self._error(f"compares '{name}' with nothing", token.at)
        return field == pa.scalar(True)  # noqa: FBT003

    @staticmethod
    def _plain(field: pc.Expression, kind: str) -> pc.Expression:
        return field.cast(pa.string()) if kind == "text" else field

    def _column(self) -> str:
        token = self._tokens[self._next]
        if token.kind not in ("word", "quoted") or token.says("and", "or", "not", "in", "is", "null", "true", "false"):
            raise self._error("lacks a column", token.at)
        name = token.text.strip('"')
        if name not in self._schema.names or pa.types.is_list(self._schema.field(name).type):
            close = get_close_matches(name, self._schema.names, n=3) or self._schema.names
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
            return int(token.text) if re.fullmatch(r"[+-]?\d+", token.text) else float(token.text)
        if token.says("true", "false") and kind == "bool":
            return token.text.lower() == "true"
        example = {"text": "'text'", "number": "a number", "bool": "true or false"}[kind]
        raise self._error(f"compares '{name}' with something else than {example}", token.at)
