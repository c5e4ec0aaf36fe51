"""From this rank's updated pieces to whole parameters on every rank."""
