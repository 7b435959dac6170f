"""What one does with a trained run: python -m tools.show | embed | search | compare | export. See README.md here."""
