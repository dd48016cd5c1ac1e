"""List selectors: rules in torch that hand the tiles they keep to the native attention.

A method is one file with one class::

    class Strided(ListSelector):
        selector: Literal["strided"] = "strided"
        stride: int = Field(default=8, ge=1)

        def keep(self, view: View) -> torch.Tensor: ...

which is a policy like any other: its fields are what a profile says of a head. See
docs/selectors.md for a whole one, and `registry` for how its name gets known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

from vllm_sparse_backend.selection.policy import Windowed

if TYPE_CHECKING:
    import torch

    from vllm_sparse_backend.selection.view import View


class ListSelector(Windowed, ABC):
    """The base class of list selectors. Frozen, hashable, validated: a policy is data.

    A subclass gives ``selector`` its name as a Literal with a default, adds what parameters it has
    (of types that JSON knows, lists as tuples), and implements ``keep``.
    """

    selector: str

    # The field, a number, that decides how much is computed: what pictures label and sort by.
    main_parameter: ClassVar[str] = ""

    @abstractmethod
    def keep(self, view: View) -> torch.Tensor:
        """The tiles that some heads keep in one step of one request.

        Returns bool [G, q blocks, tiles] for the view's G heads, its ``blocks`` and its
        ``num_tiles`` tiles of ``tile`` keys. Tiles that a q block cannot see are cut off by the
        caller, and sink, local and diagonal tiles are added, so that nothing said about those
        matters.

        Owed: a head's tiles depend on nothing but the view, and on no other head of it; a lower
        threshold drops no tile, and a threshold of 0 keeps all; statistics in fp32; what cannot be
        judged, because of a NaN, is kept (``~(score <= threshold)``). Called without gradients, in
        every layer of every step: a few operations on whole tensors, no loop over tiles.
        """

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """Settings worth comparing, from the one that keeps most to the one that keeps least.

        What `vllm-sparse compare` goes through and calibration may choose from.
        """
        return (cls(),)  # type: ignore[call-arg]  # a subclass gives its name a default

    def files(self) -> tuple[str, ...]:
        """Paths of the files that it chooses with: what was measured with other contents of them is
        measured anew."""
        return ()

    def scaled(self, factor: float) -> Self | None:
        """The policy with its threshold multiplied: what a request's ``threshold_scale`` asks for.

        More than 1 is to keep fewer tiles, whatever way the parameter itself goes. None: there is
        no threshold, and the policy stays as it is for every request.
        """
        return None
