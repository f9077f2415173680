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
