"""Selectors: the rules that pick a q block's tiles, and the policies that name them."""

from vllm_sparse_backend.selection.policy import (
    DENSE,
    UNIFORM_DEFAULT,
    AnyPolicy,
    Dense,
    Mass,
    Policy,
    Sale,
    Static,
    Tile,
    keeps_all,
    parse_policy,
)

__all__ = [
    "DENSE",
    "UNIFORM_DEFAULT",
    "AnyPolicy",
    "Dense",
    "Mass",
    "Policy",
    "Sale",
    "Static",
    "Tile",
    "keeps_all",
    "parse_policy",
]
