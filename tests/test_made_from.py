"""What a run was made from: another input at the same path is refused by name, and where it is meant, the run continues."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from random_policy import SHAPE, make_home

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.fingerprint import fingerprint
from llama2_jax.checkpoints.load import load_model, open_model, tokenizer_of
from llama2_jax.config import UserError
from llama2_jax.data import sources
from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.data.prompts import PromptConfig
from llama2_jax.model.llama import Llama
from llama2_jax.model.reward import ScoreModel
from llama2_jax.rl import collect, ppo, rejection
from llama2_jax.rl.collect import CollectConfig
from llama2_jax.rl.ppo import PPOConfig
from llama2_jax.rl.rejection import RejectionConfig
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.runtime.workdir import ResumeConfig, resuming
from llama2_jax.stages import score, sft
from llama2_jax.stages.sft import SftConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig

QUESTIONS = [f'What is {a} and {b}?' for a in range(8) for b in range(4)]
PROVENANCE = {'stage': 'test', 'parent': None, 'step': 0}
RATE = OptimizerConfig(peak_lr=1e-3, warmup_steps=0, final_lr=1.0)

pytestmark = pytest.mark.usefixtures('mesh', 'one_device', 'compiled_once')


@pytest.fixture
def home(tmp_path):
    """policy/, help/, safe/, prompts.jsonl, and dialogs.jsonl with 16 rows."""
    home = make_home(tmp_path, [{'messages': [{'role': 'user', 'content': text}]} for text in QUESTIONS], eos=6.0)
    write_dialogs(home, 16)
    return home


def write_dialogs(home, count, answer='They are many.'):
    rows = [
        {'messages': [{'role': 'user', 'content': text}, {'role': 'assistant', 'content': answer}]} for text in QUESTIONS[:count]
    ]
    (home / 'dialogs.jsonl').write_text('\n'.join(map(json.dumps, rows)))


def replace_model(path, seed):
    """Another model with the same shape, tokenizer, provenance and name."""
    source = open_model(path)
    kind = Llama if source.head == 'head_DV' else ScoreModel
    save_model(path, kind(SHAPE, jax.random.key(seed)), tokenizer_of(source), PROVENANCE)


def tuning(home, **changes):
    settings = {
        'init_from': str(home / 'policy'),
        'data': DialogConfig(mixture=f'jsonl:{home}/dialogs.jsonl', heldout=0.0),
        'optimizer': RATE,
        'loop': LoopConfig(log_every=1, checkpoint_every=1),
        'batch_size': 4,
        'length': 63,
        'prompts': (),
    }
    return SftConfig(**(settings | changes))


def test_rows_that_changed_are_refused_until_they_are_meant(home):
    config, run = tuning(home), home / 'run'
    sft.run(config, run)
    sft.run(config, run)  # the same rows: nothing to do
    was = sources.fingerprint(f'jsonl:{home}/dialogs.jsonl')
    for count, answer in ((32, 'They are many.'), (4, 'They are many.'), (16, 'They are few..')):
        write_dialogs(home, count, answer)
        with pytest.raises(UserError) as error:
            sft.run(config, run)
        for part in (f'data.mixture=jsonl:{home}/dialogs.jsonl', was, 'resume_with_changed_data'):
            assert part in str(error.value)
    with resuming(ResumeConfig(resume_with_changed_data=True)):
        sft.run(config, run)
    recorded = json.loads((run / 'inputs.json').read_text())
    assert recorded[f'data.mixture=jsonl:{home}/dialogs.jsonl'] == sources.fingerprint(f'jsonl:{home}/dialogs.jsonl') != was


def test_a_checkpoint_tells_what_it_was_made_from(home):
    config, run = tuning(home), home / 'run'
    sft.run(config, run)
    write_dialogs(home, 16, 'They are few..')
    (run / 'inputs.json').unlink()
    with pytest.raises(UserError, match=r'checkpoints/\d+ was made from data.mixture=jsonl:.*dialogs.jsonl'):
        sft.run(config, run)


def test_another_model_at_the_same_path_is_refused(home):
    config, run = tuning(home), home / 'run'
    sft.run(config, run)
    shutil.copytree(home / 'policy', home / 'kept')
    replace_model(home / 'policy', seed=7)
    with pytest.raises(UserError, match=f'init_from={home}/policy'):
        sft.run(config, run)
    shutil.rmtree(home / 'policy')
    shutil.copytree(home / 'kept', home / 'policy')
    sft.run(config, run)


def test_rounds_of_rlhf_know_their_reward_models(home):
    rewards = RewardsConfig(helpfulness=str(home / 'help'), safety=str(home / 'safe'))
    prompts = PromptConfig(mixture=f'jsonl:{home}/prompts.jsonl', heldout=0.2, longest=40)
    sampling = RejectionConfig(
        sample_from=str(home / 'policy'), rewards=rewards, prompts=prompts, count=6, samples=8, temperatures=(1.0,),
        tune_prompts=2, max_new_tokens=16, sft=tuning(home, data=DialogConfig(mixture='', heldout=0.0)),
    )  # fmt: skip
    training = PPOConfig(
        init_from=str(home / 'policy'), rewards=rewards, prompts=prompts, judge='', iterations=1, batch_size=4,
        minibatch_size=4, max_new_tokens=8, eval_prompts=2, optimizer=RATE,
    )  # fmt: skip
    collecting = CollectConfig(models=(str(home / 'policy'),), prompts=f'jsonl:{home}/prompts.jsonl', count=4, samples=2)
    for stage, config in ((rejection, sampling), (ppo, training), (collect, collecting)):
        stage.run(config, home / stage.__name__)
    replace_model(home / 'help', seed=9)
    for stage, config in ((rejection, sampling), (ppo, training)):
        with pytest.raises(UserError, match=f'helpfulness={home}/help'):
            stage.run(config, home / stage.__name__)
    with (home / 'prompts.jsonl').open('a') as file:
        file.write('\n' + json.dumps({'messages': [{'role': 'user', 'content': 'What is 9 and 9?'}]}))
    with pytest.raises(UserError, match=f'prompts=jsonl:{home}/prompts.jsonl'):
        collect.run(collecting, home / collect.__name__)


def test_scores_know_their_model(home):
    output = str(home / 'scores.jsonl')
    score.score_file(str(home / 'help'), str(home / 'dialogs.jsonl'), output, 4)
    score.score_file(str(home / 'help'), str(home / 'dialogs.jsonl'), output, 4)
    replace_model(home / 'help', seed=9)
    with pytest.raises(UserError, match='scores.jsonl holds results for content of the model'):
        score.score_file(str(home / 'help'), str(home / 'dialogs.jsonl'), output, 4)


def test_a_fingerprint_is_of_content(home):
    ours = fingerprint(home / 'policy')
    assert ours.startswith(f'{SHAPE.parameters:,} parameters, ')
    model, tokenizer = load_model(home / 'policy')
    save_model(home / 'again', model, tokenizer, PROVENANCE | {'parent': 'elsewhere'})
    assert fingerprint(home / 'again') == ours
    model.blocks.w_q_DHK[...] *= jnp.where(jnp.arange(SHAPE.head_dim) == 3, 1.001, 1.0)[None, None, None]  # a projection only
    save_model(home / 'again', model, tokenizer, PROVENANCE)
    assert fingerprint(home / 'again') != ours
    found = {}
    for name in ('hf', 'meta', 'gguf'):
        path = home / (f'{name}.gguf' if name == 'gguf' else name)
        for changed in ('policy', 'again'):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
            convert(open_model(home / changed), path, name)
            found[changed] = fingerprint(path)
        assert found['policy'] != found['again']
