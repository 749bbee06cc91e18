"""`megaconsa bench-attention`: every backend and peer is checked against fp64, then all are timed in turns."""
