"""From what the user says to a driver: the experiment is opened, its parts are made."""
