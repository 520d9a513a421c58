"""What is not one domain: doctor, demo."""
