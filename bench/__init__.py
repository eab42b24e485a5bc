"""What moving bytes costs, side by side with others and with the bare limit: ``python -m bench --list``."""
