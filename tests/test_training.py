"Runs from the outside: killed and resumed, wrong parameters, bad photographs, full disks, no network."
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framer.runs import RunError, checkpoint_steps, history_differences, read_history
from framer.scales import new_model, tiny_text
from framer.training import TrainConfig, train

ROOT = Path(__file__).parents[1]
QUICK = dict(steps=9, size=64, batch_size=2, validation_size=64, sampling_steps=1, warmup_steps=1, num_workers=0, checkpoint_every=3, validate_every=4,
             log_layers_every=2, tensorboard=False, data=str(ROOT / "data/photographs/train"), validation_data=str(ROOT / "data/photographs/val"))


def script(before="", after="", **config):
    return "\n".join(["import torch", "torch.set_num_threads(1)", "from framer.training import TrainConfig, train", before, f"train(TrainConfig(**{dict(QUICK, **config)!r}))", after])


def start(root, before="", **config):
    env = dict(os.environ, FRAMER_ROOT=str(root), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, "-c", script(before, **config)], env=env, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, expect=0):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == expect, out[-3000:]
    return out


def go(root, expect=None, **config):
    "A run in this process, which spares another import of everything; what it said, with the message of the error where one is expected."
    said, threads = io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setenv("FRAMER_ROOT", str(root)); patch.setenv("TQDM_DISABLE", "1"); torch.set_num_threads(1)
        try: train(TrainConfig(**dict(QUICK, **config)))
        except Exception as error:
            if not expect or not isinstance(error, expect): raise
            print(error)
        else: assert not expect, f"no {expect}: {said.getvalue()[-1000:]}"
        finally: torch.set_num_threads(threads)
    return said.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run."
    root = tmp_path_factory.mktemp("whole")
    finish(start(root, run="whole"))
    return root / "reports" / "whole"


def kill_when(process, condition, timeout=200):
    "SIGKILL as soon as the condition holds."
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end, "the moment to kill never came"
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()


MOMENTS = {
    "at once": lambda run: (run / "config.json").exists(),
    "before the first checkpoint": lambda run: len(read_history(run)) >= 2,
    "inside the writing of a checkpoint": lambda run: any((run / "checkpoints").glob(".step-000006.partial-*")),
    "after a checkpoint": lambda run: len(read_history(run)) >= 8,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_bit_identical(moment, whole, tmp_path):
    run = tmp_path / "reports" / "whole"
    slow = "import framer.runs, time; keep = framer.runs._put_in_place; framer.runs._put_in_place = lambda *a: (time.sleep(0.5), keep(*a))"  # a wider window to hit
    kill_when(start(tmp_path, slow if "inside" in moment else "", run="whole"), lambda: MOMENTS[moment](run))
    if "inside" in moment: assert checkpoint_steps(run) == [3] and any((run / "checkpoints").glob(".step-*.partial-*"))
    go(tmp_path, run="whole", resume=True)
    assert not any((run / "checkpoints").glob(".*partial*"))
    assert history_differences(whole, run) == []
    for name in ("layers.csv", "validation.csv"): assert (whole / name).read_bytes() == (run / name).read_bytes()
    for name in ("model", "ema", "optimizer", "framer"):
        a, b = (load_file(r / "checkpoints" / "step-000009" / f"{name}.safetensors") for r in (whole, run))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    a, b = (json.loads((r / "metrics.json").read_text()) for r in (whole, run))
    for timing in ("step_seconds_median", "minutes"): a.pop(timing), b.pop(timing)
    assert a == b


def test_baseline_sees_the_same_data_and_noise(whole, tmp_path):
    go(tmp_path, run="baseline", framer=False, steps=3)
    baseline, framer = read_history(tmp_path / "reports" / "baseline"), read_history(whole)
    assert baseline[0]["noise_loss"] == framer[0]["noise_loss"] and "distill_loss" not in baseline[0]
    assert not (tmp_path / "reports" / "baseline" / "layers.csv").exists()


def test_gradient_accumulation_and_resume(tmp_path):
    options = dict(steps=4, gradient_accumulation_steps=2, checkpoint_every=2)
    finish(start(tmp_path, run="b", **dict(options, steps=2)))   # a process of its own, and two runs in this one
    go(tmp_path, run="a", **options)
    go(tmp_path, run="b", resume=True, **options)
    assert history_differences(tmp_path / "reports" / "a", tmp_path / "reports" / "b") == []


def test_existing_run_is_not_overwritten(whole):
    root = whole.parents[1]
    out = go(root, RunError, run="whole")
    assert "-p resume True" in out and len(read_history(whole)) == 9
    out = go(root, RunError, run="whole", resume=True, learning_rate=2e-3)
    assert "learning_rate" in out and "0.002" in out


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in sorted((ROOT / "data/photographs/train").glob("*.jpg"))[:3]: shutil.copy(path, folder)
    return folder


def test_one_bad_photograph_is_left_out(photographs, tmp_path):
    good = sorted(photographs.glob("*.jpg"))
    (photographs / "truncated.jpg").write_bytes(good[0].read_bytes()[:20000])
    (photographs / "text.png").write_text("not a picture")
    from PIL import Image
    Image.new("RGB", (1, 1)).save(photographs / "dot.png")
    out = go(tmp_path, run="r", data=str(photographs), steps=1)
    for name in ("truncated.jpg", "text.png", "dot.png"): assert f"left out: {photographs / name}" in out
    assert "3 photographs" in out


@pytest.mark.parametrize("change, words", [
    (dict(data="/no/such/folder"), ["/no/such/folder"]),
    (dict(backbone="sd9"), ["sd9", "sd2, sd3"]),
    (dict(size=100), ["size=100", "multiple of 32"]),
    (dict(framer_options=dict(raduis=0.1)), ["raduis", "radius"]),
    (dict(scale="full"), ["full"]),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_wrong_parameters(change, words, tmp_path):
    out = go(tmp_path, Exception, run="r", **change)
    assert all(word in out for word in words), out
    assert not (tmp_path / "reports" / "r" / "config.json").exists()


def test_unwritable_reports(tmp_path):
    (tmp_path / "reports").write_text("a file where the folder should be")
    out = go(tmp_path, (OSError, RunError), run="r")
    assert str(tmp_path / "reports") in out and "is a file" in out


def test_full_disk_keeps_the_last_checkpoint(whole, tmp_path):
    "A file size limit stands in for a full disk: the second checkpoint cannot be written."
    fill = ("import resource, signal, framer.training as t; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); old = t.RunFolder.save_checkpoint; "
            "t.RunFolder.save_checkpoint = lambda self, step, *a, **k: (resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)) if step > 3 else None, old(self, step, *a, **k))[1]")
    out = finish(start(tmp_path, fill, run="whole"), expect=1)
    run = tmp_path / "reports" / "whole"
    assert "resume True" in out and checkpoint_steps(run) == [3] and not any((run / "checkpoints").glob(".*partial*")), out[-2000:]
    go(tmp_path, run="whole", resume=True)
    assert history_differences(whole, run) == []


def test_no_network_is_needed(tmp_path):
    refuse = "import socket; socket.socket.connect = socket.create_connection = socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(AssertionError(f'network: {a}'))"
    finish(start(tmp_path, refuse, run="r", steps=1))


def test_two_processes_train_one_model(tmp_path):
    "Two CPU processes (gloo): one history, and both end with the same weights, heads and average. A second run in another precision keeps their group."
    program = tmp_path / "two.py"
    keep = "import framer.training as t; old, kept = t.go_on, []; t.go_on = lambda parts, *a: (kept.append(parts), old(parts, *a))[1]"
    tell = ("p = kept[0]; sums = [float(sum(x.double().sum() for x in xs)) for xs in (p.plain_model.parameters(), p.framer.parameters(), p.ema.shadow_params)]; "
            "open(f'ends-{p.accelerator.process_index}.txt', 'w').write(f'{p.accelerator.num_processes} {sums}')")
    again = f"train(TrainConfig(**{dict(QUICK, run='half', steps=1, mixed_precision='bf16')!r})); open(f'half-{{kept[1].accelerator.process_index}}.txt', 'w').write(f'{{kept[1].accelerator.num_processes}} {{kept[1].accelerator.mixed_precision}}')"
    program.write_text(script(keep, tell + "\n" + again, run="two", steps=3, framer_options=dict(teacher="random"), log_layers_every=1))
    env = dict(os.environ, FRAMER_ROOT=str(tmp_path), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    done = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ends = [(tmp_path / f"ends-{rank}.txt").read_text() for rank in (0, 1)]
    assert ends[0] == ends[1] and ends[0].startswith("2 "), ends
    run = tmp_path / "reports" / "two"
    assert [r["step"] for r in read_history(run)] == [1, 2, 3] and (run / "model" / "config.json").exists()
    assert [(tmp_path / f"half-{rank}.txt").read_text() for rank in (0, 1)] == ["2 bf16", "2 bf16"] and len(read_history(tmp_path / "reports" / "half")) == 1


def test_photographs_of_a_resumed_run_are_the_same(photographs, tmp_path):
    go(tmp_path, run="r", data=str(photographs), steps=1)
    sorted(photographs.glob("*.jpg"))[0].unlink()
    out = go(tmp_path, RunError, run="r", data=str(photographs), steps=2, resume=True)
    assert "photographs" in out and "given 2, recorded 3" in out


# -- the paper's recipes

TINY = dict(QUICK, steps=4, validate_every=9, checkpoint_every=1, keep_checkpoints=9, scale="tiny")


@pytest.fixture
def here(tmp_path, monkeypatch):
    "Runs of this process: one thread, reports in a folder of their own, two held-out photographs."
    monkeypatch.setenv("FRAMER_ROOT", str(tmp_path)); monkeypatch.setenv("TQDM_DISABLE", "1")
    folder = tmp_path / "held-out"; folder.mkdir()
    for path in sorted((ROOT / "data/photographs/val").glob("*.jpg"))[:2]: shutil.copy(path, folder)
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield lambda name, **config: train(TrainConfig(**{**TINY, "run": name, "validation_data": str(folder), **config}), log=lambda *a: None)
    torch.set_num_threads(threads)


def tensors(run, step, name): return load_file(run / "checkpoints" / f"step-{step:06d}" / f"{name}.safetensors")


def test_stages_resume_bit_identical(here):
    "PiSA-SR: stopped at the change of stages and inside the second, and gone on with."
    options = dict(recipe="framer-u", pixel_steps=1, steps=3)
    whole = here("whole", **options)
    for stop in (1, 2):
        here(f"stop{stop}", **{**options, "steps": stop}); again = here(f"stop{stop}", resume=True, recipe="framer-u", steps=3)   # without saying again where the stage changes
        assert history_differences(whole, again) == []
        for name in ("model", "ema", "optimizer", "framer"):
            a, b = (tensors(r, 3, name) for r in (whole, again))
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    first, last = tensors(whole, 1, "model"), tensors(whole, 3, "model")
    changed = {k for k in first if not torch.equal(first[k], last[k])}
    assert changed and all(".semantic." in k for k in changed)                            # no decay, no momentum on anything else
    assert {"l2", "lpips", "csd"} <= set(read_history(whole)[0])
    assert set(load_file(whole / "model" / "diffusion_pytorch_model.safetensors")) == set(new_model("sd2", "unet", "tiny").state_dict())


def test_runs_of_one_process_may_differ_in_precision(here):
    "And the second in full precision is the first, to the last bit."
    first, half, last = (here(f"p{k}", steps=1, mixed_precision=p) for k, p in enumerate(("no", "bf16", "no")))
    assert history_differences(first, last) == [] and read_history(first)[0]["distill_loss"] != read_history(half)[0]["distill_loss"]


def test_a_frozen_base_is_neither_changed_nor_copied(here, tmp_path):
    base = tmp_path / "base"
    plain = new_model("sd3", "transformer", "tiny", seed=5); plain.save_pretrained(base / "transformer"); tiny_text("sd3").save_pretrained(base)
    run = here("d", backbone="sd3", weights=str(base), steps=2, cache_text=str(tmp_path / "texts"), optimizer="adamw8bit")
    saved, kept = load_file(run / "model" / "diffusion_pytorch_model.safetensors"), tensors(run, 2, "model")
    assert all("control" in k for k in kept) and all(torch.equal(saved[k], v) for k, v in plain.state_dict().items() if k in saved)
    assert json.loads((run / "model" / "framer.json").read_text())["weights"] == str(base)
    other = tmp_path / "other"; new_model("sd3", "transformer", "tiny", seed=6).save_pretrained(other / "transformer"); tiny_text("sd3").save_pretrained(other)
    shutil.rmtree(base); shutil.copytree(other, base)                                     # the same name, other weights
    with pytest.raises(Exception, match="base"): here("d", backbone="sd3", weights=str(base), steps=3, resume=True, cache_text=str(tmp_path / "texts"), optimizer="adamw8bit")


def test_gradient_checkpointing_changes_memory_only(here):
    a, b = (read_history(here(f"g{g}", recipe="framer-d", backbone="sd3", steps=2, gradient_checkpointing=bool(g))) for g in (0, 1))
    assert [round(r["noise_loss"], 5) for r in a] == [round(r["noise_loss"], 5) for r in b] and abs(a[-1]["distill_loss"] - b[-1]["distill_loss"]) < 1e-3
