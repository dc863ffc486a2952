"""Methods that change how images attend to text."""
