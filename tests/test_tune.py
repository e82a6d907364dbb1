"""The search for tile sizes, as far as it goes without a GPU."""

import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kernels_triton.config import TABLES, Tile, configure
from tools import tune, tune_measure
from tools.bench_cases import DTYPES, SHAPES
from tools.tune_candidates import BLOCKS, candidates, valid, with_tile

A = next(x for x in SHAPES if x.name == "A")
C64 = next(x for x in SHAPES if x.name == "C64")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: x.name)
@pytest.mark.parametrize("field", BLOCKS)
def test_candidates_are_valid_and_the_present_tile_is_first(shape, field):
    problem = tune_measure.make_problem(shape, "bfloat16", "sm_90")
    config = configure(problem)
    tiles = list(candidates(field, config, problem))
    if getattr(config, field) is None:
        assert not tiles
        return
    assert tiles[0] == getattr(config, field)
    assert len(tiles) == len(set(tiles)) > 1
    for tile in tiles[1:]:
        assert valid(field, tile, config, shape.K, shape.V)
        assert getattr(with_tile(config, field, tile), field) == tile


@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: x.name)
@pytest.mark.parametrize("dtype", [x.name for x in DTYPES])
def test_every_candidate_makes_other_launches(shape, dtype):
    problem = tune_measure.make_problem(shape, dtype, "sm_90")
    for field in BLOCKS:
        config = tune_measure.config_of(problem, field)
        seen = []
        for tile in candidates(field, config, problem):
            launches = tune_measure.launches_of(field, problem, with_tile(config, field, tile))
            assert launches and launches not in seen, (field, tile)
            seen.append(launches)


def test_smaller_tiles_where_registers_multiply():
    """Float32 in "ieee" has no matrix units: a tile's rows fill registers, so that the largest tiles are not tried."""

    def largest(dtype: str) -> dict[str, int]:
        problem = tune_measure.make_problem(A, dtype, "sm_90")
        config = configure(problem)
        tiles = {field: [*candidates(field, config, problem)][1:] for field in ("forward", "backward")}
        return {field: max(x.BT * x.BV for x in found) for field, found in tiles.items()}

    assert largest("float32-tf32") == {"forward": 64 * 64, "backward": 64 * 64}
    assert largest("float32-ieee") == {"forward": 32 * 64, "backward": 32 * 32}


def test_no_thread_holds_much_of_a_state_without_matrix_units():
    problem = tune_measure.make_problem(A, "float32-ieee", "sm_90")
    tiles = [*candidates("dstate", configure(problem), problem)][1:]
    assert {x.num_warps for x in tiles} == {1, 2, 4, 8}
    assert max(x.BK * x.BV // (32 * x.num_warps) for x in tiles) == 64


@pytest.mark.parametrize("arch, narrow", [("sm_90", False), ("sm_80", True)])
def test_hopper_has_no_candidate_whose_groups_of_warps_share_32_values(arch, narrow):
    problem = tune_measure.make_problem(A, "bfloat16", arch)
    tiles = [*candidates("forward", configure(problem), problem)][1:]
    assert any(x.num_warps == 8 for x in tiles)
    assert any(x.num_warps == 8 and x.BV < 64 for x in tiles) == narrow


def test_an_unknown_kernel_is_refused():
    config = configure(tune_measure.make_problem(A, "bfloat16", "sm_90"))
    with pytest.raises(ValueError, match="field: expected one of state, .*, got 'mix'"):
        with_tile(config, "mix", config.state)


def test_found_tiles_reach_the_table(tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text(tune_measure.table_path("sm_90").read_text())
    tile = (64, 64, 128, 32, 4, 4)
    tune.write(path, A, "bfloat16", {"forward": (*tile, 1, 1)}, "a machine")  # as found, and as tables have it
    old = json.loads(tune_measure.table_path("sm_90").read_text())
    new = json.loads(path.read_text())
    changed = [n for n, (x, y) in enumerate(zip(old["entries"], new["entries"], strict=True)) if x != y]
    assert len(changed) == 1
    entry = new["entries"][changed[0]]
    assert entry["forward"] == list(tile)
    assert entry["K"] == A.K and entry["heads"][1] is None
    assert entry["measured"] == "a machine"


@pytest.mark.parametrize("arch", [*TABLES, "gfx942"])
def test_tables_are_files(arch):
    assert json.loads(tune_measure.table_path(arch).read_text())["tile"] == [x.name for x in dataclasses.fields(Tile)]


def test_compiling_one_tile():
    config = configure(tune_measure.make_problem(C64, "bfloat16", "sm_90"))
    job = (C64, "bfloat16", "normaliser", "sm_90", dataclasses.astuple(config.normaliser))
    [(spills, shared, error)] = tune.compile_all([job], 1)
    assert (spills, error) == (0, "")
    assert shared < 1000


TILE = Tile(64, 64, 64, 64, 4, 2)
WIDE = 300_000  # bytes of shared memory that no architecture has


def test_without_a_clock_no_tile_may_spill():
    found = tune.pruned([TILE] * 3, [(8, 0, ""), (0, 0, ""), (0, WIDE, "")], "sm_90", few=0)
    assert [x.problem for x in found] == ["spills", "", "shared memory > 232448"]


def test_few_spills_are_left_to_the_clock_and_the_present_tile_stays():
    found = tune.pruned([TILE] * 4, [(900, 0, ""), (8, 0, ""), (900, 0, ""), (900, 0, "broken")], "sm_90", few=128)
    assert [x.problem for x in found] == ["", "", "spills", "broken"]


def test_where_all_spill_the_clock_decides():
    found = tune.pruned([TILE] * 3, [(900, WIDE, ""), (900, 0, ""), (900, WIDE, "")], "sm_90", few=128)
    assert [x.problem for x in found] == ["shared memory > 232448", "", "shared memory > 232448"]


class FakeBench:
    """A GPU on which one tile is fastest but wrong, and another takes its process along."""

    def __init__(self, problem, config):
        pass

    def time(self, field, config):
        if config.state.num_stages == 4:
            os._exit(7)
        return {1: 1.0, 2: 2.0, 3: 3.0}[config.state.num_stages]

    def check(self, config):
        return "h: error" if config.state.num_stages == 1 else ""


def fake_measure(*arguments):
    tune_measure.Bench = FakeBench
    tune_measure.measure(*arguments)


def test_a_tile_that_takes_its_process_along_is_left_out(monkeypatch):
    monkeypatch.setattr(tune, "tune_measure", SimpleNamespace(measure=fake_measure))
    tiles = {n: Tile(64, 16, 64, 64, 4, stages) for n, stages in enumerate((4, 3, 1, 2))}
    times, wrong = tune.on_gpu(A, "bfloat16", "state", "sm_90", tiles)
    assert times == {1: 3.0, 2: 1.0, 3: 2.0}
    assert wrong == {0: "fails on the GPU: exit code 7", 2: "h: error", 3: ""}


def test_tiles_far_behind_are_timed_once(monkeypatch):
    monkeypatch.setattr(tune_measure, "Bench", FakeBench)
    sent = []
    tiles = {n: Tile(64, 16, 64, 64, 4, stages) for n, stages in enumerate((3, 2, 2))}
    receiver = SimpleNamespace(send=sent.append)
    tune_measure.measure(A, "bfloat16", "state", "sm_90", tiles, 3, 1.01, receiver)
    assert [x for what, x in sent if what == "time"] == [0, 1, 2, 1, 2, 1, 2]
    assert [x for what, x in sent if what == "turns"] == [9, 4, 2]
    assert sent[-1] == ("wrong", {1: ""})


@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: x.name)
def test_what_is_checked_launches_what_is_timed(shape):
    problem = tune_measure.make_problem(shape, "bfloat16", "sm_90")
    small = tune_measure.of_case(problem, tune_measure.checked_case(problem))
    assert min(shape.T, 1024) <= small.T <= shape.T
    for field in BLOCKS:
        config = tune_measure.config_of(problem, field)
        timed, checked = (tune_measure.launches_of(field, x, config) for x in (problem, small))
        assert [x.name for x in timed] == [x.name for x in checked], field
        assert [x.constexprs.get("SEGMENTS") for x in timed] == [x.constexprs.get("SEGMENTS") for x in checked], field


@pytest.fixture
def check(monkeypatch):
    """Bench.check without a GPU; h is 1 and may be 1e-3 off. An argument is h of each run, by descriptors or not."""
    bench = object.__new__(tune_measure.Bench)
    problem = tune_measure.make_problem(A, "bfloat16", "sm_90")
    vars(bench)["_small"] = problem, {}, {"h": np.ones(3)}, {"h": 1e-3}

    def call(results):
        monkeypatch.setattr(
            bench, "_results", lambda problem, *_: {"h": torch.full((3,), results(problem.descriptors))}
        )
        return bench.check(configure(problem))

    return call


def test_right_results_pass(check):
    assert check(lambda _: 1.0) == ""


def test_what_is_wrong_is_named(check):
    assert check(lambda _: 1.01).startswith("h: error 1.0e-02 > 1.0e-03")
    assert check(lambda _: float("nan")).startswith("h: error inf")
    runs = iter((1.0, 1.0001))
    assert check(lambda _: next(runs)) == "h: other bits in another run"
    assert check(lambda descriptors: 1.0 if descriptors else 1.0001) == "h: other bits by pointers"


def test_the_entry_of_a_precision():
    table = json.loads(tune_measure.table_path("sm_90").read_text())["entries"]
    for name in ("float32-tf32", "float32-ieee"):
        config = configure(tune_measure.make_problem(A, name, "sm_90"))
        own = [x for x in table if "float32" in x["dtypes"] and name.split("-")[1] in x["precisions"]]
        assert dataclasses.astuple(config.backward)[: len(own[0]["backward"])] == tuple(own[0]["backward"])


@pytest.mark.parametrize("error, code", [("", 0), ("broken", 1)])
def test_compiling_alone(monkeypatch, error, code):
    monkeypatch.setattr(tune, "compile_all", lambda jobs, _: [(0, 0, error)] * len(jobs))
    result = CliRunner().invoke(_app(), ["--target", "sm_90", "--shapes", "C64"])
    assert result.exit_code == code, result.output
    assert all(f": {field} " in result.output for field in BLOCKS)


def test_a_search_that_writes(monkeypatch, tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text(tune_measure.table_path("sm_90").read_text())
    monkeypatch.setattr(tune_measure, "table_path", lambda _: path)
    monkeypatch.setattr(tune_measure, "this_architecture", lambda: "sm_90")
    monkeypatch.setattr(tune_measure, "machine", lambda: "a machine")
    monkeypatch.setattr(tune, "compile_all", lambda jobs, _: [(0, 0, "")] * len(jobs))
    fastest = {}

    def on_gpu(shape, dtype, field, arch, tiles):
        fastest[field] = tiles[1]
        return {n: 1.0 - (n == 1) / 2 for n in tiles}, {1: ""}

    monkeypatch.setattr(tune, "on_gpu", on_gpu)
    result = CliRunner().invoke(_app(), ["--shapes", "C64", "--write"])
    assert result.exit_code == 0, result.output
    [entry] = [x for x in json.loads(path.read_text())["entries"] if x["measured"] == "a machine"]
    assert {field: Tile(*entry[field]) for field in BLOCKS} == fastest


def test_bad_arguments():
    for arguments in (["--shapes", "Z"], ["--kernels", "mix"], ["--dtype", "float8", "--target", "sm_90"]):
        assert CliRunner().invoke(_app(), arguments).exit_code == 2


def _app():
    import typer

    app = typer.Typer()
    app.command()(tune.main)
    return app
