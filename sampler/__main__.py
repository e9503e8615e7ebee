"""`python -m sampler`: the command `sampler`."""

import sys

from sampler.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
