"""What the GPUs that kernels are built for lend to a block, and what of it fits at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM: CUDA C++ Programming Guide, technical specifications by capability."""

    threads: int
    blocks: int
    shared: int  # bytes of all blocks
    block_shared: int  # bytes of one block, after asking for them
    cluster: int = 1  # blocks of a cluster, those that every such GPU allows
    registers: int = 65536

    def blocks_of(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that run on it at once, for registers a thread and shared bytes a block."""
        if shared > self.block_shared:
            return 0
        warps = -(-threads // 32)
        # A warp's registers come in units of 256 from its quarter of the register file.
        warp_registers = -(-registers * 32 // 256) * 256
        by_registers = 4 * (self.registers // 4 // warp_registers) // warps
        # Each block takes 1 KB for the system and units of 128 bytes.
        by_shared = self.shared // (-(-shared // 128) * 128 + 1024)
        return min(self.blocks, self.threads // (32 * warps), by_registers, by_shared)


DEVICES = {
    "sm_80": Multiprocessor(2048, 32, 164 << 10, 163 << 10),
    "sm_86": Multiprocessor(1536, 16, 100 << 10, 99 << 10),
    "sm_89": Multiprocessor(1536, 24, 100 << 10, 99 << 10),
    "sm_90": Multiprocessor(2048, 32, 228 << 10, 227 << 10, cluster=8),
}
RUNS_ON = {"sm_80": ("sm_80", "sm_86", "sm_89"), "sm_90": ("sm_90",)}
