"""A run's tables in; a page to look at its pairs and correct them out, and the decisions as tables.

The address is printed; it opens in a browser on this machine alone. Over SSH, forward the port:
ssh -L 8765:127.0.0.1:8765 HOST. Example:
    python -m stages.audit results/shapes
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.audit.app import audit_app
from stages.core.audit.desk import Desk, journal_of
from stages.core.audit.index import RunIndex
from stages.core.execution.runtime import log, run_stage, set_up_log
from stages.core.pages.journal import Journal
from stages.core.pages.server import new_token, serve


@dataclass(frozen=True, kw_only=True)
class Args:
    """A run's tables in, a page to look at its pairs and correct them out."""

    run: tyro.conf.Positional[Path]
    """The run's folder, as results/shapes; finished or not."""
    port: int = 8765
    """Port of the loopback address; 0 takes a free one."""
    open_browser: bool = True
    """Whether to open the page in a browser, where there is a screen."""


def main(args: Args) -> None:
    """Serve the page; write the decisions into tables before and after."""
    set_up_log()
    index = RunIndex(args.run)
    started = time.monotonic()
    num_items, what = index.warm()
    log.info("audit: %d %s read in %.1f s", num_items, what, time.monotonic() - started)
    with Journal(journal_of(args.run)) as journal:
        desk = Desk(args.run, journal)
        report(desk.compact())
        token = new_token()
        try:
            serve(audit_app(index, desk, token), token=token, port=args.port,
                  open_browser=args.open_browser)  # fmt: skip
        finally:
            report(desk.compact())


def report(written: list[Path]) -> None:
    """Say which tables have changed, and that the run is to be made again from them."""
    for path in written:
        log.info("audit: %s written; the next snakemake call remakes what depends on it", path)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
