import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.mesh import MeshConfig, make_mesh, parameter_spec, reshard
from llama2_jax.ops.loss import cross_entropy, log_probs

RNG = np.random.default_rng(0)
B, L, D, V = 4, 6, 16, 24
X, HEAD = RNG.normal(size=(B, L, D)).astype(np.float32), RNG.normal(size=(D, V)).astype(np.float32)
TARGETS = RNG.integers(V, size=(B, L)).astype(np.int32)
WEIGHTS = RNG.choice([0.0, 1.0, 0.5], size=(B, L)).astype(np.float32)


def naive(x_BLD, head_DV, targets_BL, weights_BL):
    logits_BLV = jnp.einsum('BLD,DV->BLV', x_BLD, head_DV)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BL * (jax.nn.logsumexp(logits_BLV, axis=-1) - target_BL))


def compare(found, expected):
    assert abs(float(found[0]) - float(expected[0])) < 1e-4  # of a sum near 60
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-6)


def test_loss_by_hand():
    """Logits (0, ln 3): the targets have probabilities 1/4 and 3/4, and count once and twice."""
    head = jnp.array([[0.0, np.log(3.0)]])
    arguments = jnp.ones((1, 2, 1)), head, jnp.array([[0, 1]]), jnp.array([[1.0, 2.0]])
    assert float(cross_entropy(*arguments)) == pytest.approx(np.log(4) + 2 * np.log(4 / 3), rel=1e-6)
    gradient = jax.grad(cross_entropy, argnums=1)(*arguments)  # sum of weight × (probability - hit)
    np.testing.assert_allclose(gradient, [[0.25 - 1 + 2 * 0.25, 0.75 + 2 * (0.75 - 1)]], atol=1e-6)


@pytest.mark.parametrize('block', [None, 1, 5, 7, 24, 100])
def test_blocks_change_nothing(block):
    expected = jax.value_and_grad(naive, argnums=(0, 1))(X, HEAD, TARGETS, WEIGHTS)
    assert float(cross_entropy(X, HEAD, TARGETS, WEIGHTS, block)) == pytest.approx(float(expected[0]), rel=1e-6)
    compare(
        jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)), static_argnums=4)(X, HEAD, TARGETS, WEIGHTS, block), expected
    )


def test_gradients_scale_with_the_cotangent():
    once, half = (jax.grad(lambda x, s=s: s * cross_entropy(x, HEAD, TARGETS, WEIGHTS))(X) for s in (1.0, 0.5))
    np.testing.assert_allclose(half, 0.5 * once, rtol=1e-6)


def test_weight_zero_means_no_trace():
    weights = np.zeros((B, L), np.float32)
    weights[0, 0] = 1
    value, (dx, _) = jax.value_and_grad(cross_entropy, argnums=(0, 1))(X, HEAD, TARGETS, weights)
    assert float(value) == pytest.approx(float(naive(X, HEAD, TARGETS, weights)), rel=1e-6)
    assert np.abs(dx[0, 0]).max() > 0.1 and np.abs(np.asarray(dx).reshape(-1, D)[1:]).max() == 0


def test_huge_logits_stay_finite():
    value, gradients = jax.value_and_grad(cross_entropy, argnums=(0, 1))(1e4 * X, HEAD, TARGETS, WEIGHTS)
    assert float(value) == pytest.approx(float(naive(1e4 * X, HEAD, TARGETS, WEIGHTS)), rel=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    'mesh', [MeshConfig(tensor=8, fsdp=1), MeshConfig(replica=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, sequence=2, tensor=2)]
)
@pytest.mark.parametrize('block', [None, 5])
def test_vocabulary_and_tokens_on_several_devices(mesh, block):
    expected = jax.value_and_grad(naive, argnums=(0, 1))(X, HEAD, TARGETS, WEIGHTS)
    with jax.set_mesh(make_mesh(mesh)):
        head = jax.sharding.reshard(jnp.asarray(HEAD), parameter_spec('head_DV'))
        x, targets, weights = (reshard(jnp.asarray(a), n) for a, n in ((X, 'BLD'), (TARGETS, 'BL'), (WEIGHTS, 'BL')))
        found = jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)), static_argnums=4)(x, head, targets, weights, block)
        assert found[1][1].sharding == head.sharding
    compare(found, expected)


def naive_log_probs(x_BLD, head_DV, targets_BL, temperature):
    log_BLV = jax.nn.log_softmax(jnp.einsum('BLD,DV->BLV', x_BLD, head_DV) / temperature)
    return jnp.take_along_axis(log_BLV, targets_BL[..., None], axis=-1)[..., 0], -(jnp.exp(log_BLV) * log_BLV).sum(-1)


@pytest.mark.parametrize(('block', 'temperature'), [(None, 1.0), (5, 1.0), (7, 0.7), (100, 1.3)])
def test_log_probs_and_entropy(block, temperature):
    found = log_probs(X, HEAD, TARGETS, temperature, block)
    for ours, theirs in zip(found, naive_log_probs(X, HEAD, TARGETS, temperature), strict=True):
        assert ours.shape == (B, L) and ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize('axes', [None, {'fsdp': 2, 'sequence': 2, 'tensor': 2}])
def test_gradients_of_what_becomes_of_log_probs(axes):
    """Any function of them; here a product with exp, as in PPO. None flows through the entropy."""

    def objective(log_probs, x_BLD, head_DV):
        log_BL, entropy_BL = log_probs(x_BLD, head_DV)
        return jnp.sum(WEIGHTS * jnp.exp(0.3 * log_BL)) + jnp.sum(jax.lax.stop_gradient(entropy_BL))

    expected = jax.value_and_grad(objective, argnums=(1, 2))(lambda x, head: naive_log_probs(x, head, TARGETS, 0.9), X, HEAD)
    if axes is None:
        compare(
            jax.value_and_grad(objective, argnums=(1, 2))(lambda x, head: log_probs(x, head, TARGETS, 0.9, 5), X, HEAD), expected
        )
        return
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        place = [reshard(jnp.asarray(X), 'BLD'), jax.sharding.reshard(jnp.asarray(HEAD), parameter_spec('head_DV'))]
        targets, weights = reshard(jnp.asarray(TARGETS), 'BL'), reshard(jnp.asarray(WEIGHTS), 'BL')

        def sharded(x_BLD, head_DV):
            log_BL, entropy_BL = log_probs(x_BLD, head_DV, targets, 0.9, 5)
            return jnp.sum(weights * jnp.exp(0.3 * log_BL)) + jnp.sum(jax.lax.stop_gradient(entropy_BL))

        compare(jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))(*place), expected)
