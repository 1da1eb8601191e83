"""Long Range Arena sequence classification: tokens, a bidirectional backbone, masked mean pooling."""
