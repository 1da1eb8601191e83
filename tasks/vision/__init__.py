"""ViT-style image classification: patches, a bidirectional or 2-D backbone, mean pooling."""
