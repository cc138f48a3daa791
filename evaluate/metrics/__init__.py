"""What is measured of a transcoder. One file a metric."""
