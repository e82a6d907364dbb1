"""The search for tile sizes, as far as it goes without a GPU."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from kernels_triton.config import TABLES, Tile, configure
from tools import tune, tune_measure
from tools.bench_cases import SHAPES
from tools.tune_candidates import BLOCKS, candidates, valid, with_tile

A = next(x for x in SHAPES if x.name == "A")
C64 = next(x for x in SHAPES if x.name == "C64")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: x.name)
@pytest.mark.parametrize("field", BLOCKS)
def test_candidates_are_valid_and_the_present_tile_is_first(shape, field):
    config = configure(tune_measure.make_problem(shape, "bfloat16", "sm_90"))
    tiles = list(candidates(field, config, shape.K, shape.V))
    if getattr(config, field) is None:
        assert not tiles
        return
    assert tiles[0] == getattr(config, field)
    assert len(tiles) == len(set(tiles)) > 1
    for tile in tiles[1:]:
        assert valid(field, tile, config, shape.K, shape.V)
        assert getattr(with_tile(config, field, tile), field) == tile


def test_an_unknown_kernel_is_refused():
    config = configure(tune_measure.make_problem(A, "bfloat16", "sm_90"))
    with pytest.raises(ValueError, match="field: expected one of state, .*, got 'mix'"):
        with_tile(config, "mix", config.state)


def test_found_tiles_reach_the_table(tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text(tune_measure.table_path("sm_90").read_text())
    tile = (64, 64, 128, 32, 4, 4)
    tune.write(path, A, "bfloat16", {"forward": tile}, "a machine")
    old = json.loads(tune_measure.table_path("sm_90").read_text())
    new = json.loads(path.read_text())
    changed = [n for n, (x, y) in enumerate(zip(old["entries"], new["entries"], strict=True)) if x != y]
    assert len(changed) == 1
    entry = new["entries"][changed[0]]
    assert entry["forward"] == list(tile)
    assert entry["K"] == A.K and entry["heads"][1] is None
    assert new["measured"] == "a machine"


@pytest.mark.parametrize("arch", [*TABLES, "gfx942"])
def test_tables_are_files(arch):
    assert json.loads(tune_measure.table_path(arch).read_text())["tile"] == [x.name for x in dataclasses.fields(Tile)]


def test_compiling_one_tile():
    config = configure(tune_measure.make_problem(C64, "bfloat16", "sm_90"))
    job = (C64, "bfloat16", "normaliser", "sm_90", dataclasses.astuple(config.normaliser))
    [(spills, shared, error)] = tune.compile_all([job], 1)
    assert (spills, error) == (0, "")
    assert shared < 1000


def test_bad_arguments():
    for arguments in (["--shapes", "Z"], ["--kernels", "mix"]):
        assert CliRunner().invoke(_app(), arguments).exit_code == 2


def _app():
    import typer

    app = typer.Typer()
    app.command()(tune.main)
    return app
