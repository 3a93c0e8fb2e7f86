"""How processes meet, and learn of each other's end: every process keeps a connection to a hub in process 0.

The system closes the connection when a process ends, however that ends. A machine that is gone closes nothing: hence
signs of life. Messages are small JSON objects.
"""

import contextlib
import json
import os
import socket
import threading
import time
from multiprocessing.connection import Connection, wait
from typing import Any

from dsnet_jax.errors import InputError, listed
from dsnet_jax.processes.launch import Place

JOIN_SECONDS = 300  # For all processes to come.
BEAT_SECONDS = 5  # Between two signs of life.
DEAD_SECONDS = 40  # Without a sign of life.
GRACE_SECONDS = 5  # For a process to stop by itself when another has failed: often by the same error, and it says so.
MAX_BYTES = 1 << 16  # Of a message.


class Member(threading.Thread):
    """A process's end of its connection to the hub; there is one in process 0 too.

    Attributes:
      place: of this process.
      jax_port: where JAX's service is to listen, on process 0's machine.
      stop_requested: whether another process has called `request_stop`.
    """

    def __init__(self, place: Place):
        """Meets the others.

        Raises:
          InputError: they have not come within JOIN_SECONDS.
        """
        super().__init__(daemon=True)
        self.place = place
        self.stop_requested = False
        self._sending = threading.Lock()
        self._failing, self._heard_of_it = threading.Event(), threading.Event()
        self._all_waiting = threading.Semaphore(0)
        self._connection = self._connect()
        self._send(hello=place.index, count=place.count, name=f"{socket.gethostname()}, pid {os.getpid()}")
        try:
            if not self._connection.poll(2 * JOIN_SECONDS):
                raise EOFError
            welcome = _receive(self._connection)
        except (EOFError, OSError) as error:
            raise InputError(f"process 0 at {place.host}:{place.port} ended before all processes had come") from error
        if "end" in welcome:
            raise InputError(welcome["end"])
        self.jax_port, self._main_process = welcome["jax_port"], welcome["main_process"]

    def run(self) -> None:
        """Listens, and ends the process when another one has ended."""
        heard = time.monotonic()
        while True:
            try:
                message = _receive(self._connection) if self._connection.poll(BEAT_SECONDS) else None
            except (EOFError, OSError):
                return self._end(f"{self._main_process} has died", 0)
            self._send()
            if message is not None:
                heard = time.monotonic()
            elif time.monotonic() - heard > DEAD_SECONDS:
                return self._end(f"{self._main_process} has not been heard of for {DEAD_SECONDS} s", 0)
            match message:
                case {"all": "waiting"}:
                    self._all_waiting.release()
                case {"stop": True}:
                    self.stop_requested = True
                case {"end": text, "grace": grace}:
                    return self._end(text, grace)
                case {"goodbye": True}:
                    return None

    def wait_for_all(self) -> None:
        """Returns when every process has called it as often as this one."""
        self._send(waiting=True)
        self._all_waiting.acquire()

    def request_stop(self) -> None:
        """Sets `stop_requested` in the others."""
        self._send(stop=True)

    def fail(self, message: str) -> None:
        """Tells the others to stop, and why. In process 0 it returns when they have stopped."""
        self._failing.set()
        self._send(failed=message)
        self._heard_of_it.wait(2 * GRACE_SECONDS)

    def close(self) -> None:
        """Ends the connection; after it the end of this process ends no other."""
        self._send(goodbye=True)
        self.join()
        self._connection.close()

    def _connect(self) -> Connection:
        host = "localhost" if self.place.index == 0 else self.place.host
        until = time.monotonic() + JOIN_SECONDS
        while True:
            try:
                link = socket.create_connection((host, self.place.port), timeout=5)
                link.settimeout(None)
                return Connection(link.detach())
            except OSError as error:
                if time.monotonic() > until:
                    raise InputError(
                        f"{self.place} could not reach process 0 at {host}:{self.place.port} within {JOIN_SECONDS} s "
                        f"({error.strerror or error}): does the same command run there, is it reachable from here?"
                    ) from error
                time.sleep(0.5)

    def _send(self, **message: Any) -> None:
        with self._sending:
            _send(self._connection, **message)

    def _end(self, text: str, grace: float) -> None:
        if self._failing.wait(grace):
            self._heard_of_it.set()
            return
        line = f"dsnet: {text}; {self.place} stops too: a training goes on from what it has saved\n"
        os.write(2, line.encode())
        os._exit(1)


class Hub(threading.Thread):
    """What process 0 does for all: gathers them, and tells everybody what has become of one."""

    def __init__(self, place: Place):
        """Takes the port.

        Raises:
          InputError: it is taken.
        """
        super().__init__(daemon=True)
        self._count = place.count
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            self._server = socket.create_server(("", place.port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise InputError(
                f"port {place.port} of this machine, where the other processes would meet, cannot be used "
                f"({os.strerror(error.errno)}): name another in --hosts, as in {place.host}:{place.port + 1}"
            ) from error
        self._members: dict[int, Connection] = {}
        self._names: dict[int, str] = {}

    def run(self) -> None:
        """Gathers all processes, then serves them until each has left."""
        with self._server:
            everybody_is_here = self._gather()
        if everybody_is_here:
            self._tell_all(jax_port=_free_port(), main_process=self._names[0])
            self._serve()

    def _gather(self) -> bool:
        until = time.monotonic() + JOIN_SECONDS
        strangers: list[Connection] = []
        while len(self._members) < self._count:
            ready = wait([self._server, *strangers, *self._members.values()], max(0, until - time.monotonic()))
            if not ready:
                return self._end_all(self._who_is_missing())
            for connection in ready:
                if connection is self._server:
                    strangers.append(Connection(self._server.accept()[0].detach()))
                elif connection in strangers:
                    strangers.remove(connection)
                    if fault := self._welcome(connection):
                        return self._end_all(fault)
                else:  # Nobody has anything to say yet.
                    index = self._index(connection)
                    return self._end_all(f"{self._names[index]} ended before all processes had come", index)
        return True

    def _welcome(self, connection: Connection) -> str | None:
        try:
            match _receive(connection):
                case {"hello": int(index), "count": int(count), "name": str(name)}:
                    pass
                case _:
                    raise ValueError
        except (EOFError, OSError, ValueError):  # Not one of us.
            connection.close()
            return None
        fault = None
        if count != self._count:
            fault = f"{name} was started as one of {count} processes, process 0 as one of {self._count}"
        elif index in self._members:
            fault = f"two processes were started as process {index}: {self._names[index]}, and {name}"
        if fault:
            _send(connection, end=f"{fault}: give all of them the same --hosts, and each its own place")
            return f"{fault}: give all of them the same --hosts, and each its own place"
        self._members[index], self._names[index] = connection, f"process {index} ({name})"
        return None

    def _who_is_missing(self) -> str:
        missing = [str(index) for index in range(self._count) if index not in self._members]
        return (
            f"not all of {self._count} processes have come within {JOIN_SECONDS} s, missing: "
            f"{', '.join(listed(missing))}: start the same command on every host"
        )

    def _serve(self) -> None:
        heard = dict.fromkeys(self._members, time.monotonic())
        waits = dict.fromkeys(self._members, 0)
        next_beat = 0.0
        while self._members:
            for connection in wait(self._members.values(), BEAT_SECONDS):
                index = self._index(connection)
                try:
                    message = _receive(connection)
                except (EOFError, OSError):
                    return self._end_all(f"{self._names[index]} has died", index)
                heard[index] = time.monotonic()
                match message:
                    case {"waiting": True}:
                        waits[index] += 1
                        if waits[index] == min(waits.values()):
                            self._tell_all(all="waiting")
                    case {"stop": True}:
                        self._tell_all(index, stop=True)
                    case {"failed": text}:
                        return self._end_all(f"{self._names[index]} stopped: {text}", index, GRACE_SECONDS)
                    case {"goodbye": True}:
                        _send(self._members.pop(index), goodbye=True)
            if time.monotonic() > next_beat:
                self._tell_all()
                next_beat = time.monotonic() + BEAT_SECONDS
            for index in self._members:
                if time.monotonic() - heard[index] > DEAD_SECONDS:
                    return self._end_all(f"{self._names[index]} has not been heard of for {DEAD_SECONDS} s", index)

    def _end_all(self, text: str, culprit: int | None = None, grace: float = 0) -> bool:
        """Ends the others, then this process: its end, and that of JAX's service in it, would drown the message."""
        until = time.monotonic() + grace
        own = self._members.pop(0, None)
        self._tell_all(end=text, grace=grace)
        self._members.pop(culprit, None)
        while self._members and (ready := wait(self._members.values(), until + GRACE_SECONDS / 2 - time.monotonic())):
            for connection in ready:
                try:
                    _receive(connection)
                except (EOFError, OSError):
                    del self._members[self._index(connection)]
        if own:
            _send(own, end=text, grace=max(0, until - time.monotonic()))
        return False

    def _tell_all(self, but: int | None = None, **message: Any) -> None:
        for index, connection in self._members.items():
            if index != but:
                _send(connection, **message)

    def _index(self, connection: Connection) -> int:
        return next(index for index, other in self._members.items() if other is connection)


def _send(connection: Connection, **message: Any) -> None:
    with contextlib.suppress(OSError):  # Whoever is gone is noticed by reading.
        connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Connection) -> dict[str, Any]:
    return json.loads(connection.recv_bytes(MAX_BYTES))


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
