"""The kernels of a pack's adapters, and packs through them: on a GPU, or without one by Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import make_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_search.data import FlatRows, TokenizedData, TokenSplit
from lora_search.engine import Engine, StepMetrics
from lora_search.engine import lora as lora_module
from lora_search.engine.adapter import Places
from lora_search.engine.fused import fused_behind, probe
from lora_search.engine.masks import Masks, survivors_scale
from lora_search.engine.pack import Pack, Share, build_pack
from lora_search.engine.table import Table, tables
from lora_search.model import load_base
from lora_search.space import TrialConfig, trial_config
from lora_search.spec import Base
from lora_search.spec.schema import Lora, Training

if TYPE_CHECKING:
    from pathlib import Path

    from lora_search.spec import SweepSpec

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":  # read when Triton is imported, by whomever
    pytest.skip("needs a CUDA device, or Triton and TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="needs Triton (pip install triton==3.6.0): it is no part of torch for a CPU")

from lora_search.engine import kernels  # noqa: E402  # imports Triton

DEVICE = torch.device("cuda" if ON_GPU else "cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]
BASES = ["float32", "bfloat16", "checkpointing"] if ON_GPU else ["float32"]

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")

GRADIENT_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of a gradient's norm: sums in another order; in bfloat16, whose numbers have eight bits, of rounded products."""

property_settings = settings(
    max_examples=6 if ON_GPU else 3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Layers:
    """Adapters on layers that share an input, as the kernels are told of them, without a model around them."""

    groups: tuple[Places, ...]

    def __init__(self, ranks: dict[int, int], features: int, outs: dict[int, int], dtype: torch.dtype, scale: float):
        self.groups = (tuple(outs),)
        self.scaling = scale
        total = sum(ranks.values())
        self.a_SI = torch.randn(total, features, device=DEVICE).to(dtype)
        self.grad_a_SI = torch.zeros(total, features, device=DEVICE)
        self.b = {place: torch.randn(rank, outs[place], device=DEVICE).to(dtype) for place, rank in ranks.items()}
        self.grad_b = {place: torch.zeros(rank, outs[place], device=DEVICE) for place, rank in ranks.items()}
        self.spans: dict[int, slice] = {}
        self.records = np.zeros((1, 1 + len(outs), 4), np.int64)
        start = 0
        for index, place in enumerate(outs):
            if place in ranks:
                self.spans[place] = slice(start, start + ranks[place])
                address = (self.b[place].data_ptr(), self.grad_b[place].data_ptr())
                self.records[0, 1 + index] = (*address, ranks[place], start)
                start += ranks[place]
        if total:
            self.records[0, 0] = (self.a_SI.data_ptr(), self.grad_a_SI.data_ptr(), total, 0)


def rows_of(tokens: int) -> FlatRows:
    zeros = np.zeros(tokens, np.int64)
    return FlatRows(zeros, zeros, (tokens,), zeros[:1], zeros[:1])


def off_by(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert not found.isnan().any()
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def trials_of(ranks: st.SearchStrategy[int]) -> st.SearchStrategy[list[tuple[int, dict[int, int], bool]]]:
    """Tokens, the rank of each layer, and whether anything is dropped."""
    layers = st.dictionaries(st.sampled_from([5, 6, 7]), ranks)
    return st.lists(st.tuples(st.integers(1, 300), layers, st.booleans()), min_size=1, max_size=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [24, 136, 2048] if ON_GPU else [24, 136])
@property_settings
@given(trials=trials_of(st.integers(1, 90)) | trials_of(st.sampled_from([8, 16, 64])))  # the latter lie at 16 bytes
def test_kernels_compute_what_they_should(
    dtype: torch.dtype, features: int, trials: list[tuple[int, dict[int, int], bool]]
) -> None:
    """Against float64, from fresh random numbers."""
    outs = {5: 48, 6: 20, 7: 512}
    adapters = [Layers(ranks, features, outs, dtype, 0.25 + index) for index, (_, ranks, _) in enumerate(trials)]
    shares = [
        Share(rows_of(tokens), adapter, Masks(3, index, 0, 0.3) if drops else None)  # type: ignore[arg-type]
        for index, ((tokens, _, drops), adapter) in enumerate(zip(trials, adapters, strict=True))
    ]
    pack = build_pack(shares, DEVICE)
    tokens = pack.parts[-1].tokens.stop
    x_NI = torch.randn(tokens, features, device=DEVICE).to(dtype)
    grad_NI = torch.randn(tokens, features, device=DEVICE).to(dtype)
    before_NI = grad_NI.double()
    behind = fused_behind(pack, (5, 6, 7), DEVICE)
    assert (behind is not None) == any(ranks for _, ranks, _ in trials)
    if behind is None:
        return
    kept = kept_of(pack, adapters, features)
    downs, keeps = behind.enter(x_NI)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    grads_down = [
        torch.zeros(part.tokens.stop - part.tokens.start, len(a.a_SI), dtype=torch.float64, device=DEVICE)
        for part, a in zip(pack.parts, adapters, strict=True)
    ]
    for place, out in outs.items():
        if not behind.adapts(place):
            assert not any(place in a.spans for a in adapters)
            continue
        y_NO, grad_NO = (torch.randn(tokens, out, device=DEVICE).to(dtype) for _ in range(2))
        (y_before,) = (y_NO.double(),)
        saved = behind.add(place, y_NO, downs)
        behind.gather(place, grad_NO, saved)
        for index, (part, a) in enumerate(zip(pack.parts, adapters, strict=True)):
            rows = part.tokens
            if place not in a.spans:
                assert torch.equal(y_NO[rows].double(), y_before[rows])
                continue
            dropped = x_NI[rows].double() * kept[index]
            down = dropped @ a.a_SI[a.spans[place]].double().t()
            added = part.share.scale * down @ a.b[place].double()
            assert off_by(y_NO[rows], y_before[rows] + added) < tolerance
            assert off_by(a.grad_b[place], part.share.scale * down.t() @ grad_NO[rows].double()) < tolerance
            grads_down[index][:, a.spans[place]] = part.share.scale * grad_NO[rows].double() @ a.b[place].double().t()
    behind.leave(x_NI, keeps, grad_NI)
    for index, (part, a) in enumerate(zip(pack.parts, adapters, strict=True)):
        rows = part.tokens
        if not a.spans:
            assert torch.equal(grad_NI[rows].double(), before_NI[rows])
            continue
        dropped = x_NI[rows].double() * kept[index]
        assert off_by(a.grad_a_SI, grads_down[index].t() @ dropped) < tolerance
        through = grads_down[index] @ a.a_SI.double() * kept[index]
        assert off_by(grad_NI[rows], before_NI[rows] + through) < tolerance


def kept_of(pack: Pack, adapters: list[Layers], features: int) -> list[torch.Tensor]:
    """Every part's mask, seen by what is left of ones that go through it."""
    tokens = pack.parts[-1].tokens.stop
    table = tables(pack, DEVICE)[5, 6, 7]
    kept = []
    for part, adapter in zip(pack.parts, adapters, strict=True):
        values = adapter.a_SI.clone()
        adapter.a_SI.fill_(1)
        through = torch.zeros(tokens, features, device=DEVICE, dtype=values.dtype)
        ones = torch.ones(tokens, 512, device=DEVICE, dtype=values.dtype)
        kernels.add_up(through, ones, table, 5, 0, drop=True, scale=False)
        adapter.a_SI.copy_(values)
        mask = through[part.tokens] != 0
        if not part.share.dropout:
            assert mask.all() or not adapter.spans
        elif adapter.spans and mask.numel() > 2000:
            assert abs(mask.double().mean() - 1 / survivors_scale(0.3)) < 5 * (0.21 / mask.numel()) ** 0.5
        kept.append(mask.double())
    return kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_found_to_run(dtype: torch.dtype) -> None:
    assert probe(DEVICE, dtype)


@pytest.mark.parametrize("key", [0, -1, 123_456_789_012_345])
@pytest.mark.parametrize("place", [0, 7])
def test_mask_is_philoxs_of_key_place_row_and_column(key: int, place: int) -> None:
    rows, features = 70, 136
    heads = [0, 5, 0, 0, 0], [5, 5 + rows, key, 20_000, 0]  # of the second part, whose rows begin at its own first
    matrix = torch.ones(16, features, device=DEVICE)
    numbers = [[*heads[0], 0, 0, 0, 0], [*heads[1], matrix.data_ptr(), 0, 16, 0]]
    table = Table(torch.tensor(numbers, device=DEVICE), 9, 0, (16,), aligned=True, drops=True, longest=rows)
    through = torch.zeros(5 + rows, features, device=DEVICE)
    ones = torch.ones(5 + rows, 16, device=DEVICE)
    kernels.add_up(through, ones, table, place, 0, drop=True, scale=False)
    kept = (through[5:] != 0).cpu().numpy()
    assert not through[:5].any()
    np.testing.assert_array_equal(kept, levels(key, place, rows, features) >= 20_000)


def levels(key: int, place: int, rows: int, features: int) -> npt.NDArray[np.uint64]:
    """Sixteen bits for each place, by Philox 4x32-7 as its paper says; eight columns from each counter."""
    low, multipliers, weyl = 0xFFFF_FFFF, (0xD251_1F53, 0xCD9E_8D57), (0x9E37_79B9, 0xBB67_AE85)
    octets = features // 8
    counter = [
        np.broadcast_to(np.arange(octets, dtype=np.uint64), (rows, octets)),
        np.broadcast_to(np.arange(rows, dtype=np.uint64)[:, None], (rows, octets)),
        np.full((rows, octets), place, np.uint64),
        np.zeros((rows, octets), np.uint64),
    ]
    keys = [key & low, (key >> 32) & low]
    for _ in range(7):
        products = [counter[0] * np.uint64(multipliers[0]), counter[2] * np.uint64(multipliers[1])]
        highs, lows = [p >> np.uint64(32) for p in products], [p & np.uint64(low) for p in products]
        counter = [
            highs[1] ^ counter[1] ^ np.uint64(keys[0]),
            lows[1],
            highs[0] ^ counter[3] ^ np.uint64(keys[1]),
            lows[0],
        ]
        keys = [(k + w) & low for k, w in zip(keys, weyl, strict=True)]
    a, b, c, d = counter
    words = np.stack([a, c, b, d], -1)  # as Triton joins (a, b) with (c, d)
    both = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], -1)
    return both.reshape(rows, features)


TRIALS: list[dict[str, Any]] = [
    {"rank": 3, "alpha": 8.0, "dropout": 0.1, "target_modules": "attention-qv", "batch_size": 2, "seed": 1},
    {"rank": 16, "alpha": 16.0, "dropout": 0.0, "target_modules": "all-linear", "batch_size": 3, "seed": 2},
    {"rank": 40, "alpha": 20.0, "dropout": 0.3, "target_modules": "mlp", "batch_size": 1, "seed": 3},
    {"rank": 8, "alpha": 32.0, "dropout": 0.05, "target_modules": "all-linear", "use_rslora": True, "seed": 4},
    {"rank": 1, "alpha": 1.0, "dropout": 0.2, "target_modules": "re:.*1.*up_proj", "seed": 5},
]


@pytest.fixture(scope="module", params=BASES)
def spec(tiny: Path, request: pytest.FixtureRequest) -> SweepSpec:
    checkpointing = request.param == "checkpointing"
    dtype = "bfloat16" if checkpointing else request.param
    return make_spec(tiny, base={"compute_dtype": dtype, "gradient_checkpointing": checkpointing})


@pytest.fixture(scope="module")
def engine(spec: SweepSpec) -> Engine:
    base = load_base(spec.base, DEVICE)
    return Engine(base, random_data(base.model.config.vocab_size, np.random.default_rng(1).integers(3, 60, 64)))


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(lora_module, "fuses", lambda device, dtype: True)


@pytest.fixture
def configs(spec: SweepSpec) -> list[TrialConfig]:
    return [trial_config(spec, {"learning_rate": 2e-3, "steps": 40, **values}) for values in TRIALS]


@pytest.fixture
def residents(engine: Engine, configs: list[TrialConfig]) -> Iterator[list[str]]:
    """Trials that have made some steps together, so that B is no longer zero and A has a gradient."""
    names = [str(index) for index in range(len(configs))]
    for name, config in zip(names, configs, strict=True):
        engine.admit(name, config)
    for _ in range(3):
        assert all(isinstance(outcome, StepMetrics) for outcome in engine.step(names).values())
    yield names
    for name in engine.residents:
        engine.release(name)


def test_gradient_is_the_same_alone_and_in_company(engine: Engine, spec: SweepSpec, residents: list[str]) -> None:
    """Dropout included: a trial's masks are its own."""
    together, others = engine.gradients(residents), engine.gradients(residents[::-1])
    tolerance = GRADIENT_TOLERANCE[spec.base.compute_dtype]
    for name in residents:
        alone = engine.gradients([name])[name]
        assert alone.norm() > 0
        assert (together[name] - alone).norm() <= tolerance * alone.norm()
        assert (others[name] - alone).norm() <= tolerance * alone.norm()


def test_kernels_and_products_of_ones_own_make_the_same_gradient(
    engine: Engine, spec: SweepSpec, residents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout, whose masks differ."""
    names = [name for name, values in zip(residents, TRIALS, strict=True) if not values["dropout"]]
    plain = trial_config(spec, {"rank": 5, "target_modules": "all-linear", "dropout": 0.0, "steps": 40, "seed": 9})
    engine.admit("plain", plain)
    names.append("plain")
    for _ in range(3):
        engine.step(["plain"])
    fused, measured = engine.gradients(names), engine.evaluate(residents)
    monkeypatch.setattr(lora_module, "fuses", lambda device, dtype: False)
    apart, evaluated = engine.gradients(names), engine.evaluate(residents)
    tolerance = GRADIENT_TOLERANCE[spec.base.compute_dtype]
    for name in names:
        assert (fused[name] - apart[name]).norm() <= tolerance * apart[name].norm()
    for name in residents:
        assert measured[name].loss == pytest.approx(evaluated[name].loss, rel=tolerance)


@needs_gpu
def test_losses_are_the_same_alone_and_in_company(engine: Engine, spec: SweepSpec, configs: list[TrialConfig]) -> None:
    """Twenty steps; trials join and leave on the way."""

    def losses(of: dict[str, range]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in of}
        for step in range(20):
            for name, there in of.items():
                if step == there.start:
                    engine.admit(name, configs[int(name)])
            for name, outcome in engine.step(engine.residents).items() if engine.residents else ():
                assert isinstance(outcome, StepMetrics)
                found[name].append(outcome.loss)
            for name, there in of.items():
                if step == there.stop - 1:
                    engine.release(name)
        return found

    company = losses({"0": range(20), "1": range(3, 20), "2": range(12), "3": range(5, 15), "4": range(1, 20)})
    tolerance = 1e-4 if spec.base.compute_dtype == "float32" else 3e-2
    for name, together in company.items():
        alone = losses({name: range(len(together))})[name]
        assert together == pytest.approx(alone, rel=tolerance)


@pytest.mark.gpu
@needs_gpu
def test_memory_that_runs_out_splits_the_pack(tmp_path: Path) -> None:
    """What CUDA itself says, of a process that may have no more than a part of the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(tmp_path / "model"))
    engine = Engine(load_base(Base(model=str(tmp_path / "model")), "cuda"), random_data(1000, np.full(64, 256)))
    for index in range(8):
        config = TrialConfig(
            Lora(rank=4, target_modules="all-linear", dropout=0.1), Training(batch_size=16, seed=index, steps=40)
        )
        engine.admit(str(index), config)

    def peak(names: tuple[str, ...]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert all(isinstance(outcome, StepMetrics) for outcome in engine.step(names).values())
        return torch.cuda.max_memory_allocated()

    two, eight = peak(engine.residents[:2]), peak(engine.residents)
    assert eight > 3 * two
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (two + eight) / 2 / torch.cuda.get_device_properties(DEVICE).total_memory
    )
    try:
        outcomes = engine.step(engine.residents)
        after = engine.step(engine.residents)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.pack_limit in (2, 4)
    for of in (outcomes, after):
        assert all(isinstance(outcome, StepMetrics) for outcome in of.values()), of


def random_data(vocabulary: int, lengths: npt.NDArray[np.int64]) -> TokenizedData:
    """Rows of these lengths, the same in every split."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, lengths.sum()).astype(np.int32)
    split = TokenSplit(tokens, np.ones(len(tokens), np.bool_), np.concatenate([[0], np.cumsum(lengths)]))
    return TokenizedData(split, split, split, 0, "random", 0, 0)
