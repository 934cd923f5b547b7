"""What leaves the machine: an adapter merged into its base, and a folder pushed to the Hub."""
