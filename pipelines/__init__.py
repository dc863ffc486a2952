"""Methods that need no training: closed-form edits, guidance, attention control."""
