"""The configuration file followed: what is taken up, what is refused, what is said of it, what is kept."""

import hashlib
import os
import re
import stat
import threading

import pytest
import trustme
import yaml
from fakes import ASK, SPOKEN, STREAM, RawClient, await_that, error, events

from aiproxy.config import ConfigError, Sources, load, read_sources
from aiproxy.server.reload import LOOK, Follower, LastGood, changes, start

ONE = {"name": "a", "base_url": "http://a.example", "token": "sk-test-a-secret"}


class Taker:
    """Notes what it is given."""

    def __init__(self, unsafe=()):
        self.taken = []
        self.faults = []
        self._unsafe = unsafe

    def apply(self, config, digest):
        if self._unsafe:
            raise ConfigError(self._unsafe)
        self.taken.append((config, digest))

    def refuse(self, faults):
        self.faults.append(list(faults))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.yaml"
    write(path, [ONE])
    return path


def write(path, upstreams, **settings):
    path.write_text(yaml.safe_dump({"upstreams": upstreams, **settings}))


def followed(path, taker=None):
    taker = taker or Taker()
    return taker, Follower(path, start(path, None), taker, None)


def look(follower, times=2):
    """A change is in force at the second look."""
    for _ in range(times):
        follower.look()


# ------------------------------------------------------------------------------------------- looking


def test_a_file_that_stays_the_same_is_not_taken_up(path):
    taker, follower = followed(path)
    look(follower, 5)
    os.utime(path)
    path.write_bytes(path.read_bytes())
    look(follower, 3)
    assert (taker.taken, taker.faults) == ([], [])


def test_a_change_is_taken_up_once_at_the_second_look(path):
    assert 2 * LOOK < 2  # seconds, as README.md says
    taker, follower = followed(path)
    write(path, [ONE], max_in_flight=7)
    follower.look()
    assert taker.taken == []
    look(follower, 4)
    ((config, digest),) = taker.taken
    assert (config.max_in_flight, digest) == (7, hashlib.sha256(path.read_bytes()).hexdigest()[:12])


def test_a_file_that_is_being_written_is_waited_for(path):
    """A part of a list of upstreams may be a good configuration, and yet not the one that is meant."""
    taker, follower = followed(path)
    two = yaml.safe_dump({"upstreams": [ONE, {**ONE, "name": "b"}]}).encode()
    for end in (len(two) // 2, len(two) - 30, len(two)):
        path.write_bytes(two[:end])
        follower.look()
        assert (taker.taken, taker.faults) == ([], [])
    follower.look()
    assert len(taker.taken) == 1


def test_a_rename_and_a_switched_link_are_changes_too(tmp_path, path):
    link, renamed, other, next_link = (tmp_path / name for name in ("link", "new", "other", "next"))
    link.symlink_to(path)
    taker, follower = followed(link)
    write(renamed, [ONE], max_in_flight=1)
    renamed.rename(path)
    look(follower)
    write(other, [ONE], max_in_flight=2)
    next_link.symlink_to(other)
    next_link.rename(link)
    look(follower)
    assert [config.max_in_flight for config, _ in taker.taken] == [1, 2]


@pytest.mark.parametrize("bad", [b"upstreams: [", b"", b"upstreams: []\nwight: 1\n", b"\xff", "fifo", None])
def test_a_bad_file_is_refused_once_and_a_good_one_taken_up_after_it(path, bad):
    taker, follower = followed(path)
    path.unlink()
    if bad == "fifo":
        os.mkfifo(path)
    elif bad is not None:
        path.write_bytes(bad)
    look(follower, 4)
    assert (taker.taken, len(taker.faults)) == ([], 1)
    assert taker.faults[0]
    path.unlink(missing_ok=True)
    write(path, [ONE])
    look(follower, 4)
    assert len(taker.taken) == 1


def test_what_the_service_finds_unsafe_is_refused(path):
    taker, follower = followed(path, Taker(unsafe=["bind: no"]))
    write(path, [ONE], max_in_flight=7)
    look(follower)
    assert taker.faults == [["bind: no"]]


def with_ca_bundle(path):
    write(path, [{**ONE, "base_url": "https://a.test", "ca_bundle": "ca.pem"}])


def test_a_file_that_was_refused_is_taken_up_once_what_it_lacked_is_there(path):
    taker, follower = followed(path)
    with_ca_bundle(path)
    look(follower, 14)
    assert len(taker.faults) == 1, "the same faults are told once"
    trustme.CA().cert_pem.write_to_path(path.parent / "ca.pem")
    look(follower)  # at most a second and a half
    assert len(taker.taken) == 1
    look(follower, 12)
    assert (len(taker.taken), len(taker.faults)) == (1, 1)


def test_a_changed_env_file_is_taken_up_and_a_faulty_one_is_refused(path):
    keys = path.parent / "keys"
    keys.write_text("KEY=sk-test-one")
    write(path, [ONE], env_file="keys", api_keys=[{"name": "alice", "key": "${KEY}"}])
    taker, follower = followed(path)
    keys.write_text("KEY=sk-test-two")
    look(follower)
    assert [config.api_keys[0].keys[0] for config, _ in taker.taken] == ["sk-test-two"]
    keys.write_text("KEY")
    look(follower)
    assert taker.faults == [[f"{keys}: line 1: is not of the form NAME=value"]]


# ----------------------------------------------------------------------------------------- last good


def test_a_worker_that_starts_while_the_file_is_faulty_has_the_last_good_one(path):
    LastGood.create(path.parent, read_sources(path), environ := {})
    last_good = LastGood.of(environ)
    taker = Taker()
    follower = Follower(path, start(path, last_good), taker, last_good)
    write(path, [ONE], max_in_flight=7)
    look(follower)
    path.write_bytes(b"upstreams: [")
    look(follower)
    begun = start(path, LastGood.of(environ))
    assert begun.config.max_in_flight == 7
    assert begun.found.config == b"upstreams: ["
    assert begun.faults == tuple(taker.faults[0])
    assert stat.S_IMODE(os.stat(environ["AIPROXY_LAST_GOOD"]).st_mode) == 0o600


def test_a_worker_that_starts_bears_with_a_last_good_one_whose_other_files_are_gone(path):
    with_ca_bundle(path)
    LastGood.create(path.parent, read_sources(path), environ := {})
    begun = start(path, LastGood.of(environ))
    assert begun.config.upstreams[0].ca_bundle == str(path.parent / "ca.pem")
    assert len(begun.faults) == 1


def test_without_a_last_good_one_that_can_be_read_a_faulty_file_ends_the_start(path):
    LastGood.create(path.parent, read_sources(path), environ := {})
    path.write_bytes(b"upstreams: [")
    kept = path.parent / "accepted-configuration"
    for spoil in (lambda: kept.write_bytes(b"?"), kept.unlink, environ.clear):
        spoil()
        with pytest.raises(ConfigError):
            start(path, LastGood.of(environ))


# ------------------------------------------------------------------------------------------- changes


def test_changes_are_told_by_their_paths_and_never_with_a_secret(path):
    keys = [{"name": "alice", "key": "sk-test-alice"}, {"name": "bob", "key": "sk-test-bob"}]
    write(
        path,
        [{**ONE, "headers": {"x-team": "one"}}, {**ONE, "name": "b"}],
        api_keys=keys,
        admin_key="sk-test-admin",
        timeouts={"idle": 60},
    )
    old = load(path)
    write(
        path,
        [
            {**ONE, "token": "sk-test-a-new", "weight": 5, "headers": {"x-team": "two"}},
            {**ONE, "name": "c", "model_mappings": {"claude-x": "claude-y"}},
        ],
        api_keys=[{"name": "alice", "key": "sk-test-alice-new"}, {"name": "carol", "key": "sk-test-carol"}],
        admin_key="sk-test-admin-new",
        listen=8081,
        max_in_flight=9,
    )
    new = load(path)
    assert changes(old, new) == [
        "listen: 8080 -> 8081 (needs a restart)",
        "timeouts.idle: 60.0 -> 120.0",
        "api_keys.alice.keys: changed",
        "api_keys.bob: removed",
        "api_keys.carol: added",
        "max_in_flight: not set -> 9",
        "admin_key: changed",
        "upstreams.a.token: changed",
        "upstreams.a.weight: 1 -> 5",
        "upstreams.a.headers: changed",
        "upstreams.b: removed",
        "upstreams.c: added",
    ]
    assert changes(new, new) == []


def test_what_a_variable_stands_for_is_not_told_whatever_the_setting(path):
    text = "upstreams: [{name: a, base_url: 'https://a.test/%s', token: sk-test-a}]"
    old, new = (
        load(path, {"KEY": "very-secret"}, sources=Sources((text % last).encode()))
        for last in ("${KEY}", "plain")
    )
    assert changes(old, new) == changes(new, old) == ["upstreams.a.base_url: changed"]


# ------------------------------------------------------------------------------------------ in service


def rewrite(served, config):
    """Change a served configuration as an editor does, by a rename."""
    path = served.config
    before = len(served.stdout_lines())
    whole = {**yaml.safe_load(path.read_text()), **config}
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump(whole))
    new.rename(path)
    return before


def answers(served, times=1):
    """Who answers messages."""
    with RawClient.to(served.url) as client:
        found = []
        for _ in range(times):
            client.post(ASK)
            found.append(client.read().header("x-aiproxy-upstream"))
    return found


def assert_told_by_each(served, workers, since, line):
    """Within two looks at the file each worker says this, once."""

    def told():
        return len(re.findall(line, "\n".join(served.stdout_lines()[since:])))

    await_that(lambda: told() >= workers, limit=2 * LOOK + 2)
    assert told() == workers


@pytest.mark.parametrize("workers", [1, 2])
def test_every_worker_takes_up_a_good_file_within_two_looks_and_refuses_a_bad_one(
    upstream, serve, config_of, workers
):
    a, b = upstream(), upstream()
    served = serve(config_of([a]), workers=workers)
    # Each worker follows the file: it has read it, and has a thread for that.
    await_that(lambda: sum(len(os.listdir(f"/proc/{pid}/task")) > 1 for pid in served.workers()) == workers)
    assert_told_by_each(served, workers, rewrite(served, config_of([b])), "INFO reload result=applied ")
    answers(served, 12)
    assert (len(a.seen), len(b.seen)) == (0, 12)
    before = rewrite(served, {"upstreams": "none"})
    assert_told_by_each(served, workers, before, "ERROR reload result=refused .*upstreams")
    answers(served, 12)
    assert len(b.seen) == 24
    assert "sk-test" not in "\n".join(served.stdout_lines())


def test_a_live_stream_ends_as_it_began_while_the_configuration_changes(upstream, serve, config_of):
    gate = threading.Event()
    a, b = upstream(events([*SPOKEN[:5], gate, *SPOKEN[5:]])), upstream()
    served = serve(config_of([a]))
    with RawClient.to(served.url) as streaming:
        streaming.post(STREAM)
        got = streaming.answer()
        next(got.pieces())
        before = rewrite(served, config_of([{"name": "b", "base_url": b}]))
        served.wait_for_log("reload result=applied .*upstreams.a: removed; upstreams.b: added", since=before)
        assert answers(served) == ["b"]
        gate.set()
        assert (got.read().body, got.ending) == (b"".join(SPOKEN), "end")


def test_circuits_and_the_cursor_of_upstreams_that_stay_are_kept(upstream, serve, config_of):
    bad = upstream(*[error(500)] * 5)
    one = {"name": "bad", "base_url": bad}
    served = serve(
        config_of([one, {"name": "b", "base_url": upstream()}, {"name": "c", "base_url": upstream()}])
    )
    before = answers(served, 15)  # the circuit of `bad` is open from the third failure on
    reloads = rewrite(served, {"max_in_flight": 50})
    served.wait_for_log("reload result=applied", since=reloads)
    after = answers(served, 4)
    assert len(bad.seen) == 3
    assert before[-4:] + after in (["b", "c"] * 4, ["c", "b"] * 4)
    reloads = rewrite(served, config_of([{**one, "token": "sk-test-mended"}]))
    served.wait_for_log("reload result=applied .*upstreams.bad.token: changed", since=reloads)
    answers(served)
    assert len(bad.seen) == 4  # another account: it is asked at once


def test_a_bad_edit_and_a_dead_worker_do_not_end_the_service(upstream, serve, config_of):
    served = serve(config_of([upstream()]))
    assert answers(served) == ["a"]
    before = rewrite(served, {"upstreams": "none"})
    served.wait_for_log("reload result=refused", since=before)
    (worker,) = served.workers()
    before = len(served.stdout_lines())
    os.kill(worker, 9)
    served.wait_for_log("reload result=refused", timeout=20, since=before)
    assert answers(served) == ["a"]
