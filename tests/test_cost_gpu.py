"""The GPUs' cost model: that it is what `make gpu-model` makes, and that it orders what it must."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tools.gpu_check import rates
from tools.gpu_check.judge import judge
from tools.gpu_check.model import DENSITY, GROUP, HEADS, LAYERS
from tools.gpu_check.peaks import GPUS
from tools.gpu_check.pool import executor
from vllm_sparse_backend import compat, target
from vllm_sparse_backend.calibrate.command import _usable
from vllm_sparse_backend.calibrate.run import Model
from vllm_sparse_backend.ops.cpu.build import instruction_sets
from vllm_sparse_backend.ops.triton import cost
from vllm_sparse_backend.ops.triton.cost import BETTER, WORSE
from vllm_sparse_backend.ops.triton.launch import HEAD_DIMS
from vllm_sparse_backend.options import Refused, parse_names
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Mass, Sale, Static

PAGE = Path(__file__).parents[1] / "docs/gpu-model.md"
ARCHS = [gpu.arch for gpu in GPUS]
FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128
)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process for compiling, whatever this one interprets."""
    with executor(1) as made:
        yield made


def test_rates_are_of_the_gpus_that_have_published_peaks() -> None:
    assert list(cost.rates()) == ARCHS
    for its in cost.rates().values():
        assert list(its.heads) == list(HEAD_DIMS)
        for one in its.heads.values():
            kinds = [one.int8] + ([one.fp4] if one.fp4 else [])
            for ends in (one.attend, *(e for k in kinds for e in (k.score, *k.anchor.values()))):
                assert ends[BETTER] >= ends[WORSE] > 0


def _compiled(pool: ProcessPoolExecutor, arch: str, dims: tuple[int, ...]) -> cost.GpuRates:
    asked = pool.submit(rates.wanted, [arch], dims).result()
    return rates.rates_of(pool.map(judge, asked)).root[arch]


def _is_shipped(made: cost.GpuRates, dims: tuple[int, ...]) -> None:
    """Whoever changes a kernel, a launch or a peak: `make gpu-model`."""
    shipped = cost.rates()[next(g.arch for g in GPUS if g.name == made.gpu)]
    assert made == shipped.model_copy(update={"heads": {d: shipped.heads[d] for d in dims}})


def test_the_rates_are_those_of_the_kernels_as_they_are(pool: ProcessPoolExecutor) -> None:
    _is_shipped(_compiled(pool, "sm_90", (64, 128)), (64, 128))


@pytest.mark.all
@pytest.mark.parametrize("arch", ARCHS)
def test_all_rates_are_those_of_the_kernels_as_they_are(
    pool: ProcessPoolExecutor, arch: str
) -> None:
    _is_shipped(_compiled(pool, arch, HEAD_DIMS), HEAD_DIMS)


def _rows(gpu: str, prefill: str) -> dict[int, list[str]]:
    """docs/gpu-model.md: cells by tokens."""
    text = PAGE.read_text().split(f"## PREDICTION: {gpu}, {prefill}\n")[1].split("## ")[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"][2:]
    return {int(cells[0].replace(",", "")): cells[1:] for cells in lines}


def _ends(cell: str) -> tuple[float, float]:
    found = [float(x) for x in re.findall(r"[\d.]+", cell.replace(",", ""))]
    return found[0], found[-1]


@pytest.mark.parametrize(
    ("gpu", "way", "policy"),
    [
        *((gpu.name, "in chunks", Sale(tail=0)) for gpu in GPUS),  # the page leaves tails out
        ("H100", "whole", Sale(tail=0)),
        ("B200", "in chunks, fp4", Sale(tail=0, bits="fp4")),
    ],
)
def test_the_page_says_the_same_of_llama(gpu: str, way: str, policy: Sale) -> None:
    arch = next(it.arch for it in GPUS if it.name == gpu)
    chunk = 1 << 20 if way == "whole" else cost.rates()[arch].chunk
    for tokens, cells in _rows(gpu, way).items():
        attend, dense, share = _ends(cells[4]), _ends(cells[6])[0], _ends(cells[7])
        base = 1e3 * LAYERS * cost.dense_seconds(arch, tokens, tokens, HEADS, 128)
        assert base == pytest.approx(dense, rel=0.01, abs=0.6)
        for end in (BETTER, WORSE):
            its = tokens, tokens, HEADS, 128
            ours = 1e3 * LAYERS * DENSITY[tokens] * cost.attend_seconds(arch, end, *its)
            assert ours == pytest.approx(attend[end], rel=0.005, abs=0.06)
            chosen = cost.selection_seconds(arch, end, policy, *its, GROUP, chunk)
            percent = 100 * 1e3 * LAYERS * chosen / base
            # Whole q blocks are counted here; there, half of the square.
            assert percent == pytest.approx(share[end], rel=0.01, abs=0.06)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_selection_costs_follows_from_what_is_scored(arch: str) -> None:
    def seconds(
        policy: AnyPolicy, rows: int = 8192, context: int = 8192, heads: int = 4, group: int = 4
    ) -> float:
        its = policy, rows, context, heads, 128, group, 2048
        better, worse = (cost.selection_seconds(arch, end, *its) for end in (BETTER, WORSE))
        assert 0 <= better <= worse
        return worse

    policy = Mass()
    assert seconds(DENSE) == seconds(Mass(tau=0)) == 0
    assert 0 < seconds(Static()) < 0.1 * seconds(policy)
    assert seconds(policy, heads=8) == pytest.approx(2 * seconds(policy))
    for less, more in (
        (Mass(tail=0), Mass(tail=128)),
        (Mass(row_stride=4), Mass(row_stride=2)),
        (Mass(local=256), Mass(local=512)),  # more exact scores
    ):
        assert seconds(less) < seconds(more)
    assert seconds(Mass(bits=4)) == seconds(Mass(bits=8)), "integers are int8 whatever their bits"
    assert (seconds(Mass(bits="fp4")) < seconds(policy)) is (arch == "sm_100")
    # Scored rows come by 16, and a group's heads by powers of two.
    assert seconds(Mass(row_stride=8)) == seconds(Mass(row_stride=4))
    assert seconds(policy, group=3) > seconds(policy, group=4)
    # In steps, as a prompt is read: keys are coded anew in each, whoever counts them.
    untailed = Mass(tail=0)
    steps = sum(seconds(untailed, 2048, end) for end in range(2048, 8193, 2048))
    assert steps == pytest.approx(seconds(untailed))
    known = sum(
        cost.selection_seconds(arch, WORSE, policy, 2048, end, 4, 128, 4, 2048, 8192)
        for end in range(2048, 8193, 2048)
    )
    assert known == pytest.approx(seconds(policy))


def test_a_target_is_an_instruction_set_or_an_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert target.names() == [*(isa.name for isa in instruction_sets()), *ARCHS]
    assert target.of("avx2", FACTS) == target.Cpu("avx2")
    assert target.of("sm_90", FACTS, 4096) == target.Gpu("sm_90", 4, 4096)
    assert target.of("sm_90", FACTS).chunk_tokens == 8192, "vLLM's own"
    with pytest.raises(Refused, match=r"--target: want one of avx512_bf16, .*, got 'sm_75'"):
        target.of("sm_75", FACTS)
    # This machine's: the GPU's where vLLM runs on one.
    monkeypatch.setattr(compat, "supported_platform", lambda: "cuda")
    monkeypatch.setattr(compat, "gpu", lambda: ("NVIDIA H100 80GB HBM3", "9.0"))
    assert target.of(None, FACTS) == target.Gpu("sm_90", 4)
    for platform, device, capability in (
        ("cuda", "NVIDIA GeForce RTX 5090", "12.0"), ("rocm", "AMD Instinct MI300X", "9.4"),
    ):  # fmt: skip
        monkeypatch.setattr(compat, "supported_platform", lambda its=platform: its)
        monkeypatch.setattr(compat, "gpu", lambda its=(device, capability): its)
        with pytest.raises(Refused, match=f"this machine's {device} .* want one that is to stand"):
            target.of(None, FACTS)
        assert target.of("sm_89", FACTS).name == "sm_89", "which may be said"
        assert "which cannot be done here: --target: this machine's" in str(
            target.why_untimed("avx2")
        )
        usable, _ = _usable(parse_names("sale", ["sale", "strided"]), Model(FACTS, (0,)), "avx2")
        assert usable == ("sale",)


def test_whose_seconds_they_are_is_never_left_open() -> None:
    assert target.of("avx2", FACTS).whose == "one thread with avx2"
    for arch, gpu in zip(ARCHS, GPUS, strict=True):
        its = target.of(arch, FACTS)
        said = f"one {gpu.name} ({arch}), PREDICTED and never timed on hardware"
        assert (its.whose, its.base) == (said, gpu.dense)
        better, worse = its.ends
        assert worse == its and better != its


def test_what_choosing_is_said_to_take_beside_attention() -> None:
    """docs/calibration.md."""

    def percent(its: target.Target, policy: AnyPolicy) -> float:
        at = 8192, 8192, 1, 128
        ends = [
            end.selection_seconds(policy, *at) / end.sparse_seconds(DENSE, *at, 1.0)
            for end in its.ends
        ]
        return 100 * sum(ends) / len(ends)

    for group, low, high in ((4, 7, 11), (1, 15, 20)):
        of_gpus = [percent(target.Gpu(arch, group), Sale()) for arch in ARCHS]
        assert (round(min(of_gpus)), round(max(of_gpus))) == (low, high)
        assert max(percent(target.Gpu(arch, group), Static()) for arch in ARCHS) < 1
    of_cpus = [percent(target.Cpu(isa.name), Sale()) for isa in instruction_sets()]
    assert (round(min(of_cpus)), round(max(of_cpus))) == (4, 7)
