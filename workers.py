"""The processes of one training run on several machines: TF_CONFIG, how they find each other, and signals to them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import cli
from errors import UserError, listed

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_SECONDS = 0.2  # between two looks at who is there
_ANSWER_SECONDS = 2.0  # for what a worker that is there sends
_CONNECT_SECONDS = 120  # for TensorFlow, once all workers are there
_END_SECONDS = 5.0  # for a process that a signal has ended in the ordinary way


class Cluster(NamedTuple):
    """The workers of a run, and which of them this process is.

    Attributes:
        addresses: host:port of each, the first worker's first; () where TF_CONFIG is not set.
        number: place of this process among them, from 0.
    """

    addresses: tuple[str, ...] = ()
    number: int = 0

    @property
    def workers(self) -> int:
        """How many there are, at least 1."""
        return max(len(self.addresses), 1)


def cluster() -> Cluster:
    """This process's place among the workers of TF_CONFIG.

    Raises:
        UserError: TF_CONFIG is not what TensorFlow documents.
    """
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return Cluster()
    try:
        config = json.loads(text)
        members = {kind: config["cluster"].get(kind, []) for kind in ("chief", "worker")}
        addresses = tuple(address for kind in members.values() for address in kind)
        for address in addresses:
            if not re.fullmatch(r".+:\d+", address):
                raise ValueError(f"{address!r} is not host:port")
        kind, index = config["task"]["type"], int(config["task"]["index"])
        if not 0 <= index < len(members.get(kind, [])):
            raise ValueError(f"no task {kind} {index}")
        if kind == "worker":
            index += len(members["chief"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"TF_CONFIG {text!r} cannot be used ({error}); write "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}, or unset it'
        ) from error
    return Cluster(addresses, index)


def is_chief() -> bool:
    """Whether this process is the first worker, which alone writes and prints."""
    return cluster().number == 0


def meet(cluster: Cluster, seconds: float) -> None:
    """Wait until all workers of a run are there, in whatever order they start.

    TensorFlow itself would wait for ever, without a word and deaf to signals. The first worker listens at its address,
    where TensorFlow will listen later; the others tell it who they are, and it lets all go on at once.

    Args:
        cluster: the workers.
        seconds: how long to wait.

    Raises:
        UserError: a worker did not come in that time, the first worker cannot listen, or two processes disagree on who
            they are.
    """
    until = time.monotonic() + seconds
    if cluster.number:
        _report(cluster, until, seconds)
    else:
        _gather(cluster, until, seconds)
    connects = f"TensorFlow connects them, within {_CONNECT_SECONDS} s"
    print(f"All {cluster.workers} workers are here; {connects}", file=sys.stderr, flush=True)


def _gather(cluster: Cluster, until: float, seconds: float) -> None:
    """The first worker's part: wait for the others, and send them on."""
    port = int(cluster.addresses[0].rpartition(":")[2])
    here: dict[int, socket.socket] = {}
    try:
        server = socket.create_server(("", port), backlog=cluster.workers)
    except OSError as error:
        raise _cannot_start(error.strerror or str(error)) from error
    with contextlib.ExitStack() as opened:
        opened.enter_context(server)
        server.settimeout(_AGAIN_SECONDS)
        said = False
        while missing := [a for k, a in enumerate(cluster.addresses) if k and k not in here]:
            if not said:
                _say(missing, seconds)
                said = True
            _check_time(missing, until, seconds)
            with contextlib.suppress(TimeoutError):
                connection = opened.enter_context(server.accept()[0])
                _welcome(cluster, here, connection)
            here = {k: connection for k, connection in here.items() if not _is_closed(connection)}
        for connection in here.values():
            with contextlib.suppress(OSError):  # it ended just now, which TensorFlow will tell
                connection.sendall(b"go\n")
        for connection in here.values():  # who closes first keeps the port for a while: not this process
            connection.settimeout(_ANSWER_SECONDS)
            with contextlib.suppress(OSError):
                connection.recv(1)


def _welcome(cluster: Cluster, here: dict[int, socket.socket], connection: socket.socket) -> None:
    """Read who has come, and note it in `here`, or answer why it cannot be."""
    connection.settimeout(_ANSWER_SECONDS)
    try:
        with connection.makefile("rb") as lines:
            addresses, index = json.loads(lines.readline(1 << 20))
        if tuple(addresses) != cluster.addresses:
            connection.sendall(f"no it names the workers {listed(cluster.addresses)}\n".encode())
        elif index in here and not _is_closed(here[index]):
            connection.sendall(f"no another process is worker {index} already\n".encode())
        else:
            here[index] = connection
            missing = [a for k, a in enumerate(cluster.addresses) if k and k not in here]
            if missing:
                connection.sendall(f"wait {listed(missing)}\n".encode())
    except (OSError, ValueError, TypeError):  # not a worker of ours, or one that is gone
        connection.close()


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side has ended; it sends nothing after its first line."""
    try:
        connection.settimeout(0)
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_ANSWER_SECONDS)


def _report(cluster: Cluster, until: float, seconds: float) -> None:
    """The part of every worker but the first: say who it is, and wait to be sent on."""
    first = cluster.addresses[0]
    host, _, port = first.rpartition(":")
    said = ""
    while True:
        missing = first
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 1) as connection:
            connection.sendall(json.dumps([cluster.addresses, cluster.number]).encode() + b"\n")
            for line in _lines(connection, until):
                answer, _, what = line.partition(" ")
                if answer == "go":
                    return
                if answer == "no":
                    raise UserError(
                        f"TF_CONFIG {os.environ.get('TF_CONFIG', '')!r} does not fit the first worker, {first}: "
                        f"{what}; give all workers the same list, and each its own index"
                    )
                missing = what or missing
                if missing != said:
                    said = missing
                    _say([missing], seconds)
        _check_time([missing], until, seconds)
        if not said:
            said = first
            _say([first], seconds)
        time.sleep(_AGAIN_SECONDS)


def _lines(connection: socket.socket, until: float) -> Iterator[str]:
    """Lines as they come, until the other side ends or the time is over."""
    connection.settimeout(_AGAIN_SECONDS)
    text = b""
    while time.monotonic() < until:
        with contextlib.suppress(TimeoutError):
            received = connection.recv(4096)
            if not received:
                return
            *whole, text = (text + received).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")


def _say(missing: list[str], seconds: float) -> None:
    print(f"Waiting for the workers {listed(missing)}, at most {seconds:g} s", file=sys.stderr, flush=True)


def _check_time(missing: list[str], until: float, seconds: float) -> None:
    if time.monotonic() > until:
        raise UserError(
            f"waited {seconds:g} s for the workers {listed(missing)} of TF_CONFIG; start them all, at addresses that "
            "can be reached from here, or wait longer with --wait"
        )


def _cannot_start(why: str) -> UserError:
    return UserError(
        f"TF_CONFIG {os.environ.get('TF_CONFIG', '')!r}: cannot start as this worker ({why}); name hosts that can be "
        "reached and ports that are free"
    )


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """Around the moment in which TensorFlow connects the workers.

    It holds Python's lock then, so that no Python code, a signal handler or a thread, could end a process that waits
    for one that died just now: Ctrl-C and SIGHUP end it as the system does it, and an alarm where it takes too long.
    SIGTERM is not heard: TensorFlow takes it for itself, until the handler of before is set again.

    Raises:
        UserError: TensorFlow cannot connect.
    """
    handled = [n for n in (*_SIGNALS, signal.SIGALRM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in handled}
    signal.alarm(_CONNECT_SECONDS)
    try:
        yield
    except Exception as error:
        if not hasattr(error, "error_code"):  # TensorFlow's errors have one; it is not imported here
            raise
        raise _cannot_start(str(error).splitlines()[0]) from error
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


class Watch:
    """Ends this process at a signal that Python does not hear, because TensorFlow waits for a worker that is gone.

    Python runs its signal handlers between two of its own instructions, thus never while TensorFlow waits. A thread
    hears of every signal, leaves the process time to end in the ordinary way, and then ends it with status 130.

    Attributes:
        spared: how many signals to come are none of its business, because the run ends by them when its step is done.
    """

    def __init__(self) -> None:
        self.spared = 0
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()

    def _listen(self, reading: int) -> None:
        while number := os.read(reading, 1):
            if number[0] not in _SIGNALS:
                continue
            if self.spared:
                self.spared -= 1
                continue
            time.sleep(_END_SECONDS)
            print("error: stopped", file=sys.stderr, flush=True)
            os._exit(cli.STOPPED)
