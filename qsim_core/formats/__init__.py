"""Number formats: the values that they represent, exact rounding to them, and codes."""
