"""What FRAMER adds to a training step: time and memory beside the baseline, and beside a plain implementation of the equations.

    python benchmarks/cost.py gpu --budget 540     DiT4SR and PiSA-SR at true size, the paper's setting first  -> reports/cost/gpu.json
    python benchmarks/cost.py cpu                  tiny models                                                 -> reports/cost/cpu.json
    python benchmarks/cost.py growth               batch, layers, resolution; two processes                    -> reports/cost/growth/<device>.json
    python benchmarks/cost.py count                true size, counted without a GPU, not measured      -> reports/cost/roofline/h200.json
    python benchmarks/cost.py smoke --out DIR      one tiny row, few steps

The three contestants alternate within one run. A file is written after each row, so a run may be stopped, or stop itself when --budget seconds are nearly
spent; the same command goes on with the rows that are missing. Rows for which memory does not suffice say so. The logic is in framer/cost.py and framer/roofline.py.
"""
import argparse, json, math, os, statistics, sys, time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # threads that wait do not spin, so that processor time counts work
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch


def plain(maps, teacher, negatives, config):
    """FRAMER's loss (Eq. 1 to 10) as it is printed: for every layer and band a full FFT, a mask, and the inverse FFT; similarities on the band-passed maps. No half
    spectra, no shared transforms, no Parseval. Teacher and negatives are constants, and the gates carry no gradient."""
    students = [i for i in range(len(maps)) if i != teacher]
    h, w = maps[0].shape[-2:]
    u, v = (torch.fft.fftfreq(n, device=maps[0].device) * 2 for n in (h, w))
    low = torch.hypot(u[:, None], v[None, :]) <= config.radius + 1e-6
    masks = (low.float(), (~low).float())

    def band(f, mask): return torch.fft.ifft2(torch.fft.fft2(f.float()) * mask).real.flatten(1)
    def strength(f, mask): return (torch.fft.fft2(f.float(), norm="ortho").abs() * mask).sum((1, 2, 3)) / (f.shape[1] * mask.sum() + config.eps)
    def cosine(a, b): return torch.nn.functional.cosine_similarity(a, b, dim=1)

    total = 0.0
    with torch.autocast(maps[0].device.type, enabled=False):
        for i, j in zip(students, negatives):
            student, target, other = maps[i], maps[teacher].detach(), maps[j].detach()
            losses, gates, differences = [], [], []
            for mask, kind in zip(masks, ("intra", "inter")):
                s, t, n = band(student, mask), band(target, mask), band(other, mask)
                plus, minus = cosine(s, t), cosine(s, n)
                scores = [plus, minus]
                if kind == "inter": scores += [cosine(s, t.roll(k, 0)) for k in range(1, len(s))]   # the teacher's maps of the other images
                losses.append(torch.logsumexp(torch.stack(scores), 0) - plus)
                gates.append(plus.detach().clamp(min=0))
                e = strength(student, mask) if config.faw_grad else strength(student.detach(), mask)
                differences.append((strength(target, mask) - e).abs() / (e + config.eps))
            weights = torch.softmax(torch.stack(differences), 0)
            total = total + sum(x * g * l for x, g, l in zip(weights, gates, losses)).mean()
    return config.weight * total


def gather_worker(rank, port, sizes, out):
    "One of two processes: seconds to gather the teacher's maps, by their bytes."
    import torch.distributed as dist
    from framer.distill import _gather
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1); dist.init_process_group("gloo")
    rows = []
    for n in sizes:
        x = torch.randn(4, n // 16)
        _gather(x)
        spent = []
        for _ in range(7):
            dist.barrier(); wall, cpu = time.perf_counter(), time.process_time(); _gather(x)
            spent.append((time.perf_counter() - wall, time.process_time() - cpu))
        rows.append(dict(bytes=n, wall_seconds=statistics.median(s[0] for s in spent), processor_seconds=statistics.median(s[1] for s in spent)))
    if rank == 0: Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def growth(args):
    "Measured points, a fitted model and its error, and what a gather costs between two processes."
    import socket, tempfile
    from framer.cost import fit_growth, growth_points, loss_seconds
    from framer.runs import environment, write_json
    points = []
    for p in growth_points():
        points.append(dict(p, seconds=loss_seconds(**p, device=args.device, rounds=args.rounds))); print(points[-1], flush=True)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gather.json"
        torch.multiprocessing.spawn(gather_worker, (port, [2**20, 2**22, 2**24], str(file)), nprocs=2)
        gathered = json.loads(file.read_text())
    where = environment()
    args.out.joinpath("growth").mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"growth/{args.device}.json", dict(kind="growth", hardware=where["hardware"], versions=where["versions"], commit=(where["git"] or {}).get("commit"), date=where["date"],
               command=where["command"], clock="processor" if args.device == "cpu" else "wall", points=points, fit=fit_growth(points), gather=dict(processes=2, backend="gloo", rows=gathered)))
    print("wrote", args.out / f"growth/{args.device}.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("gpu", "cpu", "growth", "count", "smoke"))
    parser.add_argument("--out", type=Path, default=ROOT / "reports/cost", help="folder for the results")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; no row is begun that is likely to end later")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each contestant")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda for gpu, else cpu")
    args = parser.parse_args()
    if args.rounds < 1 or args.warmup < 1: parser.error("--rounds and --warmup: expected 1 or more")
    if args.budget <= 0: parser.error(f"--budget {args.budget}: expected seconds above 0")
    args.out, args.device = args.out.resolve(), args.device or ("cuda" if args.command == "gpu" else "cpu")
    if args.device == "cpu": torch.set_num_threads(1)
    if args.command == "growth": return growth(args)
    if args.command == "count":
        from framer.roofline import count_file
        count_file(args.out / "roofline/h200.json", plain, log=lambda *a: print(*a, flush=True))
        return print("wrote", args.out / "roofline/h200.json")
    from framer.cost import run_plan
    try: left = run_plan(args.out / f"{args.command}.json", args.command, args.device, plain, args.budget, args.rounds, args.warmup, log=lambda *a: print(*a, flush=True))
    except RuntimeError as error:
        if "no CUDA device" not in str(error): raise
        raise SystemExit(f"{error}; `cpu` and `growth` run everywhere.") from None
    print("wrote", args.out / f"{args.command}.json", f"- {left} rows are still missing: run the same command again" if left else "- complete")


if __name__ == "__main__":
    main()
