"""What is in the store: listed, collected, hashed again, compared."""
