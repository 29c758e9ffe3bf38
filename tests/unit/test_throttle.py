"""Wrong passwords make an address wait."""

from fakes import Clock

from aiproxy.server.throttle import Throttle


def test_after_five_wrong_passwords_an_address_waits_longer_each_time():
    clock = Clock()
    throttle = Throttle(clock)
    waits = []
    for _ in range(14):
        throttle.failed("a")
        waits.append(throttle.must_wait("a"))
        clock.now += waits[-1]
        assert throttle.must_wait("a") == 0
    assert waits == [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert throttle.must_wait("b") == 0
    throttle.succeeded("a")
    throttle.failed("a")
    assert throttle.must_wait("a") == 0


def test_an_hour_without_a_wrong_password_is_forgiven():
    clock = Clock()
    throttle = Throttle(clock)
    for _ in range(9):
        throttle.failed("a")
    clock.now += 3601
    throttle.failed("a")
    assert throttle.must_wait("a") == 0


def test_the_addresses_that_are_remembered_are_bounded():
    clock = Clock()
    throttle = Throttle(clock)
    for _ in range(5):
        throttle.failed("first")
    assert throttle.must_wait("first") == 1
    for number in range(10_000):
        throttle.failed(f"address {number}")
    assert throttle.must_wait("first") == 0
