"""Pictures, captions and token tables: reading, making and loading them."""
