"""tools.multi_gpu_check on two devices of a CPU, and what it says where something is wrong."""

import copy
import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from tools import multi_gpu_check
from tools.multi_gpu_jax import gathered_bytes


def test_both_frameworks_on_two_devices(tmp_path):
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "tools.multi_gpu_check", "--json", str(file), "--timeout", "100"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(file.read_text())["results"]
    for parts in (found["torch"], found["jax"]):
        assert {name: len(rows) for name, rows in parts.items()} == {
            "equality": 1,
            "bits": 2,
            "bytes": 4,
            "scaling": 4,
        }
    assert multi_gpu_check.all_good(found)
    for part, key, value in (("equality", "good", False), ("bits", "same", False), ("bytes", "measured", 1)):
        worse = copy.deepcopy(found)
        worse["jax"][part][0][key] = value
        assert not multi_gpu_check.all_good(worse)
    assert not multi_gpu_check.all_good({**found, "jax": {}})


def test_a_process_that_fails_ends_the_others(tmp_path, monkeypatch):
    """Two processes, one of which waits for ever."""
    program = "import sys, time; time.sleep(300 if sys.argv[1] == '0' else 0); sys.exit('no such luck')"
    started = []

    def start(framework, rank, device, devices, folder):
        with open(folder / f"log{rank}", "wb") as log:
            command = [sys.executable, "-c", program, str(rank)]
            started.append(subprocess.Popen(command, stderr=log, start_new_session=True))
        return started[-1]

    monkeypatch.setattr(multi_gpu_check, "_start", start)
    parts, problem = multi_gpu_check.run("torch", "cpu", 2, 60.0)
    assert parts == {} and problem == "torch: process 1 ended with code 1\nno such luck\n"
    _, problem = multi_gpu_check.run("jax", "cpu", 2, 0.5)
    assert problem.startswith("jax: expected an end within 0 s, got none")
    for process in started:
        assert process.poll() is not None


def test_bytes_in_a_compiled_program():
    text = """
      %a = f32[8,1,296]{2,1,0} all-gather(%x), dimensions={0}
      %b = (f32[1,300]{1,0}, f32[8,300]{1,0}) all-gather-start(%y), dimensions={0}
      %c = f32[8,300]{1,0} all-gather-done(%b)
    """
    assert gathered_bytes(text, 8) == [4 * 296, 4 * 300]


def test_bad_arguments():
    import typer

    app = typer.Typer()
    app.command()(multi_gpu_check.main)
    for arguments, text in (
        (["--device", "tpu"], "expected one of cpu, cuda, got tpu"),
        (["--frameworks", "mxnet"], "expected one of torch, jax, got mxnet"),
        (["--devices", "1"], "or equal to 2"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert text in " ".join(result.output.split())
    assert multi_gpu_check.environment("cuda", 2).get("TRITON_INTERPRET") is None
    assert "host_platform_device_count=3" in multi_gpu_check.environment("cpu", 3)["XLA_FLAGS"]
