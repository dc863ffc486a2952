"""Edit files, and other people's formats."""
