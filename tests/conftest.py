import pytest

from weir import Weir


@pytest.fixture(scope="module")
def weir():
    with Weir(WEIR__SSE__HEARTBEAT="1s") as weir:
        yield weir
        assert weir.process.poll() is None, f"weir died:\n{weir.log}"
        assert "panicked" not in weir.log, weir.log
