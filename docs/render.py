"""The documentation site from the notebooks: `python docs/render.py [--out _docs] [--force]` from the project root.

nbdev prepares the pages (`proc_nbs`: signatures, links between pages), this file turns what nbdev wrote for Quarto into
MyST, and Sphinx builds it. Pages show the outputs that are stored in the notebooks. A warning is an error."""
import argparse, functools, os, re, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path
import nbformat as nf
from nbdev.config import get_config
from nbdev.serve import proc_nbs

HERE = Path(__file__).resolve().parent
PICTURES = 'reports-figures'   # beside the pages: the pictures of reports/figures
MATHJAX = HERE/'_static'/'tex-svg.js'
_directive = re.compile(r'^#\|\s*([\w-]+)\s*:?\s*(.*)$')

def mathjax():
    "MathJax as one file in docs/_static, taken from the npm registry once. FRAMER_DOCS_MATHJAX=cdn leaves it out."
    if os.environ.get('FRAMER_DOCS_MATHJAX', 'npm') == 'cdn' or MATHJAX.exists(): return
    way_out = f'install npm, or put tex-svg.js of MathJax 3 at {MATHJAX}, or set FRAMER_DOCS_MATHJAX=cdn (pages then need a network to show mathematics)'
    if not shutil.which('npm'): sys.exit(f'npm is not installed, and the pages need MathJax: {way_out}')
    with tempfile.TemporaryDirectory() as d:
        done = subprocess.run(['npm', 'pack', 'mathjax@3', '--silent'], cwd=d, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode: sys.exit(f'`npm pack mathjax@3` failed ({done.stderr.strip()[-300:]}): {way_out}')
        with tarfile.open(next(Path(d).glob('mathjax-*.tgz'))) as tar: script = tar.extractfile('package/es5/tex-svg.js').read()
    MATHJAX.parent.mkdir(exist_ok=True)
    part = MATHJAX.with_suffix('.part'); part.write_bytes(script); part.replace(MATHJAX)

def directives(source):
    "The `#| key: value` lines at the head of a cell, and the rest"
    lines = source.splitlines(); n = next((i for i, l in enumerate(lines) if not _directive.match(l)), len(lines))
    return dict(_directive.match(l).groups() for l in lines[:n]), '\n'.join(lines[n:])

def links(md, base):
    "nbdev's links to our own pages become page-relative; links between notebooks go to their pages; files outside nbs/ are shown by the repository's host, pictures of reports/figures by the page"
    md = re.sub(r'(!\[[^\]]*\])\(\.\./reports/figures/', rf'\1({PICTURES}/', md)   # write_pages copies them
    md = re.sub(r'\]\(\.\./nbs/(?=[\w-]+\.ipynb)', '](', md)
    md = re.sub(r'\]\(\.\./(?!\.)', '](' + get_config().git_url.rstrip('/') + '/blob/main/', md)
    md = re.sub(r'\]\(([\w-]+)\.ipynb', lambda m: f']({names().get(m[1], m[1])}.ipynb', md)
    return re.sub(r'\[`([^`]+)`\]\(' + re.escape(base) + r'(\S+?)\)', r'<a href="\2"><code>\1</code></a>', md)

def signature(md):
    "show_doc's Markdown as MyST: nbdev's own anchor name, dunders escaped, the source link at the right"
    md = re.sub(r'\A---\n+', '', md)
    md = re.sub(r'\[source\]\((\S+?)\)\{.*?\}', r'<a class="source" href="\1">source</a>', md)
    return re.sub(r'^(#+) (\S+)$', lambda m: f'<span id="{m[2]}"></span>\n\n{m[1]} {m[2].replace("__", chr(92)+"_"+chr(92)+"_")}', md, count=1, flags=re.M)

def front(source):
    "Quarto's front matter -> a title and a subtitle"
    fm = {k: v.strip("'\"") for k, v in re.findall(r'^([\w-]+): *(.*)$', source, re.M)}
    return nf.v4.new_markdown_cell(f"# {fm.get('title', '')}\n\n{fm.get('description', '')}")

def only_imports(source):
    return all(re.match(r'(from|import)\b|\s|[)\w]+,?\s*$|$|#', l) for l in source.splitlines())

def told_cells(nb):
    "What the directives of each cell of the notebook said, by the cell's source without them (nbdev takes them out)"
    return {source.strip(): told.keys() for told, source in (directives(c.source) for c in nb.cells if c.cell_type == 'code')}

def code_cell(cell, base, said):
    "One cell that nbdev left -> what the page shows: text for a signature, folded code for an exported cell"
    told, source = directives(cell.source)
    if told.get('output') == 'asis':
        md = ''.join(o.data.get('text/markdown', '') for o in cell.outputs if 'data' in o)
        return nf.v4.new_markdown_cell(links(signature(md), base)) if md else None
    exported = {'export', 'exporti'} & said.get(source.strip(), set())
    if {'hide', 'default_exp'} & said.get(source.strip(), set()) or not source.strip() or (exported and only_imports(source)): return None
    tags = ['hide-input'] if exported else ['remove-input'] if told.get('echo') == 'false' else []
    if 'remove-input' in tags and cell.outputs and all('text/markdown' in o.get('data', {}) for o in cell.outputs):   # text that code wrote is text of the page
        return nf.v4.new_markdown_cell(links('\n\n'.join(''.join(o.data['text/markdown']) for o in cell.outputs), base))
    outputs = [o for o in cell.outputs if 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]
    return nf.v4.new_code_cell(source, outputs=outputs, metadata=dict(tags=tags))

def convert(nb, base, original):
    "A notebook as nbdev processed it, and as it was written -> a MyST notebook"
    cells, said = [], told_cells(original)
    for c in nb.cells:
        if c.cell_type == 'raw' and c.source.startswith('---'): cells.append(front(c.source))
        elif c.cell_type == 'markdown' and 'AUTOGENERATED' not in c.source:
            cells.append(nf.v4.new_markdown_cell(links(c.source, base), **(dict(attachments=c.attachments) if c.get('attachments') else {})))
        elif c.cell_type == 'code' and (cell := code_cell(c, base, said)): cells.append(cell)
    # nbdev puts the signature below the cell that defines it; a reader wants it above
    for i in range(1, len(cells)):
        if cells[i].source.startswith('<span id=') and 'hide-input' in cells[i-1].metadata.get('tags', []): cells[i-1:i+1] = [cells[i], cells[i-1]]
    for i, c in enumerate(cells): c.id = f'c{i}'
    return nf.v4.new_notebook(cells=cells, metadata=dict(language_info=dict(name='python')))

def page_names(stems):
    "Notebook -> page. `18_figures` -> `figures`, the name that nbdev's links use; `figures` steps aside for it -> `figures-notebook`"
    modules = {s: re.sub(r'^\d+[a-z]?_', '', s) for s in stems if s[0].isdigit()}
    pages = {s: modules.get(s) or (f'{s}-notebook' if s in modules.values() else s) for s in stems}
    for page in pages.values():
        if len(same := [s for s in pages if pages[s] == page]) > 1: raise ValueError(f'{", ".join(f"{s}.ipynb" for s in sorted(same))} would all be the page {page}.html: give them names of their own')
    return pages

@functools.cache
def names():
    "The pages of this project's notebooks"
    return page_names([p.stem for p in get_config().nbs_path.glob('*.ipynb')])

def contents(notebooks):
    "The side bar: first the notebooks that do a job, then the modules in reading order"
    jobs = [n for n in notebooks if not n[0].isdigit() and n != 'index']
    first = ['train', 'upscale', 'pretrain', 'small_models', 'prepare', 'recipes', 'caption', 'evaluate', 'user_study', 'compare', 'figures', 'stability', 'qualitative', 'gallery', 'ablate', 'hypotheses']
    jobs.sort(key=lambda n: (first.index(n) if n in first else len(first), n))
    tree = lambda caption, names: f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(names) + '\n```\n' if names else ''
    return tree('Notebooks', [names()[n] for n in jobs]) + '\n' + tree('Modules', [names()[n] for n in notebooks if n[0].isdigit()])

def write_pages(cfg, cache):
    "All pages for Sphinx in _proc/_sphinx"
    pages = cfg.config_path/'_proc'/'_sphinx'; shutil.rmtree(pages, ignore_errors=True); pages.mkdir()
    base = cfg.doc_url.rstrip('/') + '/'
    notebooks = sorted(p for p in cache.glob('*.ipynb') if p.stem in names())   # the cache may still hold a notebook that is gone
    for p in notebooks:
        nb = convert(nf.read(p, 4), base, nf.read(cfg.nbs_path/p.name, 4))
        if p.stem == 'index': nb.cells.append(nf.v4.new_markdown_cell(contents([n.stem for n in notebooks]), id='contents'))
        nf.write(nb, pages/(names()[p.stem] + '.ipynb'))
    if (cache/'images').is_dir(): shutil.copytree(cache/'images', pages/'images')
    pictures = cfg.config_path/'reports'/'figures'
    if pictures.is_dir(): shutil.copytree(pictures, pages/PICTURES, ignore=shutil.ignore_patterns('*.md', '*.json'))
    return pages

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--out', default='_docs', help='folder for the site')
    ap.add_argument('--force', action='store_true', help='process every notebook anew')
    args = ap.parse_args()
    cfg = get_config()
    try: names()
    except ValueError as e: sys.exit(f'{e}')
    mathjax()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    pages = write_pages(cfg, proc_nbs(n_workers=min(4, os.cpu_count() or 1), force=args.force))
    out = (cfg.config_path/args.out).resolve()
    execute = out.parent/'jupyter_execute'; existed = execute.exists()   # myst-nb makes this folder although nothing is executed
    code = subprocess.call([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-c', str(HERE), '-d', str(pages.parent/'_doctrees'), str(pages), str(out)])
    if not existed: shutil.rmtree(execute, ignore_errors=True)
    if not code: print(f'documentation: {out/"index.html"}')
    return code

if __name__ == '__main__': sys.exit(main())
