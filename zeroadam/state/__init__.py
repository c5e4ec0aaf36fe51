"""Adam's state as DTensors, what goes out of it and what comes in."""
