"""Which tiles, warps and stages each kernel is launched with: a table, and no search.

One pure function of the architecture and the layer's shapes. What it may answer is compiled for
every supported architecture by `make gpu-check`, which holds each variant to its registers, its
shared memory and its matrix instructions. Nothing here has been timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS: Final = (64, 80, 96, 112, 128, 192, 256)
ARCHITECTURES: Final = (
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950",
)  # fmt: skip
MOST_SHARED: Final = 8  # q heads whose scored rows make one matrix


@dataclass(frozen=True, slots=True)
class Shape:
    """What Triton is told of a launch: keys (or rows) of a product, warps, pipeline stages."""

    block: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Launch:
    """The launches of one layer."""

    keys: Shape  # `sum_keys` and `code_keys`; block: keys of a program
    anchor: Shape
    score: Shape
    compact: Shape  # block: subtiles at a time
    attend: Shape
    score_words: int  # words of 512 keys that one `score_tiles` program scans
    share: int  # q heads of a group that are scored together


def share_of(group: int) -> int:
    """The most q heads, up to MOST_SHARED, that divide a group into equal parts."""
    return max(n for n in range(1, min(group, MOST_SHARED) + 1) if group % n == 0)


def launch(arch: str, head_dim: int, group: int, dtype: torch.dtype) -> Launch:
    """How the kernels are launched for ``group`` q heads per kv head.

    Raises ValueError for an architecture, head_dim or dtype that there is no entry for.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture: want one of {list(ARCHITECTURES)}, got {arch!r}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: want one of {list(HEAD_DIMS)}, got {head_dim}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: want one of {[str(d) for d in DTYPES]}, got {dtype}")
    share = share_of(group)
    rows = 16 * padded(share)
    wide = padded(head_dim) == 256
    full = dtype == torch.float32
    return Launch(
        keys=Shape(128, 4, 1),
        anchor=Shape(32 if wide or full else 64, 8 if rows >= 64 else 4, 1),
        score=Shape(64, 4, 3),
        compact=Shape(1024, 4, 1),
        attend=Shape(32 if wide or full else 64, 8 if wide else 4, 2 if wide or full else 3),
        score_words=4,
        share=share,
    )


def check_device(device: torch.device) -> None:
    """Raise ValueError where no kernel can run on tensors of ``device``."""
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(
            f"q: want a tensor on a GPU for impl 'triton', got one on {device} "
            "(with TRITON_INTERPRET=1 in the environment, kernels are interpreted on the host)"
        )


def architecture() -> str:
    """The name by which `launch` knows the device that kernels run on.

    Where they are interpreted there is none, and any entry will do: the first is taken.
    """
    from triton import knobs, runtime

    if knobs.runtime.interpret:
        return ARCHITECTURES[0]
    target = runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def padded(size: int) -> int:
    """The next power of two: what a Triton axis has to be."""
    return 1 << (size - 1).bit_length()
