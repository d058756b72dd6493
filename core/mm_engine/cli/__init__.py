"""The command line: `engine`."""
