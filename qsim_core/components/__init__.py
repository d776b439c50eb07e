"""Text to component and back, and the registry of plugins."""
