"""What is measured, and how. Nothing in the package imports from here."""
