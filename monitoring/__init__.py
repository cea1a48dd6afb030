"""What is measured, and when a measurement is alarming."""
