"""Makes text that is not ours safe to show: what a model writes, data, paths and names."""

import re
import unicodedata

_SUSPECT = re.compile(r'[^\n\t -~]')
_HIDDEN = ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')  # categories: controls, format characters, surrogates, line and paragraph separators
# Format characters that text needs and that mislead nobody: the soft hyphen, joiners of scripts and emoji, tags of flags.
_KEPT = {'\u00ad', '\u200c', '\u200d', *map(chr, range(0xE0020, 0xE0080))}


def printable(text: str, line: bool = False) -> str:
    r"""The text with control characters escaped, so that no terminal obeys them and no reader is misled.

    Escaped are the controls of ASCII and Latin-1, ESC among them, marks that change the direction of text, other invisible
    format characters, line and paragraph separators, and lone surrogates. Newlines and tabs stay.

    >>> printable('\x1b]0;own\x07')
    '\\x1b]0;own\\x07'

    Args:
      line: The text must stay on one line: newlines and tabs are escaped too.
    """
    text = _SUSPECT.sub(_escaped, text)
    return text.replace('\n', '\\n').replace('\t', '\\t') if line else text


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if unicodedata.category(character) not in _HIDDEN or character in _KEPT:
        return character
    return character.encode('unicode_escape').decode()
