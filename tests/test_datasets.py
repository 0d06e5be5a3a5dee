"Data from end to end: other processes, interruptions, other people's writers, a real test set, the notebook that prepares."
import csv, hashlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framer.datasets import PairDataset, mixed, pair_loader
from framer.inventory import InventoryConfig, fingerprint, near_duplicates
from framer.pairs import PairedCrops, find_pairs
from framer.photographs import read_pixels
from framer.shards import Shards, ShardStream, find_shards, scan_shard, write_shards
from framer.sources import HubPictures, Recipe, Source, open_dataset

ROOT = Path(__file__).parents[1]
REALSR = ROOT / "../shared/data/realsr"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "The same twelve small pictures as a folder, as pairs, as shards and in a recipe."
    base = tmp_path_factory.mktemp("sets")
    for name in ("folder", "both/hr", "both/lr"): (base / name).mkdir(parents=True)
    for p in sorted((ROOT / "data/photographs/train").glob("*.jpg"))[:12]:
        with Image.open(p) as image:
            image.draft("RGB", (320, 320)); image.resize((128, 96)).save(base / f"folder/{p.stem}.png")
            image.resize((128, 96)).save(base / f"both/hr/{p.stem}.png"); image.resize((32, 24)).save(base / f"both/lr/{p.stem}_LR4.png")
    write_shards(base / "folder", base / "shards", size_mb=0.12, captions={"boats": "some boats"})
    assert len(list((base / "shards").glob("*.tar"))) >= 3
    Recipe("mix", [Source("a", "folder", first=5, weight=1.5), Source("b", "both"), Source("c", "shards", weight=0.5)]).save(base / "mix.json")
    recipe = json.loads((base / "mix.json").read_text()); recipe["filter"] = dict(side=0, bytes=0); (base / "mix.json").write_text(json.dumps(recipe))
    return base


ALL = ["folder", "both", "shards", "shards?buffer=5", "mix.json"]


def digests(dataset, batch, steps, **options):
    "One digest for each batch: pixels, captions, names, numbers."
    return [hashlib.sha256(b["hr"].numpy().tobytes() + b["lr"].numpy().tobytes() + repr((b["caption"], b["name"], b["index"].tolist())).encode()).hexdigest()
            for b in pair_loader(dataset, batch, steps=steps, **options)]


@pytest.mark.parametrize("data", ALL)
def test_batches_are_the_same_however_they_are_made(sets, data):
    def opened(): return open_dataset(data, 64, preset="seesr_light", seed=7, root=sets, log=None)
    whole = digests(opened(), 4, 8)
    assert len(set(whole)) == 8
    assert digests(opened(), 4, 8, start_step=5, num_workers=2) == whole[5:]
    assert digests(opened(), 4, 8, num_workers=1) == whole
    by_rank = [list(pair_loader(opened(), 4, steps=8, rank=r, world=4, num_workers=r % 2)) for r in range(4)]
    for step, b in enumerate(pair_loader(opened(), 4, steps=8)):
        assert b["name"] == [by_rank[r][step]["name"][0] for r in range(4)]
        assert torch.equal(b["lr"], torch.cat([by_rank[r][step]["lr"] for r in range(4)]))
    n = len(opened())
    names = [(name, int(i)) for b in pair_loader(opened(), 1, steps=n) for name, i in zip(b["name"], b["index"])]
    assert len({i for _, i in names}) == n          # an epoch is every number once: nothing twice, nothing lost


def test_another_process_draws_the_same(sets):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})
from pathlib import Path
from test_datasets import ALL, digests, open_dataset
for data in ALL: print(digests(open_dataset(data, 64, preset="seesr_strong", seed=3, root=Path({str(sets)!r}), log=None), 3, 4)[3])"""
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONHASHSEED": "11", "OMP_NUM_THREADS": "2"}, cwd=ROOT)
    assert said.returncode == 0, said.stderr[-2000:]
    assert said.stdout.split() == [digests(open_dataset(d, 64, preset="seesr_strong", seed=3, root=sets, log=None), 3, 4)[3] for d in ALL]


def test_one_picture_is_one_pair_wherever_it_is_kept(sets):
    "A folder and shards of it are two ways to the same training data."
    folder, shards = (open_dataset(d, 64, seed=5, root=sets, log=None) for d in ("folder", "shards"))
    for place in ((0, 0), (7, 2), (11, 31)):
        a, b = folder[place], shards[place]
        assert a["name"] == b["name"] and torch.equal(a["hr"], b["hr"]) and torch.equal(a["lr"], b["lr"])
    names = [b["caption"][0] for b in pair_loader(shards, 1, steps=12)]
    assert sorted(names) == [""] * 11 + ["some boats"]


def test_a_mix_is_fair(sets):
    "Over many epochs every picture comes as often as its weight says, whatever the rounding."
    one, two = (PairDataset(sorted((sets / "folder").glob("*.png"))[a:b], size=64, preset="bicubic") for a, b in ((0, 5), (5, 12)))
    mix, seen = mixed([one, two], [0.3, 1.6], seed=2), {}
    for epoch in range(40):
        for k in range(len(mix)): place = mix._place(k, epoch); seen[place[:2]] = seen.get(place[:2], 0) + 1; assert place[2] >= 0
    a, b = ([n for (which, _), n in seen.items() if which == w] for w in (0, 1))
    assert len(a) == 5 and max(a) - min(a) <= 1 and sum(a) == 40 * round(0.3 * 5)
    assert len(b) == 7 and max(b) - min(b) <= 1 and sum(b) == 40 * round(1.6 * 7)


# -- interruptions

def test_killed_while_writing_shards(sets, tmp_path):
    "Whatever moment a writer is killed at, only whole shards have their names, and a second call finishes the set."
    code = f"""
import framer.shards as s, os, signal
count = 0
def stopping(real):   # the power goes in the middle of a shard
    def addfile(self, info, file=None):
        global count; count += 1
        if count == 8: os.kill(os.getpid(), signal.SIGKILL)
        return real(self, info, file)
    return addfile
s.tarfile.TarFile.addfile = stopping(s.tarfile.TarFile.addfile)
s.write_shards({str(sets / 'folder')!r}, {str(tmp_path / 'out')!r}, size_mb=0.12)"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    there = sorted((tmp_path / "out").glob("*.tar"))
    assert there and all(not scan_shard(p).problem for p in there)
    paths, _ = write_shards(sets / "folder", tmp_path / "out", size_mb=0.12)
    assert len(paths) > len(there)
    names = Shards(paths).names()
    assert names == [p.stem for p in sorted((sets / "folder").glob("*.png"))]


def test_every_place_a_shard_can_be_cut_at(sets, tmp_path):
    "Cut anywhere, a shard is named; what is used of it is whole and right."
    source = write_shards([(p.stem, p, sets / f"both/lr/{p.stem}_LR4.png") for p in sorted((sets / "both/hr").glob("*.png"))[:4]], tmp_path / "pairs", size_mb=10)[0][0]
    data, whole = source.read_bytes(), Shards([source])
    bodies = int(whole.indexes[0].spans[:, :2].sum(-1).max())
    assert whole.kind == "pair" and len(whole) == 4
    for length in np.unique(np.linspace(0, bodies, 60).astype(int)):
        cut = tmp_path / "cut.tar"; cut.write_bytes(data[:length])
        index = scan_shard(cut)
        assert index.problem, f"cut at {length} of {len(data)} bytes and nobody noticed"
        for key, spans in zip(index.keys, index.spans):
            assert [data[o : o + s] for o, s in spans] == whole._raw(whole.names().index(key))
        os.utime(cut, ns=(int(length) + 1, int(length) + 1))
        with pytest.raises(ValueError, match="cut.tar is (cut short|empty)"): Shards([cut])


# -- other people's formats

def test_webdataset_reads_ours_and_we_read_theirs(tmp_path):
    wds = pytest.importorskip("webdataset", reason="the package webdataset is not installed: pip install webdataset to compare with it")
    val = sorted((ROOT / "data/photographs/val").glob("*.jpg"))
    paths, _ = write_shards(ROOT / "data/photographs/val", tmp_path / "ours", size_mb=1, captions={"otters": "two otters"})
    read = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert [r["__key__"] for r in read] == [p.stem for p in val] and [r["jpg"] for r in read] == [p.read_bytes() for p in val] and read[2]["txt"] == b"two otters"
    with wds.TarWriter(str(tmp_path / "theirs.tar")) as out:
        for p in val: out.write({"__key__": p.stem, "jpg": p.read_bytes(), "json": {"caption": f"a {p.stem}"}})
    theirs = Shards([tmp_path / "theirs.tar"])
    assert theirs.names() == [p.stem for p in val] and theirs.item(2).caption == "a otters" and (theirs.item(3).pixels == read_pixels(val[3])).all()


def test_hugging_face_image_folder_and_dictionary_of_splits(sets, tmp_path):
    hub = pytest.importorskip("datasets", reason="the package datasets is not installed: pip install 'framer-sr[data]'")
    hub.disable_progress_bars()
    files = sorted((sets / "folder").glob("*.png"))
    table = hub.Dataset.from_dict(dict(image=[str(p) for p in files], text=[f"a {p.stem}" for p in files])).cast_column("image", hub.Image())
    hub.DatasetDict(train=table, test=table.select(range(3))).save_to_disk(tmp_path / "two")
    for data, n in (("hf:two?caption=text", 12), ("hf:two?split=test&caption=text", 3)):
        dataset = open_dataset(data, 64, preset="bicubic", root=tmp_path, log=None)
        assert len(dataset) == n and dataset[2, 0]["caption"] == f"a {files[2].stem}" and dataset[2, 0]["name"] == files[2].stem
        assert torch.equal(dataset[2, 4]["lr"], PairDataset(files, size=64, preset="bicubic")[2, 4]["lr"])
    with pytest.raises(FileNotFoundError, match="two could not be opened .split 'validation'"): open_dataset("hf:two?split=validation", 64, root=tmp_path, log=None)
    profile = hub.Dataset.from_dict(dict(image=[Image.new("RGB", (40, 40), "red")])).cast_column("image", hub.Image())
    assert HubPictures(profile).item(0).pixels[0, 0].tolist() == [255, 0, 0]


# -- a real test set

@pytest.mark.skipif(not (REALSR / "hr").is_dir(), reason="RealSR's test pairs are not beside the project (../shared/data/realsr)")
def test_realsr_joins_and_is_not_in_the_training_set():
    pairs, bad = find_pairs(REALSR / "hr", REALSR / "lr", scale=4, size=512)
    assert len(pairs) == 100 and not bad and all(hr.name == lr.name for _, hr, lr in pairs)
    crop = PairedCrops(pairs[:3], size=128).draw(1, 0)
    blurred = torch.nn.functional.interpolate(crop["hr"][None], scale_factor=0.25, mode="area")[0]
    assert (blurred - crop["lr"]).abs().mean() < 0.06 < (blurred.flip(2) - crop["lr"]).abs().mean()
    with pytest.raises(ValueError, match="expected"): find_pairs(REALSR / "hr", REALSR / "lr", scale=2)
    ours = [fingerprint(read_pixels(p)) for p in sorted((ROOT / "data/photographs/train").glob("*.jpg"))]
    theirs = [fingerprint(read_pixels(hr)) for _, hr, _ in pairs]
    assert near_duplicates(ours, theirs) == []
    again = [fingerprint(read_pixels(lr)) for _, _, lr in pairs]    # LR is a smaller, blurred photograph of the same scene
    found = near_duplicates(again, theirs)
    right = [(i, j) for i, j, *_ in found if i == j]
    assert len(right) >= 98, f"only {len(right)} of 100 LR pictures were recognised"
    assert all(i == j for i, j, *_ in found), [(pairs[i][0], pairs[j][0]) for i, j, *_ in found if i != j]


# -- the notebook

def papermill(tmp_path, *options):
    return subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs/prepare.ipynb"), str(tmp_path / "out.ipynb"), "-k", "python3", *map(str, options)],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "FRAMER_ROOT": str(ROOT)})


def test_prepare_reports_and_writes(sets, tmp_path):
    pytest.importorskip("papermill")
    bad = tmp_path / "set"; shutil.copytree(sets / "folder", bad)
    first = sorted(bad.glob("*.png"))
    (bad / "broken.jpg").write_bytes((ROOT / "data/photographs/val/moss.jpg").read_bytes()[:9000])
    Image.open(first[0]).resize((90, 70)).save(bad / "twin.jpg", quality=60); Image.open(ROOT / "data/photographs/val/otters.jpg").resize((160, 90)).save(bad / "leak.png"); Image.new("RGB", (20, 20)).save(bad / "tiny.bmp")
    done = papermill(tmp_path, "-p", "data", bad, "-p", "test", ROOT / "data/photographs/val", "-p", "run", tmp_path / "report", "-p", "size", 64, "-p", "filter_side", 0, "-p", "filter_kb", 0, "-p", "num_workers", 1, "-p", "shards", tmp_path / "shards", "-p", "pairs", tmp_path / "pairs", "-p", "preset", "bicubic")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "report/inventory.json").read_text())["summary"]
    assert {k: said[k] for k in ("pictures", "good", "bad", "dropped", "in_test_sets", "near_duplicates")} == dict(pictures=16, good=13, bad=1, dropped=1, in_test_sets=1, near_duplicates=1)
    with open(tmp_path / "report/near_duplicates.csv") as file: rows = list(csv.DictReader(file))
    assert {(Path(r["picture"]).stem, Path(r["other"]).stem) for r in rows} == {(first[0].stem, "twin"), ("leak", "otters")}
    assert len(Shards(find_shards(tmp_path / "shards"))) == 13 and len(open_dataset(str(tmp_path / "pairs"), 64, log=None)) == 13


def test_parameters_of_the_notebook_are_those_of_the_job():
    "Names, defaults and order: papermill's --help-notebook and the error for an unknown name say the same."
    cell = next(c for c in json.loads((ROOT / "nbs/prepare.ipynb").read_text())["cells"] if "parameters" in c["metadata"].get("tags", []))
    given = {}; exec("".join(cell["source"]), given)
    assert {k: v for k, v in given.items() if not k.startswith("__")} == vars(InventoryConfig())


def test_a_long_run_starts_at_once(sets):
    "The order of a set of a million pictures, far into a run, costs no more than the epoch's permutation."
    from framer.datasets import sample_order
    from framer.shards import buffered_order
    from framer.degradation import sample_generator
    started = time.process_time()
    assert len(set(sample_order(1_000_000, 16, 40_000_000))) == 16
    assert len(set(buffered_order(1_000_000, 1000, sample_generator(0)))) == 1_000_000
    assert time.process_time() - started < 20
    stream = ShardStream(PairDataset(Shards(find_shards(sets / "shards")), size=64, preset="bicubic"), buffer=5)
    far = next(stream.read([12 * 10_000_000 + 3]))
    assert torch.equal(far["lr"], stream.dataset.draw(far["index"], 10_000_000)["lr"])
