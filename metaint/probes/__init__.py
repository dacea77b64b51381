"""Where measures are read: hook points, and how readings fold into a small state."""
