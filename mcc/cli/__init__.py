"""The command line: one file a command, `mcc --help` lists them."""
