"""What a migration transfers, whether source and destination fit, and which side runs the guest.
Pure.
"""
