"""What one card says about kvpack: `make gpu`, at most eight minutes."""
