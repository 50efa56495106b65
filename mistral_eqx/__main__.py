"""`python -m mistral_eqx`."""

import sys

from .apps.main import main as main


if __name__ == "__main__":
    sys.exit(main())
