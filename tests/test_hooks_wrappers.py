"Hooks under torch.compile, DDP, accelerate, PEFT, gradient checkpointing and exceptions; afterwards the model is what it was."
import functools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

diffusers = pytest.importorskip("diffusers")

from framer.hooks import Recorder, find_taps, hooks_left, unwrap  # noqa: E402


def tiny_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def tiny_sd3(layers=2):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=8, pooled_projection_dim=8, pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name: p.add_(0.3 * torch.randn_like(p))  # else every block is almost an identity
    return model


def inputs(model, h=8, w=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, text, pooled = torch.randn(2, 4, h, w, generator=g), torch.randn(2, 3, 8, generator=g), torch.randn(2, 8, generator=g)
    common = dict(encoder_hidden_states=text, timestep=torch.tensor([500, 500]))
    return dict(hidden_states=x, pooled_projections=pooled, **common) if hasattr(unwrap(model), "transformer_blocks") else dict(sample=x, **common)


def recorded(model, **size):
    "Features of one call of a model without any wrapping."
    with Recorder(model, find_taps(model)) as r:
        model(**inputs(model, **size))
        return [f.detach().clone() for f in r.features]


def assert_equal(features, expected, **tolerance):
    assert len(features) == len(expected)
    for f, e in zip(features, expected): torch.testing.assert_close(f, e, **tolerance)


both = pytest.mark.parametrize("make", [tiny_unet, tiny_sd3])


@pytest.fixture
def dynamo():
    import torch._dynamo
    from torch._dynamo.utils import counters
    torch._dynamo.reset(); counters.clear()
    yield counters
    torch._dynamo.reset(); counters.clear()


@pytest.mark.parametrize("make, how, when", [(tiny_sd3, "wrap", "after"), (tiny_sd3, "inplace", "after"), (tiny_sd3, "inplace", "before"), (tiny_unet, "wrap", "before")])
def test_compile(dynamo, make, how, when):
    model = make(); expected = recorded(model)
    compiled = torch.compile(model, backend="eager") if how == "wrap" else model
    if how == "inplace": model.compile(backend="eager")
    call = lambda: compiled(**inputs(model)).sample
    if when == "after": call()  # hooks that come later are not in this code
    dynamo.clear()
    recorder = Recorder(compiled, find_taps(compiled))
    for _ in range(3):
        call(); assert_equal(recorder.features, expected, atol=1e-5, rtol=1e-4); recorder.clear()
    assert dynamo["stats"]["unique_graphs"] == 1 and not dynamo["graph_break"]
    call(); recorder.features[0].sum().backward()
    recorder.clear(); model.eval(); call()
    with pytest.raises(RuntimeError, match="eval mode"): recorder.features
    with recorder.recording(), torch.no_grad(): call()
    assert_equal(recorder.features, expected, atol=1e-5, rtol=1e-4)
    recorder.remove(); model.train(); call()
    assert recorder.done is None and recorder.open is None and hooks_left(model, everyone=True) == 0  # compiled code has forgotten it too


def test_compiled_blocks_and_sizes(dynamo):
    "Blocks compiled one by one, each with its own hook; then other image sizes."
    model = tiny_sd3(10)
    expected = {s: recorded(model, h=s[0], w=s[1]) for s in [(8, 8), (12, 8)]}
    for block in model.transformer_blocks: block.compile(backend="eager")
    model(**inputs(model))
    with Recorder(model, find_taps(model)) as r:
        for (h, w), e in expected.items():
            model(**inputs(model, h=h, w=w)); assert_equal(r.features, e, atol=1e-4, rtol=1e-3); r.clear()


def test_compile_other_sizes(dynamo):
    model = tiny_sd3(2)
    expected = {s: recorded(model, h=s[0], w=s[1]) for s in [(8, 8), (12, 8), (4, 16)]}
    compiled = torch.compile(model, backend="eager")
    with Recorder(compiled, find_taps(compiled)) as r:
        for (h, w), e in expected.items():
            compiled(**inputs(model, h=h, w=w)); assert_equal(r.features, e, atol=1e-5, rtol=1e-4); r.clear()


@both
def test_checkpointing(make):
    "Every block runs twice and is recorded once; gradients through the recorded maps are equal."
    def run(checkpointing):
        model, runs = make(), []
        if checkpointing: model.enable_gradient_checkpointing()
        first = find_taps(model).modules[0] if make is tiny_sd3 else model.down_blocks[0].resnets[0]
        first.register_forward_pre_hook(lambda *a: runs.append(1))
        with Recorder(model, find_taps(model)) as r:
            out = model(**inputs(model)).sample
            maps = r.features; n = len(r.done)
            (out.square().mean() + sum((i + 1) * m.square().mean() for i, m in enumerate(maps))).backward()
            assert len(r.done) == n == len(maps) and all(a is b for a, b in zip(maps, r.features))
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(runs)
    (plain, once), (again, twice) = run(False), run(True)
    assert (once, twice) == (1, 2)
    assert plain.keys() == again.keys()
    for n in plain: torch.testing.assert_close(plain[n], again[n], msg=n)


def test_whole_model_checkpointed():
    "The model runs again during backward: the maps that the loss was made of stay."
    model = tiny_sd3(); x = inputs(model)
    with Recorder(model, find_taps(model)) as r:
        out = checkpoint(lambda: model(**x).sample, use_reentrant=False)
        maps = r.features
        out.sum().backward()
        assert all(a is b for a, b in zip(maps, r.features))


def test_reentrant_checkpointing_is_refused():
    model = tiny_sd3(); model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))
    with Recorder(model, find_taps(model)) as r:
        with pytest.raises(RuntimeError, match="use_reentrant=False"): model(**inputs(model))
        assert r.open is None and r.done is None


@both
def test_exceptions(make):
    "In a layer, after the last layer, and in another hook: nothing half recorded, and the next call works."
    model = make(); expected = recorded(model)
    keys, before = list(model.state_dict()), model(**inputs(model)).sample
    recorder = Recorder(model, find_taps(model))
    last = model.conv_out if make is tiny_unet else model.proj_out
    for place in (recorder.taps.modules[1], last, model):
        model(**inputs(model))
        def fail(*args): raise OSError("broken")
        fault = place.register_forward_hook(fail, prepend=True)
        with pytest.raises(OSError, match="broken"): model(**inputs(model))
        assert recorder.open is None and recorder.done is None
        with pytest.raises(RuntimeError, match="did not finish"): recorder.features
        fault.remove()
        model(**inputs(model)); assert_equal(recorder.features, expected, atol=0, rtol=0)
    fault = last.register_forward_hook(fail)
    with pytest.raises(OSError): model(**inputs(model))
    recorder.remove(); fault.remove()
    assert hooks_left(model, everyone=True) == 0
    for m in model.modules():
        assert not m._forward_hooks_with_kwargs and not m._forward_hooks_always_called and not m._forward_pre_hooks_with_kwargs
    assert list(model.state_dict()) == keys and torch.equal(model(**inputs(model)).sample, before)


@both
def test_outputs_and_gradients_are_untouched(make):
    "Recording changes no bit of the output or of the gradients, during and after."
    def run(attach):
        model = make(); r = Recorder(model, find_taps(model)) if attach else None
        out = model(**inputs(model)).sample; out.square().mean().backward()
        result = [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        if attach: assert list(model.state_dict()) == list(make().state_dict()); r.remove()
        return result
    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@both
def test_references_are_freed(make):
    import gc, weakref
    model = make()
    with Recorder(model, find_taps(model)) as r:
        model(**inputs(model))
        ref = weakref.ref(r.features[0]); r.clear(); gc.collect()
        assert ref() is None
        model(**inputs(model)); ref = weakref.ref(r.features[0])
    gc.collect(); assert ref() is None


def test_accelerate_prepare():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = tiny_unet()
    before = Recorder(model, find_taps(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    after = Recorder(wrapped, find_taps(wrapped))
    out = wrapped(**inputs(model)).sample
    assert out.dtype == torch.float32  # accelerate converts the output, not the maps
    assert {f.dtype for f in before.features} == {torch.bfloat16}
    assert all(a is b for a, b in zip(before.features, after.features))
    accelerator.backward(out.mean() + sum(f.float().mean() for f in after.features)); optimizer.step()
    before.remove(); after.remove()
    assert hooks_left(unwrap(wrapped), everyone=True) == 0


def test_accelerate_compiled_regions(dynamo):
    utils = pytest.importorskip("accelerate.utils")
    if not hasattr(utils, "compile_regions"): pytest.skip("this accelerate has no compile_regions")
    model = tiny_sd3(); expected = recorded(model)
    compiled = utils.compile_regions(model, backend="eager"); compiled(**inputs(model))
    with Recorder(compiled, find_taps(compiled)) as r:
        compiled(**inputs(model)); assert_equal(r.features, expected, atol=1e-5, rtol=1e-4)
        assert r.taps.table()[0]["kind"] == "JointTransformerBlock"


def test_peft():
    peft = pytest.importorskip("peft")
    model = tiny_unet(); names, expected = find_taps(model).names, recorded(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]))
    taps = find_taps(wrapped)
    assert taps.names == names and unwrap(wrapped) is model
    with Recorder(wrapped, taps) as r:
        wrapped(**inputs(model)); assert_equal(r.features, expected)  # B is zero at first
        r.features[2].sum().backward()
    assert any(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


def ddp_worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        model = tiny_sd3(2); x = inputs(model, seed=10 + rank)
        early = Recorder(model, find_taps(model))  # before wrapping
        with torch.no_grad(): alone = model(**x).sample
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        recorder = Recorder(ddp, find_taps(ddp))  # and after
        for _ in range(2):
            recorder.clear(); ddp.zero_grad()
            out = ddp(**x).sample; maps = recorder.features
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(maps, early.features, strict=True))
            (out.mean() + sum(m.square().mean() for m in maps)).backward()
        ddp.eval()
        with recorder.recording(), torch.no_grad(): ddp(**x)
        assert torch.equal(out.detach(), alone) and all(torch.equal(a, b) for a, b in zip(maps, recorder.features))
        early.remove(); recorder.remove()
        assert hooks_left(ddp.module, everyone=True) == 0 and list(ddp.module.state_dict()) == list(tiny_sd3(2).state_dict())
        torch.save(dict(maps=[m.detach() for m in maps], grad=model.transformer_blocks[0].attn.to_q.weight.grad), f"{folder}/{rank}.pt")
    finally: dist.destroy_process_group()


def test_ddp(tmp_path):
    "Each rank records its own images; gradients that come through the maps are averaged like all others."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    mp.spawn(ddp_worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert not torch.equal(first["maps"][0], second["maps"][0]) and torch.equal(first["grad"], second["grad"])
    model, grads = tiny_sd3(2), []
    for rank, result in enumerate((first, second)):
        model.zero_grad()
        with Recorder(model, find_taps(model)) as r:
            out = model(**inputs(model, seed=10 + rank)).sample
            assert_equal(result["maps"], [f.detach() for f in r.features])
            (out.mean() + sum(m.square().mean() for m in r.features)).backward()
        grads.append(model.transformer_blocks[0].attn.to_q.weight.grad.clone())
    torch.testing.assert_close(first["grad"], (grads[0] + grads[1]) / 2)


def test_attention_types():
    "One layer per resnet in other U-Nets of diffusers too; a U-Net without attention; a deeper one."
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=(1, 2, 1), block_out_channels=(8, 8, 16), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8, mid_block_type="UNetMidBlock2D",
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "UpBlock2D"))
    with Recorder(model, find_taps(model)) as r:
        model(**inputs(model))
        assert [f.shape[1] for f in r.features] == r.taps.channels
    assert len(r.taps.names) == 4 + 1 + 7 and r.taps.names[-1] == "up_blocks.2.resnets.1"
