#!/usr/bin/env python
"""Fetch a larger set of free photographs from Debian's wallpaper packages.

    python data/prepare.py [--out data/large] [--packages NAME ...]

Needs apt-get and dpkg-deb (Debian or Ubuntu) and the Python packages numpy and Pillow; no root, and nothing is installed.
Writes OUT/train/*.jpg, OUT/SOURCES.csv (author and licence of every picture) and OUT/contact_sheet.jpg (look at it).
The photographs of data/photographs/train are in it too, so that the larger set holds the smaller one; those of data/photographs/val are not.
Pictures in JPEG XL are read where the Python package pillow-jxl-plugin is installed, and counted where it is not.
Downloaded packages stay in OUT/.packages, so a second run needs no network.
"""
import argparse
import csv
import fnmatch
import getpass
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import numpy as np
    from PIL import Image, ImageDraw, ImageOps
except ImportError as error:
    sys.exit(f"{error}. Install what is missing first: python -m pip install numpy pillow")

try:
    import pillow_jxl  # noqa: F401  (registers JPEG XL with Pillow)
    JXL = True
except ImportError:
    JXL = False

DATA = Path(__file__).resolve().parent
# NAME, or NAME/RELEASE for a Debian release other than this machine's own
PACKAGES = "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers", "ukui-wallpapers/sid", "budgie-backgrounds/sid"
MIRROR = "http://deb.debian.org/debian"  # apt checks the signatures
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Sharp, but no photographs (seen on the contact sheet)
ARTWORK = "Elephants*", "analogpattern*", "*/SafeLanding/*", "*/Patak/*", "*/Autumn/*", "*/Kay/*", "Stripes*", "ocean-waves*", "*-midnight*"
SPDX = {
    "GPL-2+": "GPL-2.0-or-later", "GPL-2": "GPL-2.0-only", "GPL-3": "GPL-3.0-only", "GPL-3+": "GPL-3.0-or-later",
    "LGPLv3": "LGPL-3.0-only", "LGPL-3": "LGPL-3.0-only", "LGPL-3+": "LGPL-3.0-or-later", "CC0": "CC0-1.0",
}
COLUMNS = "file split title author licence package original_file original_size changes".split()


class Problem(Exception):
    "Something the user can put right; shown without a traceback."


def apt_get(arguments: list, folder: Path) -> None:
    "Run apt-get in `folder`; its errors become a `Problem`."
    try:
        result = subprocess.run(["apt-get", "-q", *arguments], cwd=folder, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        raise Problem("apt-get did not finish in 30 minutes; run again later") from None
    said = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith(("E:", "Err", "W: Failed"))]
    if result.returncode or any(line.startswith("W: Failed") for line in said):
        said = said or ["apt-get said nothing"]
        if any(word in said[0] for word in ("Unable to locate", "no installation candidate", "Can't find a source")):
            raise Problem(f"{said[0]} (not in this release, or the lists are empty: `apt-get update` as root fills them)")
        raise Problem(f"{' / '.join(said[:2])} (no network, or the mirror is out of reach)")


def lists_of(release: str, folder: Path) -> list[str]:
    "apt options with package lists of another release, kept in `folder`: nothing of the machine's own apt is touched."
    for sub in ("state/lists/partial", "cache/archives/partial"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    signed = f"[signed-by={KEYRING}] " if KEYRING.is_file() else ""
    (folder / "sources.list").write_text(f"deb {signed}{MIRROR} {release} main\n")
    (folder / "status").touch()
    values = {"Dir::Etc::sourcelist": folder / "sources.list", "Dir::Etc::sourceparts": "-", "Dir::State": folder / "state", "Dir::State::status": folder / "status",
              "Dir::Cache": folder / "cache", "APT::Sandbox::User": getpass.getuser()}
    options = [part for key, value in values.items() for part in ("-o", f"{key}={value}")]
    apt_get([*options, "update"], folder)
    return options


def download(package: str, release: str, folder: Path) -> Path:
    "The package's .deb file: from `folder`, or fetched into it."
    folder = folder / release if release else folder
    folder.mkdir(exist_ok=True)
    ready = sorted(folder.glob(f"{package}_*.deb"))
    if ready:
        return ready[-1]
    with tempfile.TemporaryDirectory(dir=folder, prefix="part-") as part:
        options = lists_of(release, Path(part) / "apt") if release else []
        apt_get([*options, "download", package], Path(part))
        found = list(Path(part).glob("*.deb"))
        if not found:
            raise Problem("apt-get reported success but left no package; run again")
        target = folder / found[0].name
        os.replace(found[0], target)
        return target


def licences(copyright_file: Path) -> list[tuple[list[str], str, str]]:
    "(patterns, author, licence) of every Files paragraph of a machine-readable Debian copyright file; later ones win."
    result, text = [], copyright_file.read_text(encoding="utf-8", errors="replace")
    for paragraph in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^(Files|Copyright|License):[ \t]*(.*(?:\n[ \t]+.*)*)", paragraph, re.M))
        if len(fields) == 3:
            years = re.compile(r"^[\d\s,.\-]+|,?\s*\d{4}$")
            authors = [years.sub("", re.sub(r"<[^>]*>|https?://\S+|\(c\)|©|´", "", line)).strip(" ,") for line in fields["Copyright"].splitlines()]
            licence = fields["License"].splitlines()[0].strip()
            result.append((fields["Files"].split(), "; ".join(a[1:-1] if a[0] == a[-1] == '"' else a for a in authors if a), SPDX.get(licence, licence)))
    return result


def credit(path: Path, entries: list) -> tuple[str, str] | None:
    "(author, licence) of one picture: from a KDE metadata.json beside it, else from the package's copyright file."
    for parent in list(path.parents)[:3]:
        if (parent / "metadata.json").is_file():
            plugin = json.loads((parent / "metadata.json").read_text(encoding="utf-8")).get("KPlugin", {})
            if plugin.get("License") and plugin.get("Authors"):
                return "; ".join(a.get("Name", "?") for a in plugin["Authors"]), SPDX.get(plugin["License"], plugin["License"])
    found = None
    for patterns, author, licence in entries:
        if any(p == "*" or fnmatch.fnmatch(path.name, p.rsplit("/", 1)[-1]) for p in patterns if not p.startswith("debian/")):
            found = author, licence
    return found


def sharpness(image: Image.Image) -> tuple[float, float]:
    "Median over 64x64 patches of the mean gradient (8-bit levels), and the share of flat patches (below 1), at 1400 pixels or less."
    image = image.convert("L")
    image.thumbnail((1400, 1400))
    grey = np.asarray(image, np.float64)
    gradient = (np.abs(np.diff(grey, axis=1))[:-1] + np.abs(np.diff(grey, axis=0))[:, :-1]) / 2
    height, width = (side // 64 for side in gradient.shape)
    patches = gradient[: height * 64, : width * 64].reshape(height, 64, width, 64).mean((1, 3))
    return float(np.median(patches)), float((patches < 1).mean())


def fingerprint(image: Image.Image) -> np.ndarray:
    "256 bits: is each pixel of a 17x16 copy brighter than its right neighbour? Near-duplicates differ in few of them."
    small = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.LANCZOS), np.int16)
    return (small[:, :-1] > small[:, 1:]).ravel()


def bundled(split: str) -> list[tuple[dict, Image.Image]]:
    "Rows and pictures of data/photographs/SOURCES.csv."
    folder = DATA / "photographs"
    try:
        with open(folder / "SOURCES.csv", newline="", encoding="utf-8") as file:
            return [(row, Image.open(folder / row["file"]).convert("RGB")) for row in csv.DictReader(file) if row["split"] == split]
    except OSError as error:
        raise Problem(f"{error}: the bundled photographs are needed, to keep those for validation out of the training set. Restore them (git checkout data/photographs).") from None


def judge(path: Path, names: list, prints: list, kept: list) -> tuple[str, Image.Image | None, np.ndarray | None]:
    "Why the picture is left out ('' if it is not), the opened picture and its fingerprint."
    if any(fnmatch.fnmatch(str(path), pattern if "/" in pattern else f"*/{pattern}") for pattern in ARTWORK):
        return "no photograph", None, None
    if path.suffix == ".jxl" and not JXL:
        return "in JPEG XL (`python -m pip install pillow-jxl-plugin` reads them)", None, None
    try:
        image = Image.open(path)
        if min(image.size) < 1000:
            return "short side below 1000 pixels", None, None
        image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        return f"cannot be decoded ({error})", None, None
    median, flat = sharpness(image)
    if median < 2 or flat >= 0.35:
        return "blurred or flat", None, None
    stem, bits = str(path.with_suffix("")), fingerprint(image)
    if any(stem.endswith("/" + name) for name in names) or any((bits != other).mean() < 0.1 for other in prints):
        return "in data/photographs/val", None, None
    if any((bits != other).mean() < 0.1 for other in kept):
        return "the same picture as another", None, None
    return "", image, bits


def contact_sheet(thumbnails: list, path: Path):
    "All kept photographs on one page, with their names."
    rows = -(-len(thumbnails) // 6)
    sheet = Image.new("RGB", (6 * 240, rows * 180), "black")
    for place, (name, thumbnail) in enumerate(thumbnails):
        x, y = place % 6 * 240, place // 6 * 180
        sheet.paste(thumbnail, (x, y + 16))
        ImageDraw.Draw(sheet).text((x, y + 2), name[:38], fill="white")
    sheet.save(path, quality=85)


def collect(deb: Path, package: str, work: Path):
    "Unpack a package: its JPEG (and JPEG XL) files, largest first, and its licence entries."
    result = subprocess.run(["dpkg-deb", "-x", deb, work], capture_output=True, text=True)
    if result.returncode:
        deb.unlink()
        raise Problem(f"{deb.name} could not be unpacked ({result.stderr.strip()}); it is removed, so run again to fetch it anew")
    copyright_file = work / "usr/share/doc" / package / "copyright"
    entries = licences(copyright_file) if copyright_file.is_file() else []
    files = [p for p in sorted(work.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg", ".jxl") and p.is_file() and not p.is_symlink()]
    return sorted(files, key=lambda p: -p.stat().st_size), entries


def prepare(out: Path, packages: list[str]) -> tuple[int, float]:
    "Do it all; returns the number of photographs, and the megapixels of those from packages."
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise Problem(f"{program} is not on this machine: this script takes photographs from Debian packages and so needs Debian or Ubuntu (a container will do). "
                          "Elsewhere, use any folder of photographs of your own; the bundled ones in data/photographs/train need nothing.")
    val = bundled("val")
    names, prints = [row["original_file"].rsplit(".", 1)[0] for row, _ in val], [fingerprint(image) for _, image in val]
    cache, train = out / ".packages", out / "train"
    cache.mkdir(parents=True, exist_ok=True)
    train.mkdir(exist_ok=True)
    kept, rows, thumbnails, failed = [], [], [], {}
    for package in packages:
        try:
            package, _, release = package.partition("/")
            deb = download(package, release, cache)
        except Problem as problem:
            failed[package] = problem
            print(f"{package}: left out: {problem}", flush=True)
            continue
        version = deb.stem.split("_")[1].replace("%3a", ":")
        with tempfile.TemporaryDirectory(dir=cache, prefix="work-") as work:
            files, entries = collect(deb, package, Path(work))
            out_of, reasons = len(files), {}
            for path in files:
                who, title = credit(path, entries), path.parts[-4] if path.stem[0].isdigit() else path.stem
                reason, image, bits = judge(path, names, prints, kept) if who else ("no licence found", None, None)
                if reason:
                    reasons[reason] = reasons.get(reason, 0) + 1
                    continue
                name = f"{package}_{re.sub(r'[^A-Za-z0-9.-]+', '_', title)}.jpg"
                part, changes = train / f".{name}.part", "none"
                if path.suffix == ".jxl":
                    image.save(part, "JPEG", quality=95, subsampling=0)
                    changes = "saved as JPEG"
                else:
                    shutil.copyfile(path, part)
                os.replace(part, train / name)
                kept.append(bits)
                rows.append([f"train/{name}", "train", title, *who, f"{package} {version}", str(path.relative_to(work)), f"{image.width}x{image.height}", changes])
                image.thumbnail((236, 160))
                thumbnails.append((title, image))
        left = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or "none"
        print(f"{package} {version}: {out_of} JPEG and JPEG XL files, {out_of - sum(reasons.values())} kept; left out: {left}", flush=True)
    if not rows:
        raise Problem("no photograph was kept" + "".join(f"\n  {p}: {why}" for p, why in failed.items()))
    fetched = len(rows)
    for row, image in bundled("train"):
        bits = fingerprint(image)
        if any((bits != other).mean() < 0.1 for other in kept):
            continue
        name = f"bundled_{Path(row['file']).name}"
        shutil.copyfile(DATA / "photographs" / row["file"], train / name)
        rows.append([f"train/{name}", *(row[column] for column in COLUMNS[1:])])
        image.thumbnail((236, 160))
        thumbnails.append((row["title"], image))
    print(f"data/photographs/train: {len(rows) - fetched} added that were not among these", flush=True)
    if (out / "SOURCES.csv").is_file():  # what an earlier run wrote and this one did not; your own files stay
        with open(out / "SOURCES.csv", newline="", encoding="utf-8") as file:
            for old in {row["file"] for row in csv.DictReader(file)} - {row[0] for row in rows}:
                (out / old).unlink(missing_ok=True)
    part = out / ".SOURCES.csv.part"
    with open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    os.replace(part, out / "SOURCES.csv")
    contact_sheet(thumbnails, out / "contact_sheet.jpg")
    return len(rows), sum(math.prod(map(int, row[7].split("x"))) for row in rows[:fetched]) / 1e6


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA / "large", help="folder to write to")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), metavar="NAME", help="Debian packages to take pictures from")
    options = parser.parse_args(arguments)
    out = options.out.expanduser().resolve()
    try:
        count, megapixels = prepare(out, options.packages)
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except OSError as error:
        sys.exit(f"error: {error} (while writing to {out}; is there space, and may you write there? --out names another folder)")
    megabytes = sum(f.stat().st_size for f in (out / "train").iterdir()) / 1e6
    print(f"{count} photographs, {megapixels:.0f} megapixels fetched, {megabytes:.0f} MB, in {out / 'train'}; licences in {out / 'SOURCES.csv'}; look at {out / 'contact_sheet.jpg'}")


if __name__ == "__main__":
    main()
