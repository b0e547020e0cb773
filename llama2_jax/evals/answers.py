"""Finds the final answer in a model's text: a number, a letter or words.

What the text states ("The answer is …", "Answer: …", a box) counts before all else, and a later statement before an earlier
one, as a model may correct itself.
"""

import re
from collections.abc import Collection, Iterator, Mapping

from llama2_jax.evals.task import normalise

_MINUS = str.maketrans(dict.fromkeys('\u2212\ufe63\uff0d', '-'))
_GROUPS = re.compile(r'(?<=\d)(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=\d{3})')  # between thousands
_COMMAND = re.compile(r'\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}')
_BOX = re.compile(r'\\f?box(?:ed)?\s*\{([^{}]*)\}')
_MARKUP = re.compile(r'\*\*|__|`|\\[()\[\]]|\$(?!\s?\.?\d)')
_NEW_QUESTION = re.compile(r'\n\s*(?:Q|Question|Problem)(?: \d+)?:')
_STATED = re.compile(
    r'\b(?:answer|(?:correct|right|best) (?:option|choice))(?: (?:choice|option|letter|here))?'
    r'(?:,? (?:to|of|for|therefore|then)\b[^.:?\n]{0,80}?)?'
    r'(?:\s*:|,? (?:is|was|would be)\b)(?: therefore| thus| simply| approximately| about|,)*\s*:?'
    r'(?!\s*(?:not|calculated|computed|found|obtained|determined)\b)'
    r'|^\W*(?:final |correct )?answer(?:\W*\n|\s*=)',  # a heading
    re.IGNORECASE | re.MULTILINE,
)
_RETRACTED = re.compile(
    r"\bwait\b|\bcorrection\b|my mistake|made an? (?:mistake|error)|but that(?: is|'s) (?:wrong|incorrect)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r'[.!?;](?=\s|$)|\n')
_DIGITS = r'(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+'
NUMBER = re.compile(rf'(?:(?<![\w)\]])-)?(?:[$€£¥₹]\s?-?)?(?<![\w.])(?:{_DIGITS})')
_MARKED = re.compile(rf'^\s*####\s*({NUMBER.pattern})(?: ?[a-z%]+)?\.?\s*$', re.MULTILINE)  # the end of GSM8K's own solutions
_LEADING_LETTER = re.compile(
    r'\W*(?:(?:option|choice|letter) )?\(?([A-Z])'
    r'(?!\)? (?:is|was|can|could|would|does|has|says|isn|and|or)\b)'  # a sentence about an option
    r'(?:[).:,;\]"]|\s*$|\s+[^\w\s]|\s+(?:because|as|since)\b|(?<![AI])\s)',  # and neither of the words "a" and "I"
    re.IGNORECASE,
)


# "Answer:" may also introduce a whole explanation: what follows must be short, or begin with a number, letter or formula.
SHORT = 80
_BARE = re.compile(r'\W*(?:\d|[A-Za-z]\b)|\$|\\[a-z]')
_LISTED = re.compile(r'\d+[.)]\s+\S')


def plain(text: str) -> str:
    """The text of one answer without Markdown and LaTeX around words and numbers; a box becomes 'answer: …'."""
    text = text.replace('\r\n', '\n').translate(_MINUS)
    answered = _NEW_QUESTION.split(text, maxsplit=1)[0]
    if _STATED.search(answered) or _BOX.search(answered):
        text = answered  # and not what a model asks itself next
    text = _GROUPS.sub(',', text).replace('\\$', '$').replace('\\%', '%')
    for _ in range(3):  # commands in commands
        text = _COMMAND.sub(r'\1', text)
    return _MARKUP.sub('', _BOX.sub(r' answer: \1 ', text))


def stated(text: str) -> Iterator[str]:
    """What a `plain` text states as its answer, each to the end of its line, the last first.

    >>> list(stated('The answer is 12, no. The answer is 18.'))
    ['18.', '12, no. The answer is 18.']
    """
    found = list(statements(text))
    if found and (retracted := _RETRACTED.search(text, found[-1].end())):
        yield _line(text[retracted.end() :])
    yield from (_line(text[statement.end() :]) for statement in reversed(found))


def statements(text: str) -> Iterator[re.Match[str]]:
    """Where "The answer is", "Answer:" and the like end, but for those that introduce an explanation."""
    for statement in _STATED.finditer(text):
        words, line = statement.group(), _line(text[statement.end() :])
        same_line = '\n' not in words and not text.startswith('\n', statement.end())
        says = same_line and (len(line) <= SHORT or words.rstrip().lower().endswith(('is', 'was', 'be')))
        if says or _BARE.match(line) and not _LISTED.match(line):
            yield statement


def _line(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in text.split('\n') if re.search(r'\w|[^\s\w$.:]{2}|[<>(\[{\])}]', line)), '')


def extract_number(text: str) -> str:
    """The number stated, or else the last one; without grouping commas, currency, units and trailing zeros; '' if there is none.

    >>> extract_number('18 / 2 = 9. The answer is $1,009.00 a day. Q: 5')
    '1009'
    """
    whole = plain(_MARKED.sub(r'answer: \1', text))
    for statement in stated(whole):
        if found := _number_in(statement):
            return _canonical(found)
    bold = re.findall(rf'\*\*\s*({NUMBER.pattern})[^*\d]{{0,20}}\*\*', text.strip().split('\n')[-1].translate(_MINUS))
    found = bold or NUMBER.findall(whole)
    return _canonical(found[-1]) if found else ''


def _number_in(statement: str) -> str:
    """Its first number, or the result where it is an equation."""
    for part in (_SENTENCE_END.split(statement, maxsplit=1)[0], statement):
        result = re.search(rf'=\s*({NUMBER.pattern})[^\d=]*$', part)
        if found := result or re.search(f'({NUMBER.pattern})', part):
            return found.group(1)
    return ''


def _canonical(found: str) -> str:
    digits = re.sub(r'[^\d.]', '', found)
    digits = re.sub(r'\.0*$|(\.\d*?)0+$', r'\1', digits)
    digits = f'0{digits}' if digits.startswith('.') else digits.lstrip('0') or '0'
    digits = f'0{digits}' if digits.startswith('.') else digits
    return f'-{digits}' if '-' in found and digits != '0' else digits


def letter(text: str, options: Mapping[str, str]) -> str:
    """The option chosen, by its letter or its words; '' if there is none.

    Args:
      text: As a model wrote it.
      options: Capital letter -> text of the option.

    >>> letter('The answer is a blotter (e).', {'A': 'inkwell', 'E': 'blotter'})
    'E'
    """
    whole = plain(text)
    for statement in stated(whole):
        sentence = _SENTENCE_END.split(statement, maxsplit=1)[0]
        chosen = _leading(statement, options) or ''.join(_bracketed(sentence, options)[:1])
        if chosen := chosen or _by_words(statement, options) or ''.join(_bracketed(statement, options)[:1]):
            return chosen
    lines = [line for line in whole.split('\n') if line.strip()] or ['']
    leading = [found for line in lines if (found := _leading(line, options))]
    if len(leading) == 1 and _leading(lines[0], options):
        return leading[0]
    if found := _bracketed(whole, options):
        return found[-1]
    return _leading(lines[-1], options) or _by_words(lines[0], options) or _by_words(lines[-1], options)


def _bracketed(text: str, options: Mapping[str, str]) -> list[str]:
    return [found.upper() for found in re.findall(r'\(\s?([A-Za-z])\s?\)', text) if found.upper() in options]


def _leading(text: str, options: Mapping[str, str]) -> str:
    """The letter that a line begins with, unless it is a word of a sentence, such as "a"."""
    found = _LEADING_LETTER.match(text)
    return found.group(1).upper() if found and found.group(1).upper() in options else ''


def _by_words(text: str, options: Mapping[str, str]) -> str:
    """The option whose text is all of it or its first sentence, or else the only one named there (the longest of nested ones)."""
    said = {normalise(text), normalise(_SENTENCE_END.split(text, maxsplit=1)[0])}
    names = {letter: name for letter, option in options.items() if (name := normalise(option))}
    if same := [letter for letter, name in names.items() if name in said]:
        return same[0]
    named = [letter for letter, name in names.items() if any(f' {name} ' in f' {one} ' for one in said)]
    named = [one for one in named if not any(one != other and f' {names[one]} ' in f' {names[other]} ' for other in named)]
    return named[0] if len(named) == 1 else ''


def word(text: str, vocabulary: Collection[str]) -> str:
    """The word of a small vocabulary, such as yes and no, in lower case: as stated, or else the first or last of the text.

    >>> word('Is it? **"No"**, it is not.', ('yes', 'no'))
    'no'
    """
    whole = plain(text)
    pattern = re.compile(rf'\b(?:{"|".join(vocabulary)})\b', re.IGNORECASE)
    for statement in stated(whole):
        if found := pattern.search(statement):
            return found.group().lower()
    if found := re.match(rf'\W*({pattern.pattern})', whole, re.IGNORECASE):
        return found.group(1).lower()
    found = pattern.findall(whole)
    return found[-1].lower() if found else ''


def words(text: str) -> str:
    """What is stated, or else the first line; without quotes, brackets of LaTeX and a final dot.

    >>> words('Sure! The answer is:\\n\\n"St. Louis".')
    'St. Louis'
    """
    whole = plain(text).strip()
    lines = [line.strip() for line in whole.split('\n') if line.strip()] or ['']
    first = lines[1] if lines[0].endswith(':') and lines[1:] else lines[0]
    answer = next((statement for statement in stated(whole) if statement), re.sub(r'^A: *', '', first))
    return answer.strip(' \t"\'“”‘’«»').rstrip('.').strip(' \t"\'“”‘’«»')
