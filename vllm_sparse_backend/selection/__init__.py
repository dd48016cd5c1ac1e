"""Selectors: the rules that pick a q block's tiles, and the policies that name them."""

from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.named import (
    AnyPolicy,
    Policy,
    keeps_all,
    label,
    main_parameter,
    parse_policy,
    scaled,
)
from vllm_sparse_backend.selection.policy import (
    DENSE,
    UNIFORM_DEFAULT,
    Bits,
    Dense,
    Mass,
    Sale,
    Static,
    Tile,
)

__all__ = [
    "DENSE",
    "UNIFORM_DEFAULT",
    "AnyPolicy",
    "Bits",
    "Dense",
    "ListSelector",
    "Mass",
    "Policy",
    "Sale",
    "Static",
    "Tile",
    "keeps_all",
    "label",
    "main_parameter",
    "parse_policy",
    "scaled",
]
