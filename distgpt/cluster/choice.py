"""--checkpoint: which checkpoint of a run a command reads. Imports no torch."""

import argparse

BEST, NEWEST = "best", "newest"


def add_option(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add --checkpoint; `default` says which one is taken without it."""
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        default=NEWEST,
        help=f"{BEST} (the lowest validation loss), {NEWEST}, a step or a checkpoint's directory (default: {default})",
    )
