"""Every figure and table of the paper at tiny scale: `python docs/reports.py` from the project root.

docs/reports.json lists the jobs: a name, a notebook, its parameters, the jobs it needs, the files it leaves. A training run is done when it finished with these parameters; any other
job is done when its files are there and neither its notebook nor its parameters nor the library nor a job it needs has changed since. So a second call does what is missing, and a call that was
interrupted goes on. At the end reports/index.html links every figure to its notebook and its runs."""
import argparse, hashlib, json, os, shutil, subprocess, sys, threading, time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from html import escape
from pathlib import Path
from framer.figures import machine, read_figures
from framer.report import render_report
from framer.runs import RunLock, RunLocked, environment, project_root, write_json

FIELDS = {'name', 'title', 'notebook', 'kind', 'parameters', 'needs', 'outputs', 'like'}
KINDS = {'run': 'Runs', 'figures': 'Figures', 'page': 'Tables and pages'}   # another kind gets a heading of its own name

def read_jobs(path):
    "The jobs of a list, complete: name -> dictionary. `ValueError` naming what is wrong with which."
    listed, jobs = json.loads(Path(path).read_text()), {}
    for given in listed['jobs']:
        base = listed.get('shared', {}).get(given.get('like'), {})
        if given.get('like') and not base: raise ValueError(f"{path}: job {given.get('name')!r} is like {given['like']!r}, which is not in `shared`")
        job = {'kind': 'page', 'needs': [], **base, **given, 'parameters': {**base.get('parameters', {}), **given.get('parameters', {})}}
        name = job.get('name', '')
        if unknown := set(job) - FIELDS: raise ValueError(f'{path}: job {name!r} has unknown {", ".join(sorted(unknown))}; known are {", ".join(sorted(FIELDS))}')
        if not name or name in jobs or not job.get('notebook'): raise ValueError(f'{path}: each job needs a name of its own and a notebook, got {given}')
        if job['kind'] == 'run':
            job['parameters'].setdefault('run', name)
            job.setdefault('outputs', [f'reports/{name}/metrics.json', f'reports/{name}/model/config.json'])
        if not job.get('outputs'): raise ValueError(f'{path}: job {name!r} has no outputs, so nobody could tell whether it is done')
        job['out'] = f"reports/{name}/{Path(job['notebook']).name}"
        jobs[name] = job
    for name, job in jobs.items():
        if lost := [n for n in job['needs'] if list(jobs).index(n) >= list(jobs).index(name)] if set(job['needs']) <= set(jobs) else sorted(set(job['needs']) - set(jobs)):
            raise ValueError(f'{path}: job {name!r} needs {", ".join(lost)}, which is not listed before it')
    return jobs

def digest(job, jobs, root):
    "What a job's result depends on: of a run its records; else the notebook's cells, the parameters, the library, and the same of what it needs."
    path = root/(job['notebook'] if job['kind'] != 'run' else job['outputs'][0])
    if not path.is_file(): return ''
    if job['kind'] == 'run': return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    cells = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    return hashlib.sha256(json.dumps([cells, job['parameters'], library(root), [digest(jobs[n], jobs, root) for n in job['needs']]], sort_keys=True).encode()).hexdigest()[:16]

class State:
    "reports/gallery/jobs.json: what was done, when, and how long it took. Written whole after every job."
    def __init__(self, root):
        self.path, self.lock = root/'reports/gallery/jobs.json', threading.Lock()
        self.rows = json.loads(self.path.read_text()) if self.path.is_file() else {}
    def put(self, name, **row):
        with self.lock:
            self.rows[name] = row
            self.path.parent.mkdir(parents=True, exist_ok=True); write_json(self.path, self.rows)

def library(root):
    "A digest of the package's modules."
    return hashlib.sha256(b''.join(p.read_bytes() for p in sorted((root/'framer').glob('*.py')))).hexdigest()[:16]

def finished(job, root):
    "Did this run reach its last step with these parameters?"
    folder = root/'reports'/job['name']
    try: record, metrics = (json.loads((folder/f).read_text()) for f in ('config.json', 'metrics.json'))
    except (OSError, ValueError): return False
    asked = {k: v for k, v in job['parameters'].items() if k != 'resume'}
    return metrics.get('steps') == record['config'].get('steps') and all(record['config'].get(k) == v for k, v in asked.items())

def is_done(job, jobs, state, root):
    row = state.rows.get(job['name'], {})
    if job['kind'] == 'run': return finished(job, root) and all((root/o).exists() for o in job['outputs'])
    return row.get('status') == 'done' and row.get('digest') == digest(job, jobs, root) and all((root/o).exists() for o in job['outputs'])

def wanted(jobs, only):
    "The chosen jobs and what they need, in the list's order."
    if unknown := [n for n in only if n not in jobs]: sys.exit(f'no job {", ".join(unknown)}; there are {", ".join(jobs)}')
    chosen = set(only or jobs)
    while more := {n for name in chosen for n in jobs[name]['needs']} - chosen: chosen |= more
    return [n for n in jobs if n in chosen]

def move_aside(job, root):
    "Before a run is made anew: its folder gets another name, and nothing is lost."
    folder = root/'reports'/job['name']
    if job['kind'] != 'run' or not folder.exists(): return
    k = next(k for k in range(1, 10**6) if not folder.with_name(f'{folder.name}.old-{k}').exists())
    folder.rename(folder.with_name(f'{folder.name}.old-{k}'))

def records_only(job, root):
    "A run's folder without a checkpoint, as a fresh clone has it: there is nothing to go on from."
    folder = root/'reports'/job['name']
    return job['kind'] == 'run' and (folder/'config.json').is_file() and not any((folder/'checkpoints').glob('step-*'))

CHILDREN = set()

def papermill(job, root, threads):
    "Execute a job's notebook; the status, the processor's seconds and the path of the log."
    out = root/job['out']; out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix('.log')
    command = [sys.executable, '-m', 'papermill', str(root/job['notebook']), str(out), '-k', 'python3', '--no-progress-bar', '-y', json.dumps(job['parameters'])]
    with open(log, 'w') as file:
        child = subprocess.Popen(command, cwd=root, env=dict(os.environ, OMP_NUM_THREADS=str(threads)), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        CHILDREN.add(child)
        try:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, usage.ru_utime + usage.ru_stime, log
        finally: CHILDREN.discard(child)

def do(job, jobs, state, root, threads):
    "One job; True when it left everything that it should."
    if records_only(job, root): move_aside(job, root)
    began, mark, commit = time.time(), digest(job, jobs, root), environment()['git']
    status, cpu, log = papermill(job, root, threads)
    if job['kind'] == 'run': mark = digest(job, jobs, root)   # its records are there only now
    missing = [o for o in job['outputs'] if not (root/o).exists()]
    seconds, ok = time.time() - began, status == 0 and not missing
    if (root/job['out']).is_file():
        try: render_report(root/job['out'])
        except ValueError as e: print(f"  {job['name']}: no page of the executed notebook ({e})")
    state.put(job['name'], status='done' if ok else 'failed', digest=mark, seconds=round(seconds, 1), cpu_seconds=round(cpu, 1), commit=(commit or {}).get('commit'), finished=time.strftime('%Y-%m-%dT%H:%M:%S%z'))
    if ok: print(f"  {job['name']}: {seconds:.0f} s", flush=True)
    else:
        print(f"  {job['name']}: FAILED" + (f' (status {status})' if status else f", no {', '.join(missing)}") + f'; the end of {log}:', flush=True)
        print('\n'.join('    ' + l for l in log.read_text(errors='replace').splitlines()[-12:]), flush=True)
    return ok

def run_all(names, jobs, state, root, workers, threads):
    "Jobs as soon as what they need is done, `workers` at a time; the names of those that failed or could not start."
    todo, failed, running = list(names), [], {}
    with ThreadPoolExecutor(workers) as pool:
        while todo or running:
            for name in list(todo):
                needs = jobs[name]['needs']
                if any(n in failed for n in needs): print(f"  {name}: left out, it needs {', '.join(n for n in needs if n in failed)}"); todo.remove(name); failed.append(name)
                elif len(running) < workers and not any(n in todo or n in running.values() for n in needs):
                    todo.remove(name); running[pool.submit(do, jobs[name], jobs, state, root, threads)] = name
            if not running: continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                if not future.result(): failed.append(name)
    return failed

# -- the page

CSS = '''body{max-width:62rem;margin:2rem auto;padding:0 1rem;font:16px/1.6 system-ui,sans-serif;color:#222;background:#fff}figure{margin:2.5rem 0}img{max-width:100%;height:auto}figcaption{font-size:14px}
a{color:#0173b2}table{border-collapse:collapse;font-size:14px}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}code{font-size:13px}nav a{margin-right:.9rem}
.failed{color:#b00020}@media(prefers-color-scheme:dark){body{background:#131416;color:#d9d9d9}a{color:#56b4e9}td,th{border-color:#3a3b3d}.failed{color:#ff8c8c}}'''

def link(path, root, words=''):
    "A link from reports/ to a file of the project; the words alone where there is no such file."
    path = Path(path)
    if not (root/path).exists(): return escape(words or path.as_posix())
    return f'<a href="{escape(os.path.relpath(root/path, root/"reports"))}">{escape(words or path.as_posix())}</a>'

def run_links(run, root):
    "A run by name, its report and its records."
    name = run['run']
    page = next((p for p in (Path('reports')/name/'train.html', Path('reports')/name/'config.json', Path('reports')/name) if (root/p).exists()), Path('reports')/name)
    facts = ', '.join(f'{k} {run[k]}' for k in ('steps', 'seed') if run.get(k) is not None)
    return link(page, root, name) + (f' ({escape(facts)}; commit {escape((run.get("commit") or "unknown")[:10])})' if facts else '')

def figure_html(figure, jobs, root):
    "One figure or table: picture, caption, and links to everything that made it."
    place = Path(os.path.relpath(figure['folder'], root)); files = [place/f for f in figure['files']]
    png = next((f for f in files if f.suffix == '.png' and not f.stem.endswith('-dark')), None)
    dark = png.with_name(f'{png.stem}-dark.png') if png else None
    source = lambda f: escape(os.path.relpath(root/f, root/'reports'))
    if png: body = '<picture>' + (f'<source media="(prefers-color-scheme: dark)" srcset="{source(dark)}">' if (root/dark).exists() else '') + f'<img alt="{escape(figure["name"])}" src="{source(png)}"></picture>'
    else: body = markdown_table((root/files[0]).read_text())
    job = next((j for j in jobs.values() if j['notebook'] == figure['notebook']), None)
    executed = Path(job['out']).with_suffix('.html') if job else None
    made = link(figure['notebook'], root) + (f', {link(executed, root, "as it ran")}' if executed and (root/executed).exists() else '')
    runs = '; '.join(run_links(r, root) for r in figure['runs'])
    rest = ', '.join(link(f, root, f.name) for f in [*files, place/f'{figure["name"]}.json'])
    return f'<figure id="{escape(figure["name"])}">{body}<figcaption><p>{escape(figure["caption"])}</p><p>Notebook: {made}.' + (f' Runs: {runs}.' if runs else '') + f' Files: {rest}.</p></figcaption></figure>'

def markdown_table(text):
    "A Markdown table of ours as HTML."
    rows = [[c.strip() for c in l.strip().strip('|').split('|')] for l in text.splitlines() if l.startswith('|')]
    cell = lambda c: f'<b>{escape(c[2:-2])}</b>' if c.startswith('**') else escape(c)
    line = lambda cells, tag: '<tr>' + ''.join(f'<{tag}>{cell(c)}</{tag}>' for c in cells) + '</tr>'
    return '<table>' + line(rows[0], 'th') + ''.join(line(r, 'td') for r in rows[2:]) + '</table>'

def jobs_html(kind, jobs, state, root):
    "The jobs of one kind as a table."
    rows = []
    for job in (j for j in jobs.values() if j['kind'] == kind):
        row = state.rows.get(job['name'], {})
        page = Path(job['out']).with_suffix('.html')
        status = f"{row['seconds']:.0f} s ({row.get('cpu_seconds', 0):.0f} s of processor)" if row.get('status') == 'done' else 'finished before' if job['kind'] == 'run' and finished(job, root) else 'not run' if not row else '<span class="failed">failed</span>, ' + link(Path(job['out']).with_suffix('.log'), root, 'log')
        out = ', '.join(link(o, root, Path(o).name) for o in job['outputs'])
        parameters = ', '.join(f'{k}={json.dumps(v)}' for k, v in job['parameters'].items())
        rows.append(f'<tr><td>{link(page, root, job["title"])}</td><td>{link(job["notebook"], root)}<br><code>{escape(parameters)}</code></td><td>{out}</td><td>{status}</td></tr>')
    return '<table><tr><th>what</th><th>notebook and parameters</th><th>leaves</th><th>took</th></tr>' + ''.join(rows) + '</table>'

def write_index(jobs, state, root):
    "reports/index.html; its path."
    figures, here = read_figures(root/'reports/figures'), environment()
    git = here['git'] or {}
    total, cpu = (sum(r.get(k, 0) for r in state.rows.values()) for k in ('seconds', 'cpu_seconds'))
    body = [f'<h1>Figures and tables</h1><p>Made by <code>make reports</code> at commit {escape((git.get("commit") or "unknown")[:10])}, {here["date"]}, on {escape(machine(here["hardware"]))}, {here["hardware"]["cores"]} cores; '
            f'{total / 60:.0f} minutes of jobs, {cpu / 60:.0f} of them on the processor. Everything here is at tiny scale: small models, short training, few photographs.</p>',
            '<nav>' + ''.join(f'<a href="#{escape(f["name"])}">{escape(f["name"])}</a>' for f in figures) + '</nav>']
    body += [figure_html(f, jobs, root) for f in figures]
    for kind in dict.fromkeys([*KINDS, *(j['kind'] for j in jobs.values())]): body.append(f'<h2>{escape(KINDS.get(kind, kind))}</h2>' + jobs_html(kind, jobs, state, root))
    page = root/'reports/index.html'; partial = page.with_name('.index.html.partial')
    partial.write_text(f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Figures and tables</title><style>{CSS}</style></head><body>{"".join(body)}</body></html>\n', encoding='utf-8')
    partial.replace(page)
    return page

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--only', nargs='+', default=[], metavar='NAME', help='these jobs and what they need')
    ap.add_argument('--jobs', type=int, default=max(1, min(4, os.cpu_count() or 1)), help='how many at a time (default: a job a core, 4 at most)')
    ap.add_argument('--threads', type=int, default=1, help='threads of a job (runs are resumed only with the number they began with)')
    ap.add_argument('--force', action='store_true', help='do all of them again, or with --only the named ones; folders of runs are renamed, not removed')
    ap.add_argument('--list', action='store_true', help='say what there is to do, and do nothing')
    ap.add_argument('--index', action='store_true', help='only write reports/index.html anew')
    ap.add_argument('--file', default=str(Path(__file__).with_suffix('.json')), help='the list of jobs')
    args, root = ap.parse_args(argv), project_root()
    if args.jobs < 1 or args.threads < 1: ap.error('--jobs and --threads take a number from 1 up')
    try: jobs = read_jobs(args.file)
    except (OSError, ValueError, KeyError) as e: sys.exit(f'{e}')
    (root/'reports/gallery').mkdir(parents=True, exist_ok=True)
    names = wanted(jobs, args.only)
    if args.list or args.index:
        state = State(root)
        if args.list: print('\n'.join(f"{'done' if is_done(jobs[n], jobs, state, root) else 'to do':6} {n}: {jobs[n]['title']}" for n in names))
        if args.index: print(write_index(jobs, state, root))
        return 0
    try: lock = RunLock(root/'reports/gallery')
    except RunLocked as e: sys.exit(f'{e}')
    state, began = State(root), time.time()
    try:
        forced = (args.only or names) if args.force else []
        for n in forced: move_aside(jobs[n], root)
        todo = [n for n in names if n in forced or not is_done(jobs[n], jobs, state, root)]
        print(f'{len(todo)} of {len(names)} jobs to do, {args.jobs} at a time', flush=True)
        failed = run_all(todo, jobs, state, root, args.jobs, args.threads)
        page = write_index(jobs, state, root)
    except KeyboardInterrupt:
        for child in list(CHILDREN): child.terminate()
        sys.exit('\ninterrupted; the same command goes on from here')
    finally: lock.release()
    print(f'{time.time() - began:.0f} s; open {page}' + (f'\nfailed: {", ".join(failed)}' if failed else ''))
    return 1 if failed else 0

if __name__ == '__main__': sys.exit(main())
