"""Another model that grades answers."""
