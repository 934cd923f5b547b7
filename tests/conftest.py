"""What holds for every test."""

import signal

import pytest

from trl_crisp.run.interruption import SIGNALS


@pytest.fixture(autouse=True)
def signal_handlers_stay():
    """The training script ignores signals once its run has ended; processes that later tests start would inherit that."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)
