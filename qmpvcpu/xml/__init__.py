"""Domain XML: bytes in, bytes out."""
