"""The profiles that come with the package, found by the digest of the model served."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from vllm_sparse_backend.profile import Profile, load_profile

FOLDER = Path(__file__).parent
SCHEMA = FOLDER / "profile.schema.json"


def shipped_for(digest: str | None) -> Profile | None:
    """The shipped profile of the model with this digest, if there is one."""
    return _shipped().get(digest) if digest else None


@cache
def _shipped() -> dict[str | None, Profile]:
    profiles = (load_profile(path) for path in sorted(FOLDER.glob("*.json")) if path != SCHEMA)
    return {profile.model.digest: profile for profile in profiles}
