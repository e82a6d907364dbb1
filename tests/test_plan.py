"""The plan as data: what it compiles, and for which shapes; nothing runs."""

import dataclasses
import itertools
import math

import pytest

from kernels_triton import plan
from kernels_triton.builder import Builder
from kernels_triton.config import MANY_HEADS, TABLES, Config, Tile, configure, table
from kernels_triton.launch import Descriptor, Launch
from kernels_triton.problem import LONGEST_CHUNK
from kernels_triton.validation import ArrayInfo, check_call

OPTIONS = {"eps": 1e-6, "chunk_size": None, "qk_scale": None, "normalizer_grad": "exact"}
OPTIONS |= {"layout": "bhtd", "precision": "ieee", "backend": "auto"}


def problem(B=2, H=4, T=100, K=64, V=128, dtype="bfloat16", states=True, **options):
    options = OPTIONS | options
    tokens = (B, T, H) if options["layout"] == "bthd" else (B, H, T)
    arrays = {"q": (*tokens, K), "k": (*tokens, K), "v": (*tokens, V)}
    infos = {name: ArrayInfo(shape, dtype, "") for name, shape in arrays.items()}
    arrays = {"i": tokens, "f": tokens}
    if states:
        arrays |= {"c_initial": (B, H, K, V), "n_initial": (B, H, K), "m_initial": (B, H)}
    return check_call(infos | {name: ArrayInfo(shape, "float32", "") for name, shape in arrays.items()}, **options)


def launches(p):
    return plan.forward_pass(p).launches + plan.backward_pass(p, None, True).launches


def compiled_for(p):
    """All that a kernel is compiled for: run-time integers count only as 1, of 32 bits, or wider."""
    kinds = []
    for launch in launches(p):
        scalars = {
            n: 1 if x == 1 else 32 if x < 2**31 else 64 for n, x in launch.operands.items() if isinstance(x, int)
        }
        kinds.append((launch.name, scalars, dict(launch.constexprs), launch.num_warps, launch.num_stages))
    return kinds


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_length_compiles_nothing(layout, dtype):
    """Of a few heads there are two plans, for short and for long sequences; of many, one."""
    for H, plans in ((4, (100, 65536)), (256, (100,))):
        expected = [compiled_for(problem(H=H, T=T, layout=layout, dtype=dtype)) for T in plans]
        for T in (2, 17, 64, 65, 1024, 4099, 65536):
            assert compiled_for(problem(H=H, T=T, layout=layout, dtype=dtype)) in expected


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_both_scans_in_one_pass(arch):
    """Forward states are computed again in some backward passes, cut perhaps into another number of segments."""
    kinds = ({"save_states": False}, {"form": "recurrent"})
    unequal = 0
    for dtype, K, H, T in itertools.product(
        ("float32", "float16", "bfloat16"), (64, 128, 256, 512), (1, 4, 8), (2100, 4096)
    ):
        for options in kinds:
            p = dataclasses.replace(problem(2, H, T, K, max(K, 128), dtype=dtype, **options), arch=arch)
            scans = [x for x in plan.backward_pass(p).launches if x.name == "state_scan"]
            each = [sum(x.constexprs["BACKWARD"] == backward for x in scans) for backward in (False, True)]
            b = Builder(p)
            forward = min(b.segments(False), 2)
            if b.config.fused and p.form == "recurrent":  # the fused kernel does what is left after the first launch
                forward -= 1
            assert each == [forward, min(b.segments(True), 2)]
            unequal += b.segments(False) != b.segments(True)
    assert unequal or arch != "sm_90"


@pytest.mark.parametrize(
    "B, H, T, K, V", [(1, 8, 1_100_000, 64, 256), (64, 64, 8192, 256, 512), (2, 4, 2_000_003, 16, 16)]
)
def test_huge_shapes(B, H, T, K, V):
    p = problem(B, H, T, K, V)
    chunks = B * H * -(-T // configure(p).L)
    assert chunks > 65_535
    for launch in launches(p):
        assert isinstance(launch.grid, int)
        assert 0 < launch.grid < 2**31
        assert launch.grid >= B * H


def test_every_configuration_is_valid():
    dims = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257, 384, 511, 512]
    chunks = [None, 16, 32, 64, 128, 256, 512]
    for K, V, L, dtype in itertools.product(dims, dims, chunks, ("float32", "bfloat16", "float16")):
        config = configure(problem(K=K, V=V, dtype=dtype, chunk_size=L))
        assert config.L == min(L or config.L, LONGEST_CHUNK)
        for field in dataclasses.fields(Config):
            tile = getattr(config, field.name)
            if isinstance(tile, Tile):
                blocks = (tile.BT, tile.BS, tile.BK, tile.BV)
                assert all(x >= 16 and x & (x - 1) == 0 for x in blocks), (K, V, L, dtype, tile)
                assert dtype == "float32" or field.name == "normaliser" or min(tile.BK, tile.BV) >= 32, (K, V, L, tile)
                assert config.L % tile.BT == 0
                assert config.L % tile.BS == 0
                assert field.name not in ("forward", "backward") or config.L // tile.BT <= 8


def test_rows_read_value_by_value_are_spread_over_eight_warps():
    """Of 16-bit values: with four, ptxas spilt up to 7 KB for odd dims, and has spilt wrongly (tools/sass.py)."""
    for K, V, dtype in itertools.product((65, 129, 359, 512), (15, 129, 257, 512), ("bfloat16", "float16")):
        config = configure(problem(K=K, V=V, dtype=dtype))
        odd = K % 2 == 1 or V % 2 == 1
        for name in ("state", "dstate", "forward", "backward"):
            tile = getattr(config, name)
            assert tile.num_warps == 8 or not odd, (K, V, dtype, tile)
    assert configure(problem(K=129, V=128, dtype="float32")) == configure(problem(K=130, V=128, dtype="float32"))


def test_chunks_longer_than_the_tables_take_small_tiles():
    """(359, 15) in chunks of 256 spilt 3 KB with blocks of 128 keys, and ptxas 12.9 and 13.0 lost the thread's number."""
    for K, V in itertools.product((64, 65, 128, 359, 512), (15, 64, 256)):
        config = configure(problem(K=K, V=V, dtype="bfloat16", chunk_size=256))
        for tile in (config.forward, config.backward):
            assert (tile.num_warps, tile.BK, tile.BV) == (8, 64, 64), (K, V, tile)
        config = configure(problem(K=K, V=V, dtype="float32", chunk_size=256))
        assert (config.forward.BT, config.forward.BS) == (32, 32)


@pytest.mark.parametrize("dtype, precision", [("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "tf32")])
def test_no_two_groups_of_warps_share_a_product_of_32_values(dtype, precision):
    """On Hopper such kernels have ended with an illegal memory access; the stage functions' chunks of 512 take eight."""
    warps = set()
    for K, V, L in itertools.product((64, 128, 129, 256, 512), (15, 64, 128, 256, 512), (None, 64, 128, 256, 512)):
        p = problem(K=K, V=V, dtype=dtype, precision=precision)
        config = configure(dataclasses.replace(p, chunk_size=L, arch="sm_90"))
        for tile in (config.forward, config.backward):
            assert tile.num_warps <= 4 or tile.BV >= 64, (K, V, L, tile)
            warps.add(tile.num_warps)
    assert warps == {4, 8}


@pytest.mark.parametrize("arch", [*TABLES, "gfx942", "sm_86", "unheard of"])
def test_every_architecture_has_a_table(arch):
    for K, V, heads in itertools.product((1, 64, 65, 512), (1, 64, 512), (1, 40, 400)):
        for dtype in ("float32", "bfloat16", "float16"):
            p = dataclasses.replace(problem(B=1, H=heads, K=K, V=V, dtype=dtype), arch=arch)
            config = configure(p)
            assert config.fused or not config.dfused
            assert not config.fused or heads >= MANY_HEADS or V > config.fused.BV
            assert config.fused is None or config.fused.BK >= K
            assert config.dfused is None or (config.dfused.BK >= K and config.dfused.BV >= V)
    assert table("unheard of") == table("gfx942")


def test_fused_kernels_where_they_fill_the_gpu():
    """Heads in parts of V take the fused kernel only if its last round of programs leaves few multiprocessors idle."""

    def fused(heads: int, V: int) -> bool:
        p = dataclasses.replace(problem(B=1, H=heads, K=128, V=V, dtype="bfloat16"), arch="sm_90")
        return configure(p).fused is not None

    taken = {
        V: [heads for heads in (16, 32, 64, 96, 128, 144, 192, 256) if fused(heads, V)] for V in (64, 128, 256, 512)
    }
    assert taken == {
        64: [128, 144, 192, 256],
        128: [16, 32, 64, 128, 256],  # 64 heads in two segments
        256: [16, 64, 128, 192, 256],  # 32 heads would take two
        512: [32, 64, 96, 128, 144, 192, 256],  # 16 heads likewise
    }


def test_an_entry_for_short_chunks_alone():
    """Float32's short chunks have large tiles, which a call that asks for longer ones does not get."""

    def found(chunk_size: int | None) -> tuple[int, int]:
        p = problem(K=128, V=128, dtype="float32", chunk_size=chunk_size)
        config = configure(dataclasses.replace(p, arch="sm_90"))
        return config.L, config.backward.BK

    assert [found(x) for x in (None, 16, 32, 64, 128)] == [(32, 128), (16, 128), (32, 128), (64, 64), (128, 32)]


def test_segments_of_few_heads():
    """As many as keep the GPU busy, up to a bound; many programs only in few segments, and short sequences are whole."""
    cases = {(1, 128, 256): 32, (2, 256, 512): 9, (8, 128, 128): 17, (16, 128, 256): 9, (22, 128, 256): 6}
    cases |= {(24, 128, 256): 1, (32, 128, 256): 1, (128, 128, 256): 1}
    for (heads, K, V), count in cases.items():
        p = dataclasses.replace(problem(B=1, H=heads, T=65536, K=K, V=V, dtype="bfloat16"), arch="sm_90")
        assert Builder(p).segments(backward=True) == count, (heads, K, V)
        assert Builder(dataclasses.replace(p, T=1024)).segments(backward=True) == 1
    p = dataclasses.replace(problem(B=1, H=16, T=65536, K=128, V=256, dtype="bfloat16"), arch="sm_90")
    assert Builder(p).segments(backward=False) == 4  # the fused kernel's


def test_a_launch_checks_its_names():
    launch = launches(problem())[0]
    operands = {name: x for name, x in launch.operands.items() if name != "T"}
    with pytest.raises(TypeError, match=r"gates_forward: run-time parameters: expected .*'T'"):
        dataclasses.replace(launch, operands=operands)
    swapped = dict(reversed(launch.operands.items()))
    with pytest.raises(TypeError, match=r"gates_forward: run-time parameters"):
        dataclasses.replace(launch, operands=swapped)
    with pytest.raises(TypeError, match=r"gates_forward: constexprs: expected .* got \['L'\]"):
        dataclasses.replace(launch, constexprs={"L": 64})


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("has_dlast", [True, False])
def test_passes_are_closed(states, has_dlast):
    """Every buffer read was given or made before; every result was made; nothing is made twice."""
    p = problem(states=states)
    segment = (plan.segment_state(p), plan.segment_cotangent(p, None, has_dlast), plan.segment_backward(p))
    for program in (plan.forward_pass(p), plan.backward_pass(p, None, has_dlast), *(segment if states else ())):
        known = set(program.inputs)
        for launch in program.launches:
            assert isinstance(launch, Launch)
            assert set(launch.buffers) <= known
            made = {buffer for buffer, _ in launch.outputs.values()}
            assert not made & known - {"unused_scan", "unused_d"}
            known |= made
        assert set(program.results) <= known - set(program.inputs)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"states": False, "dtype": "float32", "save_states": False},
        {"B": 128, "K": 64, "V": 64, "layout": "bthd"},
        {"input_gate": "sigmoid", "normalize": False},
        {"form": "recurrent", "T": 3},
        {"T": 3},
        {"sequences": 5, "B": 1, "layout": "bthd"},
        {"sequences": 5, "B": 1, "layout": "bthd", "has_table": True},
    ],
    ids=str,
)
def test_results_are_known_without_a_plan(options, save):
    later = {name: options.pop(name) for name in ("sequences", "has_table", "form") if name in (options := {**options})}
    p = dataclasses.replace(problem(**options), **later)
    program = plan.forward_pass(p, save)
    assert plan.forward_results(p, save) == {name: program.spec(name) for name in program.results}


def test_equal_problems_share_a_plan():
    assert plan.forward_pass(problem()) is plan.forward_pass(problem())


def test_who_finds_the_normalisers_cotangent():
    """In the fused backward kernel of bfloat16 it is matrix units, from h; elsewhere the normaliser's kernel."""
    many = problem(H=MANY_HEADS, V=64)
    found = {}
    for name, p in (("exact", many), ("detached", dataclasses.replace(many, normalizer_grad="detached"))):
        first, *rest = plan.backward_pass(p, None, True).launches
        fused = next(x for x in rest if x.name == "fused_backward")
        found[name] = (first.constexprs["FACTOR"], fused.constexprs["FIND_DELTA"], fused.operands["h"] == "h")
        assert "h" not in first.buffers
    assert found == {"exact": (True, True, True), "detached": (False, False, False)}
    for other in (problem(V=64), problem(H=MANY_HEADS, V=64, dtype="float32")):
        first = plan.backward_pass(other, None, True).launches[0]
        assert not first.constexprs["FACTOR"] and "h" in first.buffers
    # Of a split sequence the states' cotangents come first, in a scan that needs all of it.
    assert not plan.segment_cotangent(many, None, True).launches[0].constexprs["FACTOR"]
    fused = next(x for x in plan.segment_backward(many, None, True).launches if x.name == "fused_backward")
    assert not fused.constexprs["FIND_DELTA"]


def test_states_are_stored_as_they_are_read():
    """Through a descriptor of the launch's own output, which is nothing that it reads."""
    for descriptors in (False, True):
        p = dataclasses.replace(problem(T=5000, K=256, V=256), descriptors=descriptors)
        scans = [x for x in launches(p) if x.name == "state_scan"]
        assert {x.constexprs["SEGMENTS"] for x in scans} == {1, 2}
        for scan in scans:
            view, (own, spec) = scan.operands["states_view"], scan.outputs["states"]
            assert isinstance(view, Descriptor) == descriptors
            if descriptors:
                assert (view.buffer, math.prod(view.shape)) == (own, math.prod(spec.shape))
            assert (own in scan.buffers) == (scan.constexprs["SEGMENTS"] == 2)  # what the first launch stored
    assert not any(
        isinstance(x.operands["states_view"], Descriptor)
        for x in plan.segment_state(p).launches
        if x.name == "state_scan"
    )


def test_gates_are_added_up_in_one_order():
    """Kernels in one launch and in two, of documents and of sequences alone: as many tokens and warps at a time."""
    for options in ({}, {"chunk_size": 64}, {"K": 64, "V": 64, "H": 1}):
        warps = {
            (x.constexprs["G"] * x.constexprs["L"], x.num_warps)
            for T in (100, 65536)
            for x in plan.forward_pass(problem(T=T, **options)).launches
            if x.name.startswith("gates")
        }
        assert len(warps) == 1


def test_packed_sequences_are_read_by_pointers():
    """A descriptor's tile goes on beyond a sequence's end, to a neighbour's tokens that may be infinite."""
    p = problem(1, 4, 4096, 128, 256, dtype="bfloat16", layout="bthd")
    for sequences in (0, 3):
        found = {
            isinstance(x, Descriptor)
            for launch in launches(dataclasses.replace(p, descriptors=True, sequences=sequences))
            for x in launch.operands.values()
        }
        assert found == {False} | ({True} if not sequences else set())


def test_strides_along_axes_of_one_element_change_no_launch():
    """PyTorch has them as 0, JAX as its contiguous arrays have them; a unit that is larger would load other tiles."""
    p = problem(1, 1, 1, 189, 65, dtype="float32")
    zeros = dataclasses.replace(p, strides=tuple((name, (0, 0, 0)) for name, _ in p.strides))
    assert launches(p) == launches(zeros)
