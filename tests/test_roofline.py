"Counted steps: the ledger against steps whose bytes are known, fake against real, and the committed file."
import json
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers"); pytest.importorskip("peft")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from framer.cost import PAPER, Setting  # noqa: E402
from framer.roofline import Ledger, Machine, counted_row, counted_step, fake_gpu, gpu_casts, moved_bytes, operations  # noqa: E402

ROOT = Path(__file__).parents[1]
warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")


def test_memory_of_a_chain_is_what_its_tensors_hold():
    "Each tanh keeps its output for the backward pass; the ledger sees them come and go."
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        x = torch.randn(1000, requires_grad=True); before = ledger.live
        y = x
        for _ in range(5): y = y.tanh()
        assert ledger.live - before == 5 * 4000
        y.sum().backward()
        del y
        assert ledger.live - before <= 3 * 4000 and x.grad.shape == x.shape


def test_a_machine_twice_as_fast_takes_half_the_time():
    setting = Setting("tiny-dit4sr", 2, "bf16")
    slow, fast = (counted_step(setting, "framer", machine=Machine("m", *rates)) for rates in ((1e12, 1e14, 1e13), (2e12, 2e14, 2e13)))
    assert slow["bytes"] == fast["bytes"] and slow["seconds"] == pytest.approx(2 * fast["seconds"])


def test_what_framer_adds_is_counted():
    "More bytes, calls and operations than the baseline's, fewer than the plain form's."
    def plain(maps, teacher, negatives, config): return sum((torch.fft.ifft2(torch.fft.fft2(m.float())).real - maps[teacher].detach().float()).square().mean() for m in maps[:-1] for _ in range(8))
    row = counted_row(Setting("tiny-dit4sr", 4, "bf16"), plain)
    base, framer, other = (row["contestants"][k] for k in ("baseline", "framer", "plain"))
    for k in ("bytes", "calls", "seconds"): assert base[k] < framer[k] < other[k] or k == "calls" and base[k] < framer[k]
    assert row["memory_overhead_percent"] < row["plain_memory_overhead_percent"] and sum(row["added_ms_by"].values()) <= row["added_ms"] * 1.001 + 1e-6


def test_maps_share_the_copies_of_normalisations():
    "Under a GPU's autocast DiT4SR's maps are the float32 copies that the next norm keeps; without sharing they are memory of their own."
    from framer import hooks
    setting = Setting("tiny-dit4sr", 8, "bf16")
    shared = counted_step(setting, "framer")["peak"]
    share, hooks.CallRecord.share = hooks.CallRecord.share, lambda self, norm, args: None
    try: apart = counted_step(setting, "framer")["peak"]
    finally: hooks.CallRecord.share = share
    assert apart > shared


def test_nothing_fake_stays_behind():
    "After counting, geometry and autocast are real again."
    from framer.distill import FramerConfig, lean_distillation
    counted_step(Setting("tiny-dit4sr", 2, "bf16"))
    maps = [torch.randn(2, 64, 8, 8) for _ in range(3)]
    assert type(lean_distillation(maps, FramerConfig()).loss) is torch.Tensor
    with gpu_casts(), torch.autocast("cpu", torch.bfloat16): assert torch.nn.LayerNorm(4)(torch.randn(2, 4).bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16): assert torch.nn.functional.layer_norm(torch.randn(2, 4).bfloat16(), (4,)).dtype == torch.bfloat16
    assert torch.nn.Linear(2, 2).to(torch.float64).weight.dtype == torch.float64


def test_an_unknown_operation_costs_its_bytes():
    x = torch.randn(8, 8)
    assert operations(torch.ops.aten.sin.default, (x,), {}, x.sin()) == 0 and moved_bytes(torch.ops.aten.sin.default, (x,), x.sin()) == 2 * 256
    with fake_gpu() as ledger: torch.zeros(4).sin()
    assert ledger.calls["sin"] == 1 and ledger.bytes["sin"] == 32


def test_committed_count():
    path = ROOT / "reports/cost/roofline/h200.json"
    if not path.is_file(): pytest.skip("reports/cost/roofline/h200.json is not there")
    rows = json.loads(path.read_text())["rows"]
    paper = [r for r in rows if all(r[k] == v for k, v in vars(PAPER).items())]
    assert len(paper) == 1 and all(r["counted"] for r in rows)                      # never taken for a measurement
    assert paper[0]["memory_overhead_percent"] < 1 and paper[0]["percent_of_the_papers_step"] < 2
    assert abs(paper[0]["contestants"]["baseline"]["peak"] / 87.03e9 - 1) < 0.05    # the paper's baseline
    fresh = counted_row(Setting("dit4sr", 1, "bf16"))
    recorded, = (r for r in rows if r["model"] == "dit4sr" and r["batch"] == 1)
    for k in ("peak", "bytes"): assert fresh["contestants"]["framer"][k] == pytest.approx(recorded["contestants"]["framer"][k], rel=0.1)  # versions of torch and diffusers differ a little
