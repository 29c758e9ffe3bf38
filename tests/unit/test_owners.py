"""Which upstream made a message: bounded, whatever upstreams send."""

from fakes import Clock

from aiproxy.upstreams.message_threads import LIFETIME, LIMIT, Owners
from aiproxy.upstreams.shared_state import LONGEST_ID, State


def test_an_owner_is_remembered_for_its_lifetime():
    clock = Clock()
    owners = Owners(clock, State())
    owners.note("msg_1", "a")
    clock.now += LIFETIME - 1
    assert owners.owner("msg_1") == "a"
    clock.now += 1
    assert owners.owner("msg_1") is None


def test_what_is_remembered_is_bounded_in_number_and_in_length():
    owners = Owners(Clock(), State())
    owners.note("m" * (LONGEST_ID + 1), "a")
    assert owners.owner("m" * (LONGEST_ID + 1)) is None
    for number in range(LIMIT + 1):
        owners.note(f"msg_{number}", "a")
    assert [owners.owner(f"msg_{number}") for number in (0, 1, LIMIT)] == [None, "a", "a"]
