"""What holds for every test."""

import gc
import signal

import pytest

from trl_crisp.run.interruption import SIGNALS


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection():
    """Each end of a training collects garbage. This leaves out what the imports made, which takes 0.4 s to look through."""
    gc.collect()
    gc.freeze()
    yield
    # Triton tells at the process's end of all that is frozen
    gc.unfreeze()


@pytest.fixture(autouse=True)
def signal_handlers_stay():
    """The training script ignores signals once its run has ended; processes that later tests start would inherit that."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def _no_page(monkeypatch, request):
    """A run ends by drawing its page, which takes longer than a tiny run. The tests of it ask for the mark `page`."""
    if "page" not in request.keywords:
        monkeypatch.setattr("trl_crisp.train.write_page", lambda output_dir: "")
