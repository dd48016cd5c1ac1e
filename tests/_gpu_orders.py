"""The order of a batch's requests by the code of vLLM's model runners."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from _gpu_batch import Request
from vllm.v1.attention.backends.utils import reorder_batch_to_split_decodes_and_prefills


class V1Batch:
    """As much of model runner V1's input batch as its sorting looks at."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.req_ids = [str(n) for n in range(len(requests))]
        self.num_computed_tokens_cpu = np.array([it.context - it.rows for it in requests])
        self.num_prompt_tokens = self.num_computed_tokens_cpu + [it.prefilling for it in requests]

    def swap_states(self, a: int, b: int) -> None:
        lists: tuple[Any, ...] = (
            self.requests,
            self.req_ids,
            self.num_computed_tokens_cpu,
            self.num_prompt_tokens,
        )
        for one in lists:
            one[a], one[b] = one[b], one[a]


def v1_order(requests: list[Request]) -> list[Request]:
    """By V1's own code, with the threshold that our builder asks for."""
    batch = V1Batch(list(requests))
    scheduled = {str(n): it.rows for n, it in enumerate(requests)}
    reorder_batch_to_split_decodes_and_prefills(
        batch, SimpleNamespace(num_scheduled_tokens=scheduled), decode_threshold=1
    )
    return batch.requests


def v2_order(requests: list[Request]) -> list[Request]:
    """By V2's own code, without speculation."""
    from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

    tokens = {str(n): it.rows for n, it in enumerate(requests)}
    return [requests[int(n)] for n in sort_batch_req_ids(tokens, {}, 1)]
