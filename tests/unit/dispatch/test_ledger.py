"""The account of traffic goes on after a resume, whoever the peers are then."""

from moe_dist.dispatch.traffic_ledger import TOTALS, Direction, Payload, Stage, TrafficLedger
from moe_dist.distributed.links import LinkKind, Links


def test_totals_outlive_the_peers_they_came_from() -> None:
    ledger = TrafficLedger(Links(0, (0, 0, 1)))
    ledger.record(0, Stage.ONE, Payload.HIDDEN, Direction.FORWARD, [0, 1, 2], [5, 10, 100])
    ledger.record(1, Stage.TWO, Payload.COUNTS, Direction.BACKWARD, [1, 2], [0, 7])
    later = TrafficLedger(Links(0, (0,)))
    later.load_state_dict(ledger.state_dict())
    assert [later.total(*kinds) for kinds in TOTALS] == [ledger.total(*kinds) for kinds in TOTALS]
    assert later.total().bytes == 117
    assert later.total(link=LinkKind.INTER_NODE).bytes == 107
    again = TrafficLedger(Links(0, (0, 0)))
    again.load_state_dict(later.state_dict())
    again.record(0, Stage.ONE, Payload.HIDDEN, Direction.FORWARD, [1], [3])
    assert (again.total().bytes, again.total().messages) == (120, 4)
    assert again.total(payload=Payload.HIDDEN, direction=Direction.FORWARD).bytes == 113


def test_rows_to_itself_and_empty_messages_are_not_counted() -> None:
    ledger = TrafficLedger(Links(1, (0, 0, 0)))
    ledger.record(0, Stage.ONE, Payload.HIDDEN, Direction.FORWARD, [0, 1, 2], [0, 50, 7])
    assert (ledger.total().bytes, ledger.total().messages) == (7, 1)
    ledger.recording = False
    ledger.record(0, Stage.ONE, Payload.HIDDEN, Direction.FORWARD, [0, 1, 2], [1, 1, 1])
    assert ledger.total().bytes == 7


def test_a_resume_replaces_what_was_counted() -> None:
    ledger, earlier = (TrafficLedger(Links(0, (0, 1))) for _ in range(2))
    for one, size in ((ledger, 1), (earlier, 10)):
        one.record(0, Stage.ONE, Payload.HIDDEN, Direction.FORWARD, [1], [size])
    ledger.load_state_dict(earlier.state_dict())
    ledger.load_state_dict(earlier.state_dict())
    assert ledger.total().bytes == 10
    ledger.clear()
    assert ledger.total().bytes == 0
