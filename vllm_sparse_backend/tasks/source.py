"""Texts to make documents of: the user's files, or real text that every Python has."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sparse_backend.demo.text import MODULES
from vllm_sparse_backend.errors import TextError

CODE, DOCS, GIVEN = "code", "docs", "text"
HEAD_BYTES = 8192  # a NUL in the first of them: no text


@dataclass(frozen=True)
class Source:
    """Texts of one kind, read one after the other."""

    name: str  # shown beside the figures
    texts: tuple[str, ...]
    read: tuple[str, ...]  # what the texts came from, by name


def read_sources(paths: Sequence[Path] = ()) -> list[Source]:
    """The text in `paths` as one source, or help topics and library code if there are none.

    Raises TextError.
    """
    if not paths:
        return [_docs(), _code()]  # prose first: needles are found more easily in it
    files = list(_files(paths))
    return [Source(GIVEN, tuple(map(_text, files)), tuple(str(path) for path in paths))]


def names_of(sources: Iterable[Source]) -> tuple[str, ...]:
    """What the sources' texts came from: of a file or folder its own name, of "." as well."""
    every = [read for source in sources for read in source.read]
    return tuple(Path(read).resolve().name or read for read in every)


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The text of each file; of a folder, of every text file below it, sorted by path.

    Binary files in a folder are passed over, as are hidden ones. Raises TextError for a path that
    is missing, empty, binary or not UTF-8, and for a folder without text.
    """
    return [_text(file) for file in _files(paths)]


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not _hidden(file.relative_to(path)) and _is_text(file)
        ]
        if not found:
            raise TextError(f"text {path}: want a folder with text files, got one without any")
        yield from found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(path: Path) -> bool:
    try:
        return bool(_text(path))
    except TextError:
        return False


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:  # missing, not readable
        raise TextError(f"text {path}: {error.strerror}") from None
    if b"\0" in content[:HEAD_BYTES]:
        raise TextError(f"text {path}: want UTF-8 text, got a binary file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"text {path}: want UTF-8 text, got something else at byte {error.start}"
        ) from None
    if not text.strip():
        raise TextError(f"text {path}: want text, got an empty file")
    return text


def _code() -> Source:
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for name in MODULES.split() if (path := library / f"{name}.py").is_file()]
    if not paths:
        raise TextError(f"no library sources in {library}: name a text of your own with --text")
    texts = (
        f"# {path.relative_to(library)}\n\n{path.read_text(encoding='utf-8')}\n\n" for path in paths
    )
    return Source(CODE, tuple(texts), ("Python's standard library",))


def _docs() -> Source:
    from pydoc_data.topics import topics

    seen: set[str] = set()  # a fifth of the paragraphs stand in several topics
    texts = []
    for name in sorted(topics):
        parts = dict.fromkeys(part.strip("\n") for part in topics[name].split("\n\n"))
        fresh = [part for part in parts if part and part not in seen]
        seen.update(fresh)
        texts.append("\n\n".join([*fresh, ""]))
    return Source(DOCS, tuple(texts), ("Python's help topics",))
