"""Methods that solve an equation for the edited weights."""
