"""Final answers of MATH in one spelling, as Minerva compares them (Lewkowycz et al. 2022, appendix D)."""

import itertools
import re
from fractions import Fraction

from llama2_jax.evals.answers import SHORT, statements

_REPLACED = (
    ('an ', ''), ('a ', ''), ('.$', '$'), ('\\$', ''), ('\\ ', ''), (' ', ''), ('mbox', 'text'), (',\\text{and}', ','),
    ('\\text{and}', ','), ('\\text{m}', '\\text{}'), ('\\left', ''), ('\\right', ''), ('dfrac', 'frac'), ('tfrac', 'frac'),
    ('\\!', ''), ('\\%', ''), ('%', ''),
)  # fmt: skip
_UNITS = (
    'square', 'ways', 'integers', 'dollars', 'mph', 'inches', 'ft', 'hours', 'km', 'units', '\\ldots', 'sue', 'points', 'feet',
    'minutes', 'digits', 'cents', 'degrees', 'cm', 'gm', 'pounds', 'meters', 'meals', 'edges', 'students', 'childrentickets',
    'multiples', '\\text{s}', '\\text{.}', '\\text{\ns}', '\\text{}^2', '\\text{}^3', '\\text{\n}', '\\text{}', '\\mathrm{th}',
    '^\\circ', '^{\\circ}', '\\;', ',\\!', '{,}', '"', '\\dots',
)  # fmt: skip


_SPELLINGS = (
    ('\u2212', '-'), ('π', '\\pi'), ('√', '\\sqrt'), ('∞', '\\infty'), ('°', '^\\circ'), ('\\degree', '^\\circ'),
    ('×', '\\times'), ('\\cfrac', '\\frac'), ('\\displaystyle', ''), ('\\,', ''), ('\\:', ''), ('~', ' '), ('**', ''),
    ('\\(', '$'), ('\\)', '$'), ('\\[', '$'), ('\\]', '$'), ('$$', '$'),
)  # fmt: skip
_FRACTIONS = (re.compile(r'([-+]?)(\d*)\\frac\{(-?\d+)\}\{(-?\d+)\}'), re.compile(r'([-+]?)()(\d+)/(\d+)'))
# Any unit, in words or in LaTeX, after a number (Hendrycks' own grader drops these too).
_UNIT = re.compile(r'(?<=[\d}])(?:\s*\\(?:text|mbox|mathrm)\{\s*[A-Za-z][A-Za-z\s/.]*\}(?:\^\{?\d\}?)?| [a-z][a-z /]*)\$?$')
_BOX = re.compile(r'\\(?:boxed|fbox)(?![a-z])')


def boxed(text: str) -> str:
    r"""What the last \boxed or \fbox holds; '' where there is none.

    >>> boxed(r'so $x = \boxed{\frac{1}{2}}$.')
    '\\frac{1}{2}'
    """
    return _boxes(text)[-1][1] if _boxes(text) else ''


def _boxes(text: str) -> list[tuple[int, str]]:
    """The places and contents of boxes that hold anything."""
    found = []
    for box in _BOX.finditer(text):
        rest = text[box.end() :].lstrip()
        if not rest.startswith('{'):
            content = re.split(r'[$\s.]', rest, maxsplit=1)[0]
        else:
            depths = list(itertools.accumulate((letter == '{') - (letter == '}') for letter in rest))
            content = rest[1 : depths.index(0)] if 0 in depths else ''
        if content.strip():
            found.append((box.start(), content))
    return found


def final_answer(text: str) -> str:
    """What was stated last, in a box or after 'The final answer is', or else the last formula; normalised."""
    text = _spelled(text)
    found = _boxes(text)
    for statement in statements(text):
        if content := _statement(text[statement.end() :]):
            found.append((statement.start(), content))
    formulas = re.findall(r'\$([^$]+)\$', text)
    answer = max(found, key=lambda one: one[0])[1] if found else formulas[-1] if formulas else ''
    return normalise(answer)


def _statement(text: str) -> str:
    """The formula that follows, or else the sentence; '' where a box follows, or a new task."""
    line = next((line.strip() for line in text.split('\n') if line.strip(' $')), '')
    if _BOX.search(line):
        return ''
    if formula := re.match(r'\$([^$]*)\$', line):
        return formula.group(1)
    sentence = re.split(r'\.?\s*I hope it is correct|[.!;](?=\s|$)', line, maxsplit=1)[0]
    return sentence if len(sentence) <= SHORT else ''


def _spelled(text: str) -> str:
    """LaTeX for Unicode's signs, $ for all marks of formulas."""
    for before, after in _SPELLINGS:
        text = text.replace(before, after)
    return text


def normalise(answer: str) -> str:
    r"""One spelling; equal numbers are equal: 0.5, .5, 1/2 and \frac{2}{4}.

    >>> normalise(r'x = \dfrac12 \text{ dollars}')
    '\\frac{1}{2}'
    """
    raw = answer = _spelled(answer).strip()
    answer = _UNIT.sub('', answer.split('=')[-1].strip())
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for unit in _UNITS:
        answer = answer.replace(unit, '')
    answer = re.sub(r'(.*?)\$(.*?)\$(.*)', r'\2', answer)
    answer = re.sub(r'\\(?:text|textbf|mathrm|mathbf)\{(.*?)\}', r'\1', answer)
    answer = re.sub(r'\\overline\{([A-Z]+)\}', r'\1', answer)  # a segment, and no repeating decimal
    answer = re.sub(r'\\boxed\{(.*)\}', r'\1', answer)
    answer = re.sub(r'frac([^{])(.)', r'frac{\1}{\2}', answer)
    answer = re.sub(r'sqrt([^{])', r'sqrt{\1}', answer).replace('$', '').rstrip('.')
    answer = re.sub(r'^\(([A-Z])\)$', r'\1', answer)
    return _number(answer) or answer or raw


def _number(text: str) -> str:
    """The spelling of a whole number, decimal, fraction or mixed number; '' of anything else."""
    if re.fullmatch(r'[-+]?\d{1,3}(,\d{3})+(\.\d+)?', text):
        text = text.replace(',', '')
    if re.fullmatch(r'[-+]?(?:\d+\.?\d*|\.\d+)', text):
        value = Fraction(text.rstrip('.'))
    elif parts := re.fullmatch(r'([-+]?)(\d*)(?:\\frac\{(-?\d+)\}\{(-?\d+)\})', text) or re.fullmatch(
        r'([-+]?)()(\d+)/(\d+)', text
    ):
        sign, whole, above, below = parts.groups()
        if not int(below):
            return ''
        value = (int(whole or 0) + Fraction(int(above), int(below))) * (-1 if sign == '-' else 1)
    else:
        return ''
    sign, value = '-' * (value < 0), abs(value)
    return f'{sign}{value}' if value.denominator == 1 else f'{sign}\\frac{{{value.numerator}}}{{{value.denominator}}}'
