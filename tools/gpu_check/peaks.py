"""What GPUs can do at most, and what dense attention is known to take of it, as published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peaks without structured sparsity, at the clock for which they are stated."""

    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz
    bf16: float  # FLOP/s, summed in fp32
    int8: float  # OP/s
    bandwidth: float  # bytes/s
    chunk: int  # tokens: what vLLM's server takes for --max-num-batched-tokens
    dense: str  # the dense attention it is compared with
    dense_share: float  # of the bf16 peak, at long contexts
    fp4: float = 0.0  # OP/s of 4-bit floats; 0: there are none
    few_rows: float = 1.0  # of the peaks, where a matrix has 64 rows instead of 128

    def per_clock(self, peak: float) -> float:
        """Of one multiprocessor."""
        return peak / self.multiprocessors / self.clock


# NVIDIA: A100 whitepaper (2020), table 3; Ada whitepaper (2022), appendix A; H100 whitepaper
# (2022), table 2; DGX B200 data sheet, an eighth. FlashAttention-2: arXiv 2307.08691 (225 of 312
# TFLOP/s on A100); on RTX 4090, SALE's own measurement below (above the rated peak, since the card
# clocks higher); on H100 35% by arXiv 2407.08608, whose FlashAttention-3 has 75%. On B200
# FlashAttention-4's 71%, arXiv 2603.05451. A fifth-generation matrix unit does 64 rows in the time
# of 128. Chunks: vLLM 0.32, `EngineArgs.get_batch_defaults`.
FA2_SHARE: Final = {"A100": 0.72, "RTX 4090": 1.09, "H100": 0.35}
GPUS: Final = (
    Gpu("A100", "sm_80", 108, 1.41e9, 312e12, 624e12, 2.04e12, 2048, "FA2", 0.72),
    Gpu("RTX 4090", "sm_89", 128, 2.52e9, 165.2e12, 660.6e12, 1.01e12, 2048, "FA2", 1.09),
    Gpu("H100", "sm_90", 132, 1.83e9, 989e12, 1979e12, 3.35e12, 8192, "FA3", 0.75),
    Gpu("B200", "sm_100", 148, 1.85e9, 2250e12, 4500e12, 8.0e12, 16384, "FA4", 0.71, 9000e12, 0.5),
)

# Of all architectures: CUDA C++ Programming Guide, "Arithmetic Instructions", per clock of one
# multiprocessor.
WARPS_ISSUED: Final = 4
SPECIAL_LANES: Final = 16

# SALE, arXiv 2505.24179: Llama-3.1-8B on an RTX 4090, ms by context. That they are those of all 32
# layers is inferred: of one layer, FlashAttention-2 would have run at 3% of peak.
PUBLISHED: Final = {
    8192: {"select": 25, "compute": 51, "FA2": 106},
    16384: {"select": 69, "compute": 137, "FA2": 416},
    32768: {"select": 213, "compute": 378, "FA2": 1597},
    65536: {"select": 733, "compute": 1117, "FA2": 6224},
    131072: {"select": 2770, "compute": 3599, "FA2": 24731},
}
