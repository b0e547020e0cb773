"""Final answers of MATH in one spelling, as Minerva compares them (Lewkowycz et al. 2022, appendix D)."""

import re

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


def boxed(text: str) -> str:
    r"""What the last \boxed holds; '' where there is none.

    >>> boxed(r'so $x = \boxed{\frac{1}{2}}$.')
    '\\frac{1}{2}'
    """
    start = text.rfind('\\boxed')
    if start < 0:
        return ''
    rest = text[start + len('\\boxed') :]
    if not rest.startswith('{'):
        return re.split(r'[$\s.]', rest.strip(), maxsplit=1)[0]
    depth = 0
    for end, letter in enumerate(rest):
        depth += (letter == '{') - (letter == '}')
        if depth == 0:
            return rest[1:end]
    return ''


def final_answer(text: str) -> str:
    """What follows 'The final answer is', or else the last box, normalised."""
    said = re.search(r'[Ff]inal [Aa]nswer is:?\s*(.*?)\.?(?: I hope it is correct|\n|$)', text)
    return normalise(said.group(1) if said else boxed(text))


def normalise(answer: str) -> str:
    r"""One spelling.

    >>> normalise(r'x = \dfrac12 \text{ dollars}')
    '\\frac{1}{2}'
    """
    answer = answer.split('=')[-1]
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for unit in _UNITS:
        answer = answer.replace(unit, '')
    answer = re.sub(r'(.*?)\$(.*?)\$(.*)', r'\2', answer)
    answer = re.sub(r'\\(?:text|textbf|overline)\{(.*?)\}', r'\1', answer)
    answer = re.sub(r'\\boxed\{(.*)\}', r'\1', answer)
    answer = re.sub(r'frac([^{])(.)', r'frac{\1}{\2}', answer)
    answer = re.sub(r'sqrt([^{])', r'sqrt{\1}', answer).replace('$', '').rstrip('.')
    return answer.replace(',', '') if answer.replace(',', '').isdigit() else answer
