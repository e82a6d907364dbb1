"""The stored vectors, in float64 by an independent recurrence: this process's backend and the readable reference."""

import pytest

from tests.support import FRAMEWORKS, check, error, readable, run, vectors

MODES = ("exact", "detached")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", vectors())
def test_operator(name, mode, framework, backend):
    case, expected = vectors()[name]
    case = case.but(normalizer_grad=mode)
    check(run(framework, case, backend), case, expected[mode])


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", vectors())
def test_readable_reference(name, mode, form, framework="torch"):
    case, expected = vectors()[name]
    got = readable(framework, case.but(normalizer_grad=mode), form, "float64")
    assert got.keys() == expected[mode].keys()
    assert {n: e for n, x in got.items() if (e := error(x, expected[mode][n])) > 1e-12} == {}


# The same source, which JAX takes long to trace.
@pytest.mark.parametrize(
    "name, form", [("one_token", "recurrent"), ("states", "chunkwise"), ("ragged_length", "chunkwise")]
)
def test_readable_reference_in_jax(name, form):
    test_readable_reference(name, "exact", form, "jax")
