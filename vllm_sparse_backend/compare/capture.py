"""Queries, keys and values of some layers while vLLM reads a prompt, written chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_sparse_backend.backend.observe import Call, observing
from vllm_sparse_backend.compare.layer import Layer
from vllm_sparse_backend.compare.store import Store
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.offline import EngineOptions, engine, refuse_lone_row
from vllm_sparse_backend.report.capture import DENSE as DENSE_CONFIG


class _Writer:
    """Called before each layer's attention of each chunk (`observe.observing`)."""

    def __init__(
        self,
        store: Store,
        names: Mapping[int, tuple[str, str]],
        tokens: int,
        advance: Callable[[], None],
    ) -> None:
        self._store, self._names, self._tokens, self._advance = store, names, tokens, advance
        self._starts: dict[int, list[int]] = {layer: [] for layer in names}
        self.closed: list[int] = []

    def __call__(self, call: Call) -> None:
        if call.layer not in self._names:
            return
        q, end = call.rows(), int(call.seq_lens[0])
        start = end - len(q)
        if end > self._tokens:  # of a token that was generated
            return
        k, v = call.keys_values()
        name, key = self._names[call.layer]
        self._starts[call.layer].append(start)
        self._store.save_chunk(name, start, Layer(q, k[start:], v[start:]))
        if end == self._tokens:
            self._store.close_layer(name, key, self._starts[call.layer], call.scale)
            self.closed.append(call.layer)
        self._advance()


def capture(
    options: EngineOptions,
    prompts: Sequence[tuple[Sequence[int], Mapping[int, tuple[str, str]]]],
    store: Store,
    advance: Callable[[], None],
) -> None:
    """Have one engine read the prompts, each with the layers that are wanted of it, by number:
    their names in the store and their keys.

    Every tile is kept meanwhile, so that no policy is in what is compared. ``advance`` is called
    after each wanted layer of each chunk. Raises SparsePrefillError.
    """
    from vllm import SamplingParams

    for ids, _ in prompts:
        refuse_lone_row(len(ids), options.chunk_tokens)
    with engine(options, "sparse_prefill", DENSE_CONFIG) as llm:
        for ids, names in prompts:
            writer = _Writer(store, names, len(ids), advance)
            prompt: Any = {"prompt_token_ids": list(ids)}
            with observing(writer):
                llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
            if missing := sorted(set(names) - set(writer.closed)):
                raise SparsePrefillError(
                    f"model {options.model}: want the attention of layers {sorted(names)}, the "
                    f"core did not see that of {missing}"
                )
