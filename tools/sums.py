"""In which order compiled kernels add: what decides the bits of a sum, and may change with how its tiles are read."""

from __future__ import annotations

import re


def _spelled_out(layout: str, aliases: dict[str, str]) -> str:
    """A type or layout with the aliases in it replaced, those of parents too."""
    known = re.compile("|".join(rf"{re.escape(x)}\b" for x in sorted(aliases, key=len, reverse=True)) or "(?!)")
    while known.search(layout):
        layout = known.sub(lambda found: aliases[found[0]], layout)
    return layout


def orders(ttgir: str) -> list[str]:
    """Axis, shape and layout of all that a kernel sums up, from Triton's GPU IR; sorted, as programs may be rearranged.

    A reshape that may reorder keeps each thread's elements: what it is given counts then.
    """
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    reshaped = dict(re.findall(r"(%[\w#:]+) = tt\.reshape .*allow_reorder : (tensor<.*>) -> tensor", ttgir))
    # A sum is an operation with a body; its type follows the body.
    pattern = r'"tt\.(?:reduce|scan)"\((%[\w#:]+)\) <\{(axis = \d+).*?^ *\}\) : \((tensor<.*?>)\) ->'
    sums = re.findall(pattern, ttgir, re.M | re.S)
    return sorted(f"{axis}: {_spelled_out(reshaped.get(name, kind), aliases)}" for name, axis, kind in sums)
