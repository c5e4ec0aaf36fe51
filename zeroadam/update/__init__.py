"""From gradients to new parameters, on this rank's pieces alone."""
