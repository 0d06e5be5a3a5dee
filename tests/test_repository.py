"Notebooks, library, packaging and README say the same thing; imports keep to their floors."
import ast, configparser, filecmp, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
NUMBERED = [p for p in NOTEBOOKS if p.name[0].isdigit()]
JOBS = [p for p in NOTEBOOKS if p.stem in ("train", "upscale", "train_autoencoder", "compare", "prepare", "caption", "evaluate", "user_study", "degradation_benchmark", "ablate", "figures", "stability", "qualitative", "pretrain", "small_models", "cost")]
MODULES = sorted(p for p in (ROOT / "framer").glob("*.py") if not p.stem.startswith("_"))
NBDEV = [sys.executable, "-c", "import sys; from importlib.metadata import entry_points as e; f = next(p for p in e(group='console_scripts') if p.name == sys.argv[1]).load(); sys.argv = sys.argv[1:]; f()"]

# imports go down only; the modules of the lowest floor know nothing of each other
FLOORS = {
    0: "kernels jpeg photographs metric_weights tiling",
    1: "masks losses modulation heads hooks gram late degradation metrics parameters report",
    2: "distill",
    3: "sd2 sd3 onestep pisasr dit4sr scales backbones autoencoder objectives datasets sources shards pairs captions cache runs testsets",
    4: "training sampling pipelines evaluation comparison study inventory figures analysis ablation cost roofline small",
}
FLOOR = {m: n for n, names in FLOORS.items() for m in names.split()}
PLUG_AND_PLAY = ["masks", "losses", "modulation", "heads", "hooks", "gram", "late", "distill"]   # these need torch alone
METHOD = {"masks", "losses", "modulation", "heads", "hooks", "gram", "late", "distill"}          # a backbone knows nothing of FRAMER


def names(paths): return [p.name for p in paths]
def cells(path): return json.loads(path.read_text())["cells"]
def source(cell): return "".join(cell["source"])
def is_export(cell): return cell["cell_type"] == "code" and bool(re.match(r"(#\|.*\n)*#\|\s*exporti?\b", source(cell)))
def plain_python(cell): return "\n".join(l for l in source(cell).splitlines() if not re.match(r"\s*(?:%%?|!)\w", l))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "What nbdev reads, elsewhere: the work tree stays as it is."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md"): shutil.copy2(ROOT / name, folder)
    (folder / "nbs").mkdir(); (folder / "framer").mkdir()
    for p in NOTEBOOKS: shutil.copy2(p, folder / "nbs")
    shutil.copy2(ROOT / "framer/__init__.py", folder / "framer")
    return folder


def run(*command, cwd): return subprocess.run([*map(str, command)], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


# -- notebooks and library

def test_library_is_what_the_notebooks_export(copy):
    done = run(*NBDEV, "nbdev-export", cwd=copy)
    assert done.returncode == 0, done.stderr[-3000:]
    made, kept = ({p.name for p in (d / "framer").glob("*.py")} for d in (copy, ROOT))
    assert made == kept, f"only exported: {made - kept}; only in framer/: {kept - made}. Run nbdev-export"
    differ = [n for n in sorted(made) if not filecmp.cmp(copy / "framer" / n, ROOT / "framer" / n, shallow=False)]
    assert differ == [], f"out of step with nbs/: {differ}. Edit the notebook and run nbdev-export (nbdev-update carries an edit of the module back)"


def test_notebooks_are_clean(copy):
    done = run(*NBDEV, "nbdev-clean", cwd=copy)
    assert done.returncode == 0, done.stderr[-3000:]
    dirty = [p.name for p in NOTEBOOKS if json.loads(p.read_text()) != json.loads((copy / "nbs" / p.name).read_text())]
    assert dirty == [], f"not clean: {dirty}. Run nbdev-clean (nbdev-install-hooks does it on every save)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_small(path):
    assert path.stat().st_size <= 500_000, f"{path.name} has {path.stat().st_size // 1000} KB: draw smaller figures (dpi 80-100)"


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_numbered_notebook_is_one_module(path):
    exports = [m for c in cells(path) if c["cell_type"] == "code" for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M)]
    assert exports == [re.sub(r"^\d+[a-z]?_", "", path.stem)]


def test_other_notebooks_export_nothing():
    assert [p.name for p in NOTEBOOKS if p not in NUMBERED and any(is_export(c) or "default_exp" in source(c) for c in cells(p))] == []


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_notebook_reads_like_an_article(path):
    found = cells(path)
    lengths = sorted(len(source(c).splitlines()) for c in found if is_export(c))
    prose, shown = sum(c["cell_type"] == "markdown" for c in found), sum(bool(c.get("outputs")) for c in found)
    assert lengths[len(lengths) // 2] <= 12, f"median exported cell: {lengths[len(lengths) // 2]} lines"
    assert lengths[-1] <= 40, f"longest exported cell: {lengths[-1]} lines"
    assert prose >= len(lengths), f"{prose} prose cells for {len(lengths)} exported ones"
    assert shown >= len(lengths) / 3, f"{shown} cells with an output for {len(lengths)} exported ones"
    assert re.match(r"# .+\n\n> .+", source(found[0])), "the first cell is `# Title` and `> one line`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_import_cells_hold_imports_only(path):
    "The documentation runs every cell that has an import; one that needs more than imports would fail there."
    for c in cells(path):
        if c["cell_type"] != "code" or "nbdev_export" in source(c): continue
        body = ast.parse(plain_python(c)).body
        if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body):
            assert not [n for n in body if isinstance(n, (ast.Expr, ast.Assign)) and not isinstance(getattr(n, "value", None), ast.Constant)], f"imports and other code in one cell:\n{source(c)}"


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.stem)
def test_job_keeps_its_parameters_cell(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{path.name} needs one cell tagged `parameters`: without it papermill's values are overwritten by the defaults"
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"


def test_jobs_exist():
    assert set(names(JOBS)) >= {"train.ipynb", "upscale.ipynb"}


# -- README and packaging

def test_readme_is_made_from_the_index():
    done = run(sys.executable, "docs/readme.py", "--check", cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_settings_and_pyproject_agree_and_share_no_fact():
    settings = configparser.ConfigParser(delimiters=["="]); settings.read(ROOT / "settings.ini", encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["DEFAULT"]["lib_path"] == project["tool"]["nbdev"]["lib_path"] == "framer"
    assert project["project"]["name"] == "framer-sr" and project["project"]["license"] == "Apache-2.0"
    assert {"version", "dependencies", "optional-dependencies", "keywords"} <= set(project["project"]["dynamic"])
    assert not {"version", "dependencies", "optional-dependencies", "keywords"} & set(project["project"])
    assert not {"version", "description", "author", "license", "git_url", "doc_host"} & set(settings["DEFAULT"]), "these stand in pyproject.toml and framer/__init__.py"


def test_version_stands_in_one_place():
    version = re.fullmatch(r'__version__ = "([\d.]+\w*)"\n', (ROOT / "framer/__init__.py").read_text())
    assert version, "framer/__init__.py holds the version alone"
    assert re.search(rf"^## {re.escape(version[1])}\b", (ROOT / "CHANGELOG.md").read_text(), re.M), f"CHANGELOG.md has no entry for {version[1]}"
    import framer
    assert framer.__version__ == version[1]


def test_built_packages_hold_weights_and_modules(tmp_path):
    "The wheel is built from the source distribution, so both are complete when the wheel is."
    import zipfile
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    if not listed[0]: pytest.skip("not a git checkout: built packages are tested in one")
    for name in filter(None, listed):
        if name.split("/")[0] in ("framer", "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md") and (ROOT / name).is_file():
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(ROOT / name, tmp_path / "src" / name)
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, tmp_path / "src", cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    inside = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    want = {str(p.relative_to(ROOT)) for p in (ROOT / "framer").rglob("*") if p.suffix in (".py", ".safetensors", ".json")}
    assert want - inside == set(), "not in the wheel"


# -- imports

def imported(path):
    "Modules of this package that a module imports, at any depth of its code"
    for n in ast.walk(ast.parse(path.read_text())):
        if isinstance(n, ast.ImportFrom) and n.level == 1: yield from [n.module.split(".")[0]] if n.module else [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "framer": yield from [n.module.split(".")[1]] if "." in n.module else [a.name for a in n.names]
        elif isinstance(n, ast.Import): yield from (a.name.split(".")[1] for a in n.names if a.name.startswith("framer."))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_go_down_only(path):
    assert path.stem in FLOOR, f"{path.stem} has no floor yet: give it one in {Path(__file__).name}"
    mine, others = FLOOR[path.stem], set(imported(path)) - {"__version__"}
    assert [o for o in others if FLOOR[o] > mine] == [], "imports upwards"
    if mine <= 2: assert [o for o in others if FLOOR[o] == mine] == [], "modules of this floor know nothing of each other"
    if mine == 3: assert others & METHOD == set(), "a backbone, a dataset and a run know nothing of FRAMER"


def test_imports_have_no_circle():
    graph, done = {p.stem: set(imported(p)) - {"__version__"} for p in MODULES}, set()
    while ready := [m for m in graph if m not in done and graph[m] <= done]: done.update(ready)
    assert set(graph) - done == set(), "these import each other in a circle"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_star_imports(path):
    for c in cells(path):
        if c["cell_type"] == "code": assert not re.search(r"^\s*from\s+\S+\s+import\s+\*", source(c), re.M), source(c)[:200]


def outside(code):
    "Top-level names that a piece of code imports from neither the standard library nor this package"
    for n in ast.walk(ast.parse(code)):
        found = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module] if isinstance(n, ast.ImportFrom) and not n.level else []
        yield from (m.split(".")[0] for m in found if m.split(".")[0] not in {*sys.stdlib_module_names, "framer"})


@pytest.mark.parametrize("path", MODULES + JOBS, ids=lambda p: p.name)
def test_what_is_imported_is_declared(path):
    settings = configparser.ConfigParser(delimiters=["="]); settings.read(ROOT / "settings.ini", encoding="utf-8")
    declared = {re.split(r"[<>=!~\[;]", r)[0].lower() for k, v in settings["DEFAULT"].items() if k.endswith("requirements") and k != "dev_requirements" for r in v.split()}
    code = [path.read_text()] if path.suffix == ".py" else [plain_python(c) for c in cells(path) if c["cell_type"] == "code"]
    used = {{"PIL": "pillow", "IPython": "ipython", "matplotlib_inline": "matplotlib-inline"}.get(m, m) for c in code for m in outside(c)}
    assert used - declared == set(), "imported, but in no extra of settings.ini"


TORCH_ALONE = """
import sys
from importlib.metadata import requires
def top(name): return name.lower().replace("-", "_")
allowed = set(sys.stdlib_module_names) | {"torch", "torchgen", "functorch", "framer", "setuptools", "pkg_resources", "_distutils_hack", "mpmath", "markupsafe", "nvidia", "cuda"}
allowed |= {top(r.split(";")[0].split("=")[0].split("<")[0].split(">")[0].split("[")[0].split("!")[0].strip()) for r in requires("torch") or [] if "extra ==" not in r}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed and not name.startswith("__editable__"): raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Refuse())
"""

WITHOUT_NETWORK = """
import socket
def refuse(*args, **kw): raise AssertionError(f"reached for the network: {args[1:]}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = lambda *a, **kw: refuse(None, *a)
"""


def test_the_core_needs_torch_alone():
    use = "\n".join(f"import framer.{m}" for m in PLUG_AND_PLAY if (ROOT / "framer" / f"{m}.py").exists()) + """
import torch
from framer.distill import FramerConfig, distillation
done = distillation([torch.randn(2, 4, 8, 8, requires_grad=i < 2) for i in range(3)], FramerConfig())
done.loss.backward()
bad = [m for m in ("numpy", "diffusers", "fastcore", "PIL") if m in sys.modules]
assert not bad, bad
print(float(done.loss))"""
    done = run(sys.executable, "-W", "ignore", "-c", TORCH_ALONE + use, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_import_reaches_for_a_network():
    code = WITHOUT_NETWORK + "import importlib\nfor m in sys.argv[1:]: print(m, flush=True); importlib.import_module('framer.' + m)"
    done = run(sys.executable, "-W", "ignore", "-c", "import sys\n" + code, *(p.stem for p in MODULES), cwd=ROOT)
    assert done.returncode == 0, f"importing {done.stdout.split()[-1:]}:\n{done.stderr[-3000:]}"
