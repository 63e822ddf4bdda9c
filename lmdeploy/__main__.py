"""`python -m lmdeploy` is the `lmdeploy` command."""

from __future__ import annotations

import sys

from lmdeploy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
