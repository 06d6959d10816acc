"""Entry point of `inferfleet`: finds the subcommand's module and turns expected errors into one line."""

from __future__ import annotations

import importlib
import os
import sys

from common.errors import ConfigurationError

COMMANDS = {
    "up": "everything on this machine: Redis if none is given, gateways, workers",
    "gateway": "one gateway (needs REDIS_URL)",
    "worker": "one worker (needs REDIS_URL)",
    "prepare": "fetch a model, convert pickled weights to safetensors, or quantise them",
    "ctl": "look at and steer a running fleet",
    "chat": "talk to a model in the terminal",
    "demo": "kill a worker in the middle of an answer and watch another go on",
    "bench": "measure throughput and latency of a server, this one or another",
    "edge": "spread TCP connections over the gateways behind a name",
    "version": "print the version",
}
BAD_USAGE = 2


def usage() -> str:
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    return "usage: inferfleet COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\n`inferfleet COMMAND --help` says more.\n"


def run(arguments: list[str]) -> int:
    """Run one subcommand; the exit status, 2 for anything wrong with the options or the environment."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if arguments else BAD_USAGE
    if arguments[0] not in COMMANDS:
        sys.stderr.write(f"inferfleet: no command {arguments[0]!r}; there are {', '.join(COMMANDS)}\n")
        return BAD_USAGE
    module = importlib.import_module(f"ops.cli.{arguments[0]}")
    try:
        status: int = module.main(arguments[1:])
    except ConfigurationError as error:
        sys.stderr.write(f"inferfleet {arguments[0]}: {error}\n")
        return BAD_USAGE
    return status


def main() -> None:
    try:
        sys.exit(run(sys.argv[1:]))
    except BrokenPipeError:
        # the reader of a pipe such as `| head` has left; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def launcher() -> None:
    """`text-generation-launcher`, so that TGI's command lines work: it is `inferfleet up`."""
    sys.exit(run(["up", *sys.argv[1:]]))
