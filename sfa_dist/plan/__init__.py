"""What a recipe costs before it runs."""
