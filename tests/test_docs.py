"""The pages as pages: their links, and that what they list is all there is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from _docs import PAGES, REPOSITORY

from vllm_sparse_backend import doctor
from vllm_sparse_backend.backend.plan import DenseReason
from vllm_sparse_backend.control import ControlError
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.ops.cpu.core import CoreUnavailable

DOCS = REPOSITORY / "docs"
PACKAGE = REPOSITORY / "vllm_sparse_backend"
# What a server says, or answers, comes from here; the commands' own messages say what to do.
SERVING = (
    *("backend/*.py", "*.py", "ops/cpu/core.py", "ops/cpu/run.py"),
    *("selection/kept.py", "selection/named.py", "selection/registry.py"),
)
NOT_SERVING = (
    *("cli.py", "compat_rotary.py", "doctor.py", "errors.py", "files.py", "offline.py"),
    "options.py",
    "target.py",
)
# Characters of a message that are the same every time: shorter ones are found everywhere.
LEAST = 12
# For whoever programs with the package, not for whoever runs a server.
OF_PROGRAMMERS = ("backend/__init__.py",)


def page(name: str) -> str:
    return (DOCS / name).read_text()


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other.read_text()), target


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for path in DOCS.glob("*.md"):
        assert f"(docs/{path.name}" in readme, path.name


def test_every_reason_is_explained() -> None:
    for name in "troubleshooting.md", "compatibility.md":
        for reason in DenseReason:
            assert f"`{reason}`" in page(name), f"{reason} is not in docs/{name}"


def classes_of_errors() -> set[str]:
    """Names of all exceptions of the package that are made for its users to read."""
    bases: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {getattr(base, "id", "") for base in node.bases}
    found = {SparsePrefillError.__name__, ControlError.__name__, CoreUnavailable.__name__}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def test_every_class_of_errors_is_explained() -> None:
    text = page("troubleshooting.md")
    names = classes_of_errors()
    assert len(names) >= 10
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_every_advice_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(doctor, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    said = doctor._advice()
    assert said
    assert [text for text in said if text not in page("troubleshooting.md")] == []


# Every message, by what of it is the same every time


def fixed_parts(node: ast.expr | None) -> list[str]:
    """The literal parts of a text, an f-string or a format."""
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
        return "".join(map(str, parts)).split("\0")
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"%[sdr]|%\.\df", node.value)
    return []


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """What a file raises, logs or warns of: the line, and the longest part that never differs."""
    for node in ast.walk(ast.parse(path.read_text())):
        said: ast.expr | None = None
        if not isinstance(node, ast.Raise | ast.Call):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if getattr(node.exc.func, "id", "") == "AttributeError":  # of a module: Python's own
                continue
            said = node.exc.args[0] if node.exc.args else None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", "")
            if (owner, node.func.attr) in {
                ("said", "append"),
                *(("logger", level) for level in ("info", "warning", "error")),
            }:
                said = node.args[0]
        part = max(fixed_parts(said), key=len, default="").removeprefix("sparse_prefill: ")
        # A long message may be cut on the page, where it goes on to say what to do.
        sentences = [text.strip(" .:;,()'\"") for text in re.split(r"(?<=[.;]) |\);", part)]
        part = next((text for text in sentences if len(text) >= LEAST), "")
        if " " in part:
            yield node.lineno, re.sub(r"\s+", " ", part)


def test_every_message_of_a_server_is_explained() -> None:
    """A changed or new message belongs on the page, with what to do."""
    text = re.sub(r"[`\s]+", " ", page("troubleshooting.md"))
    missing, seen = [], 0
    for path in sorted({file for pattern in SERVING for file in PACKAGE.glob(pattern)}):
        name = str(path.relative_to(PACKAGE))
        if name in (*NOT_SERVING, *OF_PROGRAMMERS):
            continue
        for line, part in messages(path):
            seen += 1
            if part not in text:
                missing.append(f"{name}:{line}: {part}")
    assert seen > 40
    assert missing == []


def test_messages_are_found() -> None:
    found = dict(messages(Path(__file__).parent / "_docs.py"))
    assert found == {}
    parts = fixed_parts(ast.parse('f"want {a}, got {b!r} of it"').body[0].value)  # type: ignore[attr-defined]
    assert parts == ["want ", ", got ", " of it"]


# What the pages say of tests


def test_the_tests_that_are_named_exist() -> None:
    """docs/compatibility.md says by which test a thing is known."""
    found = 0
    for name in PAGES:
        for file, test in re.findall(
            r"`(?:tests/)?((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", name.read_text()
        ):
            path = REPOSITORY / "tests" / file
            assert path.is_file(), file
            assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"
            found += 1
    assert found > 40
