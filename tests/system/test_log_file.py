"""The log as a file: whole lines, none lost, whatever rotates it, with several processes and a full disk."""

import itertools
import json
import logging
import os
import re
import resource
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, serving
from fakes import ASK, HOST, RawClient, await_that
from in_process import client_of

from aiproxy.config import LoggingSettings
from aiproxy.observability import logs

COMPLAINT = "cannot write the log: "
DEMO = {"upstreams": [{"name": "a", "base_url": "demo://answers"}]}


@pytest.fixture(autouse=True)
def restored():
    """Logging as it was, since `configure` changes the process's."""
    logger = logging.getLogger("aiproxy")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:] = []
    yield
    logs.configure(LoggingSettings())
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)


@pytest.fixture
def log_to(tmp_path):
    """Log into a file; the name it has."""

    def configure(path="aiproxy.log", **settings):
        file = tmp_path / path
        logs.configure(LoggingSettings(file=str(file), **settings))
        return file

    return configure


def say(number, **fields):
    logs.line(logging.INFO, "said", number=number, **fields)


def numbers(*files):
    """The numbers in the lines of these files, every line of which is whole."""
    found = []
    for file in files:
        text = file.read_text()
        assert text == "" or text.endswith("\n")
        for line in text.splitlines():
            said = re.fullmatch(r"\S+Z INFO said number=(\d+)(?: text=x+)?", line)
            assert said, line[:200]
            found.append(int(said[1]))
    return found


# ------------------------------------------------------------------------------------- one process


def test_the_file_is_made_with_its_first_line_for_its_group_to_read(log_to, capsys):
    file = log_to()
    assert not file.exists()
    before = os.umask(0)
    try:
        say(1)
    finally:
        os.umask(before)
    assert numbers(file) == [1]
    assert file.stat().st_mode & 0o777 == 0o640
    assert capsys.readouterr() == ("", "")


def rename(file):
    file.rename(file.with_name("old"))


def rename_and_make(file):
    rename(file)
    file.touch(mode=0o600)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda file: None, [1, 2, 3]),
        (rename, [2, 3]),
        (os.unlink, [2, 3]),
        (rename_and_make, [2, 3]),
        (lambda file: os.truncate(file, 0), [2, 3]),
    ],
    ids=["nothing", "renamed", "removed", "renamed and made", "emptied"],
)
def test_the_log_goes_on_where_it_is_whatever_was_done_to_its_file(log_to, change, found):
    file = log_to()
    say(1)
    change(file)
    say(2)
    file = log_to()  # as another start
    say(3)
    assert numbers(file) == found
    if change is rename:
        assert numbers(file.with_name("old")) == [1]
    assert file.stat().st_mode & 0o777 == (0o600 if change is rename_and_make else 0o640)


# --------------------------------------------------------------------------------------- trouble


def test_a_directory_that_vanishes_is_told_once_a_minute_and_may_come_back(
    log_to, tmp_path, capsys, monkeypatch
):
    now = [1000.0]
    monkeypatch.setattr("aiproxy.observability.logs.time.monotonic", lambda: now[0])
    (tmp_path / "logs").mkdir()
    file = log_to("logs/aiproxy.log")
    say(1)
    file.unlink()
    file.parent.rmdir()
    for _ in range(100):
        now[0] += 0.59
        say(2)
    assert capsys.readouterr().err == f"{COMPLAINT}No such file or directory\n"
    now[0] += 1.6
    say(3)
    assert capsys.readouterr().err == f"{COMPLAINT}No such file or directory\n"
    file.parent.mkdir()
    say(4)
    assert numbers(file) == [4]
    assert capsys.readouterr().err == ""


def test_a_full_disk_fails_no_request(capsys):
    client = client_of({"base_url": "demo://answers"}, logging=LoggingSettings(file="/dev/full"))
    for _ in range(3):
        assert client.post("/v1/messages", json=ASK).status_code == 200
    assert capsys.readouterr().err == f"{COMPLAINT}No space left on device\n"


@pytest.mark.parametrize("emptied", [False, True])
def test_a_line_that_the_disk_had_no_room_for_takes_none_with_it(log_to, capsys, emptied):
    file = log_to()
    say(1)
    size = file.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, before[1]))  # a short write, then none
    try:
        for number in (2, 3):
            say(number, text="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err == f"{COMPLAINT}File too large\n"
    assert file.stat().st_size == size + 40
    if emptied:
        os.truncate(file, 0)
    say(4)
    say(5)
    whole = file.read_text().splitlines()
    if not emptied:
        assert whole.pop(1).endswith(" INFO said numbe")
        assert " number=1" in whole.pop(0)
    assert [re.search(r"number=\d", line)[0] for line in whole] == ["number=4", "number=5"]
    assert all(re.match(r"20\S+Z INFO said ", line) for line in whole)


# ------------------------------------------------------------------------------- settings that change


def test_while_other_threads_log_the_place_and_the_form_may_change(log_to, tmp_path, capsys):
    each, threads, places = 400, 4, 30
    begun = threading.Barrier(threads + 1)

    def work(first):
        begun.wait()
        for number in range(first, first + each):
            say(number)

    log_to("0", format="json")
    workers = [threading.Thread(target=work, args=(n * each,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    begun.wait()
    for place in range(1, places):
        if place % 3:
            log_to(str(place % 5), format=("text", "json")[place % 2])
        else:
            logs.configure(LoggingSettings(format=("json", "text")[place % 2]))
    for worker in workers:
        worker.join()
    texts = [capsys.readouterr().out, *(file.read_text() for file in tmp_path.iterdir())]
    found = re.findall(r'(?m)^(?:\{.*"number": (\d+)\}|\S+Z INFO said number=(\d+))$', "".join(texts))
    assert sorted(int(one or other) for one, other in found) == list(range(each * threads))
    assert sum(text.count("\n") for text in texts) == each * threads


# ------------------------------------------------------------------------------------ several processes

WRITER = """
import logging, sys
from aiproxy.observability import logs
from aiproxy.config import LoggingSettings
logs.configure(LoggingSettings(file=sys.argv[1]))
first, each = int(sys.argv[2]), int(sys.argv[3])
sys.stdin.readline()
for number in range(first, first + each):
    logs.line(logging.INFO, "said", number=number, text="x" * (100, 9000, 70000, 200000)[number % 4])
"""


def keep_renaming(file, go_on, every):
    """Rename the file again and again while `go_on` says so; how often."""
    renamed = itertools.count(1)
    while go_on():
        if file.exists():
            file.rename(file.with_name(f"{file.name}.{next(renamed)}"))
        threading.Event().wait(every)
    return next(renamed) - 1


def test_long_lines_of_several_processes_stay_whole_while_the_file_is_renamed(tmp_path):
    each, file = 150, tmp_path / "aiproxy.log"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), str(n * each), str(each)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for n in range(2)
    ]
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    renamed = keep_renaming(file, lambda: any(writer.poll() is None for writer in writers), every=0.005)
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]
    assert renamed > 3
    assert sorted(numbers(*tmp_path.iterdir())) == list(range(each * len(writers)))


# ------------------------------------------------------------------------------------ a server's own log


# ------------------------------------------------------------------------------------- a real gunicorn


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """Two workers that log into one file, as JSON."""
    home = tmp_path_factory.mktemp("logged")
    config = {"logging": {"format": "json", "file": "aiproxy.log"}, **DEMO}
    with serving(home, config, workers=2) as served:
        served.home = home
        await_that(lambda: len(booted(served)) == 2)
        yield served


def lines_in(home):
    """All lines, old files first; the last may be in the middle of being written."""
    files = sorted(home.glob("aiproxy.log*"), key=lambda file: file.stat().st_mtime_ns)
    texts = [file.read_text() for file in files]
    return [json.loads(line) for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]


def having(proxy, event):
    return [line for line in lines_in(proxy.home) if line["event"] == event]


def booted(proxy):
    return [line for line in having(proxy, "gunicorn") if line["message"].startswith("Booting worker")]


def test_workers_lose_no_line_while_the_file_is_rotated(proxy):
    each, clients = 40, 4
    before = len(having(proxy, "done"))

    def work():
        for _ in range(each):
            with RawClient(HOST, proxy.port, timeout=20) as client:
                client.post(ASK)
                assert client.read().status == 200

    workers = [threading.Thread(target=work) for _ in range(clients)]
    for worker in workers:
        worker.start()
    file = proxy.home / "aiproxy.log"
    assert keep_renaming(file, lambda: any(worker.is_alive() for worker in workers), every=0.05) > 1
    await_that(lambda: len(having(proxy, "done")) >= before + each * clients)
    for event in ("request", "attempt", "done"):
        ids = [line["id"] for line in having(proxy, event)]
        assert len(ids) == len(set(ids)) == before + each * clients


def test_what_gunicorn_says_and_how_to_try_it_stands_in_the_same_file(proxy):
    lines = lines_in(proxy.home)
    gunicorn = [line for line in lines if line["event"] == "gunicorn"]
    said = [line["message"] for line in gunicorn]
    assert said[0].startswith("Starting gunicorn")
    assert len([line for line in gunicorn if line["message"].startswith("Booting worker")]) == 2
    assert len({line["pid"] for line in gunicorn}) == 3
    start = [(line["level"], line["message"]) for line in lines if line["event"] == "start"]
    assert [level for level, _ in start] == ["WARNING", "INFO", "INFO"]
    assert start[0][1].startswith("no api_keys")
    assert start[2][1].startswith(f"aiproxy serves {proxy.url} - try: curl")
    assert proxy.stdout_lines() == []
    assert proxy.stderr == ""


def test_json_on_standard_output_holds_gunicorn_s_lines_too(serve):
    served = serve({"logging": {"format": "json"}, **DEMO})
    served.wait_for_log("Booting worker")
    served.stop()
    events = {json.loads(line)["event"] for line in served.stdout_lines()}
    assert (events, served.stderr) == ({"gunicorn", "start"}, "")


def test_text_in_a_file_shows_gunicorn_s_lines_in_our_form(serve, tmp_path):
    served = serve({"logging": {"file": str(tmp_path / "log")}, **DEMO})
    served.stop()
    lines = (tmp_path / "log").read_text().splitlines()
    assert re.fullmatch(r'20\S+Z INFO gunicorn pid=\d+ message="Starting gunicorn [0-9.]+"', lines[0])
    assert all(re.match(r"20\S+Z (INFO|WARNING) (gunicorn|start) ", line) for line in lines)
    assert (served.stdout_lines(), served.stderr) == ([], "")
