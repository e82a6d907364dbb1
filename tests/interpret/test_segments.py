"""A segment's own passes, in scans that are cut and whole: what they sum up is what the operator's passes come to."""

import numpy as np
import pytest

from kernels_triton import context, interpreter, plan
from kernels_triton.builder_scan import ScanBuilder
from tests.test_plan import problem


def run(program, arrays):
    hosts = {n: interpreter.HostArray(arrays[n].ctypes.data, arrays[n].dtype.name, arrays[n]) for n in program.inputs}
    raw = interpreter.run(program, hosts)
    return {name: x.view(program.spec(name).dtype)[..., 0] for name, x in raw.items()}


@pytest.fixture(params=[[3], [1, 3]], ids=str)
def scans(request, monkeypatch):
    """How a scan is launched, whole or cut in two."""
    monkeypatch.setattr(ScanBuilder, "segments", lambda *_: len(request.param))
    passes = (plan.forward_pass, plan.backward_pass, plan.segment_state, plan.segment_cotangent)
    for make in passes:
        make.cache_clear()
    yield request.param
    for make in passes:
        make.cache_clear()


def test_a_segment_sums_up_what_it_does(scans):
    B, H, T, K, V = 1, 2, 70, 16, 8
    rng = np.random.default_rng(0)
    shapes = {"q": (B, H, T, K), "k": (B, H, T, K), "v": (B, H, T, V), "dh": (B, H, T, V), "i": (B, H, T)}
    shapes |= {"f": (B, H, T), "c_initial": (B, H, K, V), "n_initial": (B, H, K), "m_initial": (B, H)}
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    arrays["f"] += 6
    p = problem(B, H, T, K, V, dtype="float32", chunk_size=16)
    state, cotangent = plan.segment_state(p), plan.segment_cotangent(p)
    for program in (state, cotangent):
        assert [x.constexprs["SEGMENTS"] for x in program.launches if x.name == "state_scan"] == scans
    assert "norms" not in state.specs and "dstates" not in cotangent.specs

    nothing = {"m_initial": np.full((B, H), context.NO_STABILISER, np.float32)}
    own = run(state, arrays | nothing)
    whole = run(plan.forward_pass(problem(B, H, T, K, V, dtype="float32", chunk_size=16, states=False)), arrays)
    scale = np.exp(own["m_last"] - whole["m_last"])  # without an initial state the stabiliser starts at 0
    np.testing.assert_allclose(own["c_last"] * scale[..., None, None], whole["c_last"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own["n_last"] * scale[..., None], whole["n_last"], rtol=1e-5, atol=1e-5)
    log_f = -np.logaddexp(0, -arrays["f"].astype(np.float64)).sum(2)
    np.testing.assert_allclose(own["totals"][:, :, :2].sum((2, 3)), log_f, rtol=1e-6)

    env = arrays | run(plan.forward_pass(p), arrays)
    gradients = run(plan.backward_pass(p), env)
    found = run(cotangent, env)
    for name in plan.GRADIENTS_INITIAL[:2]:
        np.testing.assert_array_equal(found[name], gradients[name])
