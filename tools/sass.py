"""Looks in compiled Hopper code for a defect of the assembler: a matrix product that reads from a wrong address.

ptxas 12.8, which Triton ships up to 3.7.1, sometimes computes a shared-memory descriptor of wgmma from the wrong
uniform register. The product then reads garbage, mostly without an error. 12.9 and 13.0 compile the same PTX well,
and our kernels are launched on Hopper only as those made them (kernels_triton/assembler.py); this is a second look.
For odd V above 96 the outputs' kernel (chunk_forward) has the first sign, as 12.8 makes it.
Three signs betray it: both halves of the 64-bit descriptor come from one register, or from the descriptor of global
memory, or one from a register that nothing has written.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\d+\s+)?([A-Z0-9_.]+)\s*(.*?);")
GLOBAL_DESCRIPTOR = "c[0x0][0x208]"


def disassemble(cubin: bytes) -> str:
    """SASS, through the tool that Triton ships. Raises RuntimeError where it has none."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise RuntimeError(f"cuobjdump: expected in Triton's package, at {tool}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def wrong_addresses(sass: str) -> list[str]:
    """The instructions that compute a descriptor from a wrong register.

    Follows registers in the code's order; where nothing runs on to an instruction, from the first branch to it.
    """
    holders: set[int] = set()  # uniform registers that hold the descriptor of global memory
    written: set[int] = set()
    lower: dict[str, int] = {}  # by carry predicate: the source of the lower half that set it
    branches: dict[int, tuple[set[int], set[int]]] = {}  # by address: what is known where a branch leads there
    ended = False  # nothing goes on to the next instruction
    found = []
    for line in sass.splitlines():
        match = INSTRUCTION.match(line)
        if not match:
            continue
        address, predicate, operation, operands = match.groups()
        if ended and int(address, 16) in branches:
            holders, written = branches[int(address, 16)]
            lower = {}
        ended = operation in ("EXIT", "BRA") and not predicate
        if operation == "BRA":
            branches.setdefault(int(operands.split()[-1], 16), (set(holders), set(written)))
        registers = [int(x) for x in re.findall(r"\bUR(\d+)\b", operands)]
        if not registers:
            continue
        target, *sources = registers
        targets = {target, target + 1} if ".64" in operation or ".WIDE" in operation else {target}
        missing = operation.startswith("UIADD3") and not written.issuperset(sources)
        if operands.startswith("UR"):
            written |= targets
        if not operation.startswith(("U", "R2UR", "S2UR")):
            continue
        carries = re.findall(r"\bUP\d\b", operands)
        halves = operation == "UIADD3.X" and any(lower.pop(x, None) in sources for x in carries)
        reads = operation.startswith("U") and any(x in holders for x in sources)
        if missing or halves or (reads and not operation.startswith("UMOV")):
            found.append(f"{operation} {operands}")
        lower = {carry: source for carry, source in lower.items() if source not in targets}
        if operation == "UIADD3" and carries and sources and sources[0] not in targets:
            lower[carries[0]] = sources[0]
        if GLOBAL_DESCRIPTOR in operands or (reads and operation.startswith("UMOV")):
            holders |= targets
        else:
            holders -= targets
    return found
