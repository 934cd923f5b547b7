"""What keeps a run alive and repeatable. Imports no trainer."""
