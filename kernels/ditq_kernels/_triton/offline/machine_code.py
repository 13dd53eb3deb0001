"""What a compiled kernel is made of: its machine code, disassembled and counted.

The Triton wheel carries the disassembler, so no GPU and no CUDA toolkit is needed. It takes longer to start
(0.3 s) than to read a kernel: all kernels of an architecture go through it together, as bare instructions.
"""

import collections
import dataclasses
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
# products whose first operand is not in shared memory: "IGMMA.64x128x32.S8.S8 R24, R152, gdesc[UR16], R24" has it in
# registers, "UTCIMMA tmem[UR21], gdesc[UR4], ..." in the tensor cores' memory, where registers were stored
REGISTER_OPERAND = re.compile(r"^(?:@\S+\s+)?(?:[IHQ]GMMA\S* R\d+, R\d+, gdesc|UTC[IHQ]MMA\S* tmem)")
Instructions = list[tuple[int, str]]  # (address, text); addresses count from the first kernel of an architecture


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled kernel."""

    op: str
    target: int
    config: Any  # its launch, a dataclass
    cubin: bytes
    shared: int  # bytes a program, dynamic


@dataclasses.dataclass(frozen=True)
class Census:
    """What one compiled kernel is made of. Opcode counts are static, per warp."""

    op: str
    target: int
    config: dict[str, int]
    registers: int
    stack: int  # bytes a thread; more than 0 means spills
    spills: int  # local memory instructions
    shared: int  # bytes a program, dynamic
    mma: dict[str, int]  # tensor-core opcodes with their suffixes, whole kernel
    loop: dict[str, int]  # opcodes of the hot loop: the longest innermost one with tensor-core instructions
    whole: dict[str, int]  # opcodes of the whole kernel
    loop_opcodes: dict[str, int]  # as loop, with suffixes: sizes of products and of loads
    whole_opcodes: dict[str, int]  # as whole, with suffixes
    register_operands: int  # products of the hot loop whose first operand comes from registers; sm_90, sm_100

    @property
    def loop_instructions(self) -> int:
        """Instructions of one hot-loop iteration."""
        return sum(self.loop.values())


def censuses_of(binaries: Sequence[Binary]) -> list[Census]:
    """Disassemble kernels and count, in their order.

    Raises:
        RuntimeError: the disassembler said nothing about resources, or a file has more than one kernel.
    """
    made: dict[int, Census] = {}
    for target in {binary.target for binary in binaries}:
        places = [i for i, binary in enumerate(binaries) if binary.target == target]
        kernels = [binaries[i] for i in places]
        codes = _disassembled([code_of(kernel.cubin) for kernel in kernels], target)
        made |= dict(zip(places, map(_census, kernels, codes), strict=True))
    return [made[i] for i in range(len(binaries))]


def code_of(cubin: bytes) -> bytes:
    """The instructions of the one kernel in an ELF file.

    Raises:
        RuntimeError: there is another number of kernels.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)  # of sections
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    # name, type, flags, address, offset, size, and four more
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(count)]
    texts = [each for each in sections if cubin.startswith(b".text", sections[names][4] + each[0])]
    if len(texts) != 1:
        raise RuntimeError(f"machine_code: expected one kernel in a cubin, got {len(texts)}")
    offset, size = texts[0][4:6]
    return cubin[offset : offset + size]


def _census(binary: Binary, instructions: Instructions) -> Census:
    registers, stack = _resources(binary)
    whole, loop = _count(instructions), _hot_loop(instructions)
    opcodes = [_opcode(text) for _, text in instructions]
    mma = collections.Counter(name for name in opcodes if "MMA" in name.split(".")[0])
    return Census(
        op=binary.op, target=binary.target, config=dataclasses.asdict(binary.config),
        registers=registers, stack=stack, spills=whole["LDL"] + whole["STL"], shared=binary.shared,
        mma=dict(mma), loop=dict(_count(loop)), whole=dict(whole),
        loop_opcodes=dict(collections.Counter(_opcode(text) for _, text in loop)),
        whole_opcodes=dict(collections.Counter(opcodes)),
        register_operands=sum(REGISTER_OPERAND.search(text) is not None for _, text in loop),
    )  # fmt: skip


def _resources(binary: Binary) -> tuple[int, int]:
    """Registers, and bytes of stack, a thread."""
    usage = _run("cuobjdump", "-res-usage", contents=binary.cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"offline: cuobjdump reported no resource usage for {binary.op}: {usage[-200:]}")
    return int(found[1]), int(found[2])


def _disassembled(codes: Sequence[bytes], target: int) -> list[Instructions]:
    """Instructions of kernels that lie one behind the other."""
    family = f"SM{target}a" if target >= 90 else f"SM{target}"
    text = _run("nvdisasm", "-b", family, contents=b"".join(codes))
    found = [(int(match[1], 16), match[2].strip()) for match in INSTRUCTION.finditer(text)]
    split, begin = [], 0
    for code in codes:
        end = begin + len(code)
        split.append([item for item in found if begin <= item[0] < end])
        begin = end
    return split


def _run(tool: str, *arguments: str, contents: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(contents)
        file.flush()
        command = [str(TOOLS / tool), *arguments, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _hot_loop(instructions: Instructions) -> Instructions:
    """Body of the longest innermost loop with tensor-core instructions; empty if there is none."""
    loops = []
    # behind the last EXIT lie waits for TMA, whose way back into the loop is a backward branch too
    ends = [address for address, text in instructions if _opcode(text) == "EXIT"]
    main = [item for item in instructions if item[0] <= max(ends, default=instructions[-1][0])]
    for address, text in main:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch is not None and int(branch[1], 16) < address:
            body = [item for item in instructions if int(branch[1], 16) <= item[0] <= address]
            if any("MMA" in text for _, text in body):
                loops.append(body)
    innermost = [loop for loop in loops if not any(_inside(other, loop) for other in loops)]
    return max(innermost, key=len, default=[])


def _inside(inner: Instructions, outer: Instructions) -> bool:
    return len(inner) < len(outer) and outer[0] <= inner[0] and inner[-1] <= outer[-1]


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P[T\d]+\s+", "", text).split()[0]


def _count(instructions: Instructions) -> collections.Counter:
    return collections.Counter(_opcode(text).split(".")[0] for _, text in instructions)
