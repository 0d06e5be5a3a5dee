"The lean form of FRAMER's loss against the reference, on models: gradients of every parameter, in every setting that training uses."
import gc
import os
import socket
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

diffusers = pytest.importorskip("diffusers")

from framer.distill import Framer, FramerConfig  # noqa: E402


class Block(nn.Module):
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(6, 6, 3, padding=1)
    def forward(self, x): return x + self.conv(x.tanh()).tanh()


def blocks(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *(Block() for _ in range(5)), nn.Conv2d(6, 3, 3, padding=1)).to(dtype)


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def sd3():
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=5, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=8, pooled_projection_dim=8, pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name: p.add_(0.3 * torch.randn_like(p))
    return model


def dit4sr():
    from framer.dit4sr import DiT4SRTransformer2DModel
    torch.manual_seed(0)
    model = DiT4SRTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=5, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=8, pooled_projection_dim=8, pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm")
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    return model


def call(model, make, seed=1, batch=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g).to(dtype)
    if make is blocks: return model(draw(batch, 3, 8, 8))
    x, text, pooled = draw(batch, 4, 8, 8), draw(batch, 3, 8), draw(batch, 8)
    common = dict(encoder_hidden_states=text, timestep=torch.full((batch,), 500))
    if make is unet: return model(x, **common).sample
    if make is dit4sr: return model(x, lr_latents=draw(batch, 4, 8, 8), pooled_projections=pooled, **common).sample
    return model(x, pooled_projections=pooled, **common).sample


MODELS = [blocks, unet, sd3, dit4sr]


def options(make): return dict(layers=[r"[1-5]"]) if make is blocks else {}


def run(make, implementation, prepare=lambda m: m, backward=None, steps=1, dtype=torch.float64, **config):
    "Gradients of all parameters, the model's and the heads', after `backward(noise, framer)`."
    model = prepare(make().to(dtype))
    with Framer.attach(model, FramerConfig(implementation=implementation, **config), **options(make)) as framer:
        framer.to(dtype)
        for s in range(steps):
            noise = call(model, make, seed=s + 1, dtype=dtype).square().mean()
            (backward or (lambda noise, framer: (noise + framer.loss()).backward()))(noise, framer)
        inner = getattr(model, "_orig_mod", model)
        found = {n: p.grad for n, p in [*inner.named_parameters(), *(("heads." + n, p) for n, p in framer.named_parameters())] if p.grad is not None}
        return found, framer.terms


def agree(a, b, bound=1e-10):
    (a, terms), (b, others) = a, b
    assert a.keys() == b.keys() and len(a) > 5
    size = max(float(x.norm()) for x in b.values())
    worst = max((float((a[n].double() - b[n].double()).norm()) / size, n) for n in a)
    assert worst[0] < bound, worst
    assert abs(terms.loss - others.loss) <= bound * abs(others.loss)
    for x, y in zip(terms.layers, others.layers, strict=True):
        assert (x.layer, x.negative) == (y.layer, y.negative)
        torch.testing.assert_close(x.loss, y.loss)


def both(make, bound=1e-10, **kw): agree(run(make, "lean", **kw), run(make, "reference", **kw), bound)


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_models(make): both(make)


@pytest.mark.parametrize("config", [dict(low="inter", faw_grad=False), dict(loss="mse"), dict(spectrum="magnitude"), dict(teacher="final-1"), dict(in_batch="student"), dict(frequency_split=False)], ids=str)
@pytest.mark.parametrize("make", [unet, dit4sr], ids=lambda m: m.__name__)
def test_configurations(make, config): both(make, **config)


@pytest.mark.parametrize("make", [unet, sd3, dit4sr], ids=lambda m: m.__name__)
def test_gradient_checkpointing(make):
    def on(model): model.enable_gradient_checkpointing(); return model
    both(make, prepare=on)
    agree(run(make, "lean", prepare=on), run(make, "lean"))


def test_ways_to_go_back():
    "FRAMER's loss alone; before and after the noise loss; twice through one graph; accumulated; not used; by torch.autograd.grad."
    def twice(noise, framer): loss = noise + framer.loss(); loss.backward(retain_graph=True); loss.backward()
    def apart(noise, framer): loss = framer.loss(); noise.backward(retain_graph=True); loss.backward()
    def other(noise, framer): loss = framer.loss(); loss.backward(retain_graph=True); noise.backward()
    def unused(noise, framer): framer.loss(); noise.backward()
    def alone(noise, framer): framer.loss().backward()
    for make in (blocks, unet, dit4sr):
        for way in (twice, apart, other, unused, alone): both(make, backward=way)
        both(make, steps=3)
    def by_grad(implementation):
        model = blocks()
        with Framer.attach(model, FramerConfig(implementation=implementation), **options(blocks)) as framer:
            noise = call(model, blocks).square().mean()
            loss = noise + framer.loss()
            return [*torch.autograd.grad(loss, [model[4].conv.weight], retain_graph=True), *torch.autograd.grad(noise, [model[1].conv.weight], retain_graph=True), *torch.autograd.grad(loss, list(model.parameters()))]
    for a, b in zip(by_grad("lean"), by_grad("reference"), strict=True): torch.testing.assert_close(a, b)


def test_spent_graph_and_detach():
    "A second backward pass through a freed graph fails as autograd's does; a detached FRAMER leaves the pass that is under way alone."
    model = blocks()
    with Framer.attach(model, **options(blocks)) as framer:
        loss = call(model, blocks).mean() + framer.loss(); loss.backward()
        with pytest.raises(RuntimeError, match="second time|already been freed"): loss.backward()
    def detached(noise, framer): loss = noise + framer.loss(); framer.detach(); loss.backward()
    both(blocks, backward=detached); both(unet, backward=detached)


def test_eval_and_no_grad():
    for make in (unet, dit4sr):
        model = make().double().eval()
        losses = []
        for implementation in ("lean", "reference"):
            with Framer.attach(model, FramerConfig(implementation=implementation, head_init="random"), **options(make)) as framer:
                framer.to(torch.float64)
                if framer.heads is not None:
                    for p in framer.parameters(): torch.nn.init.constant_(p, 0.1)
                with torch.no_grad(), framer.recording(): call(model, make)
                losses.append(framer.loss()); assert implementation == "reference" or not losses[-1].requires_grad or make is unet
        torch.testing.assert_close(*[x.detach() for x in losses])


@pytest.mark.parametrize("make", [unet, dit4sr], ids=lambda m: m.__name__)
def test_bf16_autocast_and_accelerate(make):
    accelerate = pytest.importorskip("accelerate")
    def one(implementation):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        model = make(); framer = Framer.attach(model, FramerConfig(implementation=implementation))
        optimizer = torch.optim.SGD([*model.parameters(), *framer.parameters()], 0.0)
        model, optimizer = accelerator.prepare(model, optimizer)
        for s in range(2):
            with accelerator.accumulate(model): accelerator.backward(call(model, make, seed=s, dtype=torch.float32).float().square().mean() + framer.loss())
        framer.detach()
        return {n: p.grad for n, p in [*accelerator.unwrap_model(model).named_parameters(), *framer.named_parameters()] if p.grad is not None}, framer.terms
    (a, s), (b, t) = one("lean"), one("reference")
    size = max(float(x.norm()) for x in b.values())
    assert a.keys() == b.keys() and max(float((a[n] - b[n]).norm()) for n in a) < 0.02 * size   # bfloat16 keeps 8 bits
    torch.testing.assert_close(s.loss, t.loss, rtol=2e-2, atol=1e-3)


def test_half_precision_weights():
    "Maps in bfloat16: gradients leave in bfloat16, rounded once."
    def scaled(noise, framer): (1024 * (noise + framer.loss())).backward()      # as a GradScaler does
    agree(run(blocks, "lean", dtype=torch.bfloat16, backward=scaled), run(blocks, "reference", dtype=torch.bfloat16, backward=scaled), 0.03)


@pytest.mark.parametrize("make, backend", [(sd3, "eager"), (blocks, "aot_eager")], ids=lambda m: getattr(m, "__name__", m))
def test_compiled_model(make, backend):
    import torch._dynamo
    torch._dynamo.reset()
    both(make, prepare=lambda m: torch.compile(m, backend=backend), dtype=torch.float32, bound=2e-5)
    torch._dynamo.reset()


def test_nothing_is_kept():
    "After the backward pass no map is alive, and the loss keeps nothing but maps until then."
    model = blocks()
    with Framer.attach(model, **options(blocks)) as framer:
        out = call(model, blocks); ref = weakref.ref(framer.recorder.features[2])
        loss = out.mean() + framer.loss(); loss.backward(); del out, loss; gc.collect()
        assert ref() is None


def test_one_gradient_at_a_time():
    "On the way down, each layer's gradient is made after the layer above has been through."
    model, events = blocks(), []
    with Framer.attach(model, FramerConfig(implementation="lean"), **options(blocks)) as framer:
        import framer.distill as d
        plain = d._Student.__call__
        def spy(self, scale, kept, into=None): events.append(("gradient", into is not None)); return plain(self, scale, kept, into)
        for k in range(1, 6): model[k].conv.weight.register_post_accumulate_grad_hook(lambda p, k=k: events.append(k))
        d._Student.__call__ = spy
        try: (call(model, blocks).mean() + framer.loss()).backward()
        finally: d._Student.__call__ = plain
    assert events == [5, ("gradient", True), 4, ("gradient", True), 3, ("gradient", True), 2, ("gradient", True), 1]


def worker(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = {}
        for make in (blocks, unet):
            for implementation in ("lean", "reference"):
                model = DistributedDataParallel(make().double())
                with Framer.attach(model, FramerConfig(implementation=implementation), **options(make)) as framer:
                    framer.to(torch.float64)
                    (call(model, make, seed=rank, batch=3 - rank).square().mean() + framer.loss()).backward()   # 3 and 2 images
                    found[make.__name__, implementation] = torch.cat([p.grad.flatten() for p in [*model.parameters(), *framer.parameters()]]), torch.stack([l.inter.mean() for l in framer.terms.layers])
        queue.put((rank, {k: tuple(x.tolist() for x in v) for k, v in found.items()}))
    finally: dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
def test_two_processes():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    context = mp.get_context("spawn"); queue = context.Queue()
    processes = [context.Process(target=worker, args=(r, port, queue)) for r in range(2)]
    for p in processes: p.start()
    try: found = dict(queue.get(timeout=120) for _ in processes)
    finally:
        for p in processes: p.join(20); p.kill() if p.is_alive() else None
    for name in ("blocks", "unet"):
        for rank in (0, 1):
            for a, b in zip(found[rank][name, "lean"], found[rank][name, "reference"]): torch.testing.assert_close(torch.tensor(a), torch.tensor(b))
        assert found[0][name, "lean"][0] == found[1][name, "lean"][0]   # ranks agree


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("make", [unet, sd3, dit4sr], ids=lambda m: m.__name__)
def test_shared_copies(make, checkpointing, monkeypatch):
    "As on a GPU, where autocast's normalisations run in float32: recording their copies changes no value, and is off where blocks are checkpointed, and for a U-Net."
    from framer import hooks
    from framer.roofline import gpu_casts
    def one(share):
        with monkeypatch.context() as m, gpu_casts():
            if not share: m.setattr(hooks.CallRecord, "share", lambda self, norm, args: None)
            model = make()
            if checkpointing: model.enable_gradient_checkpointing()
            with Framer.attach(model, FramerConfig()) as framer:
                with torch.autocast("cpu", torch.bfloat16): out = call(model, make, dtype=torch.float32)
                kinds = [f.dtype for f in framer.recorder.features]
                (out.float().square().mean() + framer.loss()).backward()
                return {n: p.grad for n, p in [*model.named_parameters(), *framer.named_parameters()] if p.grad is not None}, framer.terms, kinds
    (a, s, shared), (b, t, plain) = one(True), one(False)
    assert set(plain) == {torch.bfloat16} and (torch.float32 in shared) == (not checkpointing and make is not unet)
    size = max(float(x.norm()) for x in b.values())
    assert a.keys() == b.keys() and max(float((a[n] - b[n]).norm()) for n in a) < 1e-6 * size
    torch.testing.assert_close(s.loss, t.loss, rtol=1e-5, atol=1e-5)
