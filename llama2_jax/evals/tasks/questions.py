"""World knowledge (NaturalQuestions, TriviaQA) and reading (SQuAD, QuAC, BoolQ): short answers in the model's own words."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama2_jax.config import UserError
from llama2_jax.evals.answers import words
from llama2_jax.evals.files import Files, Row
from llama2_jax.evals.task import (
    Decoding,
    Example,
    Given,
    Record,
    Task,
    against_answer,
    best_against_answer,
    exact,
    f1,
    normalise,
    short_answer,
)

Pair = tuple[str, list[str]]  # a question and its answers
BEGIN = 'Answer these questions:\n'  # LLaMA 1's prompt (recipe I.1)


def _closed_book(solved: Sequence[Pair], asked: Sequence[Pair]) -> list[Example]:
    """Questions without a text, after some with their first answers."""
    begin = BEGIN + ''.join(f'Q: {question}\nA: {answers[0]}\n' for question, answers in solved)
    chat = 'Answer with a few words only: {}'
    return [Example(answers, f'{begin}Q: {question}\nA:', chat.format(question)) for question, answers in asked]


def _answers(row: Row, answers: Sequence[str]) -> list[str]:
    """The answers with text in them.

    Raises:
      UserError: There is none.
    """
    found = [answer for answer in dict.fromkeys(answers) if answer.strip()] if isinstance(answers, list) else []
    if not found:
        raise row.refused(f'its answers must be a list of texts, and are {str(answers)[:40]}')
    return found


def _first(count: int, rows: Iterator[Any], files: Files) -> list[Any]:
    """So many solved examples of a train file."""
    found = list(itertools.islice(rows, count)) if count else []
    if len(found) < count:
        raise UserError(f'{list(files.used)[-1]} holds {len(found)} examples, and {count} solved ones are asked for.')
    return found


def read_naturalquestions(files: Files, shots: int) -> list[Example]:
    """The 3,610 questions of the open version's dev file, which is the test split of papers; examples from its train file."""

    def pairs(split: str, tfds: str) -> Iterator[Pair]:
        rows = files.rows(f'NQ-open.{split}.jsonl', tfds=f'natural_questions_open#{tfds}')
        return ((row.text('question').rstrip('?') + '?', _answers(row, row['answer'])) for row in rows)

    solved = _first(shots, pairs('train', 'train'), files)
    return _closed_book(solved, list(pairs('dev', 'validation')))


def read_triviaqa(files: Files, shots: int) -> list[Example]:
    """The Wikipedia part's dev file, the filtered one; examples from its train file, or TFDS's unfiltered set without context."""

    def pairs(split: str, tfds: str) -> Iterator[Pair]:
        for row in files.rows(f'wikipedia-{split}.json', tfds=f'trivia_qa/rc.wikipedia.nocontext#{tfds}'):
            for entry in row.get('Data', [row]):  # the file is one object
                answer = entry.get('Answer') or entry['answer']
                names = [answer.get('Value') or answer['value'], *(answer.get('Aliases') or answer.get('aliases') or [])]
                yield entry.get('Question') or entry.text('question'), _answers(entry, names)

    solved = _first(shots, pairs('train', 'train'), files)
    return _closed_book(solved, list(pairs('dev', 'validation')))


def grade_words(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """Exact match, normalised, of the answer or its beginning up to a comma, bracket or sentence's end with a right answer."""
    whole = words(outputs[0]['text'])
    beginnings = [whole, short_answer(whole), *(whole[: end.start()] for end in re.finditer(r'[,.;]\s| \(| [-–—] ', whole))]
    prediction = next((text for text in beginnings if exact(text, example.target)), short_answer(whole))
    return {'prediction': prediction, 'correct': exact(prediction, example.target)}


UNANSWERABLE = 'unanswerable'


def read_squad(files: Files, shots: int) -> list[Example]:
    """SQuAD 2.0's dev file, questions without an answer included; examples from its train file."""

    def paragraphs(split: str, tfds: str) -> Iterator[tuple[str, Row]]:
        for row in files.rows(f'{split}-v2.0.json', tfds=f'squad/v2.0#{tfds}'):
            if 'data' not in row:
                yield row['context'], row
            for article in row.get('data', []):
                for paragraph in article['paragraphs']:
                    yield from ((paragraph['context'], question) for question in paragraph['qas'])

    def ask(context: str, row: Row) -> str:
        return (
            f'Passage: {context}\nQuestion: {row.text("question")}\nIf the passage does not say, answer "unanswerable".\nAnswer:'
        )

    begin = ''
    for context, row in _first(shots, paragraphs('train', 'train'), files):
        begin += f'{ask(context, row)} {_squad_answers(row)[0]}\n\n'
    return [
        Example(_squad_answers(row), begin + ask(context, row), _briefly(ask(context, row)))
        for context, row in paragraphs('dev', 'validation')
    ]


def _briefly(prompt: str) -> str:
    """The same question for a chat model, which would answer in a sentence."""
    return f'{prompt.removesuffix("Answer:")}Answer with a few words of the passage only.'


def _squad_answers(row: Row) -> list[str]:
    answers = row['answers']
    texts = answers['text'] if isinstance(answers, Mapping) else [answer['text'] for answer in answers]
    if row.get('is_impossible') is False and not texts:
        raise row.refused("it has an answer ('is_impossible': false), and 'answers' is empty")
    return _answers(row, texts) if texts else [UNANSWERABLE]


def grade_span(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """Exact match, and overlap of words, with the best of the answers; the answer is the first line."""
    prediction = words(outputs[0]['text'])
    if UNANSWERABLE in normalise(prediction) or normalise(prediction) == 'cannotanswer':
        prediction = UNANSWERABLE
    return {'prediction': prediction, 'correct': exact(prediction, example.target), 'f1': f1(prediction, example.target)}


def read_quac(files: Files, shots: int) -> list[Example]:
    """Conversations about a text: questions with those before them and their answers, after others' first questions."""

    def conversations(split: str) -> Iterator[list[Example]]:
        for row in files.rows(f'{split}_v0.2.json'):
            for article in row['data']:
                for paragraph in article['paragraphs']:
                    yield list(_conversation(article, paragraph))

    first = [examples[0] for examples in _first(shots, conversations('train'), files)]
    begin = ''.join(f'{example.prompt} {example.target[0]}\n\n' for example in first)
    return [
        dataclasses.replace(example, prompt=begin + example.prompt) for examples in conversations('val') for example in examples
    ]


def _conversation(article: Row, paragraph: Row) -> Iterator[Example]:
    text = paragraph['context'].removesuffix('CANNOTANSWER').strip()
    prompt = f'Title: {article["title"]}\nBackground: {article.get("background", "")}\nSection: {text}\n\n'
    for row in paragraph['qas']:
        texts = [UNANSWERABLE if answer['text'] == 'CANNOTANSWER' else answer['text'] for answer in row['answers']]
        answers = _answers(row, texts)
        ask = f'{prompt}Question: {row["question"]}\nIf the passage does not say, answer "unanswerable".\nAnswer:'
        yield Example(answers, ask, _briefly(ask))
        prompt += f'Question: {row["question"]}\nAnswer: {answers[0]}\n'


def read_boolq(files: Files, shots: int) -> list[Example]:
    """Yes or no about a passage; P(answer | question) against P(answer | "Answer:")."""
    examples = []
    for row in files.rows('boolq/**/dev.jsonl', 'BoolQ/**/val.jsonl', tfds='bool_q#validation'):
        title = f'{row["title"]} -- ' if row.get('title') else ''
        context = f'{title}{row.text("passage")}\nQuestion: {row.text("question").rstrip("?")}?\nAnswer:'
        choices = ((context, ' no'), (context, ' yes'))
        answer = row['label'] if 'label' in row else row['answer']
        if answer not in (0, 1):
            raise row.refused(f'the answer must be true or false, and is {str(answer)[:40]!r}')
        examples.append(Example(int(answer), choices=against_answer(choices)))
    return examples


_WORDS = Decoding(32, stop=('\n',), chat_tokens=128)
TASKS = [
    Task(
        'naturalquestions',
        read_naturalquestions,
        grade_words,
        'https://github.com/google-research-datasets/natural-questions (nq_open/NQ-open.dev.jsonl, NQ-open.train.jsonl)',
        shots=5,
        chat_shots=0,
        max_shots=None,
        decoding=_WORDS,
    ),
    Task(
        'triviaqa',
        read_triviaqa,
        grade_words,
        'https://nlp.cs.washington.edu/triviaqa (triviaqa-rc/qa/wikipedia-dev.json, wikipedia-train.json)',
        shots=5,
        chat_shots=0,
        max_shots=None,
        decoding=_WORDS,
    ),
    Task(
        'squad',
        read_squad,
        grade_span,
        'https://rajpurkar.github.io/SQuAD-explorer (squad/dev-v2.0.json, train-v2.0.json)',
        max_shots=None,
        decoding=Decoding(64, stop=('\n',), chat_tokens=128),
    ),
    Task(
        'quac',
        read_quac,
        grade_span,
        'https://quac.ai (quac/val_v0.2.json, train_v0.2.json)',
        max_shots=None,
        decoding=Decoding(64, stop=('\n',), chat_tokens=128),
        measures=('f1',),
    ),
    Task(
        'boolq',
        read_boolq,
        best_against_answer,
        'https://github.com/google-research-datasets/boolean-questions (boolq/dev.jsonl)',
    ),
]
