"""Who reads for whom."""

from __future__ import annotations

import threading
import time

from flow_core.leader import Leader
from tests.sessions.conftest import eventually


def test_who_stands_in_leaves_the_lead_to_one_who_offers_help() -> None:
    leader = Leader()
    stands_in = threading.Thread(target=leader.stand_in, args=(lambda: False, 60.0), daemon=True)
    stands_in.start()
    eventually(lambda: not leader.help())
    stands_in.join(20)
    assert not stands_in.is_alive()
    assert leader.help()


def test_who_stands_in_leaves_the_lead_to_one_who_waits() -> None:
    leader = Leader()
    stands_in = threading.Thread(target=leader.stand_in, args=(lambda: False, 60.0), daemon=True)
    stands_in.start()
    eventually(leader._lead.locked)
    leader.wait(lambda: not stands_in.is_alive(), time.monotonic() + 20, lambda _: True)
    assert not stands_in.is_alive()
