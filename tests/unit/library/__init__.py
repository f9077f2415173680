"""The public library, as a user of torch alone meets it."""
