"""tools.transforms sees what differs and what fails."""

import pytest
from typer.testing import CliRunner

from tests.support import FRAMEWORKS
from tools.cases import Case
from tools.transforms import main, outcome, ways

CASE = Case("tiny", H=1, T=3, K=2, V=2, chunk_size=16)


def test_outcomes():
    def other(function):
        return lambda q, **inputs: function(q=q * 2, **inputs)

    def broken(function):
        raise ValueError("no such\nway")

    for framework in FRAMEWORKS:
        assert outcome(CASE, framework, lambda function: function, "cpu") == "identical"
        assert outcome(CASE, framework, other, "cpu").startswith("differ: h")
        assert outcome(CASE, framework, broken, "cpu") == "ValueError: no such"


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
def test_every_way_of_a_cpu():
    found = {(framework, name): outcome(CASE, framework, way, "cpu") for framework, name, way in ways("cpu")}
    assert len(found) == 11
    assert set(found.values()) == {"identical"}


def test_bad_arguments():
    import typer

    app = typer.Typer()
    app.command()(main)
    for arguments, text in (
        (["--device", "tpu"], "expected one of cpu, cuda, got tpu"),
        (["--cases", "nothing"], "nothing"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert text in result.output
