"""What ran, made visible: counters in every worker, summed at /metrics and at shutdown.

A worker adds to a small memory-mapped file (`counters`) in a directory that the processes of
one server share (`session`); the API server reads all of them when /metrics is asked for
(`prometheus`) and when it ends. Nothing here knows vLLM, torch or the backend.
"""

from vllm_sparse_backend.metrics.counters import Counters, Totals, read_totals
from vllm_sparse_backend.metrics.session import Session, open_session

__all__ = ["Counters", "Session", "Totals", "open_session", "read_totals"]
