"""What the subcommands of `reca` do."""
