"""Whole daemons, as processes: what a user runs, against real origins, and how it fails."""
