"""The page of `megaconsa report`: one self-contained HTML file about a run, or about several.

`runs.py` finds and reads them, `page.py` puts the page together.
"""
