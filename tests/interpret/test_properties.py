"""Random shapes and options against the float64 recurrence, PyTorch and JAX to the bit."""

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support import OUTPUTS, check, make_case, run, same_bits

HEADS = st.sampled_from([1, 2, 3, 7, 8, 16, 17, 33, 65])


@st.composite
def cases(draw):
    states = draw(st.booleans())
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"]))
    gate = st.sampled_from(["float32", "float32", dtype, "float64"])
    outputs = draw(st.sets(st.sampled_from(OUTPUTS), min_size=1)) if draw(st.booleans()) else {"h"}
    return make_case(
        B=draw(st.integers(1, 2)),
        H=draw(st.integers(1, 3)),
        T=draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 47, 61, 64, 65]))),
        K=draw(HEADS),
        V=draw(HEADS),
        seed=draw(st.integers(0, 1000)),
        dtype=dtype,
        i_dtype=draw(gate),
        f_dtype=draw(gate),
        i_mean=draw(st.sampled_from([-8.0, 0.0, 0.0, 4.0])),
        f_mean=draw(st.sampled_from([-3.0, 0.0, 3.0, 6.0])),
        states=states,
        cotangents=sorted(outputs),
        layout=draw(st.sampled_from(["bhtd", "bthd"])),
        chunk_size=draw(st.sampled_from([None, 16, 32, 64])),
        normalizer_grad=draw(st.sampled_from(["exact", "detached"])),
        eps=draw(st.sampled_from([1e-6, 0.0, 1e-2])),
        qk_scale=draw(st.sampled_from([None, 1.0, 0.1])),
    )


# No shrinking: the interpreter is too slow for it, and a failure prints the call.
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_any_call(case):
    got = run("torch", case, "interpret")
    same_bits(got, run("jax", case, "interpret"))
    check(got, case)
