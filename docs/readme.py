"README.md from nbs/index.ipynb: `python docs/readme.py [--check]` from the project root. --check only says whether it is up to date."
import difflib, re, sys
import nbformat as nf
from nbconvert import MarkdownExporter
from nbdev.config import get_config

def readme(cfg):
    "The text of README.md; pictures and links to notebooks are given from the root"
    nb = nf.read(cfg.nbs_path/cfg.readme_nb, 4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
    for c in nb.cells:
        if c.cell_type != 'code': continue
        if re.search(r'^#\|\s*echo:\s*false', c.source, re.M):  # what it says stands there, not how it came to say it
            c.cell_type, c.source = 'markdown', '\n\n'.join(''.join(o.data['text/markdown']) for o in c.outputs if 'text/markdown' in o.get('data', {}))
            del c['outputs'], c['execution_count']; continue
        c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
        c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
    nb.metadata['language_info'] = dict(name='python')
    md, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'): sys.exit(f'a picture drawn in {cfg.readme_nb} has no place in README.md: store it in nbs/images/ and link to it')
    md = re.sub(r'\]\((?=images/|[\w-]+\.ipynb)', '](nbs/', md)
    md = re.sub(r'\]\(\.\./', '](', md)
    return re.sub(r'\n{3,}', '\n\n', md).strip() + '\n'

if __name__ == '__main__':
    cfg = get_config(); path = cfg.config_path/'README.md'; new, old = readme(cfg), path.read_text() if path.exists() else ''
    if '--check' not in sys.argv: path.write_text(new)
    elif new != old:
        sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), 'README.md', 'nbs/index.ipynb'))
        sys.exit('README.md is out of date: run `python docs/readme.py` after a change of nbs/index.ipynb')
