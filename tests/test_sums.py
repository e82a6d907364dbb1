"""The orders of sums, as the compile check reads them from Triton's GPU IR."""

from __future__ import annotations

from tools.sums import orders

LAYOUTS = """#blocked = #ttg.blocked<{sizePerThread = [1, 4], order = [1, 0]}>
#blocked1 = #ttg.blocked<{sizePerThread = [1], order = [0]}>
#mma = #ttg.nvidia_mma<{instrShape = [16, 64, 16]}>
"""
PRODUCT = """    %product_1 = tt.reshape %product allow_reorder : tensor<64x64xf32, #blocked> -> tensor<4096xf32, #blocked1> loc(#l)
    %product_2 = "tt.reduce"(%product_1) <{axis = 0 : i32}> ({
    ^bb0(%x: f32 loc(#l), %y: f32 loc(#l)):
      %z = arith.addf %x, %y : f32 loc(#l)
      tt.reduce.return %z : f32 loc(#l)
    }) : (tensor<4096xf32, #blocked1>) -> f32 loc(#l)
"""
ROWS = """    %rows_2 = "tt.reduce"(%rows#0) <{axis = 1 : i32}> ({
    ^bb0(%x: f32 loc(#l), %y: f32 loc(#l)):
      tt.reduce.return %x : f32 loc(#l)
    }) : (tensor<64x64xf32, #mma>) -> tensor<64xf32, #ttg.slice<{dim = 1, parent = #mma}>> loc(#l)
"""


def test_a_sum_over_a_reordered_tile_has_the_tiles_own_layout():
    assert orders(LAYOUTS + PRODUCT) == [
        "axis = 0: tensor<64x64xf32, #ttg.blocked<{sizePerThread = [1, 4], order = [1, 0]}>>"
    ]


def test_another_vector_width_is_another_order():
    wider = LAYOUTS.replace("[1, 4]", "[1, 8]")
    assert orders(wider + PRODUCT) != orders(LAYOUTS + PRODUCT)
    assert orders(wider + ROWS) == orders(LAYOUTS + ROWS)


def test_neither_names_nor_places_count():
    renamed = LAYOUTS.replace("#mma", "#other")
    assert orders(renamed + ROWS.replace("#mma", "#other") + PRODUCT) == orders(LAYOUTS + PRODUCT + ROWS)


def test_parents_are_spelled_out():
    sliced = ROWS.replace("tensor<64x64xf32, #mma>)", "tensor<64xf32, #ttg.slice<{dim = 0, parent = #mma}>>)")
    assert "parent = #ttg.nvidia_mma<{instrShape" in orders(LAYOUTS + sliced)[0]
