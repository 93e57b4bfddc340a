"""Local Flatness Regularization: the method, its training engine and its evaluation."""
