"""The commands besides training: `megaconsa NAME` or `python tools/NAME.py`.

Each of them is thin. The work is in the packages that it calls.
"""
