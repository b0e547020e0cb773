"""Programs in a model's words: every form in which a chat model hands over code, for every problem of HumanEval."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from llama2_jax.evals import sandbox
from llama2_jax.evals.files import Files
from llama2_jax.evals.task import Example
from llama2_jax.evals.tasks import TASKS
from llama2_jax.evals.tasks.code import humaneval_program, mbpp_program
from llama2_jax.evals.tasks.programs import fenced, program

HELPERS = (10, 32, 38, 50)  # problems whose prompts hold a helper before the function asked for

# A form of answer -> what a model writes; {whole}: prompt and solution, {asked}: the asked function alone, {body}: its lines.
FORMS = {
    'plain': '{whole}',
    'completion': '{body}',
    'body in a fence': '```python\n{body}```',
    'body, dedented': '```python\n{dedented}```',
    'lone closing fence': '{body}```\n\nThis adds the numbers.',
    'asked function only': 'Here it is:\n```python\n{asked}```\nIt is right.',
    'python': 'Here it is:\n\n```python\n{whole}```\n',
    'no info string': '```\n{whole}```',
    'py': '```py\n{whole}```',
    'python3': '```python3\n{whole}```',
    'space before': '``` python\n{whole}```',
    'capitals': '```PYTHON\n{whole}```',
    'trailing space': '```python \n{whole}``` \n',
    'braces': '```{{.python}}\n{whole}```',
    'four marks': '````python\n{whole}````',
    'tildes': '~~~python\n{whole}~~~',
    'indented': '1. The code:\n\n    ```python\n{indented}    ```\n',
    'bash block first': 'Install:\n```bash\npip install numpy\n```\nThen:\n```python\n{whole}```',
    'usage block after': '```python\n{whole}```\nUse it:\n```python\nprint({name}(input()))\n```\nOutput:\n```\n5\n```',
    'usage block before': '```python\nprint({name}(1, 2, 3))\n```\n```python\n{whole}```',
    'prompt repeated first': '```python\n{prompt}```\nThe solution:\n```python\n{whole}```',
    'prompt repeated last': '```python\n{whole}```\nThe question was:\n```python\n{prompt}```',
    'two versions': '```python\ndef {name}(*given):\n    return "wrong"\n```\nNo, that is wrong:\n```python\n{whole}```',
    'unclosed': '```python\n{whole}',
    'unclosed, then another': '```python\nimport math\n```python\n{whole}```',
    'closed on the last line': '```python\n{stripped}```',
    'no fence, prose around': 'Here is the function:\n\n{whole}\nIt returns the right value, as asked.',
    'main guard': '```python\n{whole}\nif __name__ == "__main__":\n    import unittest\n    unittest.main()\n```',
    'exit': '```python\nimport sys\n{whole}\nsys.exit()\n```',
    'input': '```python\n{whole}\nn = int(input("n? "))\nprint({name}(n))\n```',
    'own wrong check': '```python\n{whole}\nassert {name}() == "an example that the model got wrong"\n```',
    'future': '```python\nfrom __future__ import annotations\n{asked}```',
}  # fmt: skip


def forms(row):
    prompt, body, name = row['prompt'], row['canonical_solution'], row['entry_point']
    whole = prompt + body
    lines = whole.splitlines(keepends=True)
    values = {
        'prompt': prompt, 'body': body, 'whole': whole, 'name': name, 'stripped': whole.rstrip('\n'),
        'asked': whole[whole.index(f'def {name}(') :],
        'dedented': ''.join(line.removeprefix('    ') for line in body.splitlines(keepends=True)),
        'indented': ''.join('    ' + line for line in lines),
    }  # fmt: skip
    texts = {form: text.format(**values) for form, text in FORMS.items()}
    return texts | {'CRLF': texts['asked function only'].replace('\n', '\r\n')}


@pytest.fixture(scope='module')
def problems(fixtures):
    return TASKS['humaneval'].read(Files(str(fixtures)), 0)


def failing(problems):
    """The (problem, form) whose program does not pass; equal programs run once."""
    programs = {(e.data['task_id'], form): humaneval_program(e, text) for e in problems for form, text in forms(e.data).items()}
    different = list(dict.fromkeys(programs.values()))
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(different, pool.map(sandbox.run_program, different), strict=True))
    return {where: outcomes[code] for where, code in programs.items() if outcomes[code] != 'passed'}, len(programs)


def test_right_answers_pass_in_every_form(problems):
    some = [problems[number] for number in (*HELPERS, 0, 115, 163)]
    assert failing(some) == ({}, len(some) * (len(FORMS) + 1))


@pytest.mark.slow
def test_all_164_solutions_pass_in_every_form(problems):
    assert failing(problems) == ({}, 164 * (len(FORMS) + 1))


def test_wrong_answers_do_not_pass(problems):
    wrong = ['', '```python\n```', 'I cannot do that.', '    pass\n', '```bash\nls\n```', '```python\nprint(1)\n```']
    wrong += [
        '```python\ndef {name}(*given):\n    return "wrong"\n```',
        '```python\ndef another():\n    return 1\n```',
        '\x00',
        '(' * 500,
    ]
    programs = [humaneval_program(e, text.replace('{name}', e.data['entry_point'])) for e in problems[:2] for text in wrong]
    with ThreadPoolExecutor(2) as pool:
        assert 'passed' not in list(pool.map(sandbox.run_program, programs))


MBPP = {
    'task_id': 11, 'text': 'Write add.', 'code': 'def helper(a):\r\n  return a\r\ndef add(a, b):\r\n  return helper(a) + b',
    'test_setup_code': 'ONE = 1', 'test_list': ['assert add(ONE, 2) == 3'],
}  # fmt: skip
ADD = 'def add(a, b):\n    return a + b\n'


@pytest.mark.parametrize(
    'text',
    [
        MBPP['code'],
        ADD,
        f'```python\n{ADD}```',
        f'``` Py\n{ADD}```',
        f'[BEGIN]\n{ADD}[DONE]\nIt adds.',
        f'Sure:\n\n{ADD}\nThis adds two numbers.',
        f'```bash\npython add.py\n```\n~~~python3\r\n{ADD}~~~',
        f'```python\n{ADD}\nassert add(1, 1) == 3\nif __name__ == "__main__":\n    exit()\n```',
        f'```python\n{ADD}```\n```python\nprint(add(1, 2))\n```',
        '```python\nadd = lambda a, b: a + b\n```',
    ],
)
def test_mbpp_answers_pass_in_every_form(text):
    assert sandbox.run_program(mbpp_program(Example(None, data=MBPP), text)) == 'passed'


def test_statements_that_define_tables_still_run():
    code = program('', 'TABLE = {}\nfor n in range(3):\n    TABLE[n] = n * n\ndef square(n):\n    return TABLE[n]\n', ['square'])
    assert '__main__' not in code
    assert sandbox.run_program(sandbox.Program(code, 'assert square(2) == 4', ('square',))) == 'passed'


@pytest.mark.parametrize(
    ('text', 'blocks'),
    [
        ('none', []),
        ('```\na\n```\n```py\nb\n```', [('', 'a\n'), ('py', 'b\n')]),
        ('```py\na\n```py\nb\n```', [('py', 'a\n'), ('py', 'b\n')]),
        ('~~~\n```\na\n~~~', [('', '```\na\n')]),
        ('  ``` py x=1 \n  a\n   b\n  ```', [('py', 'a\n b\n')]),
        ('`code` and ``` not a fence ```', []),
        ('```py\na', [('py', 'a\n')]),
    ],
)
def test_fences_come_in_pairs(text, blocks):
    assert list(fenced(text)) == blocks
