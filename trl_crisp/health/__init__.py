"""What training is measured by: accuracy and length of the answers during training."""
