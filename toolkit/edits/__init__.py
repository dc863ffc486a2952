"""Edit kinds, one file each; the file's stem is the kind's name."""
