"""Random calls of every operator and network: all backends agree with the reference, or refuse with a named error."""
