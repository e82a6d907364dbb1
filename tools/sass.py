"""Looks in compiled Hopper code for two defects of the assembler: a wrong address, and a thread's number lost.

ptxas 12.8, which Triton ships up to 3.7.1, sometimes computes a shared-memory descriptor of wgmma from the wrong
uniform register. The product then reads garbage, mostly without an error. 12.9 and 13.0 compile the same PTX well,
and our kernels are launched on Hopper only as those made them (kernels_triton/assembler.py); this is a second look.
For odd V above 96 the outputs' kernel (chunk_forward) has the first sign, as 12.8 makes it.
Three signs betray it: both halves of the 64-bit descriptor come from one register, or from the descriptor of global
memory, or one from a register that nothing has written.

Where registers spill, ptxas 12.9 and 13.0 may load a spilled value into the register that holds the thread's number and
go on reading it as that number. For (359, 15) in chunks of 256 every thread then thought that another one was to store,
and nobody stored the row sums of dq's first tile. Our tiles avoid such spills (kernels_triton/config.py).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\d+\s+)?([A-Z0-9_.]+)\s*(.*?);")
GLOBAL_DESCRIPTOR = "c[0x0][0x208]"
THREAD_MASKS = ("0x1f", "0x3f", "0x7f", "0xff", "0x1ff")  # of 32 to 512 threads


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


def _instructions(sass: str) -> Iterator[tuple[int, bool, str, str]]:
    """Address, whether it has a predicate, operation and operands of each instruction."""
    for match in filter(None, map(INSTRUCTION.match, sass.splitlines())):
        address, predicate, operation, operands = match.groups()
        yield int(address, 16), bool(predicate), operation, operands


def defects(sass: str) -> list[str]:
    """The instructions that show either defect."""
    return wrong_addresses(sass) + lost_threads(sass)


class _Threads(NamedTuple):
    """Where the thread's number is, and what it was lost from."""

    holders: frozenset[int] = frozenset()  # registers that hold it
    lost: frozenset[int] = frozenset()  # those that held it when something else was loaded into them, and hold that
    slots: Mapping[str, bool] = MappingProxyType({})  # by spilled value's place: whether it is the thread's number

    def written(self, registers: range, thread: bool, loaded: bool) -> _Threads:
        """After registers were written: with the thread's number or not, perhaps by a load."""
        lost = self.lost.difference(registers)
        if loaded and not thread:
            lost = lost.union(self.holders.intersection(registers))
        holders = self.holders.difference(registers)
        return self._replace(holders=holders.union(registers) if thread else holders, lost=lost)


def _width(operation: str) -> int:
    """How many registers an instruction's result fills."""
    if ".128" in operation:
        return 4
    return 2 if ".WIDE" in operation or (".64" in operation and not operation.startswith("SHF")) else 1


def lost_threads(sass: str) -> list[str]:
    """The instructions that mask, as only the thread's number is masked, what was loaded over the thread's number.

    Follows registers and spilled values in the code's order; a block that nothing runs on to starts from the first
    branch to it, or from the jump through a table that leads to the kernel's parts.
    """
    known = at_table = _Threads()
    branches: dict[int, _Threads] = {}
    ended = False
    found = []
    for address, predicate, operation, operands in _instructions(sass):
        if ended:
            known = branches.get(address, at_table)
        ended = operation in ("EXIT", "BRA", "BRX") and not predicate
        if operation == "BRX":
            at_table = known
        elif operation == "BRA" and (to := re.search(r"0x([0-9a-f]+)", operands)):
            branches.setdefault(int(to[1], 16), known)
        first, *others = [x.strip() for x in operands.split(",")]
        sources = [int(x) for x in re.findall(r"\bR(\d+)\b", ",".join(others))]
        if operation.startswith("STL"):
            known = known._replace(slots={**known.slots, first: bool(sources) and sources[0] in known.holders})
            continue
        masks = operation == "LOP3.LUT" and len(others) > 2 and others[1] in THREAD_MASKS and others[-2] == "0xc0"
        if masks and sources and sources[0] in known.lost:
            found.append(f"{operation} {operands}")
        target = re.fullmatch(r"R(\d+)", first)
        if target and not operation.startswith(("ST", "RED", "ATOM", "BAR")):
            thread = operation == "S2R" and others[0] == "SR_TID.X"
            thread |= operation.startswith(("MOV", "IMAD.MOV")) and len(sources) == 1 and sources[0] in known.holders
            thread |= operation.startswith("LDL") and known.slots.get(others[0], False)
            filled = range(int(target[1]), int(target[1]) + _width(operation))
            known = known.written(filled, thread, operation.startswith("LD"))
    return found


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
    for address, predicate, operation, operands in _instructions(sass):
        if ended and address in branches:
            holders, written = branches[address]
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
