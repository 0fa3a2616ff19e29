"""What a store holds, what it keeps, and whether it is sound. No torch."""
