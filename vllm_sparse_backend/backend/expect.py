"""What a model's configuration says about its layers, before there is a layer to ask.

For the log and for `vllm-sparse doctor`. What really happens is decided by each layer about
itself (`backend.group`), by the same predicate; a model may do what its configuration does not
tell, and then the counters at /metrics say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse_backend.backend.plan import Capabilities, DenseReason, LayerTraits, why_dense

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Values of `layer_types` in config.json that are no plain causal attention.
KINDS = {"chunked_attention": DenseReason.CHUNKED_ATTENTION}
PLAIN = ("full_attention", "attention", "global", "sliding_attention")


def reasons(
    vllm_config: VllmConfig, core: Capabilities, *, enabled: bool = True
) -> list[DenseReason | None]:
    """Why each layer will be dense; None: it can be sparse."""
    return [why_dense(traits, core, enabled=enabled) for traits in layers(vllm_config)]


def layers(vllm_config: VllmConfig) -> list[LayerTraits]:
    """The traits of each of the model's layers, as far as its configuration tells."""
    from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

    model, cache = vllm_config.model_config, vllm_config.cache_config
    text = model.hf_text_config
    count = model.get_total_num_hidden_layers()
    types = getattr(text, "layer_types", None) or []
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    parallel = vllm_config.parallel_config
    found = []
    for index in range(count):
        kind = types[index] if index < len(types) else None
        found.append(
            LayerTraits(
                head_dim=model.get_head_size(),
                dtype=str(model.dtype).removeprefix("torch."),
                kind=_kind(vllm_config, kind),
                sliding_window=model.rswa_window is not None
                or kind == "sliding_attention"
                or (kind is None and cache.sliding_window is not None),
                sinks=text.model_type == "gpt_oss",
                softcap=bool(getattr(text, "attn_logit_softcapping", None)),
                alibi=bool(getattr(text, "alibi", False)),
                kv_sharing=index >= count - shared,
                context_parallel=parallel.decode_context_parallel_size > 1
                or parallel.prefill_context_parallel_size > 1,
                quantized_kv=get_kv_quant_mode(cache.cache_dtype) is not KVQuantMode.NONE,
            )
        )
    return found


def _kind(vllm_config: VllmConfig, layer_type: str | None) -> DenseReason | None:
    model = vllm_config.model_config
    if model.use_mla:
        return DenseReason.MLA
    if model.is_mm_prefix_lm:
        return DenseReason.MULTIMODAL_PREFIX
    if layer_type is None or layer_type in PLAIN:
        return None
    return KINDS.get(layer_type, DenseReason.OTHER_ATTENTION)
