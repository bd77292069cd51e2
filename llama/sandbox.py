"""A model's own chat template, run in a process of its own: its text came with the file.

jinja2's sandbox keeps a template from Python's objects, not from running for ever or taking all
memory; a process can be given limits and killed. One child serves a program and is started when
it is first needed; requests and answers are lines of JSON. This file is also what the child runs,
with nothing of llama imported.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from typing import Any

SECONDS = 10.0  # for one rendering; the child's start counts too
MEMORY = 512 << 20  # the child's address space
LONGEST = 1 << 24  # characters of a rendered text, and of an expression's value


class Refused(Exception):
    """Why a template gave no text."""


# --- the parent


class _Child:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()
        atexit.register(self._stop)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: dict[str, Any]) -> str:
        """The text that REQUEST's template gives; raises Refused."""
        line, late = b"", threading.Event()
        with self._turn:

            def stop() -> None:
                late.set()
                if self._process is not None:
                    self._process.kill()

            timer = threading.Timer(SECONDS, stop)
            timer.daemon = True
            timer.start()
            try:
                self._started()
                self._write(request)
                line = self._line()
            except OSError:
                pass  # it cannot start or died: no line says so
            finally:
                timer.cancel()
                if not line.endswith(b"\n"):  # also after Ctrl-C
                    self._stop()
        if late.is_set():
            raise Refused(f"it takes longer than {SECONDS:g} seconds")
        if not line.endswith(b"\n"):
            raise Refused("its process died")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return str(answer["text"])

    def _started(self) -> None:
        if self._process is None:
            # what this program had loaded before itself takes memory there that templates may need
            environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
            # unbuffered: a fork in the middle takes no half line and no locked buffer along
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True, env=environment,
            )  # fmt: skip
            self._write([MEMORY, LONGEST, sys.path])

    def _write(self, entry: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        left = memoryview(json.dumps(entry).encode("ascii") + b"\n")
        while left:
            left = left[self._process.stdin.write(left) :]

    def _line(self) -> bytes:
        """What comes up to a line's end, or to the end."""
        assert self._process is not None and self._process.stdout is not None
        line = bytearray()
        while not line.endswith(b"\n"):
            part = self._process.stdout.read(1 << 16)
            if not part:
                break
            line += part
        return bytes(line)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _forget(self) -> None:
        """In a forked child: the process, and whoever holds the lock, are its parent's."""
        if self._process is not None:
            self._process.returncode = 0  # nothing to wait for
        self._process = None
        self._turn = threading.Lock()


_child = _Child()


def check(source: str) -> None:
    """Raises Refused where SOURCE is no template."""
    _child.ask({"source": source})


def render(source: str, given: dict[str, Any], date: str | None) -> str:
    """SOURCE with the names in GIVEN; strftime_now gives DATE, or the day. Raises Refused."""
    return _child.ask({"source": source, "given": given, "date": date})


# --- the child


def _environment() -> Any:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: object) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    environment.globals["raise_exception"] = refuse
    return environment


def _answer(environment: Any, templates: dict[str, Any], request: dict[str, Any]) -> str:
    from datetime import datetime

    date = request.get("date")
    source = request["source"]
    if source not in templates:
        templates.clear()  # one program has one model's, or few
        templates[source] = environment.from_string(source)
    if "given" not in request:
        return ""
    text = ""
    for part in templates[source].generate(
        **request["given"], strftime_now=lambda form: date or datetime.now().strftime(form)
    ):
        text += part
        if len(text) > LONGEST:
            raise ValueError("it writes too much")
    return text


def _serve() -> None:
    global LONGEST
    memory, LONGEST, sys.path[:] = json.loads(sys.stdin.readline())
    environment, templates = _environment(), dict[str, Any]()
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):
        pass  # not every system has it; the time is bounded
    for line in sys.stdin:
        try:
            answer = {"text": _answer(environment, templates, json.loads(line))}
        except (MemoryError, RecursionError) as error:
            answer = {"error": f"it takes too much memory ({type(error).__name__})"}
        except Exception as error:  # whatever a template raises
            answer = {"error": " ".join(str(error).split())[:500] or type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
