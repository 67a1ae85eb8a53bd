"""What keeps database and storage in agreement: collection of dead bytes, check, backup, restore."""
