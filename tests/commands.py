"""The commands that Markdown files show, and whether our programs would take them: python commands.py < lines of JSON.

Each line of the input is [script of experiments, arguments]; each line of the output says what is wrong with it, or nothing.
"""

import ast
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = r'python |make |tpu_setup/|pip install '
_START = re.compile(rf'(?:[A-Z_0-9]+=\S+ )*(?:{PROGRAMS})')


def blocks(path):
    """The fenced blocks of a Markdown file: (language, text)."""
    return re.findall(r'^```(\w*)\n(.*?)^```', path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path):
    """The commands of a Markdown file, as words: those of its blocks, fenced or indented, and those between backticks."""
    prose = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.MULTILINE | re.DOTALL)
    shown = [text for language, text in blocks(path) if language != 'python']
    shown += [line for line in re.sub(r'\\\n\s*', '', prose).splitlines() if line.startswith('    ')]
    lines = iter(re.sub(r'\\\n\s*', '', '\n'.join(shown)).splitlines())
    found = [text for text in re.findall(r'`([^`\n]+)`', prose) if _START.match(text)]
    for line in lines:
        if _START.match(line.strip()):
            while line.count("'") % 2:  # it goes on
                more = next(lines, None)
                assert more is not None, f'{path}: a quote or an apostrophe without its like in {line!r}'
                line += '\n' + more
            found.append(line)
    return [words for text in found for words in split(text)]


def split(text):
    """A line as the words of its commands; what stands inside another command's quotes is a command, too."""
    words = [word for word in shlex.split(text, comments=True) if word != '…']
    while words and re.fullmatch(r'[A-Z_0-9]+=.*', words[0]):
        words.pop(0)
    inner = [word for word in words if word.startswith('python ')]
    return [words, *(nested for word in inner for nested in split(word))]


def flags_of(script):
    """The names of flags that a script defines at its top, without running it."""
    calls = (node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call))
    defined = ('DEFINE_', 'add_argument')
    return {call.args[0].value.lstrip('-') for call in calls if getattr(call.func, 'attr', '').startswith(defined)}


def fault(script, arguments):
    """What a program of experiments has against these arguments, without doing anything; '' if nothing."""
    from absl import flags

    from llama2_jax.config import UserError, override

    try:
        rest = flags.FLAGS([script, *arguments])[1:]
        if rest:
            return f'unexpected {rest}'
        if presets := PRESETS[script]:
            if flags.FLAGS.config not in presets:
                return f'no preset {flags.FLAGS.config}'
            override(presets[flags.FLAGS.config](), flags.FLAGS['set'].value)
            if not (flags.FLAGS.workdir or flags.FLAGS.dry_run):
                return 'no --workdir'
    except (flags.Error, UserError) as error:
        return str(error)
    finally:
        flags.FLAGS.unparse_flags()
    return ''


PRESETS = {}


def load(script):
    """Defines the flags of a program in place of those of the previous one."""
    from absl import flags

    for name in list(flags.FLAGS):
        if name in LOADED:
            delattr(flags.FLAGS, name)
    before = set(flags.FLAGS)
    PRESETS[script] = runpy.run_path(str(ROOT / 'experiments' / script), run_name='__main__').get('PRESETS', {})
    LOADED.clear()
    LOADED.update(set(flags.FLAGS) - before)


LOADED = set()


def main():
    """Reads commands and prints what is wrong with them."""
    sys.path.insert(0, str(ROOT / 'experiments'))
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    import common

    common.quietly = lambda main: None  # flags are defined, and nothing is run
    given = [json.loads(line) for line in sys.stdin]
    for script in sorted({script for script, _ in given}):
        load(script)
        for other, arguments in given:
            if other == script:
                print(json.dumps([script, arguments, fault(script, arguments)]))


if __name__ == '__main__':
    main()
