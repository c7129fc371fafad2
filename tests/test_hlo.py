"""Memory traffic, work and collectives, counted by hand in small programs."""

import pytest

from pspnet_jax import hlo

# All arrays have 256 float32, that is 1 KiB, unless their shape says otherwise.
PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[256]{0})->f32[256]{0}}

%fused_sum (p0: f32[256], p1: f32[256]) -> f32[256] {
  %p0 = f32[256]{0} parameter(0)
  %p1 = f32[256]{0} parameter(1)
  ROOT %add = f32[256]{0} add(%p0, %p1)
}

%fused_slice (q0: f32[1024], q1: s32[]) -> f32[256] {
  %q0 = f32[1024]{0} parameter(0)
  %q1 = s32[] parameter(1)
  ROOT %slice.1 = f32[256]{0} dynamic-slice(%q0, %q1), dynamic_slice_sizes={256}
}

%body (state: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %state = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %all = f32[1024]{0} get-tuple-element(%state), index=1
  %part = f32[256]{0:T(256)} fusion(%all, %i), kind=kLoop, calls=%fused_slice
  ROOT %next = (s32[], f32[1024]{0}) tuple(%i, %all)
}

%condition (state.1: (s32[], f32[1024])) -> pred[] {
  %state.1 = (s32[], f32[1024]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%cheap (c0: f32[256]) -> f32[256] {
  ROOT %c0 = f32[256]{0} parameter(0)
}

%dear (d0: f32[256]) -> f32[256] {
  %d0 = f32[256]{0} parameter(0)
  ROOT %copy.9 = f32[256]{0} copy(%d0)
}

ENTRY %main (x: f32[256], y: bf16[512], big: f32[1024]) -> f32[256] {
  %x = f32[256]{0:T(256)} parameter(0)
  %y = bf16[512]{0:T(512)(2,1)} parameter(1)
  %big = f32[1024]{0} parameter(2)
  %near = f32[256]{0:T(256)S(1)} fusion(%x, %x), kind=kLoop, calls=%fused_sum
  %far = f32[256]{0:T(256)} fusion(%near, %x), kind=kLoop, calls=%fused_sum
  %copy-start.1 = (bf16[512]{0:T(512)(2,1)S(1)}, bf16[512]{0:T(512)(2,1)}, u32[]{:S(2)}) copy-start(%y)
  %copy-done.1 = bf16[512]{0:T(512)(2,1)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[1024]{0}), f32[256]{0:S(1)}, s32[]{:S(2)}) slice-start(%big), slice={[0:256]}
  %slice-done.1 = f32[256]{0:S(1)} slice-done(%slice-start.1)
  %zero = s32[] constant(0)
  %init = (s32[], f32[1024]{0}) tuple(%zero, %big)
  %loop = (s32[], f32[1024]{0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"30"}}
  %choice = f32[256]{0} conditional(%zero, %far, %far), branch_computations={%dear, %cheap}
  %sum = f32[256]{0} all-reduce(%choice), replica_groups={}, to_apply=%fused_sum
  ROOT %end = f32[256]{0} fusion(%sum, %near), kind=kLoop, calls=%fused_sum
}
"""


def test_traffic_of_a_program_by_hand():
    kib = 1024
    expected = {
        "near: two operands in HBM, the result is not": 2 * kib,
        "far: one operand and the result": 2 * kib,
        "copy to the vector memory: read once": kib,
        "slice: a quarter of its operand": kib,
        "loop: 30 times, a quarter is read (and a counter of 4 bytes) and written": 30 * (2 * kib + 4),
        "conditional: the cheaper branch": 0,
        "all-reduce: read and written": 2 * kib,
        "end: one operand and the result": 2 * kib,
    }
    assert hlo.hbm_traffic(PROGRAM).total() == sum(expected.values())


def test_asynchronous_collectives_count_their_results():
    gather = "  %g = (f32[256]{0}, f32[1024]{0}) all-gather-start(%x), dimensions={0}\n"
    permute = "  %p = (f32[256]{0}, f32[256]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}\n"
    program = PROGRAM.replace("  %zero = ", f"{gather}{permute}  %zero = ", 1)
    expected = {"all-reduce": (1, 1024), "all-gather": (1, 4096), "collective-permute": (1, 1024)}
    assert hlo.collectives(program) == expected


def test_collectives_of_a_program():
    assert hlo.collectives(PROGRAM) == {"all-reduce": (1, 1024)}


def test_collectives_in_loops_count_as_often_as_they_run():
    program = PROGRAM.replace("  ROOT %next", "  %each = f32[256]{0} all-reduce(%part), to_apply=%fused_sum\n  ROOT %next", 1)
    assert hlo.collectives(program) == {"all-reduce": (31, 31 * 1024)}


CONVOLUTION = "%c = f32[2,5,5,7]{{3,2,1,0}} convolution(%i, %k), window={{{}}}, dim_labels=b01f_01io->b01f"
FUSED = """%fused_convolution (i: f32[2,5,5,3], k: f32[3,3,3,7]) -> f32[2,5,5,7] {{
  %i = f32[{}]{{3,2,1,0}} parameter(0)
  %k = f32[3,3,3,7]{{3,2,1,0}} parameter(1)
  ROOT {}
}}

%body"""


@pytest.mark.parametrize(
    ("image", "window", "products"),
    [
        ("2,5,5,3", "size=3x3 pad=1_1x1_1", 13 * 13),  # along an axis: three in the middle, two at each end
        ("2,5,5,3", "size=3x3 pad=2_2x2_2 rhs_dilate=2x2", 11 * 11),  # 2, 2, 3, 2, 2
        ("2,9,5,3", "size=3x3 stride=2x1 pad=1_1x1_1", 13 * 13),  # 2, 3, 3, 3, 2
        ("2,3,5,3", "size=3x3 pad=1_1x1_1 lhs_dilate=2x1", 7 * 13),  # 1, 2, 1, 2, 1: every other row is zero
    ],
)
def test_products_of_a_convolution_in_a_loop(image, window, products):
    program = PROGRAM.replace("%body", FUSED.format(image, CONVOLUTION.format(window)), 1)
    convolution = "  %each = f32[2,5,5,7]{0} fusion(%image, %kernel), kind=kOutput, calls=%fused_convolution\n"
    program = program.replace("  ROOT %next", f"{convolution}  ROOT %next", 1)
    assert hlo.flops(program) == 30 * 2 * 2 * 7 * 3 * products  # trips, multiply and add, images, outputs, inputs
