"""The engine against transformers, against the forward pass of training, and against itself alone."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface import random_pair
from letters import Letters

from llama2_jax.config import ModelConfig, UserError
from llama2_jax.inference import decode, slots
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.mesh import decoding_mesh
from llama2_jax.model.llama import Llama

GQA = ModelConfig(vocab_size=96, dim=48, layers=2, heads=8, kv_heads=2, head_dim=8, hidden=80, context=200)
MHA = dataclasses.replace(GQA, kv_heads=8)


@cache
def model_of(config):
    return Llama(config, jax.random.key(0))


def engine_of(config=GQA, devices=1, **options):
    mesh = decoding_mesh(config, jax.devices()[:devices])
    return Engine(model_of(config), Letters(config.vocab_size), mesh=mesh, **options)


def ragged(count, longest=60, seed=0):
    """Prompts of 1 to `longest` tokens, none of them BOS or EOS but the first."""
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(3, 96, size=rng.integers(0, longest)).tolist()] for _ in range(count)]


def tokens(results):
    return [[sample.token_ids for sample in samples] for samples in results]


@pytest.mark.parametrize('config', [MHA, GQA], ids=['MHA', 'GQA'])
def test_greedy_is_that_of_transformers(config):
    """64 ragged prompts, token for token; a batch of 16, so most of them wait for a place."""
    torch = pytest.importorskip('torch')
    ours, theirs = random_pair(config)
    prompts = ragged(64)
    expected = [
        theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    mesh = decoding_mesh(config, jax.devices()[:1])
    engine = Engine(ours, Letters(96), mesh=mesh, batch_size=16)
    found = [samples[0].token_ids for samples in engine.generate(Request(prompt, 24, temperature=0) for prompt in prompts)]
    assert found == [row[: row.index(2) + 1] if 2 in row else row for row in expected]


def mixed_requests(count=40):
    rng = np.random.default_rng(1)
    return [
        Request(
            prompt,
            int(rng.integers(1, 80)),
            num_samples=int(rng.integers(1, 4)),
            temperature=float(rng.choice([0, 0.7, 1.3])),
            top_p=float(rng.choice([0.8, 1])),
            top_k=int(rng.choice([0, 7])),
            seed=seed,
        )
        for seed, prompt in enumerate(ragged(count))
    ]


def test_a_request_does_not_depend_on_its_neighbours():
    """Alone, in one batch of 32 or more, and through places that are filled again and again: the same tokens."""
    requests = mixed_requests()
    together = tokens(engine_of(batch_size=128).generate(requests))
    assert tokens(engine_of(batch_size=8).generate(requests)) == together
    alone = engine_of(batch_size=1)
    assert [tokens(alone.generate([request]))[0] for request in requests[::4]] == together[::4]
    assert tokens(engine_of(devices=8, batch_size=16).generate(requests)) == together
    lengths = [len(sample) for samples in together for sample in samples]
    assert len(set(lengths)) > 20 and len({tuple(samples[0]) for samples in together}) > 35


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_log_probabilities_are_those_of_training(devices, temperature):
    """Over 1,000 sampled tokens, at the temperature and before top-p: within 1e-5 of the forward pass that is trained."""
    requests = [
        Request(prompt, 60, temperature=temperature, top_p=0.9, top_k=40, seed=seed) for seed, prompt in enumerate(ragged(26))
    ]
    scores = jax.jit(lambda model, ids: jax.nn.log_softmax(model.logits(model(ids)) / temperature))
    count, worst = 0, 0.0
    for request, [sample] in zip(requests, engine_of(devices=devices).generate(requests), strict=True):
        ids = np.zeros((1, 128), np.int32)
        ids[0, : len(request.token_ids) + len(sample.token_ids)] = [*request.token_ids, *sample.token_ids]
        places = np.arange(len(sample.token_ids)) + len(request.token_ids) - 1
        expected = np.asarray(scores(model_of(GQA), ids))[0, places, sample.token_ids]
        worst = max(worst, np.abs(expected - sample.logprobs).max())
        count += len(places)
    assert count >= 1000 and worst < 1e-5


def test_a_greedy_log_probability_is_taken_at_temperature_one():
    [[sample]] = engine_of().generate([Request([1, 5], 1, temperature=0)])
    scores = jax.nn.log_softmax(model_of(GQA).logits(model_of(GQA)(jnp.array([[1, 5]]))))[0, -1]
    assert sample.logprobs == [pytest.approx(float(scores.max()), abs=1e-5)]


def test_long_prompts_are_read_in_pieces(monkeypatch):
    """Pieces of 8 and 16 tokens, and a cache that grows, give what one piece gives."""
    requests = [Request(prompt, 40, temperature=1.0, seed=seed) for seed, prompt in enumerate(ragged(9, longest=120))]
    whole = list(engine_of().generate(requests))
    for name, value in (('PIECES', (8, 16)), ('READ_TOGETHER', 48), ('FIRST_PLACES', 64)):
        monkeypatch.setattr(slots, name, value)
    pieces = list(engine_of(batch_size=4).generate(requests))
    assert tokens(pieces) == tokens(whole)
    for [ours], [theirs] in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-5)


def test_a_cache_that_long_rows_have_left_is_cut():
    """All of it is read for each token. What follows is drawn as by an engine that never had a long row."""
    config = dataclasses.replace(GQA, context=600)
    short = [Request(prompt, 6, temperature=1.0, seed=seed) for seed, prompt in enumerate(ragged(4, longest=7))]
    engine, fresh = (engine_of(config, batch_size=4) for _ in range(2))
    list(engine.generate([Request([*range(3, 90)] * 5, 6)] * 4))
    places = [engine._slots._cache[0][0].shape[2]]
    assert tokens(engine.generate(short)) == tokens(fresh.generate(short))
    places += [some._slots._cache[0][0].shape[2] for some in (engine, fresh)]
    assert places == [512, 128, 128]


def test_a_cache_is_not_cut_for_single_tokens(monkeypatch):
    """It would grow again after each: 128 places hold what the prompt and its first tokens fill, but not 64 more."""
    sizes = []
    real = slots.decode.resized
    monkeypatch.setattr(slots.decode, 'resized', lambda cache, places: sizes.append(places) or real(cache, places))
    list(engine_of(dataclasses.replace(GQA, context=600), batch_size=1).stream(Request([*range(3, 90)], 8)))
    assert sizes == [128, 256]


@pytest.fixture
def read(monkeypatch):
    """How many tokens of prompts were read, in each call: pad tokens do not count."""
    counts = []
    real = slots.Slots._read

    def counted(self, prompts):
        counts.append(sum(len(prompt) - start for _, start, prompt in prompts))
        return real(self, prompts)

    monkeypatch.setattr(slots.Slots, '_read', counted)
    return counts


@pytest.mark.parametrize('devices', [1, 8])
def test_samples_of_a_prompt_share_its_reading(read, devices):
    engine = engine_of(devices=devices, batch_size=8)
    prompt = ragged(1, longest=200, seed=3)[0][:101]
    [samples] = engine.generate([Request(prompt, 10, num_samples=20, temperature=1.0)])
    shards = slots.shards(engine._mesh)
    assert sum(read) == 100 * shards  # once where rows can be copied, however many rounds it takes
    assert len({tuple(sample.token_ids) for sample in samples}) == 20
    alone = engine_of(batch_size=1)
    assert tokens(alone.generate([Request(prompt, 10, num_samples=20, temperature=1.0)]))[0] == tokens([samples])[0]


def test_the_next_turn_reads_only_what_is_new(read):
    engine = engine_of(batch_size=1)
    prompt = [1, *range(3, 50)]
    [[answer]] = engine.generate([Request(prompt, 20, temperature=0)])
    longer = [*prompt, *answer.token_ids, *range(3, 13)]
    [[warm]] = engine.generate([Request(longer, 20, temperature=0)])
    # The last token of a prompt is read by the step that answers it, and so was the last but one of the answer.
    assert read == [47, 10]
    [[cold]] = engine_of(batch_size=1).generate([Request(longer, 20, temperature=0)])
    assert warm.token_ids == cold.token_ids
    engine.load(model_of(GQA))  # other parameters know nothing of these tokens
    list(engine.generate([Request(longer, 1)]))
    assert read[-1] == len(longer) - 1


def test_a_common_beginning_is_copied(read):
    """Questions after the same examples: the second batch starts from the first one's."""
    shots = list(range(3, 63))
    requests = [Request([1, *shots, 70 + n, 80], 5, temperature=0) for n in range(4)]
    engine = engine_of(batch_size=2)
    found = tokens(engine.generate(requests))
    assert read[0] == 2 * 62 and sum(read[1:]) == 2
    assert [tokens(engine_of(batch_size=1).generate([request]))[0] for request in requests] == found


def test_stops():
    """Each reason, cut exactly where it comes; the first of several counts."""
    engine, prompt = engine_of(), [1, 7, 8]
    [[free]] = engine.generate([Request(prompt, 60, temperature=0)])
    assert free.stop_reason == 'length' and len(free.token_ids) == len(free.logprobs) == 60 and 2 not in free.token_ids
    text = Letters(96).decode(free.token_ids)
    assert free.text == text
    stop = text[30:33]
    place = text.index(stop)
    [[cut]] = engine.generate([Request(prompt, 60, temperature=0, stop=('nowhere', stop))])
    assert (cut.stop_reason, cut.text) == ('stop', text[:place])
    assert cut.token_ids == free.token_ids[: place + 3] and len(cut.logprobs) == place + 3
    token = free.token_ids[5]
    first = free.token_ids.index(token)
    [[ended]] = engine.generate([Request(prompt, 60, temperature=0, stop=(stop,), stop_token_ids=(token,))])
    assert (ended.stop_reason, ended.text) == ('stop', text[:first])
    assert ended.token_ids == free.token_ids[: first + 1]
    engine.tokenizer.eos_id = token
    [[eos]] = engine.generate([Request(prompt, 60, temperature=0)])
    assert (eos.stop_reason, eos.token_ids, eos.text) == ('eos', ended.token_ids, ended.text)


def test_a_stream_is_the_sample_and_never_shows_a_stop():
    engine = engine_of()
    [[free]] = engine.generate([Request([1, 7, 8], 60, temperature=0)])
    stop = free.text[30:34]
    request = Request([1, 7, 8], 60, temperature=0, stop=(stop,))
    pieces = list(engine.stream(request))
    assert ''.join(pieces) == free.text[: free.text.index(stop)] and len(pieces) > 20


def test_the_context_is_a_limit():
    engine = engine_of()
    [[sample]] = engine.generate([Request([3] * 195, 60)])
    assert len(sample.token_ids) <= 5
    [[sample]] = engine.generate([Request([3] * 199, 60, temperature=0)])
    assert len(sample.token_ids) == 1
    with pytest.raises(UserError, match='Request 1: the prompt has 200 tokens, and a context of 200 leaves no room'):
        list(engine.generate([Request([3]), Request([3] * 200)]))
    with pytest.raises(UserError, match='Request 0: token id 96 is outside the vocabulary of 96'):
        list(engine.generate([Request([3, 96])]))


def test_seeds():
    engine = engine_of()
    request = Request([1], 20, num_samples=3, temperature=1.0)
    one, two = (tokens(engine.generate([dataclasses.replace(request, seed=seed)]))[0] for seed in (1, 2))
    assert tokens(engine.generate([dataclasses.replace(request, seed=1)]))[0] == one
    assert len({tuple(sample) for sample in one + two}) == 6


def test_places_are_filled_again_without_compiling():
    engine = engine_of(batch_size=4)
    requests = [Request(prompt, 20 + 7 * (n % 5), temperature=0) for n, prompt in enumerate(ragged(6, longest=30))]
    list(engine.generate(requests))
    list(engine.generate(dataclasses.replace(request, temperature=0) for request in mixed_requests(30)))
    before = [program._cache_size() for program in decode.programs(jax.devices()[0])]
    list(engine.generate(mixed_requests(30)))
    list(engine.generate(requests * 8))
    after = [program._cache_size() for program in decode.programs(jax.devices()[0])]
    assert after[1] == before[1]  # a length of the cache has one program, whatever the settings
    assert after[0] - before[0] <= 6  # one or four rows, 32 or 128 tokens, from the beginning or not


def test_one_generation_at_a_time():
    engine = engine_of()
    first = engine.generate([Request([1], 3)])
    stream = engine.stream(Request([1], 90))
    next(stream)
    with pytest.raises(RuntimeError, match='generating already'):
        next(first)
    stream.close()
    assert len(tokens(engine.generate([Request([1], 3)]))) == 1


def test_eight_bits_lay_out():
    """Matrices take a byte a weight; the answers are nearly the same."""
    full, eight = engine_of(), engine_of(int8=True)
    block = eight._weights.blocks[0]
    assert block.w_q_DHK[...].values.dtype == block.w_down_DF[...].values.dtype == eight._weights.head_DV.values.dtype == 'int8'
    assert block.attention_norm_D[...].dtype == eight._weights.table_VD.dtype == 'float32'
    request = Request([1, 5, 9], 1, temperature=1.0, top_k=1)
    [[ours]], [[theirs]] = eight.generate([request]), full.generate([request])
    assert ours.token_ids == theirs.token_ids and ours.logprobs == pytest.approx(theirs.logprobs, abs=0.05)


@pytest.mark.parametrize(
    ('changes', 'devices', 'sizes'),
    [
        ({}, 8, (1, 4, 2)),  # two key heads over tensor; eight heads, 80 and 96 over all eight
        ({'kv_heads': 8}, 8, (1, 1, 8)),
        ({'heads': 6}, 8, (4, 1, 2)),  # three heads a key head: no more than two ways
        ({'vocab_size': 97}, 4, (4, 1, 1)),
    ],
)
def test_meshes_for_decoding(changes, devices, sizes):
    config = dataclasses.replace(GQA, **changes)
    assert tuple(decoding_mesh(config, jax.devices()[:devices]).shape.values()) == sizes


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('temperature', -0.1),
        ('temperature', math.nan),
        ('num_samples', 10**9),
        ('max_new_tokens', 2**70),
        ('top_p', 1.5),
        ('top_k', -1),
        ('max_new_tokens', 0),
        ('num_samples', 0),
        ('seed', -1),
        ('stop', ('',)),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(UserError, match=f'^{field} '):
        Request([1], **{field: value})
