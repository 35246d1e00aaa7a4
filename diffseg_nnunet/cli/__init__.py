"""The command ``diffseg``: one thin module a command, which parses, calls the pipeline, and prints.

Nothing heavy is imported before a command runs, so that ``diffseg --help`` answers at once.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code: 0 done, 1 a failure of ours, 2 usage or data to mend."""
    from diffseg_nnunet.cli.app import run

    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
