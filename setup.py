"What the package needs comes from `settings.ini`; `pyproject.toml` names the rest and configures nbdev."
from configparser import ConfigParser
from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
with open('settings.ini', encoding='utf-8') as f: parser.read_file(f)
cfg = parser['DEFAULT']
lib = cfg['lib_path']
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
extras['dev'] = sorted({r for name, rs in extras.items() if name != 'memory' for r in rs})
setup(
    keywords=cfg['keywords'].split(),
    packages=find_packages(include=[lib, f'{lib}.*']), include_package_data=False,
    package_data={lib: ['weights/*/*.safetensors', 'weights/*/*.json', 'weights/*/*.md', 'weights/*/*/*.safetensors', 'weights/*/*/*.json', 'assets/*.html', 'assets/*.json']},
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'nbdev': [f'{lib} = {lib}._modidx:d']},
)
