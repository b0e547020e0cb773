"""Files of benchmarks: every published form is read, and a bad row is refused by file, row and field before a model is loaded."""

import json
import shutil

import pytest
from evals import published

from llama2_jax.config import UserError
from llama2_jax.evals.files import Files
from llama2_jax.evals.tasks import TASKS
from llama2_jax.stages import evaluate
from llama2_jax.stages.evaluate import EvaluateConfig, adapted, load


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp('benchmarks'))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / 'benchmarks')


def examples(name, folder, shots=0):
    return load(
        adapted(TASKS[name], EvaluateConfig('', (), str(folder), '', shots=shots)), EvaluateConfig('', (), str(folder), '')
    )[1]


MMLU, GSM8K, MBPP, HUMANEVAL = 'mmlu/test/anatomy_test.csv', 'gsm8k/test.jsonl', 'mbpp/mbpp.jsonl', 'humaneval/HumanEval.jsonl'
HELLASWAG, ARC, WINOGRANDE = 'hellaswag/hellaswag_val.jsonl', 'ARC-Easy/ARC-Easy-Test.jsonl', 'winogrande_1.1/dev.jsonl'
CSQA, NQ, SQUAD = 'commonsenseqa/dev_rand_split.jsonl', 'NQ-open.dev.jsonl', 'squad/dev-v2.0.json'
GOOD = 'What hears?,eye,ear,toe,lip,B\n'
OPTIONS = {'question': {'stem': 'Where?', 'choices': [{'label': 'A', 'text': 'here'}, {'label': 'B', 'text': 'there'}]}}


def quac(**row):
    return json.dumps({'data': [{'title': 'Una', 'paragraphs': [{'context': 'Una.', 'qas': [row]}]}]})


# task, file, its content, and what the error must name
BAD = [
    ('mmlu', MMLU, GOOD + 'question,A,B,C,D,answer\n', ('anatomy_test.csv:2', 'answer')),
    ('mmlu', MMLU, '\n' + GOOD + 'What hears?,eye,ear,toe,lip,1\n', ('anatomy_test.csv:3', "'1'")),
    ('mmlu', MMLU, GOOD + 'What hears?,eye,ear,B\n', ('anatomy_test.csv:2', '4')),
    ('mmlu', MMLU, '', ('anatomy_test.csv', 'no rows')),
    ('mmlu', 'mmlu/test/anatomi_test.csv', GOOD, ('anatomi_test.csv', 'anatomy')),
    ('gsm8k', GSM8K, '{"question": "How many?"}\n', ('test.jsonl:1', "'answer'")),
    ('gsm8k', GSM8K, '{"question": "How many?", "answer": "several"}\n', ('test.jsonl:1', "'answer'")),
    ('gsm8k', GSM8K, '{"question": "How many?", "answer": 5}\n', ('test.jsonl:1', "'answer'")),
    ('gsm8k', GSM8K, '{"question": "", "answer": "#### 5"}\n', ('test.jsonl:1', "'question'")),
    ('gsm8k', GSM8K, '', ('test.jsonl', 'no rows')),
    ('gsm8k', GSM8K, '[1]\n', ('test.jsonl', 'element 0')),
    ('math', 'MATH/test/algebra/1.json', '{"problem": "?", "solution": "It is 5."}', ('1.json', "'solution'")),
    ('math', 'MATH/test/algebra/2.json', '{"problem": "?"}', ('2.json', "'solution'")),
    ('humaneval', HUMANEVAL, '{"task_id": "HumanEval/0"}\n', ('HumanEval.jsonl:1', "'prompt'")),
    ('humaneval', HUMANEVAL, '{"prompt": "def f():\\n", "entry_point": "g", "test": "x"}\n', ('HumanEval.jsonl:1', "'g'")),
    ('mbpp', MBPP, '{"task_id": 11, "text": "x", "code": "def f(): pass"}\n', ('mbpp.jsonl:1', "'test_list'")),
    ('mbpp', MBPP, '{"task_id": 11, "text": "x", "code": "def f(): pass", "test_list": ["assert g()"]}\n',
     ('mbpp.jsonl:1', "'test_list'")),
    ('mbpp', MBPP, '{"task_id": "x", "text": "x", "code": "def f(): pass", "test_list": ["assert f()"]}\n',
     ('mbpp.jsonl:1', 'int')),
    ('piqa', 'piqa/valid-labels.lst', '0\n1\n', ('valid-labels.lst', '2 labels for 1')),
    ('piqa', 'piqa/valid-labels.lst', '2\n', ('valid.jsonl:1', "'2'")),
    ('siqa', 'siqa/dev-labels.lst', '0\n', ('dev.jsonl:1', "'0'")),
    ('hellaswag', HELLASWAG, '{"ctx": "a", "activity_label": "b", "endings": ["c"]}\n', ('hellaswag_val.jsonl:1', "'label'")),
    ('hellaswag', HELLASWAG, '{"ctx": "a", "activity_label": "b", "endings": 5, "label": 1}\n', ('hellaswag_val.jsonl:1', 'int')),
    ('winogrande', WINOGRANDE, '{"sentence": "No blank.", "option1": "a", "option2": "b", "answer": "1"}\n',
     ('dev.jsonl:1', "'sentence'")),
    ('arc_easy', ARC, json.dumps(OPTIONS | {'answerKey': 'C'}), ('ARC-Easy-Test.jsonl:1', "'C'")),
    ('arc_easy', ARC, json.dumps({'question': {'stem': 'x'}, 'answerKey': 'C'}), ('ARC-Easy-Test.jsonl:1', "'choices'")),
    ('commonsenseqa', CSQA, json.dumps(OPTIONS | {'answerKey': ''}), ('dev_rand_split.jsonl:1', "'answerKey'")),
    ('naturalquestions', NQ, '{"question": "who", "answer": []}\n', ('NQ-open.dev.jsonl:1', 'answers')),
    ('naturalquestions', NQ, '{"question": "who", "answer": [" "]}\n', ('NQ-open.dev.jsonl:1', 'answers')),
    ('naturalquestions', NQ, '{"question": "who", "answer": "Una"}\n', ('NQ-open.dev.jsonl:1', 'answers')),
    ('triviaqa', 'triviaqa/qa/wikipedia-dev.json', '{"Data": [{"Question": "Who?"}]}',
     ('wikipedia-dev.json', "'Data', element 0", "'answer'")),
    ('squad', SQUAD, '{"data": [{"paragraphs": [{"qas": []}, {"qas": [{"question": "x"}]}]}]}', ('dev-v2.0.json', "'context'")),
    ('squad', SQUAD, '{"data": []}', ('squad', 'no examples')),
    ('quac', 'quac/val_v0.2.json', quac(question='Who?', answers=[]), ('val_v0.2.json', "'qas', element 0")),
    ('boolq', 'boolq/dev.jsonl', '{"question": "q", "passage": "p", "answer": "maybe"}\n', ('dev.jsonl:1', "'maybe'")),
    ('bbh', 'bbh/snarks.json', '{"examples": [{"input": "x", "target": ""}]}', ('snarks.json', "'target'")),
    ('agieval', 'agieval/lsat-ar.jsonl', json.dumps(published.EXAM | {'label': 'E'}), ('lsat-ar.jsonl:1', "'E'")),
    ('truthfulqa', 'truthfulqa/TruthfulQA.csv', 'Question,Best Answer\nx,y\n', ('TruthfulQA.csv:2', "'Correct Answers'")),
    ('truthfulqa', 'truthfulqa/TruthfulQA.csv', 'Question,Best Answer\nx,y,z\n', ('TruthfulQA.csv:2', '3 cells')),
    ('toxigen', 'toxigen/toxiGen.json', '[{"text": "x", "target_groups": []}]', ('toxiGen.json element 0', 'toxigen')),
    ('bold', 'bold/prompts/religious_ideology_prompt.json', '[]', ('religious_ideology_prompt.json', 'no rows')),
    ('xstest', 'xstest/xstest_v2_prompts.csv', 'type,prompt\nhomonyms,\n', ('xstest_v2_prompts.csv:2', "'prompt'")),
    ('advbench', 'advbench/harmful_behaviors.csv', 'aim\nx\n', ('harmful_behaviors.csv:2', "'goal'")),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'file', 'content', 'named'), BAD, ids=[f'{name}-{n}' for n, (name, *_) in enumerate(BAD)])
def test_bad_rows_are_refused_by_name(folder, name, file, content, named):
    (folder / file).write_text(content)
    with pytest.raises(UserError) as error:
        examples(name, folder)
    assert all(part in str(error.value) for part in named), str(error.value)


@pytest.mark.parametrize('name', [name for name in TASKS if name != 'toy'])
def test_any_field_may_be_missing(folder, name):
    """Each field of the first row of each file, left out: an error that names the file, or an example all the same."""
    files = Files(str(folder))
    TASKS[name].read(files, 0)
    for path in [path for used in files.used for path in ([used] if used.endswith(('l', 'n')) else [])]:
        with open(path) as file:
            original = file.read()
        if path.endswith('.jsonl'):
            first = json.loads(original.splitlines()[0])
            for field in first:
                for value in (None, 7, [], {}, ''):
                    with open(path, 'w') as file:
                        file.write(json.dumps(first | {field: value}) + '\n')
                    try:
                        assert examples(name, folder)
                    except UserError as error:
                        assert path in str(error) or name in str(error)
        with open(path, 'w') as file:
            file.write(original)


def test_blank_lines_are_skipped(folder):
    path = folder / MMLU
    path.write_text('\n' + GOOD + '\r\n' + GOOD)
    assert [example.target for example in examples('mmlu', folder)] == [1, 1]


def test_absent_parts_are_told(folder, capsys):
    assert len(examples('mmlu', folder, shots=5)) == 2
    said = capsys.readouterr().out
    assert '56 of 57 subjects are absent: abstract_algebra' in said and 'fewer than 5 solved examples of anatomy' in said
    examples('bbh', folder)
    examples('math', folder)
    said = capsys.readouterr().out
    assert '25 of 27 tasks are absent' in said and '6 of 7 subjects are absent: counting_and_probability' in said


def test_objects_over_several_lines_are_read(folder):
    """As MATH, BBH, TriviaQA and QuAC are published."""
    for name in ('math', 'bbh', 'triviaqa', 'quac', 'squad'):
        before = examples(name, folder)
        for path in folder.rglob('*.json'):
            path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
        assert examples(name, folder) == before


def test_a_relative_folder_and_brackets_in_its_name(folder, monkeypatch):
    folder.rename(folder.with_name('data [1]'))
    monkeypatch.chdir(folder.parent)
    for name in ('math', 'bbh', 'bold', 'mmlu'):
        assert examples(name, 'data [1]')


def test_shots_beyond_the_solved_examples_are_refused(folder):
    for name in ('boolq', 'humaneval', 'toy'):
        with pytest.raises(UserError, match=f'--shots=1: {name}'):
            examples(name, folder, shots=1)
    with pytest.raises(UserError, match='--shots=9: gsm8k'):
        examples('gsm8k', folder, shots=9)
    with pytest.raises(UserError, match=r'NQ-open\.train\.jsonl holds 6'):
        examples('naturalquestions', folder, shots=7)


def test_quac_with_a_solved_question(folder):
    (folder / 'quac/train_v0.2.json').write_text(quac(question='Solved?', answers=[{'text': 'so it is'}]))
    [first, *_] = examples('quac', folder, shots=1)
    assert first.prompt.startswith('Title: Una') and '\nAnswer: so it is\n\nTitle: Una' in first.prompt


def test_chat_models_are_shown_fewer(folder):
    config = EvaluateConfig('', (), str(folder), '')
    shots = {name: (adapted(TASKS[name], config).shots, adapted(TASKS[name], config, chat=True).shots) for name in TASKS}
    assert (shots['bbh'], shots['commonsenseqa'], shots['triviaqa'], shots['mbpp']) == ((3, 0), (7, 0), (5, 0), (3, 0))
    assert (shots['gsm8k'], shots['math'], shots['mmlu'], shots['truthfulqa']) == ((8, 8), (4, 4), (5, 5), (6, 6))


def test_bad_rows_and_outputs_are_found_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, 'open_engine', None)
    monkeypatch.setattr(evaluate, 'open_model', lambda _: None)
    config = EvaluateConfig('m', ('mmlu', 'gsm8k'), str(folder), str(tmp_path / 'out'), chat=False)
    (folder / GSM8K).write_text('{}\n')
    with pytest.raises(UserError, match=r"test\.jsonl:1.*'question'"):
        evaluate.run(config)
    file = tmp_path / 'file'
    file.write_text('')
    for output in (file, file / 'below'):
        with pytest.raises(UserError, match=str(file)):
            evaluate.run(EvaluateConfig('m', ('mmlu',), str(folder), str(output), chat=False))
