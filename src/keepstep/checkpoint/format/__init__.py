"""The format on disk: what is written, and how it is read by one who trusts nothing. No torch."""
