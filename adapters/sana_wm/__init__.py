"""The refiner of SANA-WM."""
