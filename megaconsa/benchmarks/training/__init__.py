"""`megaconsa bench-training`: the speed of topologies and of other trainers on the same batches."""
