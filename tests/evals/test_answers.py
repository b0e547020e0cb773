r"""What graders find in answers as models write them: text -> answer."""

import json
import re

import pytest

from llama2_jax.evals.answers import extract_number, letter, word, words
from llama2_jax.evals.task import Example, exact, f1, normalise, short_answer
from llama2_jax.evals.tasks import TASKS, latex

OPTIONS = {'A': 'shirt pocket', 'B': "calligrapher's hand", 'C': 'inkwell', 'D': 'desk drawer', 'E': 'blotter'}


def grade(name, target, text, **data):
    return TASKS[name].grade(Example(target, data=data), [{'text': text, 'stop_reason': 'eos'}], {})


@pytest.mark.parametrize(
    ('text', 'number'),
    [
        (' 5 * 4 = 20. The answer is 29.\n\nQ: There are 3', '29'),
        ('the answer is 12, but that is wrong. The answer is 18.', '18'),
        ('The answer is 12. Wait, that is wrong: 5 + 13 = 18.', '18'),
        ('The answer is not 12. It is 18.', '18'),
        ('The answer is 18, not 12.', '18'),
        ('The answer is \u22125.', '-5'),
        ('The answer is -$5', '-5'),
        ('The answer is $-5$', '-5'),
        ('$\\boxed{70{,}000}$', '70000'),
        ('The answer is 70\\,000', '70000'),
        ('70\u00a0000', '70000'),
        ('The answer is: 1,000,000.', '1000000'),
        ('The answer is $18.50. So', '18.5'),
        ('The answer is 1,234.50', '1234.5'),
        ('The answer is .5', '0.5'),
        ('The answer is 0.50', '0.5'),
        ('he has 10.00 left', '10'),
        ('The answer is 007', '7'),
        ('The answer is -0', '0'),
        ('The answer is 50%.', '50'),
        ('The answer is €18', '18'),
        ('The answer is $ 18', '18'),
        ('The answer is \\$18.', '18'),
        ('#### 1,009', '1009'),
        ('#### 18 dollars', '18'),
        ('#### -12', '-12'),
        ('#### Step 4: 9 * 2 = 18\nShe makes 18.', '18'),
        ('#### 1. Eggs\n\nShe makes 18.', '18'),
        ('She earns **$18** a day from 9 eggs.', '18'),
        ('**Step 2:** 9 * 2 = 18', '18'),
        ('**Answer:** 18 apples', '18'),
        ('The answer is **18**.', '18'),
        ('The answer is: \\(18\\)', '18'),
        ('The final answer is $18$. I hope it is correct.', '18'),
        ('The answer is:\n$$\n18\n$$\n', '18'),
        ('\\[ 9 \\times 2 = \\boxed{18} \\text{ dollars} \\]', '18'),
        ('\\fbox{7}', '7'),
        ('## Final answer\n\n18 apples', '18'),
        ('Answer:\n\n18', '18'),
        ('Sure!\n\nQuestion: 3 eggs?\n\nAnswer: 18', '18'),
        ('The answer is 9 * 2 = 18 dollars.', '18'),
        ('The answer is Janet makes $18', '18'),
        ('The answer is approximately 18.2', '18.2'),
        ('The answer to the question is therefore 18.', '18'),
        ('so -3 it is', '-3'),
        ('10-3', '3'),
        ('Therefore x = 5.0', '5'),
        ('2 + 2 = 4 dollars each, so $8', '8'),
        ('100', '100'),
        ('1.', '1'),
        ('24 answers * 2 points/answer = 48 points, and so 48 + 16 = 64 in all.', '64'),
        ('Answer = 18', '18'),
        ("Sure! Here's the answer:\n\nJanet's ducks lay 16 eggs. She sells 9 * 2 = $18.", '18'),
        ("Here's the step-by-step answer:\n1. She has 16 eggs.\n2. She makes $18.", '18'),
        ('Here is the answer:\n\nEggs: 16\nEaten: 7\nTotal: $18', '18'),
        ('Let me check my answer: 9 * 2 = 18.', '18'),
        ('To find the answer: first we subtract what she eats and what she bakes, which is 16 - 7 = 9. Then 9 * 2 = 18.', '18'),
        ('The answer is obtained by multiplying 9 by 2. So she makes $18.', '18'),
        ('The answer is calculated as follows: 16 - 7 = 9, 9 * 2 = 18.', '18'),
        ('Answer: 18 dollars\n\nExplanation: 16 - 7 = 9, and 9 times 2 is what she makes in 1 day.', '18'),
        ('The answer is 18.\n\nExplanation: 16 - 7 = 9.', '18'),
        ('**The answer is 18.**', '18'),
        ('**Final Answer: $18/day**', '18'),
        ('nothing', ''),
        ('', ''),
    ],
)
def test_numbers(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ('text', 'chosen'),
    [
        ('The answer is a blotter (e).', 'E'),
        ('So the answer is (c).', 'C'),
        ('Answer: B) because it holds a pen', 'B'),
        ('**B**', 'B'),
        ('B', 'B'),
        ("b) calligrapher's hand", 'B'),
        ('E. blotter', 'E'),
        ('Option E', 'E'),
        ('The answer is e', 'E'),
        ('The answer is\n(e)', 'E'),
        ('The answer is A because it fits', 'A'),
        ('The correct answer is: **(E) blotter**', 'E'),
        ('The correct option is E.', 'E'),
        ('The answer is blotter.', 'E'),
        ('Sure! The best choice is "blotter".', 'E'),
        ('I think a blotter is best.', 'E'),
        ('A person would use (e), the blotter.', 'E'),
        ('The answer is (B). Wait, I made a mistake: it must be (E).', 'E'),
        ('The answer is not (A). It is (E).', 'E'),
        ('(A) is wrong. (B) too. So (E).', 'E'),
        ('(E) because (A) is dry', 'E'),
        ('(a) shirt pocket: no\n(b) hand: no\n(e) blotter: yes', 'E'),
        ('(E) blotter\n\n(A) is dry, and so is (B).', 'E'),
        ('$\\boxed{E}$', 'E'),
        ('\\boxed{\\text{(E)}}', 'E'),
        ('Answer:\n\nE', 'E'),
        ('## Answer\n(e) blotter', 'E'),
        ('The answer must be an item that absorbs ink. Of the above, only blotters. So the answer is (e).', 'E'),
        ('The answer is (e).\n\nQ: What?\nA: The answer is (a).', 'E'),
        ('The answer is (e).\nI hope this answer is helpful!', 'E'),
        ('Here is my answer: we look at (A) first, which is a thing of cloth that would be stained, and so it is (E).', 'E'),
        ('The answer is a thing', ''),
        ('no idea', ''),
        ('', ''),
    ],
)
def test_letters(text, chosen):
    assert letter(text, OPTIONS) == chosen
    target = chosen.lower()
    assert grade('commonsenseqa', target or 'a', text, options=OPTIONS) == {'prediction': target, 'correct': float(bool(chosen))}


DATES = 'Which date?\nOptions:\n(A) 12/13/2026\n(B) 12/14/2026\n(C) 01/14/2026'


@pytest.mark.parametrize(
    ('target', 'text'),
    [
        ('(B)', 'The answer is (B).'),
        ('(B)', ' (B)\n'),
        ('(B)', '**(B)**'),
        ('(B)', '(B) 12/14/2026'),
        ('(B)', 'Correct answer is (B)'),
        ('(B)', 'The answer is 12/14/2026.'),
        ('(B)', 'It is not (A). So the answer is:\n\n(B)'),
        ('(B)', 'So the answer is **B**.'),
        ('(B)', 'B'),
        ('No', '"No"'),
        ('No', ' No.\n'),
        ('No', 'No, he does not return to the start.'),
        ('No', 'If yes, he would be there. So the answer is **No**.'),
        ('no', 'The sentence is not plausible. So the answer is no.'),
        ('True', 'not False is True, and True and True is True. So the answer is `True`.'),
        ('invalid', 'So the answer is invalid.'),
        ('valid', 'valid'),
        ('-41', 'So the answer is \u221241.'),
        ('8', 'I count **8** objects.'),
        ('apple bat cat', 'The answer is: apple, bat, cat.'),
        ('apple bat cat', ' apple bat cat\n'),
        ('] ) >', 'The answer is: ] ) >.'),
        ('] ) >', ' ] )>'),
        ('] ) >', 'So the answer is `] ) >`'),
    ],
)
def test_bbh(target, text):
    assert grade('bbh', target, text, input=DATES)['correct'] == 1.0
    others = {'(B)': '(A)', 'No': 'Yes', 'no': 'yes', 'True': 'False', 'invalid': 'valid', 'valid': 'invalid'}
    assert grade('bbh', others.get(target, f'{target} )'), text, input=DATES)['correct'] == 0.0
    assert grade('bbh', target, '', input=DATES)['correct'] == 0.0


@pytest.mark.parametrize(
    ('text', 'right'), [('', 0.0), ('(A)', 0.0), ('either (B) or (A)', 0.0), (' (B)', 1.0), ('The answer is B', 1.0)]
)
def test_bbh_without_listed_options(text, right):
    assert grade('bbh', '(B)', text, input='Which?')['correct'] == right


def test_small_vocabularies():
    assert word('Let us see. Yes.', ('yes', 'no')) == 'yes' and word('', ('yes', 'no')) == ''
    assert word('It is invalid', ('valid', 'invalid')) == 'invalid'


@pytest.mark.parametrize(
    ('text', 'answer'),
    [
        (r'\boxed{10}', '10'),
        (r'The final answer is \(10\).', '10'),
        ('The final answer is $.5$', '0.5'),
        (r'\fbox{7}', '7'),
        (r'\boxed 5', '5'),
        (r'So $\boxed{\frac12}$.', '1/2'),
        (r'Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.', '0.5'),
        (r'The final answer is: $\boxed{18}$. I hope it is correct.', '18'),
        ('The final answer is $[2,5)$. I hope it is correct.', '[2,5)'),
        ('The final answer is $3.5$. Therefore we are done.', '3.5'),
        ('The final answer is 3.5 cm. Done', '3.5'),
        (r'\boxed{3}, no wait, \boxed{4}', '4'),
        (r'\boxed{3}. The final answer is $4$.', '4'),
        ('The answer is not $5$. The answer is $6$.', '6'),
        (r'The answer is $\sqrt{2}$, not $2$.', r'\sqrt2'),
        (r'The answer is: $$\frac{3}{4}$$', '.75'),
        ('The answer is:\n$$\n\\frac{3}{4}\n$$', '.75'),
        ('**Answer:** $5$', '5'),
        ('**Final answer:** 5 square units', '5'),
        (r'\boxed{10{,}000}', '10000'),
        (r'\boxed{10,000}', '10000'),
        (r'\boxed{70\,000}', '70000'),
        (r'\boxed{(1,234)}', '(1,234)'),
        (r'\boxed{x=5}', '5'),
        (r'\boxed{\text{Evelyn}}', 'Evelyn'),
        (r'\boxed{\text{(C)}}', 'C'),
        (r'\boxed{-\frac{1}{2}}', r'\frac{-1}{2}'),
        (r'\boxed{\dfrac{9}{7}}', r'\frac97'),
        (r'\boxed{3\frac{1}{2}}', '7/2'),
        ('\\boxed{\u22125}', '-5'),
        (r'\boxed{90^\circ}', '90'),
        (r'\boxed{90°}', '90'),
        (r'\boxed{\$18.50}', '18.5'),
        (r'\boxed{50\%}', '50'),
        (r'\boxed{2\sqrt3}', r'2\sqrt{3}'),
        (r'\boxed{4\pi}', '4π'),
        (r'\boxed{\left(3, \frac{\pi}{2}\right)}', r'(3,\frac{\pi}{2})'),
        (r'\boxed{11\text{ cm}^2}', '11'),
        (r'\boxed{5\text{ meters per second}}', '5'),
        ('The answer is 5 meters per second.', '5'),
        (r'\boxed{\frac{1}{2} \text{ liters}}', '0.5'),
        (r'\boxed{3\text{ or }5}', r'3\text{ or }5'),
        ('Here is the answer:\n\nFirst we take away the two, and then add three, which is easy. So we have $5$.', '5'),
        (r'\boxed{0.\overline{3}}', r'0.\overline{3}'),
        ('we get $x = 5$, so $y = 6$.', '6'),
    ],
)
def test_formulas(text, answer):
    assert latex.final_answer(text) == latex.normalise(answer)
    target = latex.normalise(answer)
    assert grade('math', target, text)['correct'] == 1.0 and grade('math', target, '')['correct'] == 0.0


@pytest.mark.parametrize(
    ('text', 'plain'),
    [
        (r'x = \dfrac12', r'\frac{1}{2}'),
        (r'$\frac{1}{2}$.', r'\frac{1}{2}'),
        (r'\(10\).', '10'),
        ('$.5$', r'\frac{1}{2}'),
        (r'5\text{ cm}', '5'),
        (r'\frac{1}{0}', r'\frac{1}{0}'),
        ('points', 'points'),
    ],
)
def test_spellings_of_formulas(text, plain):
    assert latex.normalise(text) == plain


def test_boxes():
    assert latex.boxed(r'\boxed{\sqrt{2}} or \boxed{\frac{a}{b}} end') == r'\frac{a}{b}' and latex.boxed('none') == ''
    assert latex.boxed(r'\fbox{7} and \boxed{}') == '7'
    assert latex.normalise(r'0.\overline{3}') != latex.normalise('0.3')


@pytest.mark.parametrize(
    ('text', 'answers', 'right'),
    [
        (' St. Louis.\nQ:', ['St. Louis'], True),
        ('Washington, D.C.', ['Washington, D.C.'], True),
        ('Paris, France.', ['Paris'], True),
        ('Paris. It is the capital of France', ['Paris'], True),
        ('Paris (France)', ['Paris'], True),
        ('**Paris**', ['Paris'], True),
        ('“Paris”.', ['Paris'], True),
        ('A: Paris', ['Paris'], True),
        ('The answer is Paris.', ['Paris'], True),
        ('Sure! Here is the answer:\n\nParis', ['Paris'], True),
        ('1,000', ['1000'], True),
        ('1914\u20131918', ['1914-1918'], True),
        ('Beyonce\u0301', ['Beyonc\u00e9'], True),
        ('The The', ['The The'], True),
        ('London, Paris', ['Paris'], False),
        ('not Paris', ['Paris'], False),
        ('', ['The The'], False),
        ('', ['?'], False),
        ('the', ['?'], False),
    ],
)
def test_short_answers(text, answers, right):
    assert grade('triviaqa', answers, text)['correct'] == float(right)


def test_words():
    assert short_answer(' St. Paul, Minnesota.\nQ: x') == 'St. Paul' and short_answer(' 3.5 km.') == '3.5 km'
    assert normalise('The  Eiffel-Tower.') == 'eiffeltower' and words(' Mt. Everest.\nQ:') == 'Mt. Everest'
    assert exact('', ['']) == f1('', ['']) == f1('', ['the']) == 0.0
    assert grade('squad', ['unanswerable'], 'The answer is **unanswerable**.')['correct'] == 1.0


def test_numbers_are_those_of_lm_eval(fixtures):
    """Its filters of gsm8k_cot: 'The answer is N.', and where that is missing the last number."""
    rows = [json.loads(line)['answer'] for line in (fixtures / 'gsm8k/train-1500.jsonl').read_text().splitlines()]
    texts = [re.sub(r'<<.*?>>', '', row) for row in rows]
    stated = [text.replace('####', 'The answer is') + '.' for text in texts]
    for text in stated:
        assert extract_number(text) == extract_number(re.findall(r'The answer is (\-?[0-9\.\,]+).', text)[0].strip('.'))
    flexible = [[a or b for a, b in re.findall(r'(-?[$0-9.,]{2,})|(-?[0-9]+)', text.split('\n####')[0])] for text in texts]
    same = [extract_number(text.split('\n####')[0]) == extract_number(found[-1].strip('$.,')) for text, found in
            zip(texts, flexible, strict=True) if found]  # fmt: skip
    assert sum(same) >= len(same) - 1  # where 'songs on her mp3 player' is 3 to lm-eval
