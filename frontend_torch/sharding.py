"""How DTensor shards the registered operators: over batch and heads, without communication.

Imported by the first call with a DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .calls import ARGUMENTS, RESULTS
from .library import OPTIONS, READ_BACKWARD, chunkwise, chunkwise_backward
from .registry import GRADIENTS, HEADS, SAVED

TOKENS = frozenset(
    ["q", "k", "v", "i", "f", "h", "dq", "dk", "dv", "di", "df", "dh"]
)  # with an axis of tokens; states and the rest: (B, H, ...)
OFFSETS = ("cu_seqlens", "chunk_table", "chunks")

Placements = list[Any]


def _rule(read: Sequence[str], made: Sequence[str]) -> Callable[..., list[tuple[Placements, Placements]]]:
    """The acceptable placements of an operator that reads and makes tensors of these names, in order."""

    def rule(*arguments: Any) -> list[tuple[Placements, Placements]]:
        heads = HEADS[arguments[len(read) + list(OPTIONS).index("layout")]]
        packed = arguments[read.index("cu_seqlens")] is not None

        def over_batch(name: str) -> Any:
            return Shard(0)

        def over_heads(name: str) -> Any:
            if packed and name in OFFSETS:
                return Replicate()
            return Shard(heads if name in TOKENS else 1)

        def nowhere(name: str) -> Any:
            return Replicate()

        def placements(place: Callable[[str], Any]) -> tuple[Placements, Placements]:
            given = [None if x is None else place(name) for name, x in zip(read, arguments, strict=False)]
            return [place(name) for name in made], given + [None] * (len(arguments) - len(read))

        kinds = [nowhere, over_heads] if packed else [nowhere, over_heads, over_batch]
        return [placements(kind) for kind in kinds]

    return rule


register_sharding(chunkwise)(_rule(ARGUMENTS, RESULTS + SAVED))
register_sharding(chunkwise_backward)(_rule(READ_BACKWARD, GRADIENTS))
