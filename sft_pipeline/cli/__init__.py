"""The `sft` command: one file per subcommand, thin over the same functions and assets as the UI."""
