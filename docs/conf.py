"Sphinx: called by docs/render.py on the pages that it wrote."
import os
from pathlib import Path

project, author, copyright = 'framer', 'framer contributors', '2026, framer contributors'
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.mathjax']
html_theme, html_title = 'furo', 'framer'
html_static_path = [p for p in ['custom.css', '_static'] if (Path(__file__).parent/p).exists()]
html_css_files = ['custom.css']
html_show_sphinx = False
html_theme_options = dict(source_repository='https://github.com/framer-sr/framer', source_branch='main', source_directory='nbs/', top_of_page_buttons=[])
if os.environ.get('FRAMER_DOCS_MATHJAX', 'npm') != 'cdn': mathjax_path = 'tex-svg.js'   # one file beside the pages: mathematics without a network
nb_execution_mode = 'off'            # pages show the outputs that are stored in the notebooks
nb_merge_streams = True
nb_output_stderr = 'remove'          # warnings of somebody's machine are no documentation
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']
root_doc = 'index'
