"""What a policy loses on a real model: perplexity and retrieval, beside the same text read densely.

    python loadtest/quality.py --policy '{"selector": "sale", "tau": 0.002}' --length 8192

SmolLM2-135M-Instruct runs in transformers with our op as its attention, in chunks over a KV cache
as a server runs it, every head under one policy or each under its own of a profile. All contenders
read the same documents in turn, the first of them keeping everything, and losses are compared token
by token. Weights and activations are float32, which is fast on any machine; attention is bfloat16.

Tasks: `code` (library sources) and `docs` (Python's help topics), scored on the second half of each
document; `copy`, half a document and the same again, scored on the repetition; `needles`, a number
hidden at eleven depths and asked for in the needle's own words, scored on the number's digits.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Annotated, Any, TypeAlias

import torch
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.demo.plan import SCALED_POSITIONS, SCALING
from vllm_sparse_backend.demo.progress import console as stderr
from vllm_sparse_backend.demo.text import DIGITS, MODULES, NAMES, Needle
from vllm_sparse_backend.ops import sparse_attention
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.profile import Profile, load_profile
from vllm_sparse_backend.selection import DENSE, UNIFORM_DEFAULT, parse_policy

ATTENTION = "sparse_prefill"  # its name in transformers
DEPTHS = tuple(tenth / 10 for tenth in range(11))
ROWS = 512  # of logits at a time: each is 49,152 floats
WORST = 0.01  # share of the tokens
RANGE: Any = {"min": 256, "max": SCALED_POSITIONS}  # of lengths
Encode: TypeAlias = Callable[[str], list[int]]  # without special tokens
Task = StrEnum("Task", ["CODE", "DOCS", "COPY", "NEEDLES"])


@dataclass(frozen=True)
class Document:
    """`ids[:prompt]` is prefilled under a policy, the rest read densely, as decoding would be."""

    ids: list[int]
    scored: int  # the losses are those of ids[scored:]
    prompt: int


@dataclass(frozen=True)
class Uniform:
    """Every head under one policy."""

    policy: Any

    def layers(self, config: Any) -> list[Any]:
        """For each layer what `PolicyTable.build` takes."""
        return [self.policy] * config.num_hidden_layers

    @property
    def name(self) -> str:
        given = self.policy.model_dump(exclude_unset=True, exclude={"selector"})
        return " ".join([self.policy.selector, *(f"{name}={it}" for name, it in given.items())])


@dataclass(frozen=True)
class Profiled:
    """Every head under the policy that a profile has for it."""

    profile: Profile

    def layers(self, config: Any) -> list[Any]:
        """Likewise."""
        return [self.profile.for_layer(layer) for layer in range(config.num_hidden_layers)]

    @property
    def name(self) -> str:
        return f"{self.profile.name} {self.profile.digest.removeprefix('sha256:')[:6]}"


Contender: TypeAlias = Uniform | Profiled


@dataclass
class Reading:
    """What one contender made of a task's documents."""

    losses: list[torch.Tensor] = field(default_factory=list)  # nats, one [scored] per document
    found: list[bool] = field(default_factory=list)  # greedy decoding would give the scored tokens
    computed: int = 0  # keys of prefill's tiles, summed over q blocks, heads, layers
    causal: int = 0
    select_seconds: float = 0.0  # of all threads
    attend_seconds: float = 0.0


class Case(BaseModel):
    """What one contender gave on one task."""

    task: str
    length: int
    policy: str
    density: float  # computed / causal, of prefill
    perplexity: float
    change_percent: float  # of the perplexity, against dense
    error_percent: float | None  # standard error of that over documents; None for a single one
    # Half the mean square of the loss's change: what the predictions' divergence from dense comes
    # to, whichever way the text happens to reward it.
    divergence_nats: float
    worst_nats: float  # mean growth of the loss over the 1% of the tokens that it grew most on
    found: int  # documents whose scored tokens would all be decoded: of interest for needles
    asked: int
    select_seconds: float
    attend_seconds: float


class Reader:
    """The model, reading as a server would: in chunks, short contexts densely."""

    def __init__(self, positions: int, chunk: int, min_prompt: int) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        folder = ensure_model()
        AttentionInterface.register(ATTENTION, _attention)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.encode: Encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=ATTENTION, **rope_options(positions)
        ).eval()
        self._chunk, self._min_prompt = chunk, min_prompt

    @torch.inference_mode()
    def read(self, document: Document, contender: Contender, reading: Reading) -> None:
        """Add `document`, read by `contender`, to `reading`."""
        from transformers import DynamicCache

        config = self._model.config
        sparse, dense = (
            [PolicyTable.build(p, config.num_attention_heads) for p in its.layers(config)]
            for its in (contender, Uniform(DENSE))
        )
        cache = DynamicCache()
        hidden = []
        edges = [*range(0, document.prompt, self._chunk), document.prompt, len(document.ids)]
        for start, end in itertools.pairwise(dict.fromkeys(edges)):
            prefill = end <= document.prompt
            long = end >= self._min_prompt and end - start >= SparseConfig().min_query_tokens
            states = self._model.model(
                input_ids=torch.tensor([document.ids[start:end]]),
                past_key_values=cache,
                policies=sparse if prefill and long else dense,
                prompt=document.prompt if prefill else None,
                reading=reading if prefill else Reading(),
            ).last_hidden_state[0]
            hidden.append(states[max(0, document.scored - 1 - start) :])
        losses, hits = self._score(torch.cat(hidden)[:-1], document.ids[document.scored :])
        reading.losses.append(losses)
        reading.found.append(hits)

    def _score(self, hidden: torch.Tensor, ids: list[int]) -> tuple[torch.Tensor, bool]:
        """The losses of `ids`, and whether each of them was the likeliest token."""
        losses, hits = [], True
        for states, wanted in zip(hidden.split(ROWS), torch.tensor(ids).split(ROWS), strict=True):
            logits = self._model.lm_head(states)
            losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
            hits &= bool((logits.argmax(-1) == wanted).all())
        return torch.cat(losses).double(), hits


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *mask: Any,  # there is none: this attention is causal by itself
    policies: list[PolicyTable],
    prompt: int | None,
    reading: Reading,
    scaling: float,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query [1, Hq, T, D], key and value [1, Hkv, S, D], with RoPE."""
    q, k, v = (x[0].transpose(0, 1).bfloat16() for x in (query, key, value))
    table = policies[module.layer_idx]  # type: ignore[index]
    out, stats = sparse_attention(q, k, v, table, scaling, prompt_len=prompt)
    for tile, computed, causal in zip(
        table.tile_sizes, stats.tiles_computed, stats.tiles_causal, strict=True
    ):
        reading.computed += tile * computed
        reading.causal += tile * causal
    reading.select_seconds += stats.select_seconds
    reading.attend_seconds += stats.attend_seconds
    return out[None].to(query.dtype), None


def rope_options(positions: int) -> dict[str, Any]:
    """RoPE as the demo's server has it: vLLM's `dynamic` is a larger theta, fixed at the start."""
    rope, dim = SCALING["rope_parameters"], 64
    if positions <= rope["max_trained_positions"]:
        return {}
    grown = rope["factor"] * SCALED_POSITIONS / rope["max_trained_positions"] - rope["factor"] + 1
    theta = rope["rope_theta"] * grown ** (dim / (dim - 2))
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def make_documents(
    encode: Encode, task: Task, length: int, count: int, seed: int
) -> list[Document]:
    """`count` disjoint documents of `length` tokens; with needles, each of them at every depth."""
    rng = random.Random(f"{task} {seed}")
    copies = 2 if task is Task.COPY else 1
    part = length // copies
    sources = map(encode, _sources(rng) if task is Task.CODE else _topics(rng))
    ids = list(itertools.islice(itertools.chain.from_iterable(sources), count * part))
    if len(ids) < count * part:
        raise typer.BadParameter(f"{task}: there are {len(ids)} tokens of it, want {count * part}")
    texts = [ids[at : at + part] * copies for at in range(0, count * part, part)]
    if task is Task.NEEDLES:
        return [_hide(encode, text, depth, rng) for text in texts for depth in DEPTHS]
    return [Document(text, len(text) // 2, len(text)) for text in texts]


def _hide(encode: Encode, text: list[int], depth: float, rng: random.Random) -> Document:
    """`text` with a needle at `depth`, its end replaced by the question and the answer."""
    needle = Needle(rng.choice(NAMES), "".join(rng.choices("123456789", k=DIGITS)), depth)
    planted = encode(f"\n\n{needle.sentence}\n\n")
    # With the space: the first digit is then prefill's to find, the others are decoding's.
    question, answer = encode(f"{needle.question} "), encode(needle.answer)
    room = len(text) - len(planted) - len(question) - len(answer)
    at, prompt = round(depth * room), len(text) - len(answer)
    ids = [*text[:at], *planted, *text[at:room], *question, *answer]
    return Document(ids, scored=prompt, prompt=prompt)


def _sources(rng: random.Random) -> Iterator[str]:
    for name in rng.sample(names := MODULES.split(), len(names)):
        if (path := Path(sysconfig.get_path("stdlib"), f"{name}.py")).is_file():
            yield f"# {name}.py\n\n{path.read_text(encoding='utf-8')}\n\n"


def _topics(rng: random.Random) -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()  # a fifth of the paragraphs stand in several topics
    for name in rng.sample(sorted(topics), len(topics)):
        fresh = [text for text in topics[name].split("\n\n") if text not in seen]
        seen.update(fresh)
        yield "\n\n".join([*fresh, ""])


def judge(task: Task, length: int, contender: Contender, reading: Reading, dense: Reading) -> Case:
    """Compare two readings of the same documents."""
    growth = [ours - its for ours, its in zip(reading.losses, dense.losses, strict=True)]
    every, means = torch.cat(growth), [float(document.mean()) for document in growth]
    ratio = math.exp(float(every.mean()))
    error = 100 * ratio * stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return Case(
        task=task,
        length=length,
        policy=contender.name,
        density=reading.computed / reading.causal,
        perplexity=math.exp(float(torch.cat(reading.losses).mean())),
        change_percent=100 * (ratio - 1),
        error_percent=error,
        divergence_nats=float(every.square().mean() / 2),
        worst_nats=float(every.topk(math.ceil(WORST * len(every))).values.mean()),
        found=sum(reading.found),
        asked=len(reading.found),
        select_seconds=reading.select_seconds,
        attend_seconds=reading.attend_seconds,
    )


def show(task: Task, cases: Iterable[Case]) -> None:
    """The cases of one task, as a table on stdout."""
    columns = [
        "density",
        "perplexity",
        "change %",
        "divergence, mnat",
        "worst 1%",
        "select + attend s",
    ]
    table = Table(task, *columns, *(["found"] if task is Task.NEEDLES else []))
    for case in cases:
        table.add_row(
            case.policy,
            f"{case.density:.3f}",
            f"{case.perplexity:.3f}",
            f"{case.change_percent:+.2f}"
            + (f" ± {case.error_percent:.2f}" if case.error_percent is not None else ""),
            f"{1000 * case.divergence_nats:.1f}",
            f"{case.worst_nats:.2f}",
            f"{case.select_seconds:.1f} + {case.attend_seconds:.1f}",
            *([f"{case.found} of {case.asked}"] if task is Task.NEEDLES else []),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _policy(text: str) -> Any:
    try:
        return parse_policy(json.loads(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text}: {error}") from error


def main(
    policy: Annotated[list[Any] | None, typer.Option(parser=_policy, help="JSON; repeat.")] = None,
    profile: Annotated[list[Path] | None, typer.Option(help="A profile's file; repeat.")] = None,
    task: Annotated[list[Task] | None, typer.Option(help="All unless given; repeat.")] = None,
    length: Annotated[int, typer.Option(**RANGE, help="Tokens of a document.")] = 8192,
    needle_length: Annotated[int, typer.Option(**RANGE, help="Of those with needles.")] = 4096,
    documents: Annotated[int, typer.Option(min=1, help="Of each task.")] = 3,
    chunk: Annotated[int, typer.Option(help="Tokens of a step.")] = 2048,
    min_prompt: Annotated[int, typer.Option(help="Shorter contexts are dense.")] = 2048,
    seed: Annotated[int, typer.Option(help="Another gives other texts.")] = 0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """What policies lose against dense attention: perplexity, copying, needles."""
    profiles = [Profiled(load_profile(path)) for path in profile or []]
    uniform = policy or ([] if profiles else [UNIFORM_DEFAULT])
    contenders: list[Contender] = [Uniform(DENSE), *map(Uniform, uniform), *profiles]
    done: list[dict[str, Any]] = []
    tasks = {each: needle_length if each is Task.NEEDLES else length for each in task or Task}
    reader = Reader(max(tasks.values()), chunk, min_prompt)  # one RoPE for all, as of a server
    for each, tokens in tasks.items():
        texts = make_documents(reader.encode, each, tokens, documents, seed)
        pairs = [(its, Reading()) for its in contenders]
        turns = list(itertools.product(texts, pairs))
        for text, (its, reading) in track(turns, f"{each}, {tokens} tokens", console=stderr):
            reader.read(text, its, reading)
        cases = [judge(each, tokens, its, reading, pairs[0][1]) for its, reading in pairs]
        show(each, cases)
        done += [case.model_dump() for case in cases]
        if as_json:
            made = {"isa": core.active_isa(), "arguments": sys.argv[1:], "cases": done}
            as_json.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
