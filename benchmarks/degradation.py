"""framer's degradation beside BasicSR's: the same pixels for the same draw, the same distributions, and how long both take.

    python benchmarks/degradation.py parity     operation by operation, whole pipeline, and 2,000 drawn samples -> reports/degradation/parity.json
    python benchmarks/degradation.py speed      512 x 512, one thread and two, alternated                       -> reports/degradation/speed.json
    python benchmarks/degradation.py batch      degrade_batch, --device cpu or cuda                             -> reports/degradation/batch-<device>.json

BasicSR 1.4.2 is installed into an environment of its own below --cache: its source distribution is unpacked there, because its setup.py fails with
current setuptools, and `torchvision.transforms.functional_tensor`, which it imports and torchvision has dropped, is put in its place before the import.
Nothing of BasicSR is needed or touched by framer itself. `parity` may be interrupted: samples that are done are kept below --cache.
"""
import argparse, concurrent.futures, contextlib, hashlib, inspect, json, math, os, random, re, subprocess, sys, tarfile, tempfile, time, types, urllib.parse, urllib.request, venv
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
VERSION, SHA256 = "1.4.2", "b89b595a87ef964cda9913b4d99380ddb6554c965577c0c10cb7b78e31301e87"
NEEDS = "addict future lmdb opencv-python-headless pyyaml requests scikit-image scipy tqdm yapf".split()  # what BasicSR imports, beside torch and torchvision
BOUND = 1 / 255
OPTIONS = dict(  # BasicSR's names for the entries of Table 6
    scale=4, gt_size=128, use_hflip=False, use_rot=False, io_backend=dict(type="disk"), high_order_degradation=True,
    kernel_list=["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"], kernel_prob=[0.45, 0.25, 0.12, 0.03, 0.12, 0.03],
    kernel_list2=["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"], kernel_prob2=[0.45, 0.25, 0.12, 0.03, 0.12, 0.03],
    blur_kernel_size=21, blur_sigma=[0.2, 3], betag_range=[0.5, 4], betap_range=[1, 2], sinc_prob=0.1,
    blur_kernel_size2=11, blur_sigma2=[0.2, 1.5], betag_range2=[0.5, 4], betap_range2=[1, 2], sinc_prob2=0.1, final_sinc_prob=0.8,
    resize_prob=[0.2, 0.7, 0.1], resize_range=[0.15, 1.5], gaussian_noise_prob=0.5, noise_range=[1, 30], poisson_scale_range=[0.05, 3], gray_noise_prob=0.4, jpeg_range=[30, 95],
    second_blur_prob=0.8, resize_prob2=[0.3, 0.4, 0.3], resize_range2=[0.3, 1.2], gaussian_noise_prob2=0.5, noise_range2=[1, 25], poisson_scale_range2=[0.05, 2.5],
    gray_noise_prob2=0.4, jpeg_range2=[30, 95],
)


# -- BasicSR in an environment of its own (runs with the standard library alone)

def fetch_sdist(folder: Path) -> Path:
    "BasicSR's source distribution, from the package index that pip uses, checked against its known hash."
    file = folder / f"basicsr-{VERSION}.tar.gz"
    if not file.exists():
        index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/basicsr/"
        try:
            page = urllib.request.urlopen(index, timeout=60).read().decode()
            link = re.search(rf'href="([^"]*/{re.escape(file.name)}[^"]*)"', page)[1]
            content = urllib.request.urlopen(urllib.parse.urljoin(index, link), timeout=120).read()
        except (OSError, TypeError) as error:
            raise SystemExit(f"cannot fetch {file.name} from {index}: {error}. Put the file at {file} by hand, or set PIP_INDEX_URL.")
        aside = file.with_suffix(".part"); aside.write_bytes(content); aside.replace(file)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256: raise SystemExit(f"{file} has sha256 {found}: expected {SHA256}. Remove it and try again.")
    return file


def environment_python(cache: Path) -> Path:
    "The interpreter of an environment with BasicSR; made once. torch and the rest of this environment are seen from there, nothing is changed here."
    cache.mkdir(parents=True, exist_ok=True)
    home = cache / "environment"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (home / "ready").exists(): return python
    venv.create(home, with_pip=True, clear=True)
    ask = lambda code: subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    site = Path(ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
    here = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (site / "outer.pth").write_text("\n".join([*here, str(ROOT)]) + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS], check=True)
    with tarfile.open(fetch_sdist(cache)) as archive:
        for member in archive.getmembers():
            inside = Path(*Path(member.name).parts[1:])
            if member.isfile() and inside.parts[:1] == ("basicsr",) and ".." not in inside.parts:
                (site / inside).parent.mkdir(parents=True, exist_ok=True); (site / inside).write_bytes(archive.extractfile(member).read())
    (home / "ready").write_text("ok\n")
    return python


def load_basicsr():
    "BasicSR's modules, with the module that torchvision dropped put in its place."
    from torchvision.transforms.functional import rgb_to_grayscale
    shim = types.ModuleType("torchvision.transforms.functional_tensor"); shim.rgb_to_grayscale = rgb_to_grayscale
    sys.modules[shim.__name__] = shim
    import basicsr
    from basicsr.data import degradations
    from basicsr.data.realesrgan_dataset import RealESRGANDataset
    from basicsr.models.realesrgan_model import RealESRGANModel
    from basicsr.utils import DiffJPEG, USMSharp
    from basicsr.utils.img_process_util import filter2D
    from basicsr.utils.matlab_functions import imresize
    assert basicsr.__version__ == VERSION
    return types.SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("shim", "rgb_to_grayscale")}, jpeger=DiffJPEG(differentiable=False), usm=USMSharp())


# -- BasicSR's operations with the numbers of a framer Draw

def their_kernel(b, kernel):
    "The drawn kernel from BasicSR's functions, padded to 21 x 21, (1, 21, 21) float32."
    import numpy as np, torch
    d, k = b.degradations, kernel
    if k.kind == "sinc": values = d.circular_lowpass_kernel(k.cutoff, k.size)
    elif k.kind in ("iso", "aniso"): values = d.bivariate_Gaussian(k.size, k.sigma_x, k.sigma_y, k.angle, isotropic=k.kind == "iso")
    elif k.kind.startswith("gener"): values = d.bivariate_generalized_Gaussian(k.size, k.sigma_x, k.sigma_y, k.angle, k.beta, isotropic=k.kind.endswith("_iso"))
    else: values = d.bivariate_plateau(k.size, k.sigma_x, k.sigma_y, k.angle, k.beta, isotropic=k.kind.endswith("_iso"))
    pad = (21 - k.size) // 2
    return torch.FloatTensor(np.pad(values, pad))[None]


@contextlib.contextmanager
def fed(noise, gray: bool, seed: int):
    "While BasicSR draws noise, it gets framer's: normal numbers as they are, Poisson counts by scipy's quantile function from the same words."
    import numpy as np, torch
    from scipy.stats import poisson
    from framer.degradation import random_words, standard_normal
    calls = []
    def normal(*size, **_):
        calls.append(1)
        if gray: return standard_normal((1, *size[-2:]), seed)[0] if len(calls) == 1 else torch.zeros(*size)
        return standard_normal(size[-3:], seed)[None]
    def counts(rate, **_):
        calls.append(1)
        if gray and len(calls) > 1: return rate
        words = random_words(rate.numel(), seed).flatten()[: rate.numel()].double().numpy()
        exact = (rate.double() * 255).round().flatten().numpy() / 255   # level / 255 times a power of two, which float32 has rounded
        return torch.from_numpy(poisson.ppf((words + 0.5) / 2**32, exact).astype(np.float32)).reshape(rate.shape)
    with mock.patch.object(torch, "randn", normal) if noise == "gaussian" else mock.patch.object(torch, "poisson", counts):
        yield


def their_noise(b, image, draw, feed: bool):
    "BasicSR's noise on (1, 3, H, W)."
    import torch
    if draw.noise == "none": return image
    add, name = (b.degradations.add_gaussian_noise_pt, "sigma") if draw.noise == "gaussian" else (b.degradations.add_poisson_noise_pt, "scale")
    with fed(draw.noise, draw.gray, draw.noise_seed) if feed else contextlib.nullcontext():
        return add(image, **{name: torch.tensor([draw.strength], dtype=torch.float32)}, gray_noise=torch.tensor([float(draw.gray)]), clip=True, rounds=False)


def their_jpeg(b, image, quality):
    import torch
    return b.jpeger(image.clamp(0, 1), quality=torch.tensor([quality], dtype=torch.float32))


def their_pipeline(b, hr, draw, feed: bool = False, scale: int = 4):
    "BasicSR's operations on (1, 3, H, W), in the order of its RealESRGANModel.feed_data, with the numbers of `draw`."
    import torch
    import torch.nn.functional as F
    small = tuple(side // scale for side in hr.shape[2:])
    target = b.usm(hr)
    out = b.filter2D(target, their_kernel(b, draw.first.kernel))
    out = F.interpolate(out, scale_factor=draw.first.factor, mode=draw.first.mode)
    out = their_jpeg(b, their_noise(b, out, draw.first, feed), draw.first.quality)
    if draw.second.kernel is not None: out = b.filter2D(out, their_kernel(b, draw.second.kernel))
    out = F.interpolate(out, size=tuple(int(s * draw.second.factor) for s in small), mode=draw.second.mode)
    out = their_noise(b, out, draw.second, feed)
    pulse = torch.zeros(1, 21, 21); pulse[0, 10, 10] = 1   # "no sinc" is a kernel of one pixel there
    ring = pulse if draw.sinc is None else their_kernel(b, draw.sinc)
    if draw.jpeg_first:
        out = b.filter2D(F.interpolate(their_jpeg(b, out, draw.second.quality), size=small, mode=draw.mode), ring)
    else:
        out = their_jpeg(b, b.filter2D(F.interpolate(out, size=small, mode=draw.mode), ring), draw.second.quality)
    return target, torch.clamp((out * 255.0).round(), 0, 255) / 255.0


# -- photographs

def photographs():
    "The bundled photographs as (3, H, W) uint8 tensors."
    import numpy as np, torch
    from PIL import Image
    found = []
    for path in sorted((ROOT / "data/photographs").rglob("*.jpg")):
        with Image.open(path) as file: found.append(torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1))
    return found


def crop_of(pictures, index: int, size: int):
    "A crop (3, size, size) in [0, 1] that depends on the index alone."
    import torch
    from framer.degradation import sample_generator
    picture, generator = pictures[index % len(pictures)], sample_generator(index, size, stream="benchmark")
    y, x = (int(torch.randint(side - size + 1, (), generator=generator)) for side in picture.shape[1:])
    return picture[:, y : y + size, x : x + size].float() / 255


# -- parity

class Row:
    "Differences of one operation, collected over many inputs."

    def __init__(self, operation, ours, theirs):
        self.about, self.max, self.sum, self.over, self.count, self.cases, self.beyond = dict(operation=operation, ours=ours, theirs=theirs), 0.0, 0.0, 0, 0, 0, 0

    def add(self, ours, theirs, unit=1.0):
        off = (ours.double() - theirs.double()).abs() * unit
        self.max, self.sum, self.count, self.cases = max(self.max, float(off.max())), self.sum + float(off.sum()), self.count + off.numel(), self.cases + 1
        beyond = int((off > BOUND + 1e-9).sum()); self.over += beyond; self.beyond += beyond > 0

    def record(self):
        return dict(**self.about, cases=self.cases, max=self.max, mean=self.sum / self.count, share_over_bound=self.over / self.count, cases_over_bound=self.beyond, within_bound=self.max <= BOUND + 1e-9)


def operations(b, pictures, cases: int):
    "Every operation with the same drawn numbers: rows of pixel differences in [0, 1]."
    import cv2, numpy as np, torch
    import torch.nn.functional as F
    from framer.degradation import MODES, PRESETS, add_gaussian_noise, add_poisson_noise, draw_degradation, draw_kernel, resize, sample_generator
    from framer.jpeg import jpeg_codec, jpeg_float, jpeg_tensor
    from framer.kernels import KINDS, blur, kernel_values, sharpen
    preset, rows = PRESETS["seesr_strong"], []
    pick = lambda i: crop_of(pictures, i, 160)
    for kind in (*KINDS, "sinc"):
        stage = replace(preset.first, sinc_prob=float(kind == "sinc"))
        only = replace(preset, kinds=(kind,) if kind in KINDS else KINDS, kind_prob=(1.0,) if kind in KINDS else preset.kind_prob)
        values, blurred = Row(f"kernel {kind}", "kernel_values", "bivariate_* / circular_lowpass_kernel"), Row(f"blur {kind}", "blur", "filter2D")
        for i in range(cases):
            kernel = draw_kernel(stage, only, sample_generator(i, stream=kind)); theirs = their_kernel(b, kernel); pad = (21 - kernel.size) // 2
            values.add(F.pad(kernel_values(kernel), (pad,) * 4), theirs[0]); blurred.add(blur(pick(i), kernel_values(kernel)), b.filter2D(pick(i)[None], theirs)[0])
        rows += [values, blurred]
    for mode in MODES:
        for name, (low, high) in (("down", (0.15, 1.0)), ("up", (1.0, 1.5))):
            row = Row(f"resize {mode} {name}", "resize", "F.interpolate")
            for i in range(cases):
                factor = low + (high - low) * float(torch.rand((), generator=sample_generator(i, stream="factor"), dtype=torch.float64))
                row.add(resize(pick(i), tuple(int(160 * factor) for _ in "yx"), mode, factor=factor), F.interpolate(pick(i)[None], scale_factor=factor, mode=mode)[0])
            rows.append(row)
    row = Row("resize bicubic x1/4, antialiased", "resize(antialias=True)", "imresize")
    for i in range(min(cases, 16)): row.add(resize(pick(i), (40, 40), "bicubic", antialias=True), b.imresize(pick(i), 0.25))
    rows.append(row)
    draws = [draw_degradation(preset, (160, 160), sample_generator(i, stream="noise")).first for i in range(cases)]
    for noise, ours in (("gaussian", add_gaussian_noise), ("poisson", add_poisson_noise)):
        for gray in (False, True):
            row = Row(f"{noise} noise{', gray' if gray else ''}", ours.__name__, ours.__name__ + "_pt, fed the same random numbers")
            for i, d in enumerate(draws):
                strength = getattr(preset.first, noise)[0] + (getattr(preset.first, noise)[1] - getattr(preset.first, noise)[0]) * i / cases
                d = replace(d, noise=noise, gray=gray, strength=strength)
                row.add(ours(pick(i), d.strength, gray, d.noise_seed), their_noise(b, pick(i)[None], d, True)[0])
            rows.append(row)
    diff, codec, tensor = Row("JPEG, float", "jpeg_float", "DiffJPEG"), Row("JPEG, codec", "jpeg_codec (Pillow)", "cv2.imencode, whole quality"), Row("JPEG, tensor", "jpeg_tensor", "jpeg_codec (Pillow)")
    for i, d in enumerate(draws):
        diff.add(jpeg_float(pick(i)[None], d.quality), their_jpeg(b, pick(i)[None], d.quality))
        levels = (pick(i) * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
        decoded = cv2.imdecode(cv2.imencode(".jpg", np.ascontiguousarray(levels), [cv2.IMWRITE_JPEG_QUALITY, round(d.quality)])[1], 1)[..., ::-1]
        codec.add(jpeg_codec(pick(i), d.quality), torch.from_numpy(decoded.copy()).permute(2, 0, 1) / 255)
        tensor.add(jpeg_tensor(pick(i)[None], d.quality)[0], jpeg_codec(pick(i), d.quality))
    usm = Row("USM", "sharpen", "USMSharp")
    for i in range(cases): usm.add(sharpen(pick(i)), b.usm(pick(i)[None])[0])
    return [row.record() for row in rows + [diff, codec, tensor, usm]]


def pipelines(b, pictures, cases: int):
    "All of it with the same draws: BasicSR's operations fed framer's random numbers, against a preset with codec='float'."
    from framer.degradation import PRESETS, apply_degradation, draw_degradation, sample_generator
    from framer.kernels import sharpen
    preset, rows = replace(PRESETS["seesr_strong"], codec="float"), []
    quiet = lambda d: replace(d, first=replace(d.first, noise="none"), second=replace(d.second, noise="none"))
    for size, count in ((128, cases), (512, max(4, cases // 8))):
        for name, change in (("without noise", quiet), ("with noise", lambda d: d)):
            row, target = Row(f"pipeline {size} px, {name}", "apply_degradation, codec='float'", "their operations, DiffJPEG"), Row(f"target {size} px", "sharpen", "USMSharp")
            for i in range(count):
                hr, draw = crop_of(pictures, i, size), change(draw_degradation(preset, (size, size), sample_generator(i, stream="pipeline")))
                (mine, lr), (their_target, their_lr) = apply_degradation(hr, draw, preset), their_pipeline(b, hr[None], draw, feed=True)
                row.add(lr, their_lr[0]); target.add(mine, their_target[0])
            rows.append(row.record())
        rows.append(target.record())
    return rows


def noise_statistics(b):
    "Noise that each side draws by itself, on a wedge of all 256 levels: how its spread compares, level by level."
    import torch
    from framer.degradation import add_gaussian_noise, add_poisson_noise
    wedge, rows = (torch.arange(256)[None, :, None] / 255).expand(3, 256, 4096).contiguous(), []
    torch.manual_seed(0)
    for name, ours, theirs, strength in (("gaussian", add_gaussian_noise, lambda i: b.degradations.add_gaussian_noise_pt(i, sigma=10.0), 10.0), ("poisson", add_poisson_noise, lambda i: b.degradations.add_poisson_noise_pt(i, scale=1.0), 1.0)):
        one, two = (noisy[:, 64:192] - wedge[:, 64:192] for noisy in (ours(wedge, strength, False, 1), theirs(wedge[None])[0]))
        spread = [(t.std((0, 2)) * 255) for t in (one, two)]
        rows.append(dict(noise=name, strength=strength, levels="64..191", samples_a_level=3 * 4096, std_ours=float(spread[0].mean()), std_theirs=float(spread[1].mean()),
                         largest_ratio_of_std=float((spread[0] / spread[1]).log().abs().max().exp()), mean_ours=float(one.mean() * 255), mean_theirs=float(two.mean() * 255)))
    return rows


def measures(lr, target):
    "PSNR to the bicubic x1/4 of the target (dB), noise level (8-bit levels, Immerkaer 1996), slope of the power spectrum (log-log, radial)."
    import torch
    import torch.nn.functional as F
    from framer.degradation import resize
    clean = resize(target, tuple(lr.shape[1:]), "bicubic", antialias=True).clamp(0, 1)
    psnr = -10 * math.log10(float((lr - clean).square().mean()) + 1e-12)
    y = (lr * lr.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).double() * 255
    height, width = y.shape
    laplace = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=torch.float64)[None, None]
    noise = math.sqrt(math.pi / 2) / (6 * (height - 2) * (width - 2)) * float(F.conv2d(y[None, None], laplace).abs().sum())
    window = torch.hann_window(height, periodic=False, dtype=torch.float64)[:, None] * torch.hann_window(width, periodic=False, dtype=torch.float64)
    power = torch.fft.fft2((y - y.mean()) * window).abs().square()
    radius = torch.hypot(torch.fft.fftfreq(height, dtype=torch.float64)[:, None] * height, torch.fft.fftfreq(width, dtype=torch.float64)[None] * width).round().long()
    rings = torch.arange(2, min(height, width) // 2)
    mean = torch.stack([power[radius == r].mean() for r in rings]).clamp(min=1e-12).log()
    x = rings.double().log(); x = x - x.mean()
    return dict(psnr=psnr, noise=noise, slope=float((x * (mean - mean.mean())).sum() / (x * x).sum()))


def their_sampler(b, folder: Path):
    "BasicSR's own dataset and model code, drawing for itself: a function of (crop, seed) -> (target, lr)."
    import numpy as np, torch
    from PIL import Image
    Image.fromarray(np.zeros((400, 400, 3), np.uint8)).save(folder / "blank.png"); (folder / "meta.txt").write_text("blank.png\n")
    dataset = b.RealESRGANDataset(dict(OPTIONS, dataroot_gt=str(folder), meta_info=str(folder / "meta.txt")))
    model = b.RealESRGANModel.__new__(b.RealESRGANModel)   # __init__ builds networks on a GPU
    model.opt, model.is_train, model.device, model.jpeger, model.usm_sharpener = OPTIONS, True, "cpu", b.jpeger, b.usm
    model._dequeue_and_enqueue = lambda: None
    def sample(hr, seed):
        random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
        drawn = dataset[0]
        with torch.no_grad(): model.feed_data(dict(gt=hr[None], **{k: drawn[k][None] for k in ("kernel1", "kernel2", "sinc_kernel")}))
        return model.gt_usm[0], model.lq[0]
    return sample


def distributions(b, pictures, samples: int, cache: Path):
    "The measures over many samples, each side drawing for itself; what is done is kept in a file and not done again."
    from framer.degradation import PRESETS, degrade
    preset = PRESETS["seesr_strong"]
    floats = replace(preset, codec="float")
    sources = [(ROOT / "framer" / f"{m}.py").read_text() for m in ("degradation", "kernels", "jpeg")] + [inspect.getsource(f) for f in (measures, their_sampler, crop_of)]
    code = hashlib.sha256("".join([*sources, repr(OPTIONS)]).encode()).hexdigest()[:16]   # samples of other code are not mixed in
    file, sides = cache / f"samples-{code}.jsonl", {}
    done = {}
    if file.exists():
        for line in file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError): row = json.loads(line); done[row["index"]] = row
    sample, began = their_sampler(b, cache), time.time()
    with open(file, "a") as log:
        log.write("\n")
        for i in range(samples):
            if i in done: continue
            hr = crop_of(pictures, i, 128)
            pairs = dict(ours=degrade(hr, preset, 0, i), ours_float=degrade(hr, floats, 0, i), ours_again=degrade(hr, floats, 1, i), theirs=sample(hr, i))
            done[i] = dict(index=i, **{side: measures(lr, target) for side, (target, lr) in pairs.items()})
            log.write(json.dumps(done[i]) + "\n"); log.flush()
            if (i + 1) % 200 == 0: print(f"{i + 1} samples, {time.time() - began:.0f} s", flush=True)
    return [done[i] for i in range(samples)]


def compared(rows: list):
    "Kolmogorov-Smirnov statistics and quantiles of the measures."
    import numpy as np
    from scipy.stats import ks_2samp
    found = []
    for measure in ("psnr", "noise", "slope"):
        values = {side: np.array([r[side][measure] for r in rows]) for side in ("ours", "ours_float", "ours_again", "theirs")}
        quantiles = {side: np.quantile(v, np.linspace(0, 1, 101)).round(4).tolist() for side, v in values.items()}
        tests = {}
        for name, (one, two) in dict(ours_theirs=("ours", "theirs"), float_theirs=("ours_float", "theirs"), float_again=("ours_float", "ours_again")).items():
            done = ks_2samp(values[one], values[two]); tests[name] = dict(statistic=float(done.statistic), p=float(done.pvalue))
        found.append(dict(measure=measure, samples=len(rows), mean={s: float(v.mean()) for s, v in values.items()}, std={s: float(v.std()) for s, v in values.items()}, ks=tests, quantiles=quantiles))
    return found


def parity(args):
    b, pictures = load_basicsr(), photographs()
    import torch
    torch.set_num_threads(1)
    with torch.no_grad():
        began = time.time()
        result = dict(kind="parity", bound=BOUND, environment=about(), operations=operations(b, pictures, args.cases))
        show_rows(result["operations"])
        result["pipeline"] = pipelines(b, pictures, args.cases); show_rows(result["pipeline"])
        result["noise"] = noise_statistics(b)
        result["distributions"] = compared(distributions(b, pictures, args.samples, args.cache))
    for row in result["distributions"]: print(row["measure"], row["mean"], row["ks"])
    result["seconds"] = time.time() - began
    save(args.out / "parity.json", result)


def show_rows(rows):
    for r in rows: print(f"{r['operation']:36}{r['cases']:5} cases  max {r['max'] * 255:9.5f}/255  mean {r['mean'] * 255:9.6f}/255  over the bound {r['share_over_bound']:.2e}", flush=True)


# -- speed

def timed(call):
    "Wall and processor seconds of one call."
    wall, cpu = time.perf_counter(), time.process_time(); call()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(args):
    """Both sides on the same pictures with the same draws, alternated, each drawing its own noise. Three ways to use a machine: one thread; two threads inside
    one picture; two pictures at a time on one thread each, which is what a loader's workers do. Seconds of processor time say how much of a core an image
    costs, whatever else the machine is doing."""
    import statistics, torch
    from framer.degradation import PRESETS, apply_degradation, draw_degradation, sample_generator
    b, pictures, preset = load_basicsr(), photographs(), PRESETS["seesr_strong"]
    floats, result = replace(preset, codec="float"), dict(kind="speed", size=args.size, draws=args.draws, preset=preset.name, environment=about(), runs=[])
    contestants = dict(framer=lambda hr, d: apply_degradation(hr, d, preset), framer_float=lambda hr, d: apply_degradation(hr, d, floats), basicsr=lambda hr, d: their_pipeline(b, hr[None], d))
    inputs = [(crop_of(pictures, i, args.size), draw_degradation(preset, (args.size,) * 2, sample_generator(i, stream="speed"))) for i in range(args.draws)]
    pool = concurrent.futures.ThreadPoolExecutor(2, initializer=lambda: (torch.set_num_threads(1), torch.set_grad_enabled(False)))
    def two(name, i):
        list(pool.map(lambda pair: contestants[name](*pair), (inputs[i], inputs[(i + 1) % args.draws])))
    modes = dict(one_thread=(1, 1, lambda name, i: contestants[name](*inputs[i])), two_threads_a_picture=(2, 1, lambda name, i: contestants[name](*inputs[i])), two_pictures_at_a_time=(1, 2, two))
    with torch.no_grad():
        for mode, (threads, images, work) in modes.items():
            torch.set_num_threads(threads)
            times = {name: [] for name in contestants}
            for name in contestants: work(name, 0)   # warm
            for i in range(0, args.draws, images):
                for name in random.Random(i).sample(sorted(contestants), len(contestants)): times[name].append([t / images for t in timed(lambda: work(name, i))])
            run = dict(mode=mode, threads=threads * images)
            for name, found in times.items():
                wall, cpu = zip(*found)
                run[name] = dict(median_cpu_ms=statistics.median(cpu) * 1e3, median_wall_ms=statistics.median(wall) * 1e3, images_per_core_second=len(cpu) / sum(cpu), images_per_second=len(wall) / sum(wall), cpu_ms=[round(c * 1e3, 2) for c in cpu])
            for name in ("framer", "framer_float"):
                ratios = [t[1] / m[1] for t, m in zip(times["basicsr"], times[name])]
                run[f"{name}_times_faster"] = dict(per_core=run[name]["images_per_core_second"] / run["basicsr"]["images_per_core_second"], median_of_pairs=statistics.median(ratios), smallest_pair=min(ratios), by_the_clock=run[name]["images_per_second"] / run["basicsr"]["images_per_second"])
            result["runs"].append(run)
            print(f"{mode}: " + ", ".join(f"{n} {run[n]['median_cpu_ms']:.1f} ms of processor, {run[n]['median_wall_ms']:.1f} ms of time" for n in contestants) + f"; {run['framer_times_faster']}", flush=True)
        torch.set_num_threads(1)
        result["steps"] = steps(b, pictures, args.size)
    save(args.out / "speed.json", result)


def steps(b, pictures, size: int, repeats: int = 9):
    "Single operations at full size, one thread, alternated: median processor milliseconds."
    import statistics, torch
    import torch.nn.functional as F
    from framer.degradation import RoundDraw, add_gaussian_noise, add_poisson_noise, resize
    from framer.jpeg import jpeg_codec
    from framer.kernels import Kernel, blur, kernel_values, sharpen
    hr = crop_of(pictures, 0, size)
    kernel, noisy = Kernel("aniso", 21, 2.0, 1.0, 0.5), lambda kind, gray=False: RoundDraw(None, 1.0, "area", kind, 2.0, gray, 1, None)
    pairs = {
        "USM": (lambda: sharpen(hr), lambda: b.usm(hr[None])),
        "blur 21 x 21": (lambda: blur(hr, kernel_values(kernel)), lambda: b.filter2D(hr[None], their_kernel(b, kernel))),
        "resize bicubic x0.6": (lambda: resize(hr, (int(size * 0.6),) * 2, "bicubic", factor=0.6), lambda: F.interpolate(hr[None], scale_factor=0.6, mode="bicubic")),
        "Gaussian noise": (lambda: add_gaussian_noise(hr, 2.0, False, 1), lambda: their_noise(b, hr[None], noisy("gaussian"), False)),
        "Poisson noise": (lambda: add_poisson_noise(hr, 2.0, False, 1), lambda: their_noise(b, hr[None], noisy("poisson"), False)),
        "Poisson noise, gray": (lambda: add_poisson_noise(hr, 2.0, True, 1), lambda: their_noise(b, hr[None], noisy("poisson", True), False)),
        "JPEG": (lambda: jpeg_codec(hr, 60), lambda: their_jpeg(b, hr[None], 60.0)),
    }
    rows = []
    for name, both in pairs.items():
        found = ([], [])
        for i in range(repeats + 1):
            for side, call in enumerate(both):
                spent = timed(call)[1]
                if i: found[side].append(spent * 1e3)
        ours, theirs = map(statistics.median, found)
        rows.append(dict(operation=name, framer_ms=ours, basicsr_ms=theirs, times_faster=theirs / ours)); print(f"{name:22} framer {ours:7.2f} ms  BasicSR {theirs:7.2f} ms  {theirs / ours:5.1f} x", flush=True)
    return rows


def batch(args):
    "degrade_batch: the time of one batch and, on a GPU, its share of a 1 s training step; and how far it is from degrade."
    import statistics, torch
    from framer.degradation import degrade, degrade_batch
    if args.device == "cuda" and not torch.cuda.is_available(): raise SystemExit("--device cuda: torch finds no CUDA device here. Run this on a machine with one; --device cpu runs everywhere.")
    pictures, found, spent, off = photographs(), [], [], []
    hr = torch.stack([crop_of(pictures, i, args.size) for i in range(args.batch)]).to(args.device)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    for turn in range(args.repeats + 2):
        wait(); began, busy = time.perf_counter(), time.process_time(); degrade_batch(hr, "seesr_strong", 0, range(args.batch), [turn] * args.batch); wait()
        found.append(time.perf_counter() - began); spent.append(time.process_time() - busy)
    target, lr = degrade_batch(hr, "seesr_strong", 0, range(args.batch), [0] * args.batch)
    for i in range(args.batch): off.append((lr[i].cpu() - degrade(hr[i].cpu(), "seesr_strong", 0, i, 0)[1]).abs() * 255)
    seconds = statistics.median(found[2:])
    result = dict(kind="batch", device=args.device, size=args.size, batch=args.batch, seconds_median=seconds, seconds=found[2:], processor_seconds_median=statistics.median(spent[2:]), environment=about(),
                  against_degrade=dict(largest_difference_levels=float(max(o.max() for o in off)), share_of_values_that_differ=float(sum((o > 0.5).double().mean() for o in off) / len(off)), mean_difference_levels=float(sum(o.mean() for o in off) / len(off))))
    print(json.dumps({k: result[k] for k in ("device", "seconds_median", "processor_seconds_median", "against_degrade")}, indent=1))
    save(args.out / f"batch-{args.device}.json", result)


# -- records

def about():
    from importlib.metadata import PackageNotFoundError, version
    from framer.runs import environment
    found = environment()
    given = [a for a in sys.argv[1:] if a != "--inside"]
    found["command"] = " ".join(["python benchmarks/degradation.py", *(a for k, a in enumerate(given) if not {a, given[k - 1] if k else ""} & {"--cache", "--out"})])
    for name in ("torchvision", "pillow", "opencv-python-headless", "scipy"):
        with contextlib.suppress(PackageNotFoundError): found["versions"][name] = version(name)
    from PIL import features
    return dict(found, basicsr=VERSION, libjpeg_turbo=features.version("libjpeg_turbo"), load_average=list(os.getloadavg()) if hasattr(os, "getloadavg") else None)


def save(path: Path, result):
    from framer.runs import write_json
    path.parent.mkdir(parents=True, exist_ok=True); write_json(path, result); print("wrote", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("parity", "speed", "batch"))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "framer-basicsr", help="folder for BasicSR's environment and unfinished results")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/degradation", help="folder for the results")
    parser.add_argument("--samples", type=int, default=2000, help="parity: samples whose distributions are compared")
    parser.add_argument("--cases", type=int, default=64, help="parity: inputs of each operation")
    parser.add_argument("--draws", type=int, default=40, help="speed: draws that are timed")
    parser.add_argument("--size", type=int, default=512, help="speed, batch: side of a picture")
    parser.add_argument("--batch", type=int, default=16, help="batch: pictures")
    parser.add_argument("--repeats", type=int, default=10, help="batch: repetitions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="batch: where")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("samples", "cases", "draws", "batch", "repeats"):
        if getattr(args, name) < 1: parser.error(f"--{name} {getattr(args, name)}: expected 1 or more")
    if args.size < 32 or args.size % 4: parser.error(f"--size {args.size}: expected a multiple of 4, at least 32")
    if args.command != "batch" and not args.inside:
        python = environment_python(args.cache.resolve())
        quiet = dict(os.environ, OMP_WAIT_POLICY="PASSIVE")   # threads that wait do not spin, so that processor time counts work
        raise SystemExit(subprocess.run([python, __file__, *sys.argv[1:], "--inside"], env=quiet).returncode)
    sys.path.insert(0, str(ROOT))
    args.cache, args.out = args.cache.resolve(), args.out.resolve()
    dict(parity=parity, speed=speed, batch=batch)[args.command](args)


if __name__ == "__main__":
    main()
