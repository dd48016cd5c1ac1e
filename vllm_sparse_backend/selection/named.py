"""Any policy, by the name of its selector: fused ones, and whatever list selectors there are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeAlias, Union

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from vllm_sparse_backend.selection import registry
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.policy import FUSED, Dense, Mass, Sale, Static

AnyPolicy: TypeAlias = Dense | Static | Sale | Mass | ListSelector


def _adapter(classes: tuple[type[AnyPolicy], ...]) -> TypeAdapter[AnyPolicy]:
    union: Any = Annotated[Union[classes], Field(discriminator="selector")]  # noqa: UP007
    return TypeAdapter(union)


@cache
def _listed(selector: type[ListSelector]) -> TypeAdapter[AnyPolicy]:
    # Of two, so that errors say where they are as they do for all others: selector, then field.
    return _adapter((Dense, selector))


class _ByName:
    """How a field of type ``AnyPolicy`` is validated, written, and described in a JSON Schema.

    List selectors are found when their names are met and not when a model is defined: until then
    nobody's code is imported, torch neither.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        fused = handler.generate_schema(
            Annotated[Union[FUSED], Field(discriminator="selector")]  # noqa: UP007
        )
        return core_schema.no_info_wrap_validator_function(
            self._policy,
            fused,
            # As what it is, not as the base class, of whose fields alone would be written.
            serialization=core_schema.simple_ser_schema("any"),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        own = tuple(filter(None, map(registry.find, registry.BUILT_IN)))
        return handler(_adapter((*FUSED, *own)).core_schema)

    @staticmethod
    def _policy(value: Any, fused: core_schema.ValidatorFunctionWrapHandler) -> AnyPolicy:
        if isinstance(value, ListSelector):
            return value
        name = value.get("selector") if isinstance(value, Mapping) else None
        if not isinstance(name, str) or name in registry.FUSED_NAMES:
            return fused(value)
        selector = registry.find(name)
        if selector is None:
            names = [*registry.FUSED_NAMES, *sorted(registry.known())]
            raise PydanticKnownError(
                "union_tag_invalid",
                {
                    "discriminator": "'selector'",
                    "tag": name,
                    "expected_tags": ", ".join(map(repr, names)),
                },
            )
        try:
            # By way of JSON, whatever it came from: a tuple, say, is a list there.
            text = json.dumps(value)
        except (TypeError, ValueError):  # no JSON: whatever is wrong with it is said here
            return _listed(selector).validate_python(value)
        return _listed(selector).validate_json(text)


Policy: TypeAlias = Annotated[AnyPolicy, _ByName()]

_ADAPTER: TypeAdapter[AnyPolicy] = TypeAdapter(Policy)


def parse_policy(value: AnyPolicy | dict[str, object]) -> AnyPolicy:
    """A policy from itself or its dict. Raises ``pydantic.ValidationError`` (a ValueError), and
    SelectorError where its selector cannot be imported."""
    return _ADAPTER.validate_python(value)


def main_parameter(policy: AnyPolicy) -> str:
    """The field that decides how much a policy computes; "" for dense."""
    if isinstance(policy, Static):
        return "local"
    if isinstance(policy, ListSelector):
        return policy.main_parameter
    return "tau" if isinstance(policy, Sale | Mass) else ""


def label(policy: AnyPolicy, main: bool = True) -> str:
    """For people: the selector, its main parameter, unless that is not wanted, and what else is not
    the default."""
    name = main_parameter(policy)
    others = [
        each
        for each, field in type(policy).model_fields.items()
        if each not in (name, "selector") and getattr(policy, each) != field.default
    ]
    shown = [each for each in (name if main else "", *others) if each]
    words = [policy.selector, *(f"{each} {_text(getattr(policy, each))}" for each in shown)]
    return ", ".join(words) + (" (keeps all)" if shown and keeps_all(policy) else "")


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def keeps_all(policy: AnyPolicy) -> bool:
    """Whether a policy computes every tile whatever the scores."""
    return isinstance(policy, Dense) or (isinstance(policy, Sale | Mass) and policy.tau == 0)


def scaled(policy: AnyPolicy, factor: float) -> AnyPolicy | None:
    """The policy with its threshold multiplied, up to the highest there is; None: it has none, or
    keeps everything whatever the factor."""
    if isinstance(policy, ListSelector):
        return policy.scaled(factor)
    if keeps_all(policy) or not isinstance(policy, Sale | Mass):
        return None
    return policy.model_copy(update={"tau": min(1.0, policy.tau * factor)})
