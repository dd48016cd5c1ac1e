"""The published JSON Schema of profiles."""

from __future__ import annotations

import json

from vllm_sparse_backend.profile import schema
from vllm_sparse_backend.profiles import SCHEMA

RENEW = (
    "profile.schema.json is not what profile.schema() gives; write it anew: python -c '"
    "import json; from vllm_sparse_backend import profile, profiles; "
    'profiles.SCHEMA.write_text(json.dumps(profile.schema(), indent=2) + "\\n")\''
)


def test_the_schema_is_current() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema(), RENEW
