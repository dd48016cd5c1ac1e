"""README.md and docs/: their links, their blocks of code, and the commands in those."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
SHELL = ("bash", "sh")
_ENDS = {"", ";", "&&", "||", "&"}  # of a command, but for newlines about it
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_HEREDOC = re.compile(r"<<'(\w+)'\n(.*?)^\1$", re.M | re.S)
# What is quoted stays; a comment is from a # before which nothing or white space is.
_COMMENT = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*")|(?<!\S)\#[^\n]*""")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    number: int  # among the page's, from 1
    language: str
    text: str

    @property
    def name(self) -> str:
        """For a test's id."""
        return f"{self.page.name}-{self.number}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block."""

    block: Block
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)  # set for it alone
    pipe: list[list[str]] = field(
        default_factory=list
    )  # what reads its output, one after the other

    @property
    def name(self) -> str:
        """For a test's id."""
        return f"{self.block.name} {' '.join(self.words)[:50]}"


def blocks(*languages: str) -> list[Block]:
    """All blocks of these languages."""
    return [
        Block(page, number, match[1], match[2])
        for page in PAGES
        for number, match in enumerate(_FENCE.finditer(page.read_text()), 1)
        if match[1] in languages
    ]


def commands() -> list[Command]:
    """All of the shell blocks."""
    return [command for block in blocks(*SHELL) for command in commands_of(block)]


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of one block, one after the other. What a loop repeats is there once."""
    for line in _lines(block.text):
        parts = [list(part) for part in _split(line, "|")]
        environment = {}
        while parts[0] and (match := _ASSIGNMENT.fullmatch(parts[0][0])):
            environment[match[1]] = match[2]
            parts[0].pop(0)
        while parts[0] and parts[0][0] in ("do", "done"):
            parts[0].pop(0)
        if parts[0] and parts[0][0] != "for":
            yield Command(block, parts[0], environment, parts[1:])


def heredocs(block: Block) -> list[str]:
    """What a block writes into files."""
    return [match[2] for match in _HEREDOC.finditer(block.text)]


def _lines(text: str) -> Iterator[list[str]]:
    """The words of each command line, quotes and comments taken off."""
    text = _HEREDOC.sub(lambda match: f"<<'{match[1]}'", text).replace("\\\n", " ")
    text = _COMMENT.sub(lambda match: match[1] or "", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n;&|")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for token in lexer:
        if token.strip("\n") in _ENDS:
            if words:
                yield words
            words = []
        else:
            words.append(token)
    if words:
        yield words


def _split(words: list[str], by: str) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word == by:
            yield part
            part = []
        else:
            part.append(word)
    yield part
