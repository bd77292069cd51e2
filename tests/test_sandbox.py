"""The process that renders foreign templates, and forks of its parent."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from llama import sandbox

SLOW = "{% for a in range(300) %}{% for b in range(300) %}{% endfor %}{% endfor %}done"


@pytest.mark.forks
def test_a_fork_while_another_thread_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child gets a process of its own, in time, and the parent's answer stays the parent's."""
    monkeypatch.setattr(sandbox, "SECONDS", 60.0)
    said = []
    thread = threading.Thread(target=lambda: said.append(sandbox.render(SLOW, {}, None)))
    thread.start()
    end = time.monotonic() + 60
    while not sandbox._child._turn.locked() and time.monotonic() < end:
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(120)  # where it hangs
            status = 0 if sandbox.render("{{ 6 * 7 }}", {}, None) == "42" else 2
            sandbox._child._stop()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()
    assert said == ["done"]
