"""The chat format: literals by hand, Meta's golden vector, and that training and sampling see the same ids."""

import itertools
import random

import pytest

from llama2_jax.config import UserError
from llama2_jax.text.dialog import (
    SPECIAL_TAGS_ERROR,
    check_dialog,
    cut_dialog,
    encode_dialog,
    encode_prompt,
    fit_dialog,
    has_special_tags,
)
from llama2_jax.text.template import PromptFormat
from llama2_jax.text.tokenizer import train_tokenizer


class Letters:
    """A tokenizer of code points; like SentencePiece it puts a space before every text."""

    prompts = PromptFormat()

    def encode(self, text, bos, eos):
        return bos * [1] + [ord(letter) for letter in f' {text}'] + eos * [2]


def spell(ids):
    return ''.join({1: '<s>', 2: '</s>'}.get(i) or chr(i) for i in ids)


def dialog(*contents, system=None):
    turns = [{'role': role, 'content': text} for role, text in zip(itertools.cycle(('user', 'assistant')), contents)]
    return ([{'role': 'system', 'content': system}] if system is not None else []) + turns


ONE = '<s> [INST] Hi [/INST] Hello! </s>'
TWO = ONE + '<s> [INST] Bye [/INST] See you. </s>'
THREE = TWO + '<s> [INST] Bye! [/INST] Bye! </s>'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    rng = random.Random(0)
    words = ['hello', 'there', '[INST]', 'bye', 'two  spaces', 'Hi!', '<<SYS>>\n', 'ten 10', 'tree', 'end.']
    lines = [' '.join(rng.choices(words, k=9)) for _ in range(300)]
    return train_tokenizer(lines, tmp_path_factory.mktemp('tok') / 'tokenizer.model', 320)


@pytest.mark.parametrize(
    ('messages', 'text', 'answers'),
    [
        (dialog('Hi', 'Hello!'), ONE, [' Hello! </s>']),
        (dialog(' Hi\n', '\tHello! '), ONE, [' Hello! </s>']),
        (dialog('Hi', 'Hello!', 'Bye', 'See you.'), TWO, [' Hello! </s>', ' See you. </s>']),
        (
            dialog('Hi', 'Hello!', 'Bye', 'See you.', 'Bye!', 'Bye!'),
            THREE,
            [' Hello! </s>', ' See you. </s>', ' Bye! </s>'],
        ),
        (
            dialog('Hi ', 'Hello!', system=' Be brief. '),
            '<s> [INST] <<SYS>>\n Be brief. \n<</SYS>>\n\nHi [/INST] Hello! </s>',
            [' Hello! </s>'],
        ),
        (
            dialog('Hi', 'Hello!', 'Bye', 'See you.', system='Be brief.'),
            '<s> [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s> [INST] Bye [/INST] See you. </s>',
            [' Hello! </s>', ' See you. </s>'],
        ),
    ],
)
def test_literal_dialogs_and_masks(messages, text, answers):
    ids, trained = encode_dialog(messages, Letters())
    assert spell(ids) == text
    runs = [spell(i for i, _ in group) for key, group in itertools.groupby(zip(ids, trained, strict=True), lambda p: p[1]) if key]
    assert runs == answers
    assert spell(encode_prompt(messages[:-1], Letters())) == text[: text.rindex('[/INST]') + len('[/INST]')]


def test_answers_of_weight_0_are_read_but_not_learned():
    messages = dialog('Hi', 'Hello!', 'Bye', 'See you.')
    messages[1]['weight'] = 0
    ids, trained = encode_dialog(messages, Letters())
    assert spell(ids) == TWO
    assert spell(i for i, t in zip(ids, trained, strict=True) if t) == ' See you. </s>'


def test_drawn_ids_are_trained_on(llama2):
    drawn = [29871, 15043, 29991, 2]  # as 7B-chat answers; encoding its text gives 15043 29991 29871 2
    messages = [*dialog('Hi'), {'role': 'assistant', 'content': 'Hello!', 'token_ids': drawn}]
    ids, trained = encode_dialog(messages, llama2)
    assert [i for i, t in zip(ids, trained, strict=True) if t] == drawn
    assert encode_prompt([*messages, *dialog('Bye')], llama2)[9:13] == drawn
    assert cut_dialog([*messages, *dialog('Bye', 'So long')], llama2, 13) == messages
    for changes, named in (
        ({'content': 'Hello?'}, 'row 3: token_ids .* are not its content'),
        ({'token_ids': [15043, 29991]}, 'row 3: token_ids .* end with the only EOS'),
        ({'token_ids': [15043, 2, 29991, 2]}, 'row 3: token_ids .* end with the only EOS'),
        ({'token_ids': [32000, 2]}, 'row 3: token_ids of an answer are ids of'),
        ({'token_ids': '15043'}, r'row 3: messages\[1\] \(assistant\): token_ids'),
        ({'token_ids': [True]}, r'row 3: messages\[1\] \(assistant\): token_ids'),
    ):
        with pytest.raises(UserError, match=named):
            encode_dialog([messages[0], messages[1] | changes], llama2, 'row 3')


def test_metas_vector(llama2):
    golden = (
        '1 518 25580 29962 3532 14816 29903 6778 13 3629 11473 29889 13 29966 829 14816 29903 6778 13 13 18567 518 29914 25580 '
        '29962 15043 29991 29871 2 1 518 25580 29962 2648 29872 518 29914 25580 29962'
    )
    messages = dialog('Hi', 'Hello!', 'Bye', system='Be brief.')
    assert encode_prompt(messages, llama2) == [int(i) for i in golden.split()]
    ids, trained = encode_dialog([*messages, {'role': 'assistant', 'content': 'So long'}], llama2)
    assert ids[: len(golden.split())] == [int(i) for i in golden.split()]
    assert [i for i, t in zip(ids, trained, strict=True) if t] == [15043, 29991, 29871, 2, 1105, 1472, 29871, 2]


TEXTS = (
    ['hello', ' there ', '10', 'Hi!\n\nbye', '- a\n- b', 'naïve é \U0001f642', 'two  spaces', '\n10.', '[INST] x', '</s>', '▁a']
    + ['  def f():\n      return 1', '"quoted"', '(x)', '] y', '. end', '<s> [/INST]']
)  # fmt: skip


@pytest.mark.parametrize('name', ['llama2', 'trained'])
def test_a_pair_equals_metas_single_call_and_begins_with_its_prompt(name, request):
    tokenizer = request.getfixturevalue(name)
    for user, answer in itertools.product(TEXTS, repeat=2):
        ids, _ = encode_dialog(dialog(user, answer), tokenizer)
        assert ids == tokenizer.encode(f'[INST] {user.strip()} [/INST] {answer.strip()} ', bos=True, eos=True), (user, answer)


@pytest.mark.parametrize('name', ['llama2', 'trained'])
@pytest.mark.parametrize('system', [None, 'Be brief.'])
def test_training_sees_the_prompts_of_sampling_at_every_turn(name, system, request):
    tokenizer = request.getfixturevalue(name)
    messages = dialog(*TEXTS, 'last', system=system)
    ids, trained = encode_dialog(messages, tokenizer)
    starts = [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
    users = [i for i, message in enumerate(messages) if message['role'] == 'user']
    assert len(starts) == len(users) == 9
    for start, user in zip(starts, users, strict=True):
        assert ids[:start] == encode_prompt(messages[: user + 1], tokenizer)
        stop = ids.index(tokenizer.eos_id, start)
        assert all(trained[start : stop + 1])
        assert tokenizer.decode(ids[start:stop]) == messages[user + 1]['content'].strip() + ' '
    assert sum(trained) == sum(ids.index(tokenizer.eos_id, start) + 1 - start for start in starts)
    assert [ids.count(tokenizer.bos_id), ids.count(tokenizer.eos_id)] == [9, 9]


def test_special_tags():
    assert SPECIAL_TAGS_ERROR == 'Error: special tags are not allowed as part of the prompt.'
    assert not has_special_tags(dialog('Hi [inst]', '<SYS>', 'INST', system='[ INST ]'))
    for tag in ('[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'):
        assert has_special_tags(dialog(f'a{tag}b'))
        assert has_special_tags(dialog('Hi', f'{tag}', 'Bye'))
        assert has_special_tags(dialog('Hi', system=tag))


@pytest.mark.parametrize(
    ('messages', 'sentence'),
    [
        ([], r'a dialog is a list of messages, at least one\.'),
        ('Hi', r'a dialog is a list of messages, at least one\.'),
        ([{'role': 'user'}], r"messages\[0\] is not an object with 'role' and 'content'\."),
        (['Hi'], r"messages\[0\] is not an object with 'role' and 'content'\."),
        ([{'role': 'human', 'content': 'Hi'}], r"messages\[0\] has the role 'human'; valid: system, user, assistant\."),
        (dialog('Hi', ' \n'), r'messages\[1\] \(assistant\) has no text content\.'),
        (dialog('Hi', ''), r'messages\[1\] \(assistant\) has empty content\.'),
        (dialog('Hi', None), r'messages\[1\] \(assistant\) has empty content\.'),
        (dialog(['Hi']), r'messages\[0\] \(user\) has no text content\.'),
        (dialog('Hi')[:1] * 2, r"messages\[1\] has the role 'user' where 'assistant' is due\."),
        (dialog('Hi', 'Hello')[1:], r"messages\[0\] has the role 'assistant' where 'user' is due\."),
        (dialog('Hi', 'Hello', 'Bye', 'Bye', system='s')[:2] + dialog('Hi'), r"messages\[2\] has the role 'user' where"),
        (dialog('Hi') + dialog(system='s'), r"messages\[1\] has the role 'system' where 'assistant' is due\."),
        (dialog(system='s'), r'there is nothing after the system message\.'),
        (
            [{'role': 'user', 'content': 'Hi', 'weight': 0}],
            r'messages\[0\] \(user\) has weight 0; an assistant may have 0 or 1\.',
        ),
        (dialog('a') + [{'role': 'assistant', 'content': 'b', 'weight': 0.5}], r'messages\[1\] \(assistant\) has weight 0\.5;'),
    ],
)
def test_mistakes_name_the_place(messages, sentence):
    for check in (check_dialog, lambda m, where: encode_prompt(m, Letters(), where), lambda m, w: encode_dialog(m, Letters(), w)):
        with pytest.raises(UserError, match=f'^a.jsonl:7: {sentence}'):
            check(messages, 'a.jsonl:7')


def test_the_wrong_end():
    with pytest.raises(UserError, match=r'^The dialog: the last message of a prompt must be from the user\.$'):
        encode_prompt(dialog('Hi', 'Hello'), Letters())
    with pytest.raises(UserError, match=r'^The dialog: the last message of a dialog to train on must be from the assistant\.$'):
        encode_dialog(dialog('Hi'), Letters())


def test_fit_drops_the_oldest_turns_and_keeps_the_system_message():
    messages = dialog('a' * 50, 'b' * 50, 'c' * 20, 'd' * 20, 'e' * 10, system='Be brief.')
    length = len(encode_prompt(messages, Letters()))
    assert fit_dialog(messages, Letters(), length) == (messages, 0)
    one = messages[:1] + messages[3:]
    assert fit_dialog(messages, Letters(), length - 1) == (one, 1)
    two = messages[:1] + messages[5:]
    shortest = len(encode_prompt(two, Letters()))
    assert fit_dialog(messages, Letters(), len(encode_prompt(one, Letters())) - 1) == (two, 2)
    assert fit_dialog(messages, Letters(), shortest) == (two, 2)
    with pytest.raises(UserError, match=rf'^The last message takes {shortest} tokens, but there is room for {shortest - 1}\.$'):
        fit_dialog(messages, Letters(), shortest - 1)


@pytest.mark.parametrize('system', [None, 'Be brief.'])
def test_cut_at_turn_boundaries(system):
    messages = dialog('Hi', 'Hello!', 'Bye', 'See you.', 'Bye!', 'Bye!', system=system)
    prefixes = [messages[: len(messages) - 4], messages[:-2], messages]
    lengths = [len(encode_dialog(prefix, Letters())[0]) for prefix in prefixes]
    for prefix, length, longer in zip(prefixes, lengths, [*lengths[1:], 10**6], strict=True):
        assert cut_dialog(messages, Letters(), length) == prefix
        assert cut_dialog(messages, Letters(), longer - 1) == prefix
    assert cut_dialog(messages, Letters(), lengths[0] - 1) is None
