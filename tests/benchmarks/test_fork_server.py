"""Error of a fork that cannot begin; engines that fork, fail and are ended are in the tests of the commands."""

from pathlib import Path

from twotower_bench.fork_server import ForkServer


def test_a_vllm_that_cannot_be_imported_is_the_failure_of_every_fork(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('this vLLM is broken')")
    server = ForkServer(tmp_path, {"PYTHONPATH": str(tmp_path)})
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        fork = server.fork(f"the {name} engine", "twotower_bench.engines.worker:serve", (), tmp_path / name, {})
        assert fork.wait() == 1
        said = str(fork.failure("ended"))
        assert said.startswith(f"the {name} engine ended; the last it said was:") and "this vLLM is broken" in said
        fork.close()
    server.close()
