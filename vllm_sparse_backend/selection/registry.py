"""The list selectors there are, by name: those that come with the package and those that others
ship as entry points of the group ``vllm_sparse_backend.selectors``::

    [project.entry-points."vllm_sparse_backend.selectors"]
    my_method = "my_package.my_method:MyMethod"

Names are read once; a class is imported when its name is first met, which is while a server's
configuration is checked. Nothing is passed over: what cannot be used is an error.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from vllm_sparse_backend.errors import SelectorError
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.policy import FUSED

GROUP = "vllm_sparse_backend.selectors"
FUSED_NAMES = tuple(policy.model_fields["selector"].default for policy in FUSED)
BUILT_IN = {
    "anchor": "vllm_sparse_backend.selection.anchor:Anchor",
    "block_topk": "vllm_sparse_backend.selection.block_topk:BlockTopK",
    "flashprefill": "vllm_sparse_backend.selection.flashprefill:FlashPrefill",
    "flexprefill": "vllm_sparse_backend.selection.flexprefill:FlexPrefill",
    "hip": "vllm_sparse_backend.selection.hip:HiP",
    "hyper": "vllm_sparse_backend.selection.hyper:Hyper",
    "longheads": "vllm_sparse_backend.selection.longheads:LongHeads",
    "neighborhood": "vllm_sparse_backend.selection.neighborhood:Neighborhood",
    "seer": "vllm_sparse_backend.selection.seer:Seer",
    "skip_softmax": "vllm_sparse_backend.selection.skip_softmax:SkipSoftmax",
    "sparge": "vllm_sparse_backend.selection.sparge:Sparge",
    "strided": "vllm_sparse_backend.selection.s2:Strided",
    "vertical_slash": "vllm_sparse_backend.selection.vertical_slash:VerticalSlash",
    "xattention": "vllm_sparse_backend.selection.xattention:XAttention",
}


@cache
def known() -> dict[str, EntryPoint]:
    """Every list selector by name, none of them imported yet. Raises SelectorError if two share
    one name, or one has that of a fused selector."""
    found = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        if entry.name in FUSED_NAMES:
            raise SelectorError(f"{_said(entry)}: {entry.name!r} is one of this package's own")
        if entry.name in found:
            raise SelectorError(
                f"{_said(entry)}: the name is taken by {_said(found[entry.name])}; "
                "uninstall one of them"
            )
        found[entry.name] = entry
    return found


@cache
def find(name: str) -> type[ListSelector] | None:
    """The list selector of that name, imported now; None: there is none. Raises SelectorError if
    what is there cannot be used."""
    entry = known().get(name)
    if entry is None:
        return None
    try:
        made = entry.load()
    # Whatever a module of somebody else's raises, it is why this selector cannot be had.
    except Exception as error:
        raise SelectorError(
            f"{_said(entry)}: cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if not (isinstance(made, type) and issubclass(made, ListSelector)):
        raise SelectorError(f"{_said(entry)}: want a class derived from ListSelector, got {made!r}")
    if inspect.isabstract(made):
        missing = ", ".join(sorted(made.__abstractmethods__))
        raise SelectorError(f"{_said(entry)}: the class has no {missing}")
    if (own := made.model_fields["selector"].default) != name:
        raise SelectorError(
            f"{_said(entry)}: want the class to have the field "
            f'selector: Literal["{name}"] = "{name}", its default is {own!r}'
        )
    if (main := made.main_parameter) and main not in made.model_fields:
        raise SelectorError(f"{_said(entry)}: main_parameter: want one of its fields, got {main!r}")
    return made


def _said(entry: EntryPoint) -> str:
    """Which entry point, of which distribution."""
    dist = getattr(entry, "dist", None)
    of = f"of {dist.name} {dist.version}" if dist else "of this package"
    return f"selector '{entry.name} = {entry.value}' ({of})"
