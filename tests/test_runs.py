"""Runs under kill -9, a full disk, two writers: what needs processes of its own. The rest is tested in nbs/14_runs.ipynb."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from framer import runs

ROOT = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="fork, signals and kernel locks are POSIX")
ENV = dict(os.environ, OMP_NUM_THREADS="1")

TRAIN = """import os, signal, sys, torch; from framer import runs
folder, steps, resume, die = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4]
import random, numpy; random.seed(0); numpy.random.seed(0); torch.manual_seed(0); torch.set_num_threads(1)
layer = torch.nn.Linear(4, 4); optimizer = torch.optim.AdamW(layer.parameters(), 0.05); generator = torch.Generator().manual_seed(1)
with runs.open_run(folder, dict(backbone="sd2", steps=steps), resume=resume) as run:
    if run.resumed:
        found = run.load_checkpoint(); layer.load_state_dict(found.tensors["model"])
        runs.unpack_optimizer(optimizer, found.tensors["optimizer"], found.state["optimizer"])
        runs.set_rng_state(found.tensors["rng"], found.state["rng"], dict(negatives=generator))
    if die == "writing":
        put, seen = runs._put_in_place, []
        runs._put_in_place = lambda *a: (seen.append(1), os.kill(os.getpid(), signal.SIGKILL) if len(seen) == 3 else put(*a))
    for step in range(run.start_step + 1, steps + 1):
        loss = (layer(torch.randn(2, 4)) - torch.randn(2, 4, generator=generator)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        run.history.append(dict(step=step, loss=loss.item(), seconds=os.times().elapsed))
        if die == f"step {step}": os.kill(os.getpid(), signal.SIGKILL)
        if step % 4 == 0 or step == steps:
            (optim, tree), (rng, rng_tree) = runs.pack_optimizer(optimizer), runs.rng_state(dict(negatives=generator))
            run.save_checkpoint(step, dict(model=layer.state_dict(), optimizer=optim, rng=rng), dict(optimizer=tree, rng=rng_tree))
"""


def train(folder, steps=20, resume=False, die="never"):
    return subprocess.run([sys.executable, "-c", TRAIN, str(folder), str(steps), str(resume), die], cwd=ROOT, env=ENV, capture_output=True, text=True)


@posix
def test_killed_and_resumed_is_bit_identical(tmp_path):
    """Killed inside a step, then inside the writing of a checkpoint, then resumed to the end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole).returncode == 0
    assert train(killed, die="step 7").returncode == -signal.SIGKILL
    with open(killed / "history.csv", "a") as file:
        file.write("8,0.1")  # the half line of a writer that was cut off
    refused = train(killed)
    assert refused.returncode == 1 and "-p resume True" in refused.stderr
    assert train(killed, resume=True, die="writing").returncode == -signal.SIGKILL
    assert list((killed / "checkpoints").glob(".step-*.partial-*"))
    done = train(killed, resume=True)
    assert done.returncode == 0 and "goes on from step 12" in done.stdout, done
    assert not list((killed / "checkpoints").glob(".*"))
    assert runs.history_differences(whole, killed) == [] and len(runs.read_history(killed)) == 20
    one, other = runs.load_checkpoint(whole), runs.load_checkpoint(killed)
    assert one.step == other.step == 20 and one.state == other.state
    for group, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        assert all(torch.equal(tensor, other.tensors[group][name]) for name, tensor in tensors.items()), group


WRITE = """import os, sys, time, torch; from framer import runs; from pathlib import Path
folder = Path(sys.argv[1]); torch.set_num_threads(1)
while line := sys.stdin.readline():  # one child a line: the import is paid once
    child = os.fork()
    if child == 0:
        lock = runs.RunLock(folder); runs.clean_leftovers(folder); step = (runs.newest_checkpoint(folder) or 0); print(os.getpid(), flush=True)
        while True:
            step += 1; tensors = dict(a=torch.full((20000,), float(step)), b=torch.full((3, 500), -float(step)))
            runs.save_checkpoint(folder, step, dict(model=tensors, heads=dict(c=torch.full((100,), step * 2.0))), dict(step=step))
    os.waitpid(child, 0); print("gone", flush=True)
"""


@posix
def test_random_kills_leave_complete_checkpoints(tmp_path):
    rng, last = random.Random(0), 0
    writer = subprocess.Popen([sys.executable, "-W", "error", "-c", WRITE, str(tmp_path)], cwd=ROOT, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    partials = 0
    try:
        for kill in range(10):
            print(file=writer.stdin, flush=True)
            pid = int(writer.stdout.readline())
            time.sleep(0.05 + 0.15 * rng.random())
            os.kill(pid, signal.SIGKILL)
            assert writer.stdout.readline() == "gone\n"
            partials += len(list((tmp_path / "checkpoints").glob(".step-*")))
            assert all(runs.check_checkpoint(runs.checkpoint_path(tmp_path, step)) == "" for step in runs.checkpoint_steps(tmp_path))
            found = runs.load_checkpoint(tmp_path)
            if found is None:
                assert last == 0
                continue
            assert found.step >= last and found.state == dict(step=found.step)
            assert found.tensors["model"]["a"].eq(found.step).all() and found.tensors["heads"]["c"].eq(2.0 * found.step).all()
            last = found.step
        assert last >= 10
    finally:
        writer.stdin.close()
        writer.wait(30)
    print(f"{last} checkpoints, {partials} leftovers of kills inside a write")


@posix
def test_lock_dies_with_its_holder(tmp_path):
    hold = "import sys, time; from framer.runs import RunLock; RunLock(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(runs.RunLocked, match=f"pid {holder.pid} on "):
        runs.RunLock(tmp_path)
    with pytest.raises(runs.RunLocked, match="-p run NAME"):
        runs.open_run(tmp_path, {}, log=str, wait=0)
    holder.kill()
    holder.wait()
    runs.RunLock(tmp_path).release()


# Takes the lock and ends a second after it was asked to, as the kernel of a killed papermill does.
LEAVE = "import sys, time; from framer.runs import RunLock; RunLock(sys.argv[1]); print('held', flush=True); sys.stdin.readline(); time.sleep(1)"


@posix
def test_open_run_waits_for_a_holder_that_is_leaving(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", LEAVE, str(tmp_path)], cwd=ROOT, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    said, began = [], time.monotonic()
    with pytest.raises(runs.RunLocked, match=f"pid {holder.pid} on ") as caught:
        runs.open_run(tmp_path, {}, log=said.append, wait=0)
    assert time.monotonic() - began < 2 and said == [] and f"pid {holder.pid} " in caught.value.holder
    with pytest.raises(runs.RunLocked, match=f"pid {holder.pid} on "):
        runs.open_run(tmp_path, {}, log=said.append, wait=0.5)
    assert 0.5 <= time.monotonic() - began < 5 and len(said) == 1 and not (tmp_path / "config.json").exists()
    print(file=holder.stdin, flush=True)
    said.clear()
    with runs.open_run(tmp_path, {}, log=said.append, wait=60) as run:
        assert run.start_step == 0 and len(said) == 2 and said[1] == run.message
        assert f"pid {holder.pid} on " in said[0] and "waiting up to 60 seconds" in said[0]
    assert holder.wait(30) == 0


def test_open_run_does_not_wait_for_its_own_process(tmp_path):
    with runs.open_run(tmp_path, {}, log=str):
        said, began = [], time.monotonic()
        with pytest.raises(runs.RunLocked, match="already open in this process"):
            runs.open_run(tmp_path, {}, resume=True, log=said.append, wait=60)
        assert time.monotonic() - began < 5 and said == []


@posix
def test_forked_child_does_not_keep_the_lock(tmp_path):
    """A loader's worker may outlive a killed trainer for seconds: the run must be free at once."""
    code = ("import os, sys, time; from framer.runs import RunLock; RunLock(sys.argv[1])\n"
            "child = os.fork()\nif child == 0: time.sleep(20)\nelse: print(child, flush=True); time.sleep(20)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    runs.RunLock(tmp_path).release()
    os.kill(child, signal.SIGKILL)


@posix
def test_full_disk_keeps_the_checkpoint_before(tmp_path):
    """The operating system refuses files above a size: the next checkpoint fails, says so, and leaves the last one whole."""
    code = """import resource, sys, torch; from framer import runs
with runs.open_run(sys.argv[1], dict(a=1)) as run:
    run.history.append(dict(step=1, loss=1.0)); run.save_checkpoint(1, dict(model=dict(w=torch.ones(10))))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    run.history.append(dict(step=2, loss=1.0)); run.save_checkpoint(2, dict(model=dict(w=torch.ones(10)), heads=dict(w=torch.ones(9000))))"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    said = out.stderr.strip().splitlines()[-1]
    assert out.returncode == 1 and "step-000002" in said and "step-000001 is complete" in said and "-p resume True" in said, said
    assert runs.checkpoint_steps(tmp_path) == [1] and runs.load_checkpoint(tmp_path).step == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001"]
    with runs.open_run(tmp_path, dict(a=1), resume=True, log=str) as run:
        assert run.start_step == 1 and [row["step"] for row in run.read_history()] == [1]


@pytest.mark.parametrize("failing", ["OSError", "SafetensorError", "state"])
def test_failing_writer(tmp_path, monkeypatch, failing):
    runs.save_checkpoint(tmp_path, 1, dict(model=dict(w=torch.ones(2))))
    def fail(*arguments, **options):
        raise (OSError(28, "No space left on device") if failing != "SafetensorError" else runs.SafetensorError("No space left on device"))
    monkeypatch.setattr(runs, "save_file" if failing != "state" else "_write_whole", fail)
    with pytest.raises(runs.CheckpointError, match="step-000002: .*No space left on device.*step-000001 is complete"):
        runs.save_checkpoint(tmp_path, 2, dict(model=dict(w=torch.ones(2))))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001"]
    monkeypatch.undo()
    monkeypatch.setattr(runs, "free_bytes", lambda path: 1000)
    with pytest.raises(runs.CheckpointError, match="the disk is full.* 1.0 kB are free"):
        runs.save_checkpoint(tmp_path, 2, dict(model=dict(w=torch.ones(2))))


def test_interrupted_replacement_gets_its_name_back(tmp_path):
    """Killed between the two renames of a checkpoint that replaces one of the same step."""
    path = runs.save_checkpoint(tmp_path, 1, dict(model=dict(w=torch.ones(2))))
    os.replace(path, path.with_name(".step-000001.old-7"))
    (tmp_path / "checkpoints" / ".step-000001.partial-7").mkdir()
    assert runs.clean_leftovers(tmp_path) == [".step-000001.partial-7"]
    assert runs.load_checkpoint(tmp_path).step == 1


def test_project_root_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.delenv("FRAMER_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert runs.project_root() == ROOT, "found from the package's own file"
    assert runs.run_path("sd2") == ROOT / "reports" / "sd2"
    monkeypatch.setenv("FRAMER_ROOT", str(tmp_path))
    assert runs.run_path("sd2") == tmp_path / "reports" / "sd2"


def test_read_only_folder(tmp_path):
    """Running as root, chmod stops nobody: skipped with a word."""
    folder = tmp_path / "reports"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere (root)")
    with pytest.raises(runs.RunError, match="cannot be written: Permission denied"):
        runs.open_run(folder / "sd2", {}, log=str)


def test_optimisers_and_schedulers_round_trip(tmp_path):
    """Every built-in kind of state, through a checkpoint on disk."""
    for name, options in dict(AdamW=dict(amsgrad=True), SGD=dict(momentum=0.9), Adam={}, RMSprop={}, NAdam={}).items():
        layer = torch.nn.Linear(3, 2)
        optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1, **options)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        plateau.step(1.0)
        (tensors, tree), (_, plan) = runs.pack_optimizer(optimizer), runs.pack_optimizer(plateau)
        runs.save_checkpoint(tmp_path / name, 1, dict(optimizer=tensors), dict(tree=tree, plan=plan))
        found = runs.load_checkpoint(tmp_path / name)
        again = getattr(torch.optim, name)(layer.parameters(), lr=0.5, **options)
        runs.unpack_optimizer(again, found.tensors["optimizer"], found.state["tree"])
        one, other = (json.dumps(runs.jsonable(item.state_dict())) for item in (optimizer, again))
        assert one == other, name
        assert runs.unpack_state({}, found.state["plan"]) == plateau.state_dict()
