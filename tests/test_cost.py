"The cost benchmark: its plain form against the library, files that go on, memory that does not suffice, and the committed files."
import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers"); pytest.importorskip("peft")

from framer import cost  # noqa: E402
from framer.distill import FramerConfig, distillation  # noqa: E402
from framer.figures import cost_figure, read_costs  # noqa: E402

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("cost_benchmark", ROOT / "benchmarks/cost.py")
benchmark = importlib.util.module_from_spec(spec); spec.loader.exec_module(benchmark)
SMOKE = cost.plan_rows("smoke")[0]


@pytest.mark.filterwarnings("ignore:FRAMER")
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 3, 7, 5), (1, 4, 6, 6)], ids=str)
def test_plain_form_has_the_library_s_value_and_gradients(shape):
    torch.manual_seed(0)
    shared = torch.randn(shape)
    maps = [shared * k / 4 + torch.randn(shape) for k in range(5)]
    found = []
    for make in (lambda fs: benchmark.plain(fs, 4, [1, 2, 3, 0], FramerConfig()), lambda fs: distillation(fs, FramerConfig(), [1, 2, 3, 0]).loss):
        leaves = [m.clone().requires_grad_() for m in maps]
        loss = make(leaves); loss.backward()
        found.append((loss.detach(), torch.cat([f.grad.flatten() for f in leaves[:-1]])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


def made(setting, device, plain, rounds, warmup):
    made.calls.append(setting)
    return dict(**cost.asdict(setting), headline=False, device="cpu", time_overhead_percent=1.0, memory_overhead_percent=2.0, why=None)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    made.calls = []
    monkeypatch.setattr(cost, "measure_row", made)
    settings = cost.plan_rows("cpu")
    file = tmp_path / "cpu.json"
    cost.run_plan(file, "cpu", budget=-1, log=lambda *a: None)
    assert made.calls == [] and [r["why"][:12] for r in json.loads(file.read_text())["rows"]] == ["not measured"] * len(settings)
    monkeypatch.setattr(cost, "plan_rows", lambda name: settings[:2])
    assert cost.run_plan(file, "cpu", log=lambda *a: None) == 0 and len(made.calls) == 2
    monkeypatch.setattr(cost, "plan_rows", lambda name: settings[:3])
    assert cost.run_plan(file, "cpu", log=lambda *a: None) == 0 and made.calls == settings[:3]
    found = json.loads(file.read_text())
    assert {"hardware", "versions", "commit", "rows"} <= found.keys() and [r["time_overhead_percent"] for r in found["rows"]] == [1.0] * 3
    assert cost_figure(read_costs(tmp_path)) is not None
    file.write_text("[1]")
    with pytest.raises(ValueError, match="holds no rows"): cost.run_plan(file, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_headline_is_empty(tmp_path):
    with pytest.raises(RuntimeError, match="no CUDA device"): cost.run_plan(tmp_path / "gpu.json", "gpu", "cuda")
    rows = read_costs(tmp_path)
    assert [r["headline"] for r in rows].count(True) == 1 and rows[0]["headline"] and rows[0]["time_overhead_percent"] is None and "GPU" in rows[0]["why"]
    assert cost_figure(rows) is not None


def test_memory_that_does_not_suffice_is_a_row(monkeypatch):
    def none(*args): raise cost.OutOfMemory("tried to allocate")
    bench = cost.Bench(SMOKE, "cpu", benchmark.plain)
    step = cost.training_step
    monkeypatch.setattr(cost, "training_step", lambda b, how: none() if how == "plain" else step(b, how))
    seconds, memory = cost.contest(bench, ["baseline", "framer", "plain"], rounds=1, warmup=1)
    assert memory["plain"] is None and len(seconds["framer"]) == 1 and cost.overhead(seconds, memory, "plain", 1) == (None, None)
    assert cost.overhead(seconds, memory, "framer", 1)[0] is not None
    monkeypatch.setattr(cost, "cost_model", none)
    row = cost.measure_row(SMOKE)
    assert row["time_overhead_percent"] is None and "out of memory" in row["why"]


def test_a_model_trained_with_framer_is_the_baseline_s_at_inference():
    "Same steps' worth of machinery on and off: outputs, keys and parameters of the model are those of one that never had it."
    bench = cost.Bench(cost.replace(SMOKE, batch=1), "cpu", benchmark.plain)
    bench.enter("framer"); cost.training_step(bench, "framer"); bench.enter("baseline")
    found = cost.inference_row(bench, rounds=1)
    assert found["equal_outputs"] and found["equal_keys"] and found["equal_parameters"] and found["hooks_left"] == 0
    fresh = cost.cost_model(bench.setting, torch.device("cpu"))
    fresh.load_state_dict(bench.model.state_dict())                       # strict: the same keys
    with torch.no_grad(): assert torch.equal(fresh.eval()(**bench.inputs).sample, bench.model.eval()(**bench.inputs).sample)


def test_committed_files():
    rows = read_costs(ROOT / "reports/cost")
    if not rows: pytest.skip("reports/cost holds no files")
    assert sum(bool(r["headline"]) for r in rows) == (ROOT / "reports/cost/gpu.json").exists()   # the paper's setting is a row of that file alone
    for r in rows:
        assert {"implementation", "faw_grad", "gradient_checkpointing"} <= r.keys() and (r["time_overhead_percent"] is not None or r["why"]), r
        if r["headline"] and r["time_overhead_percent"] is not None: assert r["device"] == "cuda"
        if r["time_overhead_percent"] is not None: assert all(s["q25"] <= s["median"] <= s["q75"] for s in r["seconds"].values()) and r["inference"]["equal_outputs"]
