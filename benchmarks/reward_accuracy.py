"""A reward model beside a bag of words, on real preferences: one half of a file of hh-rlhf to train on, one to judge by.

python benchmarks/reward_accuracy.py --preferences='jsonl:hh-rlhf/harmless-base-test.jsonl.gz' --init_from=sft/model --workdir=hh

Both see the same pairs: those that fit the model's context, after what is too long has lost its oldest turns. The bag of words is
a logistic regression on the difference of an answer's and the other's counts of words (scikit-learn).
"""

import json
from pathlib import Path

import numpy as np
from absl import app, flags
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from llama2_jax.checkpoints.load import open_model, tokenizer_of
from llama2_jax.data.comparisons import Comparison, read_comparisons
from llama2_jax.data.preferences import PreferenceConfig, encode
from llama2_jax.evals.preference import share, text
from llama2_jax.stages import reward, score
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig

_PREFERENCES = flags.DEFINE_string('preferences', None, 'Source of comparisons.', required=True)
_INIT_FROM = flags.DEFINE_string('init_from', None, 'Model to begin with.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
_EPOCHS = flags.DEFINE_float('epochs', 1.0, 'Of the reward model.')
_LR = flags.DEFINE_float('peak_lr', 1e-3, 'Of the reward model.')


def halves(source: str, init_from: str) -> tuple[list[Comparison], list[Comparison]]:
    """The comparisons that fit the model, every other one."""
    model = open_model(init_from)
    tokenizer = tokenizer_of(model)
    found = [pair for _, (pairs, _) in read_comparisons(source) for pair in pairs]
    fitting = [pair for pair in found if encode(pair, tokenizer, model.config.context, '')[0]]
    print(f'{len(fitting):,} of {len(found):,} pairs fit a context of {model.config.context}.', flush=True)
    return fitting[::2], fitting[1::2]


def bag_of_words(train: list[Comparison], test: list[Comparison]) -> np.ndarray:
    """Which test pairs a logistic regression tells right."""

    def answers(pairs: list[Comparison]) -> tuple[list[str], list[str]]:
        return tuple([getattr(pair, side)[-1]['content'] for pair in pairs] for side in ('chosen', 'rejected'))

    words = CountVectorizer(ngram_range=(1, 2), min_df=2).fit([*answers(train)[0], *answers(train)[1]])
    chosen, rejected = (words.transform(side) for side in answers(train))
    sign = np.where(np.arange(len(train)) % 2, -1.0, 1.0)  # half of the pairs the other way round
    features = (chosen - rejected).multiply(sign[:, None]).tocsr()
    regression = LogisticRegression(C=0.01, max_iter=2000, fit_intercept=False).fit(features, sign)
    chosen, rejected = (words.transform(side) for side in answers(test))
    return regression.decision_function(chosen - rejected) > 0


def main(_: list[str]) -> None:
    """Trains both, and prints both accuracies with their intervals."""
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    train, test = halves(_PREFERENCES.value, _INIT_FROM.value)
    for name, pairs in (('train', train), ('test', test)):
        rows = ({'prompt': pair.prompt, 'chosen': pair.chosen, 'rejected': pair.rejected} for pair in pairs)
        (workdir / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    longer = [len(pair.chosen[-1]['content']) > len(pair.rejected[-1]['content']) for pair in test]
    print(f'the longer answer        {text(share(longer))}')
    print(f'bag of words             {text(share(bag_of_words(train, test)))}', flush=True)
    config = reward.RewardConfig(
        init_from=_INIT_FROM.value,
        data=PreferenceConfig(f'jsonl:{workdir}/train.jsonl', epochs=_EPOCHS.value, heldout=0.0),
        optimizer=OptimizerConfig(peak_lr=_LR.value, warmup_steps=5, warmup_share=0.03),
        loop=LoopConfig(checkpoint_every=0),
        batch_size=24,
        length=2 * open_model(_INIT_FROM.value).config.context,
    )
    reward.run(config, str(workdir / 'rm'))
    score.evaluate([str(workdir / 'rm/model')], [f'jsonl:{workdir}/test.jsonl'], str(workdir), batch_size=32)


if __name__ == '__main__':
    app.run(main)
