"""The commands of ``impq``; each imports what it needs when it runs."""
