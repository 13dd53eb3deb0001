"""What a compiled kernel is made of: its machine code, disassembled and counted.

The Triton wheel carries the disassembler, so no GPU and no CUDA toolkit is needed.
"""

import collections
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import triton

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# wgmma with its first operand in registers: "IGMMA.64x128x32.S8.S8 R24, R152, gdesc[UR16], R24"
REGISTER_OPERAND = re.compile(r"^[IHQ]GMMA\S* R\d+, R\d+, gdesc")


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
    register_operands: int  # Hopper products of the hot loop whose first operand comes from registers

    @property
    def loop_instructions(self) -> int:
        """Instructions of one hot-loop iteration."""
        return sum(self.loop.values())


def census_of(op, target, config, compiled) -> Census:
    """Disassemble a kernel that `triton.compile` returned and count.

    Raises:
        RuntimeError: the disassembler said nothing about resources.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        machine_code = _disassemble("-sass", cubin.name)
        usage = _disassemble("-res-usage", cubin.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"offline: cuobjdump reported no resource usage for {op}: {usage[-200:]}")
    instructions = _instructions(machine_code)
    whole, loop = _count(instructions), _hot_loop(instructions)
    opcodes = [_opcode(text) for _, text in instructions]
    mma = collections.Counter(name for name in opcodes if "MMA" in name.split(".")[0])
    return Census(
        op=op, target=target, config=dataclasses.asdict(config),
        registers=int(resources[1]), stack=int(resources[2]),
        spills=whole["LDL"] + whole["STL"], shared=compiled.metadata.shared,
        mma=dict(mma), loop=dict(_count(loop)), whole=dict(whole),
        loop_opcodes=dict(collections.Counter(_opcode(text) for _, text in loop)),
        whole_opcodes=dict(collections.Counter(opcodes)),
        register_operands=sum(REGISTER_OPERAND.search(text) is not None for _, text in loop),
    )  # fmt: skip


def _disassemble(what: str, path: str) -> str:
    done = subprocess.run([DISASSEMBLER, what, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _instructions(machine_code: str) -> list[tuple[int, str]]:
    """(address, text) of every instruction."""
    found = re.finditer(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", machine_code, re.MULTILINE)
    return [(int(match[1], 16), match[2].strip()) for match in found]


def _hot_loop(instructions: list[tuple[int, str]]) -> list[tuple[int, str]]:
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


def _inside(inner: list[tuple[int, str]], outer: list[tuple[int, str]]) -> bool:
    return len(inner) < len(outer) and outer[0] <= inner[0] and inner[-1] <= outer[-1]


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P[T\d]+\s+", "", text).split()[0]


def _count(instructions: list[tuple[int, str]]) -> collections.Counter:
    return collections.Counter(_opcode(text).split(".")[0] for _, text in instructions)
