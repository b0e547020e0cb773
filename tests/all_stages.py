"""Every stage after pretraining, one after the other on small random models, as one of several processes or alone.

python all_stages.py HOME WORKDIR
"""

import json
import sys
from functools import partial
from pathlib import Path

from llama2_jax import runtime
from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.data.preferences import PreferenceConfig
from llama2_jax.data.prompts import PromptConfig
from llama2_jax.inference.open import open_engine
from llama2_jax.rl import collect, ppo, rejection
from llama2_jax.rl.collect import CollectConfig
from llama2_jax.rl.ppo import PPOConfig
from llama2_jax.rl.rejection import RejectionConfig
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.stages import dpo, generate, reward, score, sft
from llama2_jax.stages.dpo import DpoConfig
from llama2_jax.stages.reward import RewardConfig
from llama2_jax.stages.sft import SftConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig

RATE = partial(OptimizerConfig, warmup_steps=0, final_lr=1.0)


def write_data(home):
    """prompts.jsonl, dialogs.jsonl and pairs.jsonl; returns the rows of the first."""
    questions = [f'What is {a} and {b}?' for a in range(8) for b in range(4)]
    asked = [{'messages': [{'role': 'user', 'content': text}], 'is_safety': i % 5 == 0} for i, text in enumerate(questions)]
    answers = [{'messages': [*row['messages'], {'role': 'assistant', 'content': 'They are many.'}]} for row in asked]
    pairs = [{'prompt': row['messages'], 'chosen': 'They are many.', 'rejected': 'No.', 'rating': 'better'} for row in asked]
    for name, rows in (('dialogs', answers), ('pairs', pairs)):
        (home / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return asked


def main(home, workdir):
    """Runs them."""
    policy, of_hugging_face = str(home / 'policy'), str(home / 'policy-hf')
    rewards = RewardsConfig(helpfulness=str(home / 'help-hf'), safety=str(home / 'safe'), batch_size=16)
    prompts = PromptConfig(mixture=f'jsonl:{home}/prompts.jsonl', heldout=0.25, longest=40)
    loop = LoopConfig(log_every=1, eval_every=2, sample_every=2, checkpoint_every=2)
    tuned = SftConfig(
        init_from=of_hugging_face,
        data=DialogConfig(mixture=f'jsonl:{home}/dialogs.jsonl', heldout=0.1),
        optimizer=RATE(peak_lr=1e-2),
        loop=loop,
        batch_size=8,
        length=63,
        prompts=('What is 3 and 4?',),
    )
    settings = {'max_new_tokens': 6, 'temperature': 1.0, 'seed': 0, 'num_samples': 2}
    engine = open_engine(policy, 8)
    generate.run(engine, str(home / 'prompts.jsonl'), str(workdir / 'out.jsonl'), settings, {'model': policy}, logprobs=True)
    sft.run(tuned, workdir / 'sft')
    data = PreferenceConfig(mixture=f'jsonl:{home}/pairs.jsonl', heldout=0.2)
    compared = RewardConfig(init_from=policy, data=data, optimizer=RATE(peak_lr=3e-3), loop=loop, batch_size=8, length=128)
    reward.run(compared, workdir / 'reward')
    score.evaluate([str(workdir / 'reward/model')], [f'jsonl:{home}/pairs.jsonl'], str(workdir / 'judged'), batch_size=8)
    preferred = DpoConfig(
        init_from=policy, data=data, optimizer=RATE(peak_lr=3e-3), loop=loop, batch_size=8, length=128, prompts=()
    )
    dpo.run(preferred, workdir / 'dpo')
    round_ = RejectionConfig(
        sample_from=policy, rewards=rewards, prompts=prompts, samples=2, temperatures=(0.5, 1.0), tune_prompts=2,
        max_new_tokens=8, decode_batch=16, sft=tuned,
    )  # fmt: skip
    rejection.run(round_, workdir / 'rejection')
    collect.run(
        CollectConfig(models=(policy,), prompts=f'jsonl:{home}/prompts.jsonl', max_new_tokens=8, decode_batch=16),
        workdir / 'collect',
    )
    last = PPOConfig(
        init_from=policy, rewards=rewards, prompts=prompts, optimizer=RATE(peak_lr=3e-3), value_optimizer=RATE(peak_lr=3e-3),
        iterations=2, batch_size=16, minibatch_size=8, max_new_tokens=8, decode_batch=16, eval_every=1, eval_prompts=8,
    )  # fmt: skip
    ppo.run(last, workdir / 'ppo')


if __name__ == '__main__':
    runtime.start()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
