"""Counts instructions in nvdisasm's listing of a cubin: of each kernel, and of its main loop."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What the main loop cannot do without: a branch around these is not taken.
WORK = ("HMMA", "LDSM", "LDGSTS", "RED", "BAR")
# The same of the head's loops over rows.
ROW_WORK = ("LDS", "LDGSTS", "STG", "BAR")
# The same of passes over rows.
PASS_WORK = ("LDG", "STG", "SHFL", "MUFU", "BAR")
# Counted one by one in the main loop; the others together as "rest".
NAMED = (
    *("HMMA", "LDSM", "LDGSTS", "LDS", "STS", "RED", "SHFL"),
    *("MUFU", "FFMA", "FMUL", "FADD", "FMNMX", "F2FP", "IMAD", "IADD3", "LOP3", "CS2R"),
)
ROW_MIX = ("MUFU", "FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "F2FP", "IMAD", "LDS", "LDGSTS", "STG")
# Counted in all of the main loop: a warp whose lanes disagree goes both ways of a branch.
IN_LOOP = ("LDSM", "HMMA", "LDG", "STS", "RED")
LOCAL = ("LDL", "STL")
UNTYPED = ("LD", "ST")  # the address decides between global, shared and local memory


@dataclass(frozen=True)
class Instruction:
    conditional: bool
    opcode: str  # as HMMA.16816.F32.BF16
    operands: str

    @property
    def base(self) -> str:
        name = self.opcode.split(".")[0]
        return "RED" if name == "REDG" else name  # sm_90's word for an addition in global memory

    @property
    def label(self) -> str | None:
        found = re.search(r"`\((\.\w+)\)", self.operands)
        return found[1] if found else None

    @property
    def bits(self) -> int:
        """Width of a load or store a thread."""
        for part in self.opcode.split(".")[1:]:
            if part in ("U8", "S8"):
                return 8
            if part in ("U16", "S16"):
                return 16
            if part in ("64", "128"):
                return int(part)
            if re.fullmatch(r"F32x\d", part):
                return 32 * int(part[-1])
        return 32


@dataclass(frozen=True)
class Code:
    instructions: list[Instruction]
    labels: dict[str, int]  # to the index of the instruction that follows


LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;")


def read(listing: str) -> dict[str, Code]:
    """Each kernel's code, by mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.M)
    kernels = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        code = Code([], {})
        for line in text.splitlines():
            label = re.match(r"^(\.\w+):", line)
            if label:
                code.labels[label[1]] = len(code.instructions)
            found = LINE.match(line)
            if found:
                predicate, opcode, operands = found.groups()
                if predicate == "@!PT":
                    opcode = "NOP"  # never done: the assembler's way round a fault of the hardware
                conditional = predicate is not None or (
                    opcode == "BRA" and not operands.startswith("`")
                )
                code.instructions.append(Instruction(conditional, opcode, operands))
        kernels[name] = code
    return kernels


def target(code: Code, at: int) -> int | None:
    """Where the branch at an index leads; None for what is not one."""
    instruction = code.instructions[at]
    if instruction.base != "BRA" or instruction.label is None:
        return None
    return code.labels[instruction.label]


def main_loop(code: Code) -> range | None:
    """The smallest loop around every HMMA; None where there is none."""
    hmma = [i for i, x in enumerate(code.instructions) if x.base == "HMMA"]
    loops = []
    for at in range(len(code.instructions)):
        first = target(code, at)
        if hmma and first is not None and first <= hmma[0] and hmma[-1] < at:
            loops.append(range(first, at + 1))
    return min(loops, key=len, default=None)


def is_tile_work(skipped: list[Instruction]) -> bool:
    return any(x.base in WORK for x in skipped)


def is_row_work(skipped: list[Instruction]) -> bool:
    """A softcap's tanh takes an exponential and a reciprocal; other exponentials are work."""
    exponentials = sum(x.opcode.startswith("MUFU.EX2") for x in skipped)
    reciprocals = sum(x.opcode.startswith("MUFU.RCP") for x in skipped)
    return exponentials > reciprocals or any(x.base in ROW_WORK for x in skipped)


def shortest_round(
    code: Code, loop: range, is_work: Callable[[list[Instruction]], bool] = is_tile_work
) -> list[Instruction]:
    """The shortest round of the loop that leaves out no work: without masks and modifiers."""
    rest = {loop.stop: 0}  # instructions from here to the end of the round
    following: dict[int, int] = {}
    for at in reversed(loop):
        to = target(code, at)
        choices = [at + 1]
        if to is not None and (at < to < loop.stop or to == loop.start):
            skipped = code.instructions[at + 1 : to]
            if not code.instructions[at].conditional:
                choices = []
            if to == loop.start:
                choices.append(loop.stop)
            elif not choices or not is_work(skipped):
                choices.append(to)
        following[at] = min(choices, key=lambda i: rest[i])
        rest[at] = 1 + rest[following[at]]
    passed, at = [], loop.start
    while at in loop:
        passed.append(code.instructions[at])
        at = following[at]
    return passed


def takes_words(code: Code, start: int, stop: int) -> bool:
    inside = code.instructions[start:stop]
    moves = any(x.base in ("LDGSTS", "STG") for x in inside)
    return moves and any(x.base == "LDS" and x.bits == 128 for x in inside)


def row_passes(code: Code) -> list[dict[str, Any]]:
    """The loops that take a row's 16-byte words from shared memory: the head's, in code order.

    `words` the words that a round takes, a thread; `all` its instructions; `mix` those of the
    shortest round that leaves none of the words out: every option off.
    """
    loops = [
        range(to, at + 1)
        for at in range(len(code.instructions))
        if (to := target(code, at)) is not None and to <= at and takes_words(code, to, at + 1)
    ]
    found = []
    for loop in loops:
        if any(other[0] in loop and other[-1] in loop for other in loops if other != loop):
            continue  # around others: code that the compiler moved out of line
        inside = [code.instructions[i] for i in loop]
        words = widths(inside, "LDS")["128"]
        every = Counter(x.base for x in inside)
        least = Counter(x.base for x in shortest_round(code, loop, is_row_work))
        found.append(
            {
                "words": words,
                "all": len(inside),
                **{base: widths(inside, base) for base in ("LDGSTS", "LDG", "LDS", "STG")},
                "untyped": sum(every[base] for base in UNTYPED),
                "mix": {"all": least.total(), **{base: least[base] for base in ROW_MIX}},
            }
        )
    return found


def is_pass_work(skipped: list[Instruction]) -> bool:
    return any(x.base in PASS_WORK for x in skipped)


def copying_loop(code: Code) -> range | None:
    """The smallest loop that loads and stores global memory."""
    loops = []
    for at in range(len(code.instructions)):
        first = target(code, at)
        if first is None or first > at:
            continue
        inside = {x.base for x in code.instructions[first : at + 1]}
        if {"LDG", "STG"} <= inside:
            loops.append(range(first, at + 1))
    return min(loops, key=len, default=None)


def pass_round(code: Code) -> dict[str, Any] | None:
    """What a thread does for its words of a row: a round of the loop, or the whole kernel where
    each thread has one. None where there is neither."""
    loop = copying_loop(code)
    if loop is None:
        ends = [x.base == "EXIT" and not x.conditional for x in code.instructions]
        loop = range(ends.index(True) + 1 if True in ends else 0)
    path = shortest_round(code, loop, is_pass_work)
    found = {base: widths(path, base) for base in ("LDG", "STG")}
    return {"all": len(path), **found} if all(found.values()) else None


def widths(instructions: list[Instruction], base: str) -> dict[str, int]:
    return dict(sorted(Counter(str(x.bits) for x in instructions if x.base == base).items()))


def counts(code: Code) -> dict[str, Any]:
    every = Counter(x.base for x in code.instructions)

    found: dict[str, Any] = {
        "instructions": len(code.instructions),
        **{base: every[base] for base in ("LDSM", "HMMA")},
        **{base: widths(code.instructions, base) for base in ("LDGSTS", "LDG", "STG", "RED")},
        "local": sum(every[base] for base in LOCAL),
        "untyped": sum(every[base] for base in UNTYPED),
    }
    loop = main_loop(code)
    if loop is not None:
        inside = Counter(code.instructions[i].base for i in loop)
        found["loop"] = {base: inside[base] for base in IN_LOOP}
        path = Counter(x.base for x in shortest_round(code, loop))
        mix = {base: path[base] for base in NAMED}
        found["tile"] = {"all": path.total(), **mix, "rest": path.total() - sum(mix.values())}
    elif passes := row_passes(code):
        found["passes"] = passes
    elif (round_ := pass_round(code)) is not None:
        found["round"] = round_
    return found


def counts_by_kernel(listing: str) -> dict[str, dict[str, Any]]:
    return {name: counts(code) for name, code in read(listing).items()}
