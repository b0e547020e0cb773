"""What a config names is checked before a run begins, by one function for all stages."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from random_policy import make_home

from llama2_jax.config import UserError, override
from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.inputs import check_inputs, common_tokenizer
from llama2_jax.rl import rejection
from llama2_jax.rl.ppo import open_stage
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.rl.versions import check

sys.path.insert(0, str(Path(__file__).parents[1] / 'experiments'))

import collect_preferences  # noqa: E402
import context_distillation  # noqa: E402
import dpo  # noqa: E402
import ghost_attention  # noqa: E402
import ppo  # noqa: E402
import rejection_sampling  # noqa: E402
import reward_model  # noqa: E402
import rlhf  # noqa: E402
import sft  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_device', 'mesh')


@pytest.fixture(scope='module')
def home(tmp_path_factory, one_device):
    rows = [{'messages': [{'role': 'user', 'content': f'What is {a} and {b}?'}]} for a in range(6) for b in range(5)]
    home = make_home(tmp_path_factory.mktemp('inputs'), rows)
    (home / 'texts.jsonl').write_text('{"text": "It is."}')
    return home


STAGES = (sft, reward_model, dpo, rejection_sampling, ppo, rlhf, ghost_attention, context_distillation, collect_preferences)


@pytest.mark.parametrize('program', STAGES, ids=lambda program: program.__name__)
def test_the_toy_presets_name_nothing_that_is_not_there(program):
    for name, preset in program.PRESETS.items():
        if name.startswith('tiny') and name != 'tiny_renewed':  # of comparisons that are collected first
            check_inputs(preset())


@pytest.mark.parametrize(
    ('program', 'setting', 'named'),
    [
        (sft, 'init_from=nope', 'init_from=nope'),
        (sft, 'init_from=HOME/help', 'init_from=.*reward model'),
        (sft, 'data.mixture=toy:nope', 'toy:nope'),
        (sft, 'data.mixture=toy:dialogs, jsonl:HOME/texts.jsonl', r'data\.mixture=.*texts\.jsonl:1'),
        (reward_model, 'data.mixture=toy:nope', r'data\.mixture=toy:nope'),
        (dpo, 'data.mixture=toy:nope', r'data\.mixture=toy:nope'),
        (dpo, 'init_from=HOME/help', 'init_from=.*reward model'),
        (reward_model, 'reference=jsonl:HOME/nope.jsonl', 'reference=.*nope.jsonl'),
        (rejection_sampling, 'rewards.helpfulness=nope', r'rewards\.helpfulness=nope'),
        (rejection_sampling, 'rewards.safety=HOME/policy', r'rewards\.safety=.*language model'),
        (rejection_sampling, 'sft.init_from=nope', r'sft\.init_from=nope'),
        (rejection_sampling, 'sft.data.mixture=jsonl:nope.jsonl', r'sft\.data\.mixture=jsonl:nope\.jsonl'),
        (rejection_sampling, 'earlier=HOME', 'earlier=.*choices.jsonl'),
        (ppo, 'rewards.safety=nope', r'rewards\.safety=nope'),
        (ppo, 'value_from=nope', 'value_from=nope'),
        (ppo, 'judge=nope', 'judge=nope'),
        (rlhf, 'base=nope', 'base=nope'),
        (rlhf, 'rewards.safety=nope', r'rewards\.safety=nope'),
        (rlhf, 'evaluation=toy:nope', 'evaluation=toy:nope'),
        (rlhf, 'ppo.judge=nope', r'ppo\.judge=nope'),
        (rlhf, 'collect.prompts=toy:nope', r'collect\.prompts=toy:nope'),
        (ghost_attention, 'constraints=jsonl:nope', 'constraints=jsonl:nope'),
        (context_distillation, 'templates=jsonl:nope', 'templates=jsonl:nope'),
        (collect_preferences, 'models=HOME/policy,nope', 'models=nope'),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_trained(home, program, setting, named):
    config = override(program.tiny(), [setting.replace('HOME', str(home))])
    with pytest.raises(UserError, match=named):
        check_inputs(config)


def test_the_command_line_checks_first(home, tmp_path, monkeypatch, capsys):
    import subprocess

    program = Path(rlhf.__file__)
    command = [sys.executable, str(program), f'--workdir={tmp_path}/run', '--set', 'base=nope']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'base=nope' in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'run').exists()


def ready(home, config):
    """A config with the models of `home`, small enough for them."""
    rewards = dataclasses.replace(config.rewards, helpfulness=str(home / 'help'), safety=str(home / 'safe'))
    prompts = dataclasses.replace(config.prompts, mixture=f'jsonl:{home}/prompts.jsonl', longest=40)
    return dataclasses.replace(config, rewards=rewards, prompts=prompts, max_new_tokens=16)


def test_a_round_that_must_fail_is_refused_before_sampling(home, tmp_path):
    config = ready(home, rejection_sampling.tiny())
    tuned = dataclasses.replace(config.sft, init_from=str(home / 'policy'), grade=False, length=60)
    config = dataclasses.replace(config, sample_from=str(home / 'policy'), sft=tuned)
    rejection.check(config)
    for changes, named in (
        ({'sample_from': ''}, 'sample_from='),
        ({'max_new_tokens': 40}, r'longest=40 and max_new_tokens=40 .* sample_from, 64'),
        ({'sft': dataclasses.replace(tuned, length=65)}, 'length=65'),
        ({'sft': dataclasses.replace(tuned, grade=True)}, r'sft\.grade=true knows the toy world only'),
    ):
        with pytest.raises(UserError, match=named):
            rejection.check(dataclasses.replace(config, **changes))


def test_the_oracle_knows_no_prompts_but_the_toy_ones(home, tmp_path):
    config = ready(home, dataclasses.replace(ppo.tiny(), init_from=str(home / 'policy')))
    with pytest.raises(UserError, match=r'judge=oracle knows the toy world only, and jsonl:.*prompts\.jsonl'):
        open_stage(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_the_loop_looks_at_its_last_step_first(home):
    rewards = RewardsConfig(helpfulness=str(home / 'help'), safety=str(home / 'safe'))
    config = dataclasses.replace(rlhf.tiny(), init_from=str(home / 'policy'), rewards=rewards)
    check(config)
    for changes, named in (
        ({'evaluation': f'jsonl:{home}/texts.jsonl'}, r'texts\.jsonl:1'),
        ({'base': str(home / 'help')}, 'base=.*language model'),
        ({'sample_from': ('nope',)}, 'sample_from=nope'),
        ({'ghost_after': 3}, r'ghost\.dialogs is missing'),
        ({'distill_before': 1}, r'distill\.prompts is missing'),
    ):
        with pytest.raises(UserError, match=named):
            check(dataclasses.replace(config, **changes))


def test_a_bad_first_row_may_be_skipped(home, tmp_path):
    (tmp_path / 'd.jsonl').write_text((home / 'texts.jsonl').read_text() + '\n' + (home / 'prompts.jsonl').read_text())
    check_inputs(DialogConfig(f'jsonl:{tmp_path}/d.jsonl skip=1'))
    with pytest.raises(UserError, match=r'd\.jsonl:1'):
        check_inputs(DialogConfig(f'jsonl:{tmp_path}/d.jsonl'))


def test_models_share_a_tokenizer(home, tmp_path_factory):
    other = tmp_path_factory.mktemp('other')
    make_home(other, [{'messages': [{'role': 'user', 'content': f'Where is {a} and {b}?'}]} for a in range(6) for b in range(5)])
    common_tokenizer({'a': str(home / 'policy'), 'b': str(home / 'help')})
    with pytest.raises(UserError, match=r'^b=.*other.* another tokenizer than a='):
        common_tokenizer({'a': str(home / 'policy'), 'b': str(other / 'help')})


def test_equal_prompts_are_not_told_to_raise_a_share(home, tmp_path):
    from llama2_jax.checkpoints.load import open_model, tokenizer_of
    from llama2_jax.data.prompts import PromptConfig, PromptData

    (tmp_path / 'p.jsonl').write_text(20 * (json.dumps({'messages': [{'role': 'user', 'content': 'Hi'}]}) + '\n'))
    tokenizer = tokenizer_of(open_model(home / 'policy'))
    for share in (0.01, 0.99):  # none is held out, or all
        with pytest.raises(UserError, match=r'p\.jsonl.* all 20 begin with the same question'):
            PromptData(PromptConfig(f'jsonl:{tmp_path}/p.jsonl', heldout=share), tokenizer, batch_size=1, seed=0)
