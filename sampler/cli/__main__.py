"""`python -m sampler.cli`: the command `sampler` where no script is installed."""

import sys

from sampler.cli import main

sys.exit(main())
