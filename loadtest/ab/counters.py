"""What a server has counted between two moments, from its /metrics."""

from __future__ import annotations

from collections.abc import Mapping

Counters = dict[str, float]  # 'name{label="value"}' and how far it has grown

PREFIX = "vllm:sparse_prefill_"
LAYER_TOKENS = f"{PREFIX}layer_tokens_total"
TILES = f"{PREFIX}tiles_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
PREEMPTIONS = "vllm:num_preemptions_total"
ALSO = (
    PREFIX_HITS,
    "vllm:prefix_cache_queries_total",
    PREEMPTIONS,
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
)
# Of every sample of one engine the same.
LEFT_OUT = ("engine", "model_name")


def read_counters(metrics: str) -> Counters:
    """Sparse prefill's counters and some of vLLM's own, of the text of /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Counters = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            ours = sample.name.startswith(PREFIX) and sample.name.endswith("_total")
            if ours or sample.name in ALSO:
                labels = ",".join(
                    f'{name}="{value}"'
                    for name, value in sorted(sample.labels.items())
                    if name not in LEFT_OUT
                )
                name = f"{sample.name}{{{labels}}}" if labels else sample.name
                found[name] = found.get(name, 0.0) + sample.value
    return found


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> Counters:
    """How far each counter has grown; those that have not are left out."""
    changes = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: change for name, change in changes.items() if change}


def total(counters: Mapping[str, float], name: str, label: str = "") -> float:
    """The sum of the counters of a name, with `label` ('path="sparse"') among their labels."""
    return sum(
        value for full, value in counters.items() if full.split("{")[0] == name and label in full
    )


def density(counters: Mapping[str, float]) -> float | None:
    """Tiles computed over causal tiles; None where the core computed nothing."""
    causal = total(counters, TILES, 'kind="causal"')
    return total(counters, TILES, 'kind="computed"') / causal if causal else None
