"""`python -m megaconsa`: the command `megaconsa`."""

from megaconsa.cli import main

if __name__ == "__main__":
    main()
