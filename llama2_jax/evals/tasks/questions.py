"""World knowledge (NaturalQuestions, TriviaQA) and reading (SQuAD, QuAC, BoolQ): short answers in the model's own words."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama2_jax.evals.answers import words
from llama2_jax.evals.files import Files
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


def read_naturalquestions(files: Files, shots: int) -> list[Example]:
    """The 3,610 questions of the open version's dev file, which is the test split of papers; examples from its train file."""

    def pairs(split: str, tfds: str) -> Iterator[Pair]:
        rows = files.rows(f'NQ-open.{split}.jsonl', tfds=f'natural_questions_open#{tfds}')
        return ((row['question'].rstrip('?') + '?', list(row['answer'])) for row in rows)

    solved = [pair for pair, _ in zip(pairs('train', 'train'), range(shots), strict=False)] if shots else []
    return _closed_book(solved, list(pairs('dev', 'validation')))


def read_triviaqa(files: Files, shots: int) -> list[Example]:
    """The Wikipedia part's dev file, the filtered one; examples from its train file, or TFDS's unfiltered set without context."""

    def pairs(split: str, tfds: str) -> Iterator[Pair]:
        for row in files.rows(f'wikipedia-{split}.json', tfds=f'trivia_qa/rc.wikipedia.nocontext#{tfds}'):
            for entry in row.get('Data', [row]):  # the file is one object
                answer = entry.get('Answer') or entry['answer']
                names = [answer.get('Value') or answer['value'], *(answer.get('Aliases') or answer.get('aliases') or [])]
                yield entry.get('Question') or entry['question'], names

    solved = [pair for pair, _ in zip(pairs('train', 'train'), range(shots), strict=False)] if shots else []
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

    def paragraphs(split: str, tfds: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for row in files.rows(f'{split}-v2.0.json', tfds=f'squad/v2.0#{tfds}'):
            if 'data' not in row:
                yield row['context'], row
            for article in row.get('data', []):
                for paragraph in article['paragraphs']:
                    yield from ((paragraph['context'], question) for question in paragraph['qas'])

    def ask(context: str, row: Mapping[str, Any]) -> str:
        return f'Passage: {context}\nQuestion: {row["question"]}\nIf the passage does not say, answer "unanswerable".\nAnswer:'

    begin = ''
    for (context, row), _ in zip(paragraphs('train', 'train') if shots else (), range(shots), strict=False):
        begin += f'{ask(context, row)} {_squad_answers(row)[0]}\n\n'
    return [
        Example(_squad_answers(row), begin + ask(context, row), ask(context, row))
        for context, row in paragraphs('dev', 'validation')
    ]


def _squad_answers(row: Mapping[str, Any]) -> list[str]:
    answers = row['answers']
    texts = answers['text'] if isinstance(answers, Mapping) else [answer['text'] for answer in answers]
    return list(dict.fromkeys(texts)) or [UNANSWERABLE]


def grade_span(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """Exact match, and overlap of words, with the best of the answers; the answer is the first line."""
    prediction = words(outputs[0]['text'])
    if UNANSWERABLE in normalise(prediction) or normalise(prediction) == 'cannotanswer':
        prediction = UNANSWERABLE
    return {'prediction': prediction, 'correct': exact(prediction, example.target), 'f1': f1(prediction, example.target)}


def read_quac(files: Files, shots: int) -> list[Example]:
    """Conversations about a text: every question with those before it and their answers."""
    if shots:
        raise ValueError('QuAC is asked without examples')
    return [
        example
        for row in files.rows('val_v0.2.json')
        for article in row['data']
        for paragraph in article['paragraphs']
        for example in _conversation(article, paragraph)
    ]


def _conversation(article: Mapping[str, Any], paragraph: Mapping[str, Any]) -> Iterator[Example]:
    text = paragraph['context'].removesuffix('CANNOTANSWER').strip()
    prompt = f'Title: {article["title"]}\nBackground: {article.get("background", "")}\nSection: {text}\n\n'
    for row in paragraph['qas']:
        answers = [UNANSWERABLE if answer['text'] == 'CANNOTANSWER' else answer['text'] for answer in row['answers']]
        ask = f'{prompt}Question: {row["question"]}\nIf the passage does not say, answer "unanswerable".\nAnswer:'
        yield Example(list(dict.fromkeys(answers)), ask, ask)
        prompt += f'Question: {row["question"]}\nAnswer: {answers[0]}\n'


def read_boolq(files: Files, shots: int) -> list[Example]:
    """Yes or no about a passage; P(answer | question) against P(answer | "Answer:")."""
    examples = []
    for row in files.rows('boolq/**/dev.jsonl', 'BoolQ/**/val.jsonl', tfds='bool_q#validation'):
        title = f'{row["title"]} -- ' if row.get('title') else ''
        context = f'{title}{row["passage"]}\nQuestion: {row["question"].rstrip("?")}?\nAnswer:'
        choices = ((context, ' no'), (context, ' yes'))
        examples.append(Example(int(row.get('answer', row.get('label'))), choices=against_answer(choices)))
    return examples


_WORDS = Decoding(32, stop=('\n',), chat_tokens=128)
TASKS = [
    Task(
        'naturalquestions',
        read_naturalquestions,
        grade_words,
        'https://github.com/google-research-datasets/natural-questions (nq_open/NQ-open.dev.jsonl, NQ-open.train.jsonl)',
        shots=5,
        decoding=_WORDS,
    ),
    Task(
        'triviaqa',
        read_triviaqa,
        grade_words,
        'https://nlp.cs.washington.edu/triviaqa (triviaqa-rc/qa/wikipedia-dev.json, wikipedia-train.json)',
        shots=5,
        decoding=_WORDS,
    ),
    Task(
        'squad',
        read_squad,
        grade_span,
        'https://rajpurkar.github.io/SQuAD-explorer (squad/dev-v2.0.json)',
        decoding=Decoding(64, stop=('\n',), chat_tokens=128),
    ),
    Task(
        'quac',
        read_quac,
        grade_span,
        'https://quac.ai (quac/val_v0.2.json)',
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
