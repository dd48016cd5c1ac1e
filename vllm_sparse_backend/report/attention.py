"""One head's attention over a text: where its mass is, which tiles are kept, what is missed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn.functional import pad

from vllm_sparse_backend.ops import PolicyTable, layout, select_tiles
from vllm_sparse_backend.ops.policies import Place
from vllm_sparse_backend.ops.tiles import Q_BLOCK, SUBTILE, TileList
from vllm_sparse_backend.selection import AnyPolicy, Policy


class Summary(BaseModel):
    """What `inspect --attention --json` prints. Shares are of a row's softmax mass."""

    model_config = ConfigDict(frozen=True)

    profile: str
    layer: int
    head: int
    policy: Policy
    text: str
    tokens: int
    density: float  # computed / causal tiles
    missed_mean: float  # over all rows
    missed_worst: float  # of one row
    worst_q_block: int  # that row's
    followed_from: int | None  # a server follows the policy from so many tokens on; None: never
    missed_by_q_block: list[float]  # means

    def describe(self) -> str:
        """For the terminal."""
        said = (
            f"layer {self.layer}, head {self.head}, {self.tokens:,} tokens of {self.text}: "
            f"density {self.density:.3f}, {self.missed_mean:.2%} of the mass missed on average, "
            f"{self.missed_worst:.2%} in the worst row (q block {self.worst_q_block})"
        )
        return f"{said}\n{self.caution()}" if self.caution() else said

    def caution(self) -> str:
        """Where a server would not do what is shown; else nothing."""
        if self.followed_from is None:
            return "A server keeps every tile for this head, its policy never pays."
        if self.tokens < self.followed_from:
            return (
                f"A server keeps every tile of a prompt this short: it follows the policy from "
                f"{self.followed_from:,} tokens on."
            )
        return ""


@dataclass
class AttentionMap:
    """A head's attention by q block and `SUBTILE` keys; rows come chunk by chunk, from position
    0 on. Holds no more than what is drawn: a float and a bit for each cell."""

    profile: str
    layer: int
    head: int
    policy: AnyPolicy
    text: str
    tokens: int
    followed_from: int | None
    num_heads: int = 1  # of the layer, for selectors that go by it

    def __post_init__(self) -> None:
        blocks, tiles = -(-self.tokens // Q_BLOCK), -(-self.tokens // SUBTILE)
        self.mass = torch.zeros(blocks, tiles)  # of a tile, summed over the block's rows
        self.kept = torch.zeros(blocks, tiles, dtype=torch.bool)
        self.missed = torch.zeros(self.tokens)  # of each row
        self.computed = self.causal = self.rows = 0

    def add(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        gpu: torch.device | None = None,
    ) -> None:
        """A step's rows: `q` [T, D] are the last T of the positions of `k`, `v` [S, D], all on the
        host. Tiles are chosen by the compiled core, or by the GPU's kernels on that device."""
        first = k.shape[0] - q.shape[0]
        if first != self.rows:
            raise ValueError(f"q: want rows from position {self.rows} on, got {first}")
        place = Place(self.layer, self.head, max(self.num_heads, self.head + 1))
        table = PolicyTable([self.policy], place=place)
        tiles = _select(q, k, v, table, scale, self.tokens, gpu)
        self.computed += tiles.computed[0]
        self.causal += tiles.causal[0]
        size = tiles.tile_sizes[0]
        kept = tiles.mask(0)
        for row, block in enumerate(tiles.blocks):
            rows = q[block.first - first : block.end - first].float()
            score = scale * (rows @ k[: block.end].float().T)  # [R, end]
            behind = torch.arange(block.end) > torch.arange(block.first, block.end)[:, None]
            mass = score.masked_fill(behind, -torch.inf).softmax(1)
            keys = kept[row].repeat_interleave(size)[: block.end]
            self.missed[block.first : block.end] = (mass * ~keys).sum(1)
            by_tile = pad(mass, (0, -block.end % SUBTILE)).unflatten(1, (-1, SUBTILE)).sum((0, 2))
            at = block.start // Q_BLOCK
            self.mass[at, : len(by_tile)] += by_tile
            # Of a block that two chunks share, what either of them keeps.
            self.kept[at, : len(by_tile)] |= keys[::SUBTILE]
        self.rows = k.shape[0]

    @property
    def mean_mass(self) -> torch.Tensor:
        """The share of a row's mass in each tile, mean of the q block's rows [blocks, tiles]."""
        rows = torch.full((len(self.mass), 1), float(Q_BLOCK))
        rows[-1] = (self.tokens - 1) % Q_BLOCK + 1
        return self.mass / rows

    def missed_by_block(self) -> tuple[list[float], list[float]]:
        """The mean over the rows of each q block, and its worst row's."""
        parts = self.missed.split(Q_BLOCK)
        return [float(part.mean()) for part in parts], [float(part.max()) for part in parts]

    def summary(self) -> Summary:
        """The figures."""
        worst = int(self.missed.argmax())
        return Summary(
            profile=self.profile,
            layer=self.layer,
            head=self.head,
            policy=self.policy,
            text=self.text,
            tokens=self.tokens,
            density=self.computed / self.causal if self.causal else 1.0,
            missed_mean=float(self.missed.mean()),
            missed_worst=float(self.missed[worst]),
            worst_q_block=worst // Q_BLOCK,
            followed_from=self.followed_from,
            missed_by_q_block=self.missed_by_block()[0],
        )


def _select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policies: PolicyTable,
    scale: float,
    prompt_len: int,
    gpu: torch.device | None,
) -> TileList:
    """What the core, or a GPU's kernels, keep of this step; one head, so that no other is
    computed."""
    kv_layout = "vec" if gpu is None else "strided"
    q, k, v = (x[:, None].contiguous().to(gpu or "cpu") for x in (q, k, v))
    cache = layout.pack(k, v, kv_layout)

    def numbers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    return select_tiles(
        q,
        cache,
        torch.arange(len(cache), dtype=torch.int32, device=q.device)[None],
        numbers(0, len(q)),
        numbers(len(k)),
        policies,
        scale=scale,
        prompt_lens=numbers(prompt_len),
        kv_layout=kv_layout,
        impl="cpu" if gpu is None else "triton",
    )
