"""`inferfleet up`: the whole fleet in one terminal."""

from __future__ import annotations

import asyncio
import sys

from common.settings import UpSettings, parse


def main(arguments: list[str]) -> int:
    settings = parse(UpSettings, arguments, program="inferfleet up")

    from ops.launcher import Launcher

    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(line_buffering=True)
    return asyncio.run(Launcher(settings).run())
