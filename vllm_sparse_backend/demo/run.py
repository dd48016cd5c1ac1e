"""Runs the plan: dense, then sparse, the same questions of the same documents; one server at a
time, so that nothing measures the other."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_sparse_backend.demo.ask import Asker, Counts, Reply, Unexpected
from vllm_sparse_backend.demo.contention import cpu_time
from vllm_sparse_backend.demo.machine import this_machine
from vllm_sparse_backend.demo.plan import DEPTHS, RESERVE, Plan, Setup
from vllm_sparse_backend.demo.progress import console, note
from vllm_sparse_backend.demo.results import (
    Answer,
    DocumentRun,
    Loss,
    Results,
    Row,
    ServerRun,
    SideRow,
)
from vllm_sparse_backend.demo.serve import Server, Side
from vllm_sparse_backend.demo.text import Document, build_document

# Long enough that the sparse side warms up what it will be measured at.
WARM_UP_TOKENS = 2304
SIDES: tuple[Side, Side] = ("dense", "sparse")
ANY_PORT = 8000  # in the commands that are shown


def run(plan: Plan, folder: Path, repeat: str) -> Results:
    """Measure everything; server logs go to `folder`. `repeat`: the command to show for it.

    Raises `ServerFailed`, and `Unexpected` if what ran was not what should have run.
    """
    started = time.perf_counter()
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(plan.model)
    progress = _Progress(plan)
    rows: list[Row] = []
    servers: list[ServerRun] = []
    info: dict[str, str] = {}
    for setup in plan.setups:
        measured: dict[Side, dict[int, SideRow]] = {}
        for side in SIDES:
            log = folder / f"{side}-{setup.options.max_model_len}.log"
            with Server(side, setup.options, log) as server:
                measurement = _Side(plan, setup, server, tokenizer, progress)
                try:
                    measured[side] = measurement.run()
                except _request_errors() as error:
                    server.check()  # if it has died, its log says more than our error does
                    raise Unexpected(f"the {side} server failed a request: {error}") from error
                info = measurement.asker.info() or info
                servers.append(
                    ServerRun(
                        side=side,
                        lengths=setup.lengths,
                        startup_seconds=server.startup_seconds,
                        command=setup.options.shell(side, ANY_PORT),
                    )
                )
        rows += [
            Row(
                length=length,
                scaled=setup.scaled,
                sparse_expected=plan.is_sparse(
                    measured["dense"][length].documents[0].prompt_tokens
                ),
                dense=measured["dense"][length],
                sparse=measured["sparse"][length],
            )
            for length in setup.lengths
        ]
    options = plan.setups[0].options
    return Results(
        made_at=datetime.now(UTC).replace(microsecond=0),
        model=options.served_name,
        threads=options.threads,
        dtype=options.dtype,
        chunk_tokens=options.chunk_tokens,
        repeat=repeat,
        machine=this_machine(),
        sparse_config=plan.config.model_dump(mode="json", exclude_defaults=True),
        sparse_info=info,
        rows=tuple(rows),
        servers=tuple(servers),
        seconds=time.perf_counter() - started,
    )


class _Progress:
    """ "[3/40] ..." in front of every request."""

    def __init__(self, plan: Plan) -> None:
        lengths = [length for setup in plan.setups for length in setup.lengths]
        documents = sum(map(plan.documents, lengths))
        self._all = len(SIDES) * (documents + len(lengths))  # a perplexity for each length
        self._done = 0

    def next(self) -> str:
        self._done += 1
        return f"[{self._done}/{self._all}]"


class _Side:
    """One server's share of the work."""

    def __init__(
        self, plan: Plan, setup: Setup, server: Server, tokenizer: Any, progress: _Progress
    ) -> None:
        self.plan, self.setup, self.server = plan, setup, server
        self.tokenizer, self.progress = tokenizer, progress
        self.asker = Asker(server)

    def run(self) -> dict[int, SideRow]:
        self._warm_up()
        return {length: self._length(length) for length in self.setup.lengths}

    def _warm_up(self) -> None:
        with console.status(f"{self.server.side}: warming up"):
            tokens = min(WARM_UP_TOKENS, self.setup.options.max_model_len - RESERVE)
            document = build_document(self.tokenizer, tokens, seed=0).token_ids
            self.asker.ask(document)
            self.asker.loss(document[:64])  # vLLM compiles its ranking of log probabilities

    def _length(self, length: int) -> SideRow:
        count = self.plan.documents(length)
        # Of one length and number: the same document on both sides, another one anywhere else.
        documents = {
            seed: build_document(self.tokenizer, length - RESERVE, seed=seed, depths=DEPTHS)
            for seed in range(1000 * length, 1000 * length + count)
        }
        place = f"{self.server.side}, {length} tokens"
        runs = [
            self._document(document, seed, f"{place}, document {number} of {count}")
            for number, (seed, document) in enumerate(documents.items(), 1)
        ]
        # Of one document only: it takes a prefill of its own, and longer than that.
        loss = self._loss(documents[1000 * length], place)
        runs[0] = runs[0].model_copy(update={"loss": loss})
        return SideRow(documents=tuple(runs))

    def _document(self, document: Document, seed: int, where: str) -> DocumentRun:
        step = self.progress.next()
        replies: list[Reply] = []
        counted, others = Counts(), 0.0
        for asked, needle in enumerate(document.needles):
            with console.status(f"{step} {where}: question {asked + 1} of {len(DEPTHS)}"):
                prompt = document.prompt(self.tokenizer, needle)
                before, cpu = self.asker.counts(), cpu_time(self.server.session)
                replies.append(self.asker.ask(prompt, salt=str(seed)))
                if not asked:
                    others = cpu_time(self.server.session).others_since(cpu)
                    counted = self.asker.counts() - before
                    self._check(replies[0], counted, where)
        answers = tuple(
            Answer(
                name=needle.name,
                expected=needle.answer,
                depth=needle.depth,
                text=reply.text,
                right=needle.right(reply.text),
            )
            for needle, reply in zip(document.needles, replies, strict=True)
        )
        ttft = replies[0].ttft_seconds
        right = sum(answer.right for answer in answers)
        note(f"{step} {where}: first token after {ttft:.2f} s, {right} of {len(answers)} right")
        return DocumentRun(
            seed=seed,
            prompt_tokens=replies[0].prompt_tokens,
            ttft_seconds=ttft,
            answers=answers,
            other_cores=others,
            **asdict(counted),
        )

    def _check(self, reply: Reply, counted: Counts, where: str) -> None:
        side, expected = self.server.side, self.plan.is_sparse(reply.prompt_tokens)
        if wrong := what_is_wrong(side, expected, reply, counted):
            raise Unexpected(f"{where}: {wrong} (log: {self.server.log})")

    def _loss(self, document: Document, where: str) -> Loss:
        step = self.progress.next()
        with console.status(f"{step} {where}: perplexity, by a prefill of its own"):
            loss = self.asker.loss(document.token_ids)
        note(f"{step} {where}: perplexity {loss.perplexity:.3f}")
        return loss


def what_is_wrong(side: Side, long: bool, reply: Reply, counted: Counts) -> str | None:
    """Why figures of this reply would not be what they claim to be; None: they are.

    `long`: whether the sparse side ought to have prefilled some of the prompt sparsely;
    `counted`: what the server counted meanwhile.
    """
    if reply.cached_tokens:
        return f"{reply.cached_tokens} tokens were in the prefix cache"
    if side == "dense":
        return f"the dense server counted {counted}" if counted != Counts() else None
    if long and not (counted.sparse_layer_tokens and counted.causal_tiles):
        return (
            "nothing of it was prefilled sparsely, says the server's /metrics; "
            "`vllm-sparse doctor` may know why"
        )
    # Our core may have read a short prompt, every tile kept.
    if not long and (counted.sparse_layer_tokens or counted.computed_tiles != counted.causal_tiles):
        return f"should have been dense, but the server counted {counted}"
    return None


def _request_errors() -> type[Exception]:
    from openai import OpenAIError

    return OpenAIError
