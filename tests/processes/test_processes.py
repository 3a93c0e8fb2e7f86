"""Processes that meet, sum, part, fail and die: real ones, of two CPU devices each, on this machine."""

import contextlib
import re
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from dsnet_jax import processes
from dsnet_jax.errors import InputError
from dsnet_jax.processes import membership
from dsnet_jax.processes.launch import Place
from dsnet_jax.processes.membership import Hub, Member

BEGINNING = """
import contextlib, os, signal, sys, time
import jax
import numpy as np
from dsnet_jax import processes
from dsnet_jax.processes import membership

membership.GRACE_SECONDS = 1
index, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 2)

def join():
    processes.join(f"127.0.0.1:{port},127.0.0.1", index)

"""
WITHOUT_JAX_SERVICE = """
jax.distributed.initialize = lambda *args, **options: None
jax.distributed.shutdown = lambda: None
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_two(script, second_stands_still=False):
    """Exit codes and outputs of `script` in two processes."""
    port = str(free_port())
    children = [
        subprocess.Popen(
            [sys.executable, "-c", BEGINNING + script, str(index), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [children[0].communicate(timeout=90)[0]]
        if not second_stands_still:
            children[1].wait(timeout=90)
    finally:
        for child in children:
            child.kill()
    return [child.wait() for child in children], [*outputs, children[1].communicate()[0]]


TOGETHER = """
def note(*_):
    global told
    told = True

told = False
signal.signal(signal.SIGTERM, note)
join()
from dsnet_jax import parallel

assert processes.describe().startswith(f"process {index} of 2 ("), processes.describe()
assert processes.is_main_process() == (index == 0) and processes.count() == 2

counts = np.array([[2**62 // 2 - 1, 2**31 - 1, 2**31, 2**32 + 5], [0, 1, 2**53 + 1, 7]], np.int64) + index
summed = processes.sum_over_processes(counts)
assert summed.dtype == np.int64
np.testing.assert_array_equal(summed, 2 * (counts - index) + 1)

mesh = parallel.global_mesh()
assert mesh.size == 4 and parallel.local_mesh().size == 2
batch = parallel.put_batch(mesh, {"x": np.full((2, 3), index, np.float32)})["x"]
assert batch.shape == (4, 3)
mean = jax.jit(lambda x: x.mean(), out_shardings=parallel.replicated(mesh))(batch)
assert float(mean.addressable_data(0)) == 0.5, mean  # Over the batch of both.

@contextlib.contextmanager
def lock():
    time.sleep(0.5)
    print("locked", time.monotonic(), flush=True)
    yield

with processes.main_process_first(lock()):
    print("inside", time.monotonic(), flush=True)

assert not processes.stop_requested_elsewhere()
processes.wait_for_all()
if index == 1:
    os.kill(os.getpid(), signal.SIGTERM)
    while not told:  # JAX has not taken the signal.
        time.sleep(0.01)
    processes.request_stop()
else:
    while not processes.stop_requested_elsewhere():
        time.sleep(0.01)
    time.sleep(1.5)  # The other waits for this one.
processes.wait_for_all()
assert processes.stop_requested_elsewhere() == (index == 0)
processes.leave()
processes.leave()
processes.report_failure("this ends nobody any more")
print("left")
"""


def test_two_processes_share_a_mesh_sum_counts_beyond_53_bits_hold_a_lock_tell_of_a_stop_and_part():
    codes, outputs = run_two(TOGETHER)
    assert codes == [0, 0], "\n".join(outputs)
    said = ("locked", "inside", "left")  # Gloo prints too, from threads, so that its lines may be broken.
    lines = [[line.split() for line in output.splitlines() if line.startswith(said)] for output in outputs]
    words = [[line[0] for line in of_one] for of_one in lines]
    assert words == [["locked", "inside", "left"], ["inside", "left"]], "\n".join(outputs)
    (_, locked), _, _ = lines[0]
    assert all(float(of_one[-2][1]) > float(locked) for of_one in lines)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_in_the_middle_of_a_sum_the_other_stops_and_names_it(victim):
    codes, outputs = run_two(
        f"""
join()
processes.sum_over_processes(np.array([1]))
if index == {victim}:
    print(f"pid {{os.getpid()}}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    processes.sum_over_processes(np.array([1]))
"""
    )
    pid = re.search(r"pid \d+", outputs[victim])[0]
    last = outputs[1 - victim].splitlines()[-1]
    assert f"dsnet: process {victim} ({socket.gethostname()}, {pid}) has died; process {1 - victim} of 2" in last
    assert codes[victim] == -9 and codes[1 - victim] == 1, outputs
    assert "Traceback" not in outputs[1 - victim]


def test_an_abort_of_jax_leaves_time_for_our_line():
    codes, outputs = run_two(
        WITHOUT_JAX_SERVICE
        + """
import ctypes, threading
join()
if index == 1:
    threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
    time.sleep(1)
    os.write(1, b"our line")
    os._exit(5)
time.sleep(60)
"""
    )
    assert (codes, outputs[1]) == ([1, 5], "our line")


def test_a_process_that_stands_still_or_has_lost_its_network_is_given_up():
    codes, outputs = run_two(
        WITHOUT_JAX_SERVICE
        + """
membership.BEAT_SECONDS, membership.DEAD_SECONDS = 0.3, 3
join()
time.sleep(4)  # Signs of life are told from none.
processes.wait_for_all()
if index == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
""",
        second_stands_still=True,
    )
    assert re.search(r"dsnet: process 1 \(.*\) has not been heard of for 3 s; process 0 of 2", outputs[0]), outputs
    assert codes[0] == 1


@pytest.mark.parametrize(
    "culprit, ending, code, words",
    [
        (0, r"processes.report_failure('no\nspace', 7)", 7, "stopped: no space;"),
        (1, r"processes.report_failure('no\nspace', 7)", 7, "stopped: no space;"),
        (0, "raise KeyError('x')", 1, "stopped: KeyError: 'x';"),
        (1, "sys.exit()", 1, "stopped: it ended before the others;"),
    ],
)
def test_when_a_process_fails_the_other_stops_and_says_why(culprit, ending, code, words):
    codes, outputs = run_two(
        WITHOUT_JAX_SERVICE
        + f"""
join()
if index == {culprit}:
    {ending}
time.sleep(60)
"""
    )
    assert re.search(
        rf"dsnet: process {culprit} \(.*\) {re.escape(words)} process {1 - culprit} of 2", outputs[1 - culprit]
    )
    assert codes[culprit] == code and codes[1 - culprit] == 1
    assert "dsnet:" not in outputs[culprit]
    assert ("Traceback" in outputs[culprit]) == ("raise" in ending)


def test_processes_that_fail_by_the_same_error_end_each_in_its_own_way():
    codes, outputs = run_two(
        WITHOUT_JAX_SERVICE
        + """
membership.GRACE_SECONDS = 20
join()
time.sleep(index)
processes.report_failure("no such data set", 2 + index)
"""
    )
    assert (codes, outputs) == ([2, 3], ["", ""])


def test_an_error_of_jax_gives_way_to_the_news_of_a_death():
    codes, outputs = run_two(
        WITHOUT_JAX_SERVICE
        + """
membership.GRACE_SECONDS = 10
join()
if index == 0:
    raise jax.errors.JaxRuntimeError("connection closed by peer")
time.sleep(1)
os._exit(9)
"""
    )
    assert codes == [1, 9]
    assert "process 1" in outputs[0] and "has died" in outputs[0] and "connection closed" not in outputs[0]


def test_jax_is_told_the_place_and_takes_no_decision_of_its_own():
    codes, outputs = run_two(
        WITHOUT_JAX_SERVICE
        + """
def initialize(*args, **options):
    print(args[0].rsplit(":", 1)[0], *args[1:], options, jax.config.jax_enable_preemption_service)

jax.distributed.initialize = initialize
from dsnet_jax.processes.launch import Place
processes.find_place = lambda hosts, process: Place("::1", int(port), 2, index, [2 * index, 2 * index + 1])
join()
processes.leave()
"""
    )
    options = {
        "cluster_detection_method": "deactivate",
        "initialization_timeout": 300,
        "heartbeat_timeout_seconds": 120,
    }
    assert codes == [0, 0], outputs
    assert outputs == [f"[::1] 2 {index} [{2 * index}, {2 * index + 1}] {options} False\n" for index in range(2)]


def test_one_process_needs_nobody():
    processes.join("localhost")
    counts = np.array([[2**40 + 1, 0]])
    assert processes.sum_over_processes(counts) is counts
    assert processes.is_main_process() and processes.describe().startswith("process 0 of 1 (")
    assert processes.count() == 1
    processes.request_stop()
    assert not processes.stop_requested_elsewhere()
    processes.wait_for_all()
    with processes.main_process_first(contextlib.nullcontext()):
        pass
    processes.report_failure("this ends nobody")
    processes.leave()


def meet(*places):
    """What becomes of members that meet at a hub: None, or the message of the error."""
    Hub(places[0]).start()
    errors = [None] * len(places)

    def come(number):
        try:
            Member(places[number])
        except InputError as error:
            errors[number] = str(error)

    comers = [threading.Thread(target=come, args=(number,)) for number in range(len(places))]
    for comer in comers:
        comer.start()
        comer.join(0.2)  # In this order.
    for comer in comers:
        comer.join()
    return errors


def test_those_who_have_not_come_are_named(monkeypatch):
    monkeypatch.setattr(membership, "JOIN_SECONDS", 1)
    port = free_port()
    for error in meet(Place("localhost", port, 4, 0), Place("localhost", port, 4, 2)):
        assert error.startswith("not all of 4 processes have come within 1 s, missing: 1, 3: start the same command")


def test_a_process_with_another_list_or_the_same_place_is_refused():
    port = free_port()
    for error in meet(Place("localhost", port, 2, 0), Place("localhost", port, 3, 1)):
        assert re.match(r".*pid \d+ was started as one of 3 processes, process 0 as one of 2: give all", error)
    port = free_port()
    errors = meet(Place("localhost", port, 3, 0), Place("localhost", port, 3, 1), Place("localhost", port, 3, 1))
    for error in errors:
        assert error.startswith("two processes were started as process 1: process 1 (")


def test_strangers_who_knock_at_the_port_are_let_go():
    port = free_port()
    hub = Hub(Place("localhost", port, 1, 0))
    strangers = [socket.create_connection(("localhost", port)) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b"\0\0\0\2[]")
    strangers[2].close()
    hub.start()
    member = Member(Place("localhost", port, 1, 0))
    member.start()
    member.close()
    hub.join(20)
    assert not hub.is_alive() and not member.is_alive()
    for stranger in strangers:
        stranger.close()


def test_a_process_0_that_cannot_be_reached_is_told_with_its_address(monkeypatch):
    monkeypatch.setattr(membership, "JOIN_SECONDS", 0)
    port = free_port()
    with pytest.raises(
        InputError, match=rf"process 1 of 2 \(.*\) could not reach process 0 at 127.0.0.1:{port} within"
    ):
        Member(Place("127.0.0.1", port, 2, 1))


def test_a_port_that_is_taken_is_told():
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(InputError, match=r"cannot be used \(Address already in use\): name another in --hosts"),
    ):
        Hub(Place("localhost", taken.getsockname()[1], 2, 0))
