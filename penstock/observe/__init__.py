"""What one engine tells about itself: the table of metric names, and the Prometheus objects behind it."""
