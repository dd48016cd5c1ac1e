"""Which tiles, warps and stages each kernel is launched with: a table, and no search.

One pure function of the architecture and the layer's shapes. What it may answer is compiled for
every supported architecture by `make gpu-check`, which holds each variant to its registers, its
shared memory and its matrix instructions. Nothing here has been timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from vllm_sparse_backend.selection import Bits

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS: Final = (64, 80, 96, 112, 128, 192, 256)
ARCHITECTURES: Final = (
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950",
)  # fmt: skip
KEY_CHUNK: Final = 128  # keys that one program quantizes
WORD_KEYS: Final = 512  # keys whose subtiles are the bits of a word
MOST_SHARED: Final = 8  # q heads whose scored rows make one matrix
MOST_TOGETHER: Final = 8  # `anchor_rows` programs of 16 rows that make one of 128


@dataclass(frozen=True, slots=True)
class Shape:
    """What Triton is told of a launch: keys (or rows) of a product, warps, pipeline stages."""

    block: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Score(Shape):
    """How `score_tiles` is launched."""

    parts: int  # in which the keys of a subtile lie in a product of its; see there
    together: int  # `anchor_rows` programs whose rows one program scores
    words: int = 4  # of 512 keys that one program scans


@dataclass(frozen=True, slots=True)
class Launch:
    """The launches of one layer."""

    keys: Shape  # `sum_keys` and `code_keys`; block: keys of a program
    anchor: Shape
    score: Score
    score_packed: Score | None  # where two codes are in a byte; see `packs`
    compact: Shape  # block: subtiles at a time
    attend: Shape
    attend_repeat: bool  # real channels are read once more in place of those that pad head_dim
    share: int  # q heads of a group that are scored together


# Attention, by the padded head_dim. A program's 64 query rows are four warps of 16 on NVIDIA and
# two of 32 on AMD; where there are more, warps multiply the same rows twice. Then products of 64
# keys where the registers suffice without a spill, and as many stages as leave room for two blocks
# on a multiprocessor, so that one multiplies while the other takes exponentials.
# (A third stage of 64 channels spills on sm_80, of pages longer than 16.)
_AMPERE: Final = {64: Shape(64, 4, 2), 128: Shape(32, 4, 4), 256: Shape(32, 8, 2)}
# 100 KB of shared memory instead of 164.
_SMALL: Final = {**_AMPERE, 64: Shape(64, 4, 3), 128: Shape(32, 4, 2)}
_HOPPER: Final = {64: Shape(64, 4, 4), 128: Shape(64, 4, 3), 256: Shape(32, 4, 3)}
_BLACKWELL: Final = {**_HOPPER, 256: Shape(16, 4, 3)}
_CDNA3: Final = {64: Shape(32, 2, 2), 128: Shape(32, 2, 2), 256: Shape(16, 4, 2)}  # 64 KB
_CDNA4: Final = {64: Shape(32, 2, 3), 128: Shape(32, 2, 3), 256: Shape(16, 4, 3)}  # 160 KB
_ATTEND: Final = {
    "sm_80": _AMPERE, "sm_86": _SMALL, "sm_89": _SMALL, "sm_90": _HOPPER, "sm_100": _BLACKWELL,
    "sm_103": _BLACKWELL, "sm_120": _SMALL, "gfx942": _CDNA3, "gfx950": _CDNA4,
}  # fmt: skip
# Where one instruction multiplies the codes of 64 rows or more, 128 keys take fewer for each; never
# fewer than 64, since that is the largest tile.
_SCORE: Final = {arch: Shape(128, 4, 3) for arch in ("sm_90", "sm_100")}
# Of 256 channels four warps' registers do not hold 128 rows, and two stages leave room for another
# block, or for sums over more than a subtile; so they do of 64.
_SCORE_64: Final = {arch: Shape(64, 4, 2) for arch in ("sm_86", "sm_89")}
_SCORE_256: Final = {
    "sm_86": Shape(64, 4, 2), "sm_89": Shape(64, 4, 2), "sm_90": Shape(128, 8, 2),
    "sm_103": Shape(64, 4, 2),
}  # fmt: skip
# Rows of different q blocks are scored together until there are so many: a product then costs less
# for each. A fifth-generation matrix unit does 128 rows in the time of 64; on sm_90 the keys' codes
# are loaded once for twice the rows.
_SCORE_ROWS: Final = {"sm_90": 128, "sm_100": 128}
# sm_103 has no such instruction for integers, and its registers do not hold eight heads' rows.
_MOST_SHARED: Final = {"sm_103": 4}
# The launches of scoring where 4-bit floats are multiplied as such, and of how many rows: a
# fifth-generation matrix unit multiplies them by 128 rows only.
_FP4: Final = {
    "sm_100": (Shape(128, 4, 3), 128), "sm_103": (Shape(128, 4, 3), 128),
    "sm_120": (Shape(64, 4, 3), 64), "gfx950": (Shape(64, 4, 3), 64),
}  # fmt: skip
# float32 has no matrix units on NVIDIA (TF32 would not be float32), and its products take the
# registers. On AMD a thread has 256 of them with 8 waves, with 16 half as many; for sm_80 and
# sm_120 the compiler makes do with few, and words of memory, where 8 warps are to have more.
_FLOAT32: Final = {64: Shape(16, 8, 1), 128: Shape(16, 16, 1), 256: Shape(16, 16, 1)}
_FLOAT32_FEW: Final = {**_FLOAT32, 64: Shape(16, 16, 1)}
_FLOAT32_AMD: Final = {64: Shape(16, 8, 1), 128: Shape(16, 8, 1), 256: Shape(16, 8, 1)}
_ATTEND_FLOAT32: Final = {
    "sm_80": _FLOAT32_FEW, "sm_120": _FLOAT32_FEW, "gfx942": _FLOAT32_AMD, "gfx950": _FLOAT32_AMD,
}  # fmt: skip
# Where head_dim is padded, a masked load is a branch on AMD, behind which nobody knows how many are
# under way, so that all are waited for; in float32 on sm_120 it takes the last registers.
_REPEAT: Final = ("gfx942", "gfx950")
_REPEAT_FLOAT32: Final = ("sm_120",)


def share_of(group: int, most: int = MOST_SHARED) -> int:
    """The most q heads, up to ``most``, that divide a group into equal parts."""
    return max(n for n in range(1, min(group, most) + 1) if group % n == 0)


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
    width, full = padded(head_dim), dtype == torch.float32
    most = 2 if full else 4 if width == 256 else _MOST_SHARED.get(arch, MOST_SHARED)
    share = share_of(group, most)
    rows = 16 * padded(share)
    if full:
        anchor = Shape(16, 8, 1)
    elif width == 256:
        anchor = Shape(16, 8 if rows == 64 else 4, 1)
    else:
        # Few keys where the last registers go to packing one head's codes, or five's or six's; or,
        # on sm_120, to pages longer than 16.
        few = width == 128 and rows == 16 and arch in _FP4
        few |= (width, rows, arch) in ((64, 64, "sm_120"), (64, 128, "sm_100"))
        anchor = Shape(width // (4 if few else 2), 8 if rows == 128 else 4, 1)
    score = _SCORE.get(arch, Shape(64, 4, 3))
    if head_dim in (64, 256):
        score = (_SCORE_64 if head_dim == 64 else _SCORE_256).get(arch, score)
    together = max(1, _SCORE_ROWS.get(arch, 64) // rows)
    return Launch(
        keys=Shape(KEY_CHUNK, 8 if width == 256 else 4, 1),
        anchor=anchor,
        score=Score(score.block, score.warps, score.stages, _parts(arch, score.block), together),
        score_packed=_score_packed(arch, width, rows),
        compact=Shape(1024, 4, 1),
        attend=(_ATTEND_FLOAT32.get(arch, _FLOAT32) if full else _ATTEND[arch])[width],
        attend_repeat=width != head_dim and arch in (_REPEAT_FLOAT32 if full else _REPEAT),
        share=share,
    )


def packs(arch: str, bits: Bits) -> bool:
    """Whether such codes lie two in a byte: 4-bit floats, where there are matrix instructions for
    them. Elsewhere they are multiplied as integers, for the same tiles."""
    return bits == "fp4" and arch in _FP4


def _score_packed(arch: str, width: int, rows: int) -> Score | None:
    if arch not in _FP4:
        return None
    shape, at_once = _FP4[arch]
    if arch == "sm_120" and width == 64:  # three stages would be unrolled, and spill
        shape = Shape(64, 4, 2)
    parts = 1 if arch in ("sm_100", "sm_103", "gfx950") else shape.block // 16
    return Score(shape.block, shape.warps, shape.stages, parts, max(1, at_once // rows))


def _parts(arch: str, keys: int) -> int:
    """In how many parts of a product the keys of a subtile lie, so that a thread has many of one.

    On NVIDIA a thread has two adjacent columns of every eight; before Hopper, and where its kind of
    instruction is missing, two warps of four share a product's columns by eights, and of a subtile
    a thread gets half. A fifth-generation matrix unit gives a thread whole rows, as AMD's give runs
    of columns.
    """
    if arch == "sm_100" or not arch.startswith("sm_"):
        return 1
    return 8 if arch == "sm_90" else keys // 16


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
