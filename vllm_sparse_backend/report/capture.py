"""A text read by a model through vLLM, and one head's attention looked at while it is."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sparse_backend import compat
from vllm_sparse_backend.config import SparseConfig, vllm_log_level
from vllm_sparse_backend.offline import EngineOptions, engine, kv_gib, refuse_lone_row
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.profile import Profile
from vllm_sparse_backend.selection import keeps_all

if TYPE_CHECKING:
    from vllm_sparse_backend.backend.observe import Call
    from vllm_sparse_backend.report.attention import AttentionMap

DEFAULT_LENGTH = 2048
CHUNK_TOKENS = 2048
# The model is run as it is, every tile kept, so that what a head sees does not depend on what
# policies made of the layers below it; and by the core from the first token on, or there were
# nothing to observe.
DENSE = {"policy": {"selector": "dense"}, "min_prompt_tokens": 1, "min_query_tokens": 1}


def look_at(
    profile: Profile,
    layer: int,
    head: int,
    text: Path,
    *,
    model: str | None,
    length: int | None,
    dtype: str,
    overrides: dict[str, Any] | None,
) -> AttentionMap:
    """The attention of one head of the profile's model over the first `length` tokens of a file.

    Raises Refused and SparsePrefillError; the message says what to change.
    """
    from vllm_sparse_backend.demo.machine import fast_dtype
    from vllm_sparse_backend.demo.model import ModelUnavailable, ensure_model

    try:
        folder = ensure_model(model)
    except ModelUnavailable as error:
        raise Refused(f"--model: {error}") from None
    ids = _tokens(str(folder), text, length)
    refuse_lone_row(len(ids), CHUNK_TOKENS)
    chosen = fast_dtype() if dtype == "auto" else dtype
    options = EngineOptions(
        model=str(folder),
        max_model_len=len(ids) + 1,
        chunk_tokens=CHUNK_TOKENS,
        dtype=chosen,
        hf_overrides=overrides,
        kv_gib=kv_gib(profile.model, len(ids), chosen),
    )
    # vLLM logs to what is stdout when it is imported, where JSON may be wanted.
    with (
        contextlib.redirect_stdout(sys.stderr),
        vllm_log_level("ERROR"),
        _failing(),
        engine(options, "sparse_prefill", DENSE) as llm,
    ):
        from vllm_sparse_backend.compat import model_facts

        profile.match(model_facts(llm.llm_engine.model_config))
        return _observe(llm, ids, profile, layer, head, text.name)


def _observe(
    llm: Any, ids: list[int], profile: Profile, layer: int, head: int, text: str
) -> AttentionMap:
    from vllm import SamplingParams

    from vllm_sparse_backend.backend.observe import observing
    from vllm_sparse_backend.report.attention import AttentionMap

    policy = profile.for_layer(layer)[head]
    found = AttentionMap(
        profile=profile.name,
        layer=layer,
        head=head,
        policy=policy,
        text=text,
        tokens=len(ids),
        followed_from=0 if keeps_all(policy) else _followed_from(policy, profile.model.head_dim),
        num_heads=profile.model.num_heads,
    )
    on_gpu = compat.supported_platform() != "cpu"

    def look(call: Call) -> None:
        if call.layer == layer:
            keys, values = call.keys_values(0)
            own = head // (call.q.shape[1] // keys.shape[1])
            rows, k, v = call.rows(0)[:, head], keys[:, own], values[:, own]
            found.add(rows, k, v, call.scale, call.q.device if on_gpu else None)

    with observing(look):
        llm.generate(
            [{"prompt_token_ids": ids}],
            SamplingParams(temperature=0, max_tokens=1),
            use_tqdm=False,
        )
    if found.rows != len(ids):
        raise Refused(
            f"--attention: layer {layer} is dense in this model, the core does not see it; "
            "`vllm-sparse doctor --model` says why"
        )
    return found


def _tokens(model: str, text: Path, length: int | None) -> list[int]:
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(f"--text {text}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"--text {text}: not UTF-8 text: {error.reason}") from None
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    # As vLLM reads a prompt: with what the tokenizer puts in front of it, such as <bos>.
    ids: list[int] = tokenizer.encode(content, verbose=False)
    if not content or not ids:
        raise Refused(f"--text {text}: no text in it")
    if length is not None and length > len(ids):
        raise Refused(f"--length {length}: {text} has {len(ids)} tokens")
    return ids[: length or DEFAULT_LENGTH]


def _followed_from(policy: Any, head_dim: int) -> int | None:
    """As `backend.worker` decides it, with the configuration's defaults."""
    if compat.supported_platform() != "cpu":  # servers on GPUs have no cost model
        return SparseConfig().min_prompt_tokens
    from vllm_sparse_backend.ops.cpu import core, cost

    wins = cost.sparse_wins_from(core.active_isa(), policy, head_dim)
    return None if wins is None else max(wins, SparseConfig().min_prompt_tokens)


@contextlib.contextmanager
def _failing() -> Any:
    """vLLM's own refusals (a length, a model it does not know) are the user's to mend."""
    try:
        yield
    except ValueError as error:  # pydantic's, too
        raise Refused(f"vLLM cannot run the model: {error}") from None
