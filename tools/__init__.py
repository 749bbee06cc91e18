"""The commands beside training: `megaconsa NAME` or `python tools/NAME.py`. Each is thin; the work is in the packages it calls."""
