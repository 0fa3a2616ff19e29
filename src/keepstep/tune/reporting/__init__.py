"""What people see while trials run."""
