"""``python -m sphere_plugin`` is ``sphere``."""

import sys

from sphere_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
