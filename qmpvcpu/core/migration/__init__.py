"""What a migration carries, what stands against a destination, and which side runs the guest. Pure."""
