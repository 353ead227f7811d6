"""The count of collectives is that of programs whose collectives are known."""

import exchanges
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def test_the_count_is_that_of_a_program_written_by_hand():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

    def program(x):
        def inner(c, _):
            return jnp.sin(jax.lax.psum(c * c, "model")), None

        def outer(c, _):
            c, _ = jax.lax.scan(inner, c, None, length=3)
            return 2 * jax.lax.ppermute(c, "data", [(0, 1), (1, 0)]), None

        x, _ = jax.lax.scan(outer, jax.lax.psum(x, "data") * x, None, length=5)
        part = jax.lax.psum_scatter(3 * x, "data", tiled=True)
        x = jax.lax.all_gather(jnp.cos(part), ("data", "model"), tiled=True)
        both = ("data", "model")
        x = jax.lax.cond(
            x[0] > 0, lambda x: jax.lax.psum(jnp.exp(x), both), lambda x: x, x
        )
        with jax.named_scope("accumax.boundary"):
            return jax.lax.while_loop(
                lambda x: x[0] > 0,
                lambda x: jax.lax.pmax(x, "data") - 1,
                x,
            )

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    x = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=NamedSharding(mesh, P()))
    text = jax.jit(mapped).lower(x).compile().as_text()
    found = exchanges.collectives(text)
    assert [(x.op, x.place, x.executions, x.bytes, x.wire()) for x in found] == [
        ("all-reduce", "outside", 1, 1024, 1024),
        ("all-reduce", "loop", 15, 1024, 1024),
        ("collective-permute", "loop", 5, 1024, 1024),
        ("reduce-scatter", "outside", 1, 1024, 512),
        ("all-gather", "outside", 1, 2048, 1536),
        ("all-reduce", "branch", 1, 2048, 3072),
        ("all-reduce", "boundary", 1, 2048, 2048),
    ]
    assert found[1].groups == {frozenset({0, 1}), frozenset({2, 3})}
    assert found[3].groups == {frozenset({0, 2}), frozenset({1, 3})}
    assert found[4].groups == {frozenset(range(4))}


OTHERS = """\
HloModule of_other_compilers

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %p = f32[8]{0:T(128)} parameter(0)
  %r = f32[8]{0:T(128)} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %s = f32[2]{0:T(128)} dynamic-slice(%r, %i), dynamic_slice_sizes={2}
}

%wrapped (q: bf16[6]) -> bf16[24] {
  %q = bf16[6]{0} parameter(0)
  ROOT %g = bf16[24]{0} all-gather(%q), replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %n = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(8,128)S(1)}) parameter(0)
  %x = f32[8]{0:T(8,128)S(1)} get-tuple-element(%c), index=1
  %a = f32[8]{0} all-reduce-start(%x), replica_groups=[2,4]<=[4,2]T(1,0)
  %b = f32[8]{0} all-reduce-done(%a)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %b)
}

ENTRY %main (x: f32[8], y: bf16[6]) -> f32[2] {
  %x = f32[8]{0:T(128)} parameter(0)
  %y = bf16[6]{0} parameter(1)
  %s = f32[2]{0:T(128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %g = ((bf16[6]{0}), bf16[24]{0}) async-start(%y), calls=%wrapped
  %h = bf16[24]{0} async-done(%g), calls=%wrapped
  %m = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=2], \
device_ids=([2,2]T(1,0)) {'a'}
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
}
"""


def test_the_count_knows_what_the_cpu_does_not_write():
    scattered, gathered, turned, reduced = exchanges.collectives(OTHERS)
    assert scattered[:4] == ("reduce-scatter", "outside", 1, 32)
    assert gathered[:4] == ("all-gather", "outside", 1, 48)
    assert gathered.dtypes == {"bf16"}
    assert gathered.groups == {frozenset(range(4)), frozenset(range(4, 8))}
    assert turned.groups == {frozenset({0, 1}), frozenset({2, 3})}
    assert reduced[:4] == ("all-reduce", "loop", 7, 32)
    assert reduced.groups == {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}
