"""The `ditq` command: every package registers its subcommands under the entry-point group `ditq.commands`."""
