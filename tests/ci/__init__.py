"""What CI systems are told, and the workflows that they run."""
