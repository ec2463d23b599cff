"""What ends a training before its last step: a request to stop, a rank that hangs, a rank that is gone."""

from halo_training.supervision.peers import PeerLost, is_lost_peer
from halo_training.supervision.stop import BY_FILE, StopRequests
from halo_training.supervision.watchdog import Watchdog

__all__ = ["BY_FILE", "PeerLost", "StopRequests", "Watchdog", "is_lost_peer"]
