"""The commands beside training: thin over the rest of the package."""
