"""Which calls to draw: the pattern of --only.

Terms with commas between: `field=value`, `field=lo..hi` (numbers, both included), `field=glob` (as in file names).
`odd` or `even` after a term is about that term's field. A comma inside a value is written as `+`:

    dtype=bfloat16,V=97..512,odd        cotangents=h+c_last,form=chunkwise        normalizer_grad=det*
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from .fuzz_call import FIELDS, Call, read_value

T = TypeVar("T")
TRIES = 40
PARITIES = {"odd": 1, "even": 0}


@dataclass
class Term:
    """What one field must be."""

    text: str
    span: tuple[float, float] | None = None
    parity: int | None = None

    def fits(self, value: Any) -> bool:
        if self.parity is not None and (not isinstance(value, int) or value % 2 != self.parity):
            return False
        if self.span is not None:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return number and self.span[0] <= value <= self.span[1]
        return fnmatch.fnmatch("+".join(map(str, value)) if isinstance(value, tuple) else str(value), self.text)


@dataclass(frozen=True)
class Only:
    """The calls that --only asks for; without terms all."""

    terms: Mapping[str, Term] = field(default_factory=dict)

    def fits(self, call: Call) -> bool:
        return all(term.fits(getattr(call, name)) for name, term in self.terms.items())

    def pick(self, rng: np.random.Generator, name: str, draw: Callable[[], T]) -> T:
        """A value of a field: a drawn one that fits, or else one that is made to."""
        term = self.terms.get(name)
        x = draw()
        if term is None:
            return x
        for _ in range(TRIES):
            if term.fits(x):
                return x
            x = draw()
        if term.span is None:
            made = read_value(name, term.text.replace("+", ","))  # a glob that nothing drawn fits: an error
        elif isinstance(FIELDS[name], int) or name == "chunk_size":
            made = int(rng.integers(int(term.span[0]), int(term.span[1]) + 1))
            made += 0 if term.fits(made) else 1 if made < term.span[1] else -1
        else:
            made = float(rng.uniform(*term.span))
        if not term.fits(made):
            raise ValueError(f"only: expected a pattern that a value of {name} fits, got {term.text!r}")
        return made


def parse(pattern: str) -> Only:
    """The pattern of --only. Raises ValueError with the term, what was expected and what came."""
    terms: dict[str, Term] = {}
    last = ""
    for part in filter(None, (x.strip() for x in pattern.split(","))):
        if part in PARITIES:
            if not last or not isinstance(FIELDS[last], int) or isinstance(FIELDS[last], bool):
                raise ValueError(f"only: expected {part!r} after a field that is a whole number, got {pattern!r}")
            terms[last].parity = PARITIES[part]
            continue
        name, equals, text = part.partition("=")
        if not equals or name not in FIELDS:
            raise ValueError(f"only: expected field=value with a field among {', '.join(FIELDS)}, got {part!r}")
        last = name
        low, dots, high = text.partition("..")
        try:
            span = (float(low), float(high)) if dots else None
        except ValueError:
            raise ValueError(f"only: expected numbers as in lo..hi, got {part!r}") from None
        if span and span[0] > span[1]:
            raise ValueError(f"only: expected lo <= hi, got {part!r}")
        if span is None and not any(x in text for x in "*?["):
            read_value(name, text.replace("+", ","))
        terms[name] = Term(text, span)
    return Only(terms)
