"""`python -m mistral_eqx`."""

import sys


def main() -> int:
    """As [`mistral_eqx.apps.main.main`][]. Ctrl-C while JAX is imported ends it in a line
    too."""
    try:
        from .apps.main import main

        return main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
