"""`python -m ops.cli …` is `inferfleet …`: how the launcher starts its children with its own interpreter."""

from ops.cli.main import main

main()
