"""Pages of the site that are no files of docs/: the README as its home, and a reference page for each room of the package."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'llama2_jax'


def on_config(config):
    """Lists the reference pages in the navigation."""
    config.nav.append({'Reference': [{title: f'reference/{title}.md'} for title in _reference()]})
    return config


def on_files(files, config):
    """Adds the home page and the reference pages."""
    readme = (ROOT / 'README.md').read_text()
    pages = {'index.md': re.sub(r'\]\((?!http|#)', '](../', readme).replace('](../docs/', '](')}
    for title, modules in _reference().items():
        pages[f'reference/{title}.md'] = f'# {title}\n\n' + '\n\n'.join(f'::: {module}' for module in modules) + '\n'
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links out of docs/ at the repository."""
    return re.sub(r'\]\(\.\./', f']({config.repo_url}/blob/main/', markdown)


def _reference():
    """The modules of each room, by the name of the room."""
    rooms = {'llama2_jax': ['llama2_jax', *(f'llama2_jax.{path.stem}' for path in sorted(PACKAGE.glob('[a-z]*.py')))]}
    for room in sorted(path.parent for path in PACKAGE.glob('*/__init__.py')):
        paths = sorted(room.rglob('*.py'), key=lambda path: (path.stem != '__init__', path))
        names = ['.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for path in paths]
        rooms[room.name] = [name for name, path in zip(names, paths, strict=True) if path.read_text().strip()]
    return rooms
