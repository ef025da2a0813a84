"""What runs on or near a device."""
