"""The faces of the Accelerator, by what a script does with them."""
