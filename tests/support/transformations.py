"""The same network in Flax's own layers, on the same variables, and JAX's transformations.

``python -m tests.support.transformations NAME ...`` compares the two under some of them.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resnet_flax import Residual, ResNet, Stage


class PlainNorm(nn.BatchNorm):
    """Batch normalisation that is called as ours is."""

    def __call__(self, x, train=False):
        return super().__call__(x, use_running_average=not train)


def plain_conv(features, size, strides=1, padding=0, **fields):
    edges = [(padding, padding)] * 2
    return nn.Conv(features, (size, size), (strides, strides), edges, **fields)


def plain_block(**dtypes):
    conv, norm = (partial(layer, **dtypes) for layer in (plain_conv, PlainNorm))
    return partial(Residual, conv=conv, norm=partial(norm, momentum=0.9))


class PlainResNet(nn.Module):
    """D2L's network with one block."""

    dtype: object = jnp.float64

    @nn.compact
    def __call__(self, x, train=False):
        dtypes = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = plain_conv(4, 7, 2, 3, name="conv1", **dtypes)(x)
        x = nn.relu(PlainNorm(momentum=0.9, name="bn1", **dtypes)(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2)
        x = Stage(4, 1, True, plain_block(**dtypes), name="layer1")(x, train)
        return nn.Dense(3, name="fc", **dtypes)(x.mean((1, 2)))


def our_resnet(dtype=jnp.float64):
    return ResNet((1,), channels=4, num_classes=3, dtype=dtype, param_dtype=dtype)


def by_batch(model, batch_stats):
    """Logits in training, a function of the parameters and the images."""

    def apply(params, x):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    return apply


def like(tree, seed):
    """Normal values in the place of others."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return structure.unflatten(drawn)


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def loss_of(apply):
    return lambda params, x: (apply(params, x) ** 3).mean()


def of_part(function, params, *names):
    """The function of one leaf alone, and the leaf."""
    leaf = params
    for name in names:
        leaf = leaf[name]

    def replaced(tree, value, name, *rest):
        return {**tree, name: replaced(tree[name], value, *rest) if rest else value}

    return lambda value: function(replaced(params, value, *names)), leaf


def grad(apply, p, x):
    return jax.grad(loss_of(apply), (0, 1))(p, x)


def jvp(apply, p, x):
    return jax.jvp(apply, (p, x), (like(p, 1), like(x, 2)))


def jvp_of_parameters(apply, p, x):
    return jax.jvp(jax.jit(lambda p: apply(p, x)), (p,), (like(p, 1),))


def jacfwd(apply, p, x):
    function, kernel = of_part(lambda p: apply(p, x), p, "layer1", "0", "conv1", "kernel")
    return jax.jacfwd(function)(kernel), jax.jacfwd(apply, 1)(p, x[:, :9, :9])


def jacrev(apply, p, x):
    return jax.jacrev(apply, 1)(p, x)


def linearize(apply, p, x):
    y, linear = jax.linearize(apply, p, x)
    return y, linear(like(p, 1), like(x, 2)), jax.linear_transpose(linear, p, x)(y)


def gauss_newton(apply, p, x):
    def function(p):
        return apply(p, x)

    y, tangent = jax.jvp(function, (p,), (like(p, 1),))
    return jax.vjp(function, p)[1](y**2 * tangent)


def hessian(apply, p, x):
    loss = loss_of(apply)
    found = []
    for names in (("bn1", "scale"), ("layer1", "0", "bn2", "scale")):
        function, leaf = of_part(lambda p: loss(p, x), p, *names)
        found.append(jax.hessian(function)(leaf))
    return found


def forward_over_reverse(apply, p, x):
    return jax.jvp(jax.grad(loss_of(apply), (0, 1)), (p, x), (like(p, 1), like(x, 2)))


def reverse_over_forward(apply, p, x):
    def slope(p, x):
        return jax.jvp(loss_of(apply), (p, x), (like(p, 1), like(x, 2)))[1]

    return jax.grad(slope, (0, 1))(p, x)


def reverse_over_reverse(apply, p, x):
    def norm(p, x):
        return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss_of(apply), (0, 1))(p, x)))

    return jax.grad(norm, (0, 1))(p, x)


def forward_over_forward(apply, p, x):
    def tangent(p):
        return jax.jvp(lambda p: apply(p, x), (p,), (like(p, 1),))[1]

    return jax.jvp(tangent, (p,), (like(p, 3),))


def vmap_over_images(apply, p, x):
    batches = jnp.stack([x, like(x, 3)], 1)
    return jax.vmap(partial(grad, apply), (None, 1))(p, batches)


def vmap_over_parameters(apply, p, x):
    ensemble = stacked(p, like(p, 3))
    pulled = jax.grad(lambda ps: (jax.vmap(apply, (0, None))(ps, x) ** 3).mean())(ensemble)
    return jax.vmap(partial(grad, apply), (0, None))(ensemble, x), pulled


def vmap_of_tangents(apply, p, x):
    directions = stacked(like(p, 1), like(p, 2))
    push = jax.vmap(lambda t: jax.jvp(lambda p: apply(p, x), (p,), (t,))[1])
    return push(directions), jax.grad(lambda d: (push(d) ** 2).sum())(directions)


def scan(apply, p, x):
    def loss(p, xs):
        return jax.lax.scan(lambda total, x: (total + loss_of(apply)(p, x), None), 0.0, xs)[0]

    xs = stacked(x, like(x, 3))
    return jax.grad(loss)(p, xs), jax.jvp(lambda p: loss(p, xs), (p,), (like(p, 1),))


def cond(apply, p, x):
    def loss(p):
        return jax.lax.cond(x.sum() > 0, lambda: loss_of(apply)(p, x), lambda: (x**2).mean())

    return jax.grad(loss)(p), jax.jvp(loss, (p,), (like(p, 1),))


def checkpoint(apply, p, x, policy=None):
    def loss(p):
        return jax.checkpoint(loss_of(apply), policy=policy)(p, x)

    return jax.grad(loss)(p), jax.jvp(loss, (p,), (like(p, 1),))


def checkpoint_saving_products(apply, p, x):
    return checkpoint(apply, p, x, jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


def checkpoint_saving_all(apply, p, x):
    return checkpoint(apply, p, x, jax.checkpoint_policies.everything_saveable)


def export(apply, p, x):
    def gradients(p, x):
        return grad(apply, p, x), jvp(apply, p, x)

    blob = jax.export.export(jax.jit(gradients))(p, x).serialize()
    return jax.export.deserialize(blob).call(p, x)


def differentiated_export(apply, p, x):
    exported = jax.export.export(jax.jit(apply))(p, x)
    call = jax.export.deserialize(exported.serialize(vjp_order=1)).call
    return jax.grad(loss_of(call), (0, 1))(p, x)


def export_of_any_batch(apply, p, x):
    (samples,) = jax.export.symbolic_shape("samples")
    shape = jax.ShapeDtypeStruct((samples, *x.shape[1:]), x.dtype)
    return jax.export.export(jax.jit(partial(grad, apply)))(p, shape).call(p, x)


def pmap(apply, p, x):
    def mean_gradient(p, x):
        return jax.lax.pmean(grad(apply, p, x)[0], "data"), jvp(apply, p, x)

    shards = x.reshape(jax.device_count(), -1, *x.shape[1:])
    return jax.pmap(mean_gradient, "data", in_axes=(None, 0))(p, shards)


def shard_map(apply, p, x):
    mesh, data = jax.sharding.Mesh(jax.devices(), ("data",)), jax.P("data")

    def mean_loss(p, x):
        return jax.lax.pmean(loss_of(apply)(p, x), "data")

    def everything(p, x):
        return (
            jax.grad(mean_loss)(p, x),
            gauss_newton(lambda p, x: jax.lax.pmean(apply(p, x), "data"), p, x),
        )

    local = jax.shard_map(everything, mesh=mesh, in_specs=(jax.P(), data), out_specs=jax.P())
    split = jax.shard_map(apply, mesh=mesh, in_specs=(jax.P(), data), out_specs=data)
    outside = jax.grad(loss_of(split), (0, 1))(p, x)
    return jax.jit(local)(p, x), outside


TRANSFORMATIONS = {
    function.__name__: function
    for function in (
        grad,
        jvp,
        jvp_of_parameters,
        jacfwd,
        jacrev,
        linearize,
        gauss_newton,
        hessian,
        forward_over_reverse,
        reverse_over_forward,
        reverse_over_reverse,
        forward_over_forward,
        vmap_over_images,
        vmap_over_parameters,
        vmap_of_tangents,
        scan,
        cond,
        checkpoint,
        checkpoint_saving_products,
        checkpoint_saving_all,
        export,
        differentiated_export,
        export_of_any_batch,
        pmap,
        shard_map,
    )
}


def compare(name, dtype=jnp.float64):
    """Makes sure that ours and the plain network agree, relative to the largest value."""
    model, plain = our_resnet(dtype), PlainResNet(dtype)
    x = jax.random.uniform(jax.random.key(0), (4, 14, 12, 1), dtype)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    params = jax.tree.map(lambda a, b: a + b / 8, variables["params"], like(variables["params"], 5))
    both = []
    for network in (model, plain):
        function = partial(TRANSFORMATIONS[name], by_batch(network, variables["batch_stats"]))
        whole = name in ("pmap", "shard_map") or "export" in name
        both.append((function if whole else jax.jit(function))(params, x))
    check_same(*both)


def check_same(ours, plain, tolerance=1e-10):
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for name in sys.argv[1:]:
        compare(name)
        print(name, "on", jax.device_count(), "devices")
