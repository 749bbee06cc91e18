"""`megaconsa bench-training`: the speed of topologies beside one process on the same batches."""
