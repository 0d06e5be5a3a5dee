"Two CPU processes (gloo): in-batch negatives are gathered, and the heads stay equal on all ranks."
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from framer.distill import Framer, FramerConfig, distillation


def maps(rows, n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(6, 4, 8, 8, generator=g)
    return [(teacher * d + torch.randn(6, 4, 8, 8, generator=g))[rows] for d in torch.linspace(0, 2, n).tolist()]


class Net(nn.Module):
    "Two widths and two sizes, so that there are heads."
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 8, 3, padding=1))])

    def forward(self, x):
        for layer in self.layers: x = layer(x).tanh()
        return x


def worker(rank, port, rows, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        gathered = distillation(maps(rows[rank]), negatives=[1, 2, 1])
        alone = distillation(maps(rows[rank]), FramerConfig(gather=False), negatives=[1, 2, 1])
        torch.manual_seed(0)
        model = DistributedDataParallel(Net())
        torch.manual_seed(100 + rank)  # heads drawn at random would differ between ranks
        framer = Framer.attach(model, layers=[r"layers\.\d"])
        optimizer = torch.optim.AdamW([*model.parameters(), *framer.parameters()], lr=1e-2)
        grads = []
        for step in range(3):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank))
            loss = model(x).square().mean() + framer.loss()
            optimizer.zero_grad(); loss.backward()
            grads.append(framer.heads.projections[0].weight.grad.clone()); optimizer.step()
        result = dict(gathered=[l.inter.tolist() for l in gathered.layers], alone=[l.inter.tolist() for l in alone.layers],
                      heads=torch.cat([p.detach().flatten() for p in framer.parameters()]).tolist(), model=torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
                      grads=torch.stack(grads).flatten().tolist(), negatives=[l.negative for l in framer.terms.layers])
        framer.detach()
        queue.put((rank, result))
    finally: dist.destroy_process_group()


def run(rows):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(r, port, rows, queue)) for r in range(2)]
    for p in processes: p.start()
    try: results = dict(queue.get(timeout=120) for _ in processes)
    finally:
        for p in processes: p.join(20); p.kill() if p.is_alive() else None
    return results[0], results[1]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("rows", [(slice(0, 3), slice(3, 6)), (slice(0, 1), slice(1, 6))], ids=["equal", "uneven"])
def test_two_processes(rows):
    a, b = run(rows)
    whole = distillation(maps(slice(0, 6)), negatives=[1, 2, 1])
    for k, layer in enumerate(whole.layers):
        torch.testing.assert_close(torch.tensor(a["gathered"][k] + b["gathered"][k]), layer.inter)  # two ranks together are one batch
    assert a["alone"] != a["gathered"]
    assert a["heads"] == b["heads"] and a["grads"] == b["grads"] and any(a["grads"])
    assert a["model"] == b["model"] and a["negatives"] == b["negatives"]
