"""The embedded world: emoji objects in four artists' styles on plain backgrounds, known completely."""
