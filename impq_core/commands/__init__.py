"""The commands of ``impq``. Heavy libraries are imported inside the commands that need them."""
